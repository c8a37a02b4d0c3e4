"""Events: each is told apart by an id that never changes, and says what to do."""

from __future__ import annotations

import re

from rustord.event import DEVICE_GONE, EVENTS, fields


def test_every_event_has_an_id_of_its_own() -> None:
    ids = [event.message_id for event in EVENTS.values()]
    assert len(set(ids)) == len(ids) > 10
    assert all(re.fullmatch("[0-9a-f]{32}", message_id) for message_id in ids)


def test_every_event_says_what_happened_and_what_to_do() -> None:
    for event in EVENTS.values():
        assert re.fullmatch(r"[A-Z].*[^.]", event.subject)
        assert re.fullmatch(r"[A-Z].*\.", event.advice)


def test_ids_are_what_they_were() -> None:
    assert DEVICE_GONE.message_id == "6c29b840b7134b4cae5b8f5d73fee24e"


def test_fields_say_what_it_is_about() -> None:
    assert DEVICE_GONE(device="/dev/sda") == {"MESSAGE_ID": DEVICE_GONE.message_id, "RUSTORD_DEVICE": "/dev/sda"}
    assert fields(uuid="01") == {"RUSTORD_OBJECT": "01"}
    assert fields() == {}
