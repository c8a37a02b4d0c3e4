"""Event: something notable that the log tells, with an id by which the journal finds all of its kind.

An id is never changed, nor used for something else. The manual and systemd's message catalog are made from `EVENTS`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """``subject`` says what happened, ``advice`` what to do; ``message_id`` is for the journal's field of that name."""

    message_id: str
    subject: str
    advice: str

    def __call__(self, *, device: str = "", uuid: str = "") -> dict[str, str]:
        """What `logging` takes as ``extra``: the journal's fields, with the device's path and the Object's uuid."""
        return {"MESSAGE_ID": self.message_id, **fields(device=device, uuid=uuid)}


def fields(*, device: str = "", uuid: str = "") -> dict[str, str]:
    """The fields of a message that is no notable event."""
    given = {"RUSTORD_DEVICE": device, "RUSTORD_OBJECT": uuid}
    return {name: value for name, value in given.items() if value}


_NOTHING = "Nothing needs to be done."

POOL_OPENED = Event("2738b6ca64cd495e9c701b3c80396198", "The pool is open", _NOTHING)
POOL_CLOSED = Event("9a20dffd3d3a4047981bddc8fff13094", "The pool is closed", _NOTHING)
POOL_READ_ONLY = Event(
    "8c7e9d3412394a2ea4e033204a8dd112",
    "The pool takes no changes",
    "Objects can be read, but none can be stored or deleted. The message says why; mend that, and restart rustord.",
)
DEVICE_JOINED = Event("7989e63b12cf4a03b39c4bdeee562835", "A device has become part of the pool", _NOTHING)
DEVICE_REMOVED = Event("125f614cfbcc4bd4899be75e03d82678", "A device has been removed from the pool", _NOTHING)
DEVICE_FAILED = Event(
    "202473e8037547f79782199f6cccc4fa",
    "A device has failed",
    "A write to it failed, so it takes none until rustord is restarted. Objects with a copy on another device can be "
    "read and stored as before. See the kernel's log and smartctl, and replace the device.",
)
DEVICE_GONE = Event(
    "6c29b840b7134b4cae5b8f5d73fee24e",
    "A device has gone",
    "It was taken out, or has lost its connection. Objects that are on it alone cannot be read until it is back; it is "
    "taken in again when it appears.",
)
DEVICE_MISSING = Event(
    "44ae4f188a744bcd9cc6094c056ad922",
    "A device of the pool is missing",
    "The pool was opened without it. Objects that are on it alone cannot be read until it is back; it is taken in when "
    "it appears.",
)
DEVICE_BACK = Event("418c0312c3294ce7bc7d0f33ba2ea7d9", "A device is back", _NOTHING)
DEVICE_REFUSED = Event(
    "a89d0e984f1347a4a3762b8319f4f434",
    "A device is not taken in",
    "It is named in the configuration, but cannot be used. The message says why.",
)
OBJECT_DAMAGED = Event(
    "0918f45e038b4c10a02d0cc1d4d9bf68",
    "A copy of an Object is damaged",
    "What was read does not match its checksum. If there is another copy, the reader got that; if not, an error.",
)
OBJECT_MENDED = Event("e76148f898aa4c75b7acc4349c030805", "A damaged Object has been mended", _NOTHING)
SCRUB_BEGAN = Event("f9867ed974ec44fe8ab093c14511a82c", "A scrub has begun", _NOTHING)
SCRUB_ENDED = Event(
    "f2d0e48deef84b4d805b68e997f8d36b",
    "A scrub has ended",
    "The message has what it found. If something is lost, 'rustorctl scrub status' lists the Objects: restore these.",
)
REQUEST_SLOW = Event(
    "84d6131cc6da4d7abfb8ab3955e1c09e",
    "A request was slow",
    "It took longer than log.slow_request; the message has the time of each phase.",
)
CONFIG_LOADED = Event("3e65b3e79a77482c81eb363b1cb89be0", "The configuration was read again", _NOTHING)
CONFIG_REFUSED = Event(
    "fa58770040354936b0b420449b5d4aba",
    "The configuration is wrong and was not taken over",
    "The daemon goes on with what it had. Check it with 'rustorctl config check', then reload again.",
)
FAULT = Event(
    "783f00a7d2ea433cb8c9fdb319eeca1d",
    "A fault of rustord itself",
    "Please report it, with what the journal has around it.",
)

EVENTS = {name: value for name, value in list(globals().items()) if isinstance(value, Event)}
"""All of them, by name."""
