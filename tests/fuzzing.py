"""What is fuzzed: every decoder of what is on a device, in the index or on the wire, by name.

`tests/test_fuzzing.py` throws Hypothesis at each of them in every run; `./dev fuzz TARGET` throws atheris, which
follows the coverage, for as long as one likes. What either finds becomes a file in tests/corpus/TARGET, and a test.

Where a checksum or a signature would keep nearly everything out, the input is also tried with the right one. Only a
Record is not: its checksum is right if we made it, and where it comes from a device, it stands under a signature, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from xxhash import xxh3_64_digest

from rustord import badblocks, footer, journal, label, page
from rustord.errors import FormatError, RustordError
from rustord.extent import Extent
from rustord.keystore.state import IndexState, Tally, digest
from rustord.keystore.store import KeyStore
from rustord.objkey import ObjKey
from rustord.record import Metadata, Record, RecordId, decode_extents, encode_metadata, encode_record
from rustord.wire.api import read_new_device, read_request
from rustord.wire.http1 import Chunked, read_reply_head, read_request_head
from rustord.wire.limits import Limits
from rustord.wire.problem import read_problem
from rustord.wire.request import read_info, read_stored

CORPUS = Path(__file__).parent / "corpus"
SECRET = bytes(range(32))
UUID = bytes(range(16))
BLOCK = 4096


class Target(NamedTuple):
    """``decode`` may raise what is in ``allowed``, and nothing else; ``seeds`` are inputs that it accepts."""

    decode: Callable[[bytes], object]
    seeds: Callable[[], Iterable[bytes]]
    allowed: type[Exception] = FormatError

    def run(self, data: bytes) -> None:
        with suppress(self.allowed):
            self.decode(data)


# What is on a device


def _label_seeds() -> Iterator[bytes]:
    members = tuple(label.Member(bytes([n]) * 16, n, 4096, 1) for n in range(3))
    yield label.Label(UUID, "pool", bytes([1]) * 16, 1, BLOCK, 4096, SECRET, 1, 7, members=members).encode()
    yield label.Label(UUID, "", bytes(16), 0, BLOCK, 4096, SECRET, 1, voids=((5, 9),)).encode()


def _decode_label(data: bytes) -> None:
    data = data.ljust(label.LABEL_BYTES, b"\0")[: label.LABEL_BYTES]
    length = int.from_bytes(data[24:28], "little")
    sealed = label.MAGIC + xxh3_64_digest(data[24:length]) + data[24:]
    for each in (data, sealed):
        try:
            found = label.decode_label(each)
        except FormatError:
            continue
        assert found is None or found.encode()


def _entries() -> list[bytes]:
    return [
        journal.put_entry(1, bytes(16), _record()),
        journal.delete_entry(2, UUID),
        journal.undo_entry(3, RecordId(UUID, 1)),
    ]


def _decode_batch(data: bytes) -> None:
    journal.decode_batch(data, UUID, SECRET)
    if len(data) >= journal.BATCH.size:
        _, _, _, number, durable, _, count = journal.BATCH.unpack_from(data)
        head = journal.BATCH.pack(journal.MAGIC, b"", UUID, number, durable, len(data), min(count, 1000))
        rest = head[24:] + data[journal.BATCH.size :]
        journal.decode_batch(journal.MAGIC + footer.sign(SECRET, rest) + rest, UUID, SECRET)


def _footer_seeds() -> Iterator[bytes]:
    for size in (100, 5000):
        yield bytes(size) + footer.encode_footer(_record(), size, [Extent(0, 7, 2)], {0: UUID}, SECRET, BLOCK)


def _decode_footer(data: bytes) -> None:
    block = data[-BLOCK:].rjust(BLOCK, b"\0")
    for number in (7, 8):
        footer.decode_piece(block, UUID, number, SECRET)


def _record(size: int = 100_000) -> bytes:
    key = ObjKey(UUID, "sha256", bytes(32), size)
    metadata = encode_metadata(Metadata("name", "text/plain", {"color": "blue"}))
    return encode_record(key, 5, 6, [[Extent(0, 7, 30)], [Extent(1, 8, 9)]], bytes(16), b"mirrored", b"name", metadata)


def _decode_record(data: bytes) -> None:
    record = Record(data)
    assert all((record.manifest, record.key, record.etag, record.devices))
    assert record.metadata.name == record.name


def _bad_block_seeds() -> Iterator[bytes]:
    yield badblocks.BadBlocks().adding(5, 3).adding(100, 1, dead=True).encode(UUID)


# What is in the index


class _Index:
    """A backend with these entries, for reading."""

    def __init__(self, entries: Mapping[bytes, bytes]) -> None:
        self._entries = entries

    def get(self, key: bytes) -> bytes | None:
        return self._entries.get(key)

    def scan(self, first: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        return iter(sorted(item for item in self._entries.items() if first <= item[0] < end))


def _decode_index(data: bytes) -> None:
    """One entry: the length of its key, the key and the value."""
    if not data:
        return
    length = 1 + data[0] % 20
    key, value = data[1 : 1 + length], data[1 + length :]
    entries = {key: value} if key else {}
    tally = Tally(len(entries), sum(digest(key, value) for key, value in entries.items()))
    backend: Any = _Index({b"s": IndexState(1, 1, UUID, tally).encode()} | entries)
    keystore = KeyStore(backend, UUID, Path("index"))
    asked: list[Callable[[], object]] = [
        lambda: [record.key for record in keystore.indexed()],
        keystore.graves,
        keystore.names,
        keystore.objects,
        lambda: keystore.get(key[1:]),
        lambda: keystore.resolve(key[1:].decode(errors="replace")),
    ]
    for ask in asked:
        with suppress(RustordError):
            ask()


def _index_seeds() -> Iterator[bytes]:
    entries = [
        (b"o" + UUID, _record()),
        (b"g" + UUID + bytes(8), b""),
        (b"nname", UUID),
        (b"s", IndexState(1, 2, UUID).encode()),
    ]
    for key, value in entries:
        yield bytes([len(key) - 1]) + key + value


# What is on the wire


def _read_request(data: bytes) -> None:
    head = read_request_head(data, 0, Limits())
    if head is not None:
        read_request(head)


def _requests() -> Iterator[bytes]:
    for line in (
        b"GET /v1/objects/0198a1b2-0000-7000-8000-00000000beef",
        b"PUT /v1/names/a%2Fb?x=y",
        b"GET /v1/names?prefix=a&limit=10",
        b"POST /v1/devices",
        b"GET http://rustord/metrics",
    ):
        yield line + b' HTTP/1.1\r\nHost: x\r\nRange: bytes=0-5, 7-\r\nContent-Length: 5\r\nIf-Match: "a"\r\n\r\n12345'


def _read_chunks(data: bytes) -> None:
    """At once, and byte by byte, it comes to the same."""
    bodies = []
    for pieces in ([data], [data[at : at + 1] for at in range(len(data))]):
        chunked, body = Chunked(), b""
        try:
            for piece in pieces:
                body += b"".join(chunked.feed(piece)[0])
                if chunked.done:
                    break
            bodies.append(body)
        except RustordError as error:
            bodies.append(type(error).__name__.encode())
    assert bodies[0] == bodies[1]


def _read_reply(data: bytes) -> None:
    head = read_reply_head(data)
    if head is not None:
        read_info(head)


def _replies() -> Iterator[bytes]:
    yield (
        b'HTTP/1.1 200 OK\r\nRustor-Uuid: 0198a1b2-0000-7000-8000-00000000beef\r\nETag: "sha256:00"\r\n'
        b"Content-Length: 5\r\nContent-Range: bytes 0-4/10\r\nLast-Modified: x\r\nRustor-Meta-A: b%20c\r\n\r\n12345"
    )


def _stored() -> Iterator[bytes]:
    yield b'{"uuid": "x", "name": "", "size": 1, "algorithm": "xxh3-128", "digest": "00"}'


TARGETS: Mapping[str, Target] = {
    "label": Target(_decode_label, _label_seeds),
    "journal": Target(_decode_batch, lambda: [journal.encode_batch(_entries(), UUID, 3, 2, SECRET)]),
    "journal-ids": Target(journal.decode_record_ids, lambda: [UUID + bytes(8)]),
    "journal-grave": Target(journal.decode_grave, lambda: [UUID + bytes(24)]),
    "footer": Target(_decode_footer, _footer_seeds),
    "record": Target(_decode_record, lambda: [_record(), _record(0)]),
    "extents": Target(decode_extents, lambda: [bytes(16)]),
    "bad-blocks": Target(lambda data: badblocks.decode_bad_blocks(data.ljust(BLOCK, b"\0"), UUID), _bad_block_seeds),
    "page": Target(page.decode_page, lambda: [b""]),
    "slot": Target(lambda data: page.decode_slot(data.rjust(BLOCK, b"\0"), UUID, 7, SECRET), lambda: [b""]),
    "volume-head": Target(page.decode_head, lambda: [bytes(page.HEAD.size)]),
    "layer-entry": Target(page.decode_layer_entry, lambda: [bytes(200)]),
    "map-entry": Target(page.decode_map_entry, lambda: [bytes(200)]),
    "index": Target(_decode_index, _index_seeds, RustordError),
    "request": Target(_read_request, _requests, RustordError),
    "chunks": Target(
        _read_chunks, lambda: [b"5;x=y\r\n12345\r\n0\r\nTrailer: x\r\n\r\n", b"A\r\n0123456789\r\n0\r\n\r\n"]
    ),
    "new-device": Target(read_new_device, lambda: [b'{"path": "/dev/sdx", "force": true}'], RustordError),
    "reply": Target(_read_reply, _replies, RustordError),
    "stored": Target(read_stored, _stored, RustordError),
    "problem": Target(
        lambda data: read_problem(500, data), lambda: [b'{"code": "no-space", "detail": "x"}'], RustordError
    ),
}


def kept(name: str) -> list[bytes]:
    """What was found before."""
    return [path.read_bytes() for path in sorted(CORPUS.glob(f"{name}/*"))]


def main(name: str = "", *arguments: str) -> None:
    """Fuzz one target with atheris; the arguments are those of libFuzzer, such as -max_total_time=60."""
    if name not in TARGETS:
        sys.exit(f"these can be fuzzed: {', '.join(TARGETS)}")
    import tempfile

    import atheris  # type: ignore[import-not-found]

    target = TARGETS[name]
    atheris.instrument_all()
    with tempfile.TemporaryDirectory(prefix="rustord-fuzz-") as directory:
        for number, seed in enumerate((*target.seeds(), *kept(name))):
            Path(directory, str(number)).write_bytes(seed)
        found = CORPUS / name
        found.mkdir(parents=True, exist_ok=True)
        atheris.Setup([sys.argv[0], directory, f"-artifact_prefix={found}/", *arguments], target.run)
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
