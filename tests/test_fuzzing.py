"""Every decoder, fuzzed a little; `./dev fuzz TARGET` goes on where this stops."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzzing import CORPUS, TARGETS, kept

targets = pytest.mark.parametrize("name", TARGETS)


@st.composite
def spoilt(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A good input with some bytes changed, cut out, doubled or put in."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 8))
        data[at : at + draw(st.sampled_from([0, length, length, len(data)]))] = draw(st.binary(max_size=8))
    return bytes(data)


@targets
def test_what_is_good_is_accepted(name: str) -> None:
    for seed in TARGETS[name].seeds():
        TARGETS[name].run(seed)


@targets
def test_what_was_found_before_is_mended(name: str) -> None:
    for data in kept(name):
        TARGETS[name].run(data)


@targets
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_nothing_but_the_one_error_comes_out(name: str, data: st.DataObject) -> None:
    seeds = list(TARGETS[name].seeds())
    TARGETS[name].run(data.draw(st.one_of(spoilt(seeds), st.binary(max_size=300))))


def test_the_corpus_is_of_targets_and_small() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} <= TARGETS.keys()
    assert sum(path.stat().st_size for path in files) < 1 << 18
