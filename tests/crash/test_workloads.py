"""Power cuts in whatever somebody may do, in whatever order; Hypothesis finds what to do."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rustord.placer import Contiguous, Mirrored, Placer, Striped
from tests.crash.proof import Proof
from tests.crash.scenarios import DEVICE_BYTES, OnFirst, opened, some
from tests.crash.story import Stage

STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("put"),
            st.lists(st.tuples(st.sampled_from([0, 100, 4000, 9000, 70_000]), st.sampled_from("ab-")), max_size=4),
        ),
        st.tuples(st.sampled_from(["delete", "move", "tombstone"]), st.integers(0, 20)),
        st.tuples(st.sampled_from(["checkpoint", "close", "crash", "lose"]), st.none()),
    ),
    min_size=1,
    max_size=8,
)


def played(stage: Stage, steps: list[tuple[str, object]]) -> None:
    """Do all of ``steps`` to a new pool."""
    story = opened(stage)
    for number, (what, argument) in enumerate(steps):
        if isinstance(argument, list):
            puts = enumerate(argument)
            story.put(*(some(number * 7 + at, size, name.strip("-")) for at, (size, name) in puts))
        elif isinstance(argument, int):
            uuids = [uuid for uuid in story.uuids if uuid not in stage.told.deleting]
            if not uuids:
                continue
            uuid = uuids[argument % len(uuids)]
            if what == "move":
                story.move(uuid)
            else:
                story.change(uuid, turns=1 if what == "tombstone" else 1000)
        elif what == "checkpoint":
            story.checkpoint()
        elif what == "close":
            story.change()
            story.reopen()
        else:
            story = stage.restart(lose_index=what == "lose")


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=STEPS,
    devices=st.integers(1, 3),
    placer=st.sampled_from([Contiguous(), Striped(2), Mirrored(2), OnFirst()]),
    seed=st.integers(0, 1 << 32),
)
def test_whatever_is_done(steps: list[tuple[str, object]], devices: int, placer: Placer, seed: int) -> None:
    chance = random.Random(seed)
    stage = Stage(dict.fromkeys(range(max(devices, placer.copies)), DEVICE_BYTES), placer, chance)
    played(stage, steps)
    Proof(seed, share=0.05).of_stage(stage, chance)


def test_everything_follows_from_one_seed() -> None:
    """Two runs write the same bytes in the same order."""
    events = []
    for _ in range(2):
        stage = Stage({0: DEVICE_BYTES, 1: DEVICE_BYTES}, Mirrored(2), random.Random(5))
        played(stage, [("put", [(9000, "a"), (100, "-")]), ("move", 0), ("crash", None), ("put", [(70_000, "a")])])
        events.append([event for event in stage.recording.events if isinstance(event, tuple) and len(event) != 1])
    assert events[0] == events[1]
