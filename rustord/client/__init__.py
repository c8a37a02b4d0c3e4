"""Client: the object API from Python, over the daemon's Unix socket.

::

    with Client() as client:
        stored = client.put(b"hello", name="greeting")
        assert client.get("greeting") == client.get(stored.uuid) == b"hello"

A ``key`` is the uuid of an Object, as text, or its name. Every method raises what the daemon answered as the
`rustord.errors` class that it is, and Unreachable if nobody answers. `rustord.client.aio` is for asyncio.
"""

from __future__ import annotations

from rustord.client.blocking import Client, Download
from rustord.wire.request import Info, Stored

__all__ = ["Client", "Download", "Info", "Stored"]
