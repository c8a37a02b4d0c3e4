from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rustord.frontends.peer import Peer, Principals, Roles, peer_of
from rustord.wire.api import Role

STRANGER = Peer(uid=4_000_000, gid=4_000_001, pid=1, groups=frozenset({4_000_002}))


def test_a_peer_is_known_by_its_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_of(ours) == (os.geteuid(), os.getegid(), os.getpid(), set(os.getgroups()))


@pytest.mark.root
@pytest.mark.parametrize("group_count", [0, 3, 1000])
def test_a_peer_is_who_connected_with_all_its_groups(tmp_path: Path, group_count: int) -> None:
    groups = list(range(70000, 70000 + group_count))
    path = tmp_path / "s"
    os.chmod(tmp_path, 0o777)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        os.chmod(path, 0o777)
        listener.listen()
        # The places of the socket and of this Python may be closed to others: they begin as we do, and in there.
        code = f"import os, socket; os.setgroups({groups}); os.setgid(5678); os.setuid(1234)\n"
        code += "s = socket.socket(socket.AF_UNIX); s.connect('s'); s.recv(1)"
        with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path) as child:
            listener.settimeout(20)
            sock, _ = listener.accept()
            with sock:
                assert peer_of(sock) == (1234, 5678, child.pid, set(groups))


def test_what_is_no_unix_socket_has_no_peer() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock, pytest.raises(OSError):  # noqa: PT011
        peer_of(sock)


@pytest.mark.parametrize("named", [Principals(uids=frozenset({4_000_000})), Principals(gids=frozenset({4_000_001}))])
def test_a_role_is_given_to_users_and_groups(named: Principals) -> None:
    nobody = Principals(frozenset({7}), frozenset({8}))
    assert Roles()(STRANGER) is Role.NOBODY
    assert Roles(nobody, nobody, nobody)(STRANGER) is Role.NOBODY
    assert Roles(readers=named)(STRANGER) is Role.READER
    assert Roles(readers=named, writers=named)(STRANGER) is Role.WRITER
    assert Roles(readers=named, admins=named)(STRANGER) is Role.ADMIN


def test_a_supplementary_group_counts() -> None:
    assert Roles(writers=Principals(gids=frozenset({4_000_002})))(STRANGER) is Role.WRITER


def test_root_and_the_daemons_own_user_are_admins() -> None:
    assert Roles()(STRANGER._replace(uid=0)) is Role.ADMIN
    assert Roles()(STRANGER._replace(uid=os.geteuid())) is Role.ADMIN


def test_principals_are_named_as_in_the_configuration(caplog: pytest.LogCaptureFixture) -> None:
    found = Principals.named(["root", "1234", "@root", "@5678", "no-such-user-here", "@no-such-group-here"])
    assert found == Principals(frozenset({0, 1234}), frozenset({0, 5678}))
    assert "no such user: no-such-user-here" in caplog.text
    assert "no such group: @no-such-group-here" in caplog.text
