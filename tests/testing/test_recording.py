"""A recording: each state that a power cut may leave, and none that it may not."""

from __future__ import annotations

import random

from rustord.testing.device import Flush, Write
from rustord.testing.recording import Recording, State

SECTOR = 512


def fill(letter: str, sectors: int = 1) -> bytes:
    return letter.encode() * SECTOR * sectors


def text(state: State, device: int = 0, sectors: int = 4) -> str:
    """The first sectors of a device, a letter each."""
    medium = state.media.get(device, {})
    return "".join(chr(medium[number][0]) if number in medium else "." for number in range(sectors))


def texts(recording: Recording, samples: int = 8) -> set[tuple[int, str]]:
    return {(state.point, text(state)) for state in recording.states(random.Random(1), samples)}


def test_a_few_writes_are_tried_in_every_combination() -> None:
    recording = Recording()
    for number, letter in enumerate("abc"):
        recording(Write(0, number * SECTOR, fill(letter)))
    found = {found for _, found in texts(recording)}
    assert found == {"a...", "ab..", ".b..", "abc.", "a.c.", ".bc.", "..c."}


def test_what_was_flushed_stays_whatever_is_written_behind_it() -> None:
    recording = Recording({0: {0: fill("o")}})
    recording(Write(0, 0, fill("a")))
    recording(Flush(0))
    recording(Write(0, 0, fill("b")))
    assert texts(recording) <= {(1, "a..."), (1, "...."), (2, "a..."), (3, "b..."), (3, "a...")}


def test_a_flush_of_one_device_says_nothing_of_another() -> None:
    recording = Recording()
    recording(Write(0, 0, fill("a")))
    recording(Write(1, 0, fill("b")))
    recording(Flush(0))
    last = {(text(s, 0, 1), text(s, 1, 1)) for s in recording.states(random.Random(1)) if s.point == 3}
    assert last == {("a", "b"), ("a", ".")}


def test_a_write_is_torn_between_sectors() -> None:
    recording = Recording()
    recording(Write(0, 0, fill("a", 4)))
    found = {text(state) for seed in range(40) for state in recording.states(random.Random(seed))}
    assert {"aaaa", "a...", "aaa.", "...a", ".aaa", "a.aa"} <= found
    assert all(set(each) <= {"a", "."} for each in found)


def test_of_two_writes_to_a_sector_either_may_be_seen() -> None:
    recording = Recording({0: {0: fill("o")}})
    recording(Write(0, 0, fill("a")))
    recording(Write(0, 0, fill("b")))
    recording.note("later")
    found = {text(state, sectors=1) for state in recording.states(random.Random(1)) if state.point == 3}
    assert found == {"o", "a", "b"}


def test_many_writes_are_sampled() -> None:
    recording = Recording()
    for number in range(30):
        recording(Write(0, number * SECTOR, fill("x")))
    states = [state for state in recording.states(random.Random(1), 6) if state.point == 30]
    assert 6 <= len({text(state, sectors=30) for state in states}) <= 12


def test_notes_are_those_of_the_moment() -> None:
    recording = Recording()
    recording.note(1)
    recording(Write(0, 0, fill("a")))
    recording.note(2)
    recording.note("text")
    assert next(state.notes for state in recording.states(random.Random(1)) if state.point == 2) == {int: 1}
    assert list(recording.states(random.Random(1)))[-1].notes == {int: 2, str: "text"}


def test_what_is_before_the_mark_is_not_cut() -> None:
    recording = Recording()
    recording(Write(0, 0, fill("a")))
    recording(Flush(0))
    recording.mark()
    recording(Write(0, 0, fill("b")))
    assert {point for point, _ in texts(recording)} == {3}


def test_after_a_cut_the_events_go_on_from_what_it_left() -> None:
    recording = Recording()
    recording(Write(0, 0, fill("a", 2)))
    state = recording.cut(random.Random(3))
    recording(Write(0, 2 * SECTOR, fill("b")))
    left = text(state)
    assert {text(s) for s in recording.states(random.Random(1)) if s.point == 3} <= {left[:2] + "b.", left}


def test_the_same_seed_gives_the_same_states() -> None:
    recording = Recording()
    for number in range(9):
        recording(Write(0, number * SECTOR, fill("x", 3)))
    first, second = (list(recording.states(random.Random(4))) for _ in range(2))
    assert [state.media for state in first] == [state.media for state in second]
