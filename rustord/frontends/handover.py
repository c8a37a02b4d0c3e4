"""Handover: an NBD connection that one process of the daemon leaves to the next, as the name of a file descriptor.

The service manager keeps the socket meanwhile, together with a name of ours: up to 255 printable characters, no colon.
All that there is to know of a connection between two requests fits into that.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from rustord.wire.negotiation import Agreement

_NAME = re.compile(r"nbd1-(s?)(e?)(a?)-((?:[0-9a-f]{2})*)-(.+)")
"""The number goes up with the meaning: what another version has left is not taken up."""


class Handover(NamedTuple):
    """A connection between two requests. ``key`` is its `rustord.export.Export.key`, ``rest`` the start of a request;
    the others are what was agreed on (see `rustord.wire.negotiation.Agreement`)."""

    key: str
    structured: bool
    extended: bool
    allocation: bool
    rest: bytes

    @classmethod
    def of(cls, agreement: Agreement, rest: bytes) -> Handover:
        return cls(agreement.export.key, agreement.structured, agreement.extended, agreement.allocation, rest)

    @classmethod
    def named(cls, name: str) -> Handover | None:
        """What `name` tells; None if it is the name of something else."""
        told = _NAME.fullmatch(name)
        return told and cls(told[5], bool(told[1]), bool(told[2]), bool(told[3]), bytes.fromhex(told[4]))

    @property
    def name(self) -> str:
        agreed = "s" * self.structured + "e" * self.extended + "a" * self.allocation
        return f"nbd1-{agreed}-{self.rest.hex()}-{self.key}"
