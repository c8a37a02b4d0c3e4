"""Backend: the ordered byte-key/byte-value store under a KeyStore, in six methods.

The index of a pool is kept in one of these. The contract is small, so that an embedded library and a database server
each fit in a page; `rustord.testing.KeyStoreContract` is the contract as tests, and what a new backend has to pass.

Keys are ordered as ``bytes`` compare in Python: byte by byte, unsigned, a prefix before what it is a prefix of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, Protocol

KEY_BYTES_MAX: Final = 500
"""A key has 1 to this many bytes: what fits into LMDB's page and leaves room for a prefix in a database's index row."""

VALUE_BYTES_MAX: Final = 1 << 29
"""A value has 0 to this many bytes (512 MiB): the power of two below SQLite's 10**9 and PostgreSQL's 2**30."""


class Backend(Protocol):
    """One ordered store, opened in one directory.

    `open` comes first and `close` last, with no other call running beside either of them. Between the two, `get` and
    `scan` may be called from any number of threads, and `commit` from any thread, though never from two at a time.

    Every method raises `Damaged` when what is stored cannot be right, and `DeviceError` when it cannot be reached. An
    entry that neither `get` nor `scan` has any more is noticed by the core (`rustord.keystore.state`). One that only
    `get` has lost is not: a backend looks for that itself, when it is opened at the latest.
    """

    def open(self, directory: Path, *, read_only: bool = False) -> None:
        """Open the store, and create it if it is absent; one that is opened ``read_only`` must be there.

        A backend that keeps its data elsewhere uses ``directory`` as the name of the store. Raises `DeviceBusy` if
        another opener has it open for writing (or, unless ``read_only``, at all), and `NotFound` if it is absent and
        ``read_only``. After an error nothing is held.
        """

    def get(self, key: bytes) -> bytes | None:
        """The value of ``key``, None if there is none. Sees every commit that returned before this call began."""

    def scan(self, first: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The entries with ``first <= key < end`` in order, all from one snapshot, which is taken at the first `next`.

        A bound has up to `KEY_BYTES_MAX` + 1 bytes, and may be empty. Closing the generator, or exhausting it, frees
        the snapshot; until then the backend may have to keep what later commits replace, so a caller does not dawdle.
        """

    def commit(self, puts: Mapping[bytes, bytes], deletes: Iterable[bytes]) -> None:
        """Apply one batch, whole or not at all; when this returns, it survives a power loss.

        Deletes come first, so a key that is in both is put. Deleting an absent key is fine, as is an empty batch.
        Raises `NoSpace` when the batch does not fit; then nothing has changed, and it may be committed again when there
        is room; so it is with `Unavailable`, when somebody else has the index locked. After a `DeviceError` the batch
        is there whole or not at all, and may be committed again as well; a backend that cannot know what a failed flush
        left on its medium goes on raising until it is opened anew.
        """

    def info(self) -> Mapping[str, int | str]:
        """Facts for people and metrics: ``entries`` and ``bytes`` (on the medium) at least. May cost a full scan."""

    def close(self) -> None:
        """Let go of everything. Closing twice, or what was never opened, is fine."""


def check_batch(puts: Mapping[bytes, bytes]) -> None:
    """Assert that the keys and values of a batch are within the limits: a caller that exceeds them is wrong."""
    for key, value in puts.items():
        assert 0 < len(key) <= KEY_BYTES_MAX, f"a key of {len(key)} bytes"
        assert len(value) <= VALUE_BYTES_MAX, f"a value of {len(value)} bytes"
