"""The proof of the proof: a store that lacks one precaution is found out."""

from __future__ import annotations

import pytest

from rustord.errors import RustordError
from tests.crash.mutants import MUTANTS, Mutant
from tests.crash.proof import Proof

ATTEMPTS = [(0, 0.3), *3 * [(1, 1.0), (1, 0.3), (1, 0.6), (2, 1.0), (1, 1.0), (2, 0.6), (2, 1.0)]]
"""How deep each goes, and how often the index is lost. Most mutants are found out at once; some need luck: the rarest,
one attempt in four."""


@pytest.mark.timeout(600)  # a rare one is looked for in many states
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mutant_is_caught(mutant: Mutant, seed: int) -> None:
    states = 0
    for number, (depth, losses) in enumerate(ATTEMPTS):
        for scenario in mutant.scenarios():
            proof = Proof(seed + number, depth=depth, losses=losses)
            try:
                with mutant.applied():
                    proof.of(scenario)
            except (AssertionError, RustordError):
                return
            states += proof.counts["states"]
    pytest.fail(f"nothing shows that {mutant}; {states} states were examined")
