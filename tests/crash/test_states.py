"""Every state that a power cut may leave of each scenario is what was promised."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.crash.proof import Proof
from tests.crash.scenarios import SCENARIOS, Scenario


@pytest.fixture
def proof(request: pytest.FixtureRequest, seed: int, record_property: Callable[[str, object], None]) -> Proof:
    """A proof that takes seconds, or with --long all states and more power cuts in what follows upon each."""
    long = request.config.getoption("long")
    return Proof(seed, samples=16, depth=2) if long else Proof(seed, share=0.08)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_every_state_that_a_power_cut_may_leave(scenario: Scenario, proof: Proof) -> None:
    proof.of(scenario)
    print(f"{scenario}:", ", ".join(f"{count} {what}" for what, count in proof.counts.items()))
    assert proof.counts["states"]
