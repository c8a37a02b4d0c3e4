"""Limits: how much one peer of a frontend, or all of them, may ask of the daemon."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Every limit of the HTTP frontend, with the reason for its default. Sizes in bytes, times in seconds.

    What may be stored at all (the length of names, the number of attributes) is decided by `rustord.change`.
    """

    # One request
    head_bytes: int = 32 * KIB
    """Request line and header fields. The longest name and all attributes, percent-encoded, fit in: 28 KiB."""
    target_bytes: int = 8 * KIB
    """A listing's prefix and cursor are two names of 1,024 bytes, each three times as long when percent-encoded."""
    json_bytes: int = 64 * KIB
    """Body of a request that is not an Object's data: a path and two switches."""
    small_body_bytes: int = 256 * KIB
    """A body up to here is gathered in memory and written by the next cycle; a larger one streams by itself."""
    page_items: int = 10_000
    """Lines of one page of a listing: some 3 MB."""

    # One connection
    pipelined: int = 64
    """Changes that one connection may have under way. A deeper pipeline gains nothing: the cycle is full before. Their
    bodies together take less than two of `small_body_bytes`."""
    read_bytes: int = 64 * KIB
    """What is read at once, and at most ahead of the request that is being answered."""
    unsent_bytes: int = 1 * MIB
    """No further request of a connection is begun while more of its replies than this are unsent."""
    head_s: float = 10.0
    """From the first byte of a head to its end. Programs send it at once; only attackers dribble."""
    body_s: float = 60.0
    """For each MiB of a body, or what is left of it: 17 KiB/s, less than any link that a tunnel may lead over."""
    send_s: float = 60.0
    """For the peer to take the next piece of a reply."""
    idle_s: float = 120.0
    """Between two requests. Longer than clients keep a connection (curl: 118 s), so that they are the ones to close."""
    linger_s: float = 2.0
    """How long a refused body is read and thrown away, so that the peer sees the refusal and not a broken pipe."""

    # All connections together
    connections: int = 512
    """An idle one costs a few KiB, one that uploads at most two of `small_body_bytes`: 256 MiB if all of them do."""
    uploads: int = 32
    """Large bodies under way, each with a buffer of `upload_piece_bytes`. Others wait."""
    downloads: int = 64
    """Large replies under way, each with a piece of `download_piece_bytes`. Others wait."""
    upload_piece_bytes: int = 1 * MIB
    """What a large body is written in: long enough for a disk, and 32 of them stay below the memory promised."""
    download_piece_bytes: int = 256 * KIB
    """What a large reply is read, verified and sent in: it stays in the processor's cache in between."""
    transfer_threads: int = 8
    """Threads that move large bodies and read what is not cached. They wait for devices and seldom for each other."""
    transfer_turn_s: float = 0.05
    """How long a stream keeps a thread while others wait for one."""
    admin_threads: int = 4
    """Threads for what is asked of the daemon itself: a device that takes long to add holds up no Object."""


@dataclass(frozen=True)
class NbdLimits:
    """Every limit of the NBD frontend beside those of the protocol, which are in its modules."""

    connections: int = 256
    """Each is a thread, and 2 MiB if it moves large requests."""
    connections_per_client: int = 64
    """Of one user, or one address: four devices with as many connections as the kernel's client takes for one."""
    negotiating: int = 32
    """Connections whose handshake is under way. One more, and the oldest of them has to go: a good client is through
    in milliseconds, whatever others do."""
    handshake_s: float = 10.0
    """From the connection to the choice of an export."""
