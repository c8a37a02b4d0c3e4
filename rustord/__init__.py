"""rustord: an object store on raw block devices.

The daemon is `rustord.daemon`; as a library, without it::

    import rustord

    with rustord.open("pool.img") as store:
        key = store.put(b"hello", name="greeting")
        print(store.get(key.uuid))

Importing this package imports none of its parts, so that the command-line tools start quickly.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rustord.keygen import KeyGen
    from rustord.keystore.backend import Backend
    from rustord.objectstore import ObjectStore
    from rustord.placer import Placer

__version__ = "0.1.0"

StrPath = str | os.PathLike[str]


def open(
    devices: StrPath | Iterable[StrPath],
    *,
    directory: StrPath | None = None,
    keygen: KeyGen | None = None,
    placer: Placer | None = None,
    backend: Backend | None = None,
) -> ObjectStore:
    """Open the pool on ``devices``: block devices or image files.

    The index is kept in ``directory``, by default beside the first device as NAME.index; so give one for devices in
    /dev. Raises PoolError, DeviceError or Damaged. The store is closed by ``close`` or as a context manager.
    """
    from rustord.keygen import HashKeyGen
    from rustord.keystore.lmdb import LmdbBackend
    from rustord.placer import Contiguous
    from rustord.pool import open_devices, open_pool

    paths = [devices] if isinstance(devices, str | os.PathLike) else list(devices)
    return open_pool(
        open_devices(paths),
        keygen=keygen or HashKeyGen("xxh3-128"),
        placer=placer or Contiguous(),
        backend=backend or LmdbBackend(),
        directory=Path(directory) if directory is not None else Path(f"{os.fspath(paths[0])}.index"),
    )
