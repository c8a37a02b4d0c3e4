"""Peer: the process at the other end of a Unix socket, as the kernel knows it, and what it may do."""

from __future__ import annotations

import ctypes
import errno
import grp
import logging
import os
import pwd
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from rustord.wire.api import Role

log = logging.getLogger(__name__)

_UCRED = struct.Struct("3i")
_SO_PEERGROUPS = 59
"""Linux 4.13, asm-generic/socket.h; Python has no name for it."""
_getsockopt = ctypes.CDLL(None, use_errno=True).getsockopt


class Peer(NamedTuple):
    """Who connected: its ids at that moment. ``groups`` holds the supplementary ones."""

    uid: int
    gid: int
    pid: int
    groups: frozenset[int]


def peer_of(sock: socket.socket) -> Peer:
    """Who is at the other end of a connected Unix socket. Raises OSError if it is none."""
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(uid, gid, pid, _groups_of(sock))


def _groups_of(sock: socket.socket) -> frozenset[int]:
    # From the socket and not from /proc/PID or the group database: those tell of whoever has that pid now, or of what
    # the user's next login will have, and may wait for a directory server. Python's own getsockopt has no room for
    # more than 256 groups.
    length = ctypes.c_uint32(4 * 64)
    while True:
        groups = (ctypes.c_uint32 * (length.value // 4))()
        if not _getsockopt(sock.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, groups, ctypes.byref(length)):
            return frozenset(groups[: length.value // 4])
        if ctypes.get_errno() != errno.ERANGE:  # which comes with the length that it takes
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@dataclass(frozen=True)
class Principals:
    """Users and groups by their numbers."""

    uids: frozenset[int] = frozenset()
    gids: frozenset[int] = frozenset()

    @classmethod
    def named(cls, names: Iterable[str]) -> Principals:
        """From names and numbers as the configuration has them, groups with ``@`` before; unknown ones are logged."""
        uids, gids = set(), set()
        for name in names:
            try:
                if name.startswith("@"):
                    gids.add(int(name[1:]) if name[1:].isdecimal() else grp.getgrnam(name[1:]).gr_gid)
                else:
                    uids.add(int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid)
            except KeyError:
                log.warning("no such %s: %s gets no role", "group" if name.startswith("@") else "user", name)
        return cls(frozenset(uids), frozenset(gids))

    def include(self, peer: Peer) -> bool:
        """Whether the peer's user or one of its groups is among them."""
        return peer.uid in self.uids or peer.gid in self.gids or not self.gids.isdisjoint(peer.groups)


@dataclass(frozen=True)
class Roles:
    """Who has which role. root and the user that the daemon runs as are always admins."""

    readers: Principals = Principals()
    writers: Principals = Principals()
    admins: Principals = Principals()

    def __call__(self, peer: Peer) -> Role:
        """The highest role that the peer has."""
        if peer.uid in (0, os.geteuid()) or self.admins.include(peer):
            return Role.ADMIN
        if self.writers.include(peer):
            return Role.WRITER
        return Role.READER if self.readers.include(peer) else Role.NOBODY
