"""Stores, replaces and deletes Objects on a guest, and reads them back, with the client that the package brings.

``load.py work FIRST [DIRECTORY]`` goes on until it is stopped. Each name goes from step FIRST on through what `content`
says, and each step is told before the name's next one begins: "done NAME STEP" or "refused NAME STEP WHY". So is what
is wrong with what is read: "unreadable NAME STEP WHY", or "wrong NAME STEP". Meanwhile files appear in DIRECTORY, each
of which is told when it is durable: "synced PATH SHA256".

``load.py check`` prints what is there: "NAME DEVICES STEP", with the devices that hold the Object as in "0,1", or "NAME
DEVICES - WHY" if it cannot be read.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from itertools import count

from rustord.client import Client
from rustord.errors import NotFound, RustordError

CLIENTS = [[f"client{client}/{number}" for number in range(8)] for client in range(4)]
"""The names that each client has to itself."""
NAMES = [name for names in CLIENTS for name in names]


def content(name: str, step: int) -> bytes | None:
    """What a name has after a step; None if that deletes it."""
    rng = random.Random(f"{name} {step}")
    size = rng.choice((None, 0, 500, 4_000, 20_000, 20_000, 100_000, 300_000))
    return None if size is None else f"{name} {step}\n".encode() + rng.randbytes(size)


def tell(*words: object) -> None:
    """Returns when the line is out of the machine."""
    os.write(wire(), (" ".join(map(str, words)) + "\n").encode())


@cache
def wire() -> int:
    return os.open("/dev/virtio-ports/rustord.test", os.O_WRONLY)


def work(names: Sequence[str], first: int) -> None:
    rng = random.Random(first)
    steps: dict[str, int] = {}
    with Client() as client:
        for step in count(first):
            for name in names:
                data = content(name, step)
                try:
                    if data is not None:
                        client.put(data, name=name)
                    else:
                        _delete(client, name, is_there=name in steps and content(name, steps[name]) is not None)
                except RustordError as error:
                    tell("refused", name, step, error.message)
                    steps.pop(name, None)
                else:
                    tell("done", name, step)
                    steps[name] = step
                if steps:
                    read = rng.choice(list(steps))
                    try:
                        if _found(client, read) != content(read, steps[read]):
                            tell("wrong", read, steps[read])
                    except RustordError as error:
                        tell("unreadable", read, steps[read], error.message)


def _delete(client: Client, name: str, *, is_there: bool) -> None:
    try:
        client.delete(name)
    except NotFound:
        if is_there:
            raise


def _found(client: Client, name: str) -> bytes | None:
    try:
        return client.get(name)
    except NotFound:
        return None


def write_files(directory: str) -> None:
    entries = os.open(directory, os.O_RDONLY)
    while True:
        file, path = tempfile.mkstemp(dir=directory)
        data = os.urandom(50_000)
        os.write(file, data)
        os.fsync(file)
        os.fsync(entries)
        os.close(file)
        tell("synced", path, hashlib.sha256(data).hexdigest())


def check() -> None:
    with Client() as client:
        for stored in list(client.names()):
            places = client.manifest(stored.uuid)["copies"]
            devices = ",".join(sorted({str(place["index"]) for copy in places for place in copy}))
            try:
                data = client.get(stored.name)
            except RustordError as error:
                print(stored.name, devices, "-", error.message)
                continue
            name, step = data.partition(b"\n")[0].decode().split()
            assert (name, data) == (stored.name, content(name, int(step))), stored
            print(name, devices, step)


def main() -> None:
    if sys.argv[1] == "check":
        check()
        return
    wire()
    clients = [threading.Thread(target=work, args=(names, int(sys.argv[2]))) for names in CLIENTS]
    clients += [threading.Thread(target=write_files, args=(directory,)) for directory in sys.argv[3:]]
    for client in clients:
        client.start()


if __name__ == "__main__":
    main()
