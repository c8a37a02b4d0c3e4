"""Stores, replaces and deletes Objects on a guest, and reads them back, with the client that the package brings.

``load.py work FIRST`` goes on until it is stopped. Each name goes from step FIRST on through what `content` says, and
each step is told before the name's next one begins: "done NAME STEP" or "refused NAME STEP WHY". So is what is wrong
with what is read: "unreadable NAME STEP WHY", or "wrong NAME STEP".

``load.py check`` prints what is there: "NAME DEVICES STEP", with the devices that hold the Object as in "0,1", or "NAME
DEVICES - WHY" if it cannot be read.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Sequence
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


def work(wire: int, names: Sequence[str], first: int) -> None:
    def tell(*words: object) -> None:
        os.write(wire, (" ".join(map(str, words)) + "\n").encode())  # returns when the line is out of the machine

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
    wire = os.open("/dev/virtio-ports/rustord.test", os.O_WRONLY)
    clients = [threading.Thread(target=work, args=(wire, names, int(sys.argv[2]))) for names in CLIENTS]
    for client in clients:
        client.start()


if __name__ == "__main__":
    main()
