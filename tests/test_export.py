from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from rustord.export import Run, State, merged

RUNS = st.lists(st.builds(Run, st.integers(1, 9), st.sampled_from([State.DATA, *State])))


def states(runs: list[Run]) -> list[State]:
    """The state of each byte."""
    return [run.state for run in runs for _ in range(run.length)]


@given(RUNS)
def test_neighbours_in_the_same_state_become_one(runs: list[Run]) -> None:
    result = list(merged(runs))
    assert states(result) == states(runs)
    assert all(one.state != other.state for one, other in pairwise(result))


def test_the_states_are_the_bits_of_base_allocation() -> None:
    assert (State.DATA, State.HOLE, State.ZERO, State.HOLE | State.ZERO) == (0, 1, 2, 3)
