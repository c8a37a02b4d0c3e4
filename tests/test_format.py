"""FORMAT.md against the code: every table of fields equals one struct, every constant has the value that it says."""

from __future__ import annotations

import ast
import importlib
import random
import re
import struct
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from xxhash import xxh3_64_digest

import rustord
from rustord.extent import Extent
from rustord.journal import Kind
from rustord.keystore import keys
from rustord.keystore.state import REBUILDING_KEY, STATE_KEY
from rustord.label import BLOCK_SIZES, LABEL_BYTES, MAGIC, TABLES_AT, Geometry, State
from rustord.placer import FreeView
from tests.simulation import Simulation, live

PACKAGE = Path(rustord.__file__).parent
TEXT = (PACKAGE / "FORMAT.md").read_text()
MODULES = {"ring": "keystore.ring", "state": "keystore.state"}
CODES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}


class Row(NamedTuple):
    offset: int
    size: int
    type: str
    field: str


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def tables() -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(the last line of text before it, head, rows) of each table."""
    before, table = "", list[list[str]]()
    for line in [*TEXT.splitlines(), ""]:
        if line.lstrip().startswith("|"):
            table.append(cells(line))
        else:
            if table:
                yield before, table[0], table[2:]
                table = []
            before = line.strip() or before


def field_tables() -> dict[str, list[Row]]:
    """The tables of fields by the struct that they stand under."""
    return {
        before.strip("`"): [Row(int(row[0]), int(row[1]), row[2], row[3]) for row in rows]
        for before, head, rows in tables()
        if head[:4] == ["Offset", "Size", "Type", "Field"]
    }


def module_of(name: str) -> Any:
    return importlib.import_module(f"rustord.{MODULES.get(name, name)}")


def structs_of_the_code() -> dict[str, str]:
    """What is said under each struct.Struct of the modules that write to a device or to the index, by name."""
    found = {}
    for path in ("label", "badblocks", "journal", "record", "footer", "page", "keystore/ring", "keystore/state"):
        body = ast.parse((PACKAGE / f"{path}.py").read_text()).body
        for number, node in enumerate(body):
            if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("struct.Struct("):
                said = body[number + 1]
                text = ast.literal_eval(said.value) if isinstance(said, ast.Expr) else ""
                found[f"{path.split('/')[-1]}.{ast.unparse(node.targets[0])}"] = text
    return found


def test_every_struct_has_a_table_and_every_table_a_struct() -> None:
    assert set(field_tables()) == set(structs_of_the_code())


@pytest.mark.parametrize("name", field_tables())
def test_a_table_equals_its_struct(name: str) -> None:
    rows = field_tables()[name]
    module, attribute = name.split(".")
    layout = getattr(module_of(module), attribute)
    assert isinstance(layout, struct.Struct)
    codes = [CODES.get(row.type, f"{row.size}s") for row in rows]
    assert layout.format == "<" + "".join(codes)
    offset = 0
    for row, code in zip(rows, codes, strict=True):
        assert (row.offset, row.size) == (offset, struct.calcsize(f"<{code}")), row.field
        offset += row.size
    assert offset == layout.size


@pytest.mark.parametrize(("name", "text"), structs_of_the_code().items())
def test_a_struct_names_the_fields_of_its_table(name: str, text: str) -> None:
    fields = [row.field for row in field_tables()[name]]
    if name == "record.EXTENT_COUNT":
        assert (fields, text) == (["extent_count"], "")  # a single field needs no list
    else:
        assert fields == re.split(r",\s+", text.partition(":")[0])


def test_every_constant_has_its_value() -> None:
    (rows,) = [rows for _, head, rows in tables() if head[0] == "Constant"]
    for constant, value, _ in rows:
        module, attribute = constant.strip("`").split(".")
        assert getattr(module_of(module), attribute) == int(value), constant


def test_every_kind_of_entry_is_listed() -> None:
    (rows,) = [rows for _, head, rows in tables() if head[0] == "Kind"]
    assert {(int(row[0]), row[1]) for row in rows} == {(kind.value, kind.name) for kind in Kind}


def test_every_kind_of_key_is_listed() -> None:
    (rows,) = [rows for _, head, rows in tables() if head[0] == "Key"]
    known = [keys.OBJECT, keys.GRAVE, keys.BASE, keys.PAGE, keys.UNKEPT, keys.NAME, keys.POSITION]
    assert [re.findall("`(.)`", row[0])[0].encode() for row in rows] == [*known, REBUILDING_KEY, STATE_KEY]
    assert f"A name of up to {keys.NAME_KEY_BYTES} bytes" in TEXT


def test_the_geometry_of_the_examples() -> None:
    (rows,) = [rows for _, head, rows in tables() if head[:2] == ["Size", "J"]]
    for row in rows:
        geometry = Geometry.of_device(int(row[0]), 4096)
        runs = [f"{block}+{count}" for block, count in geometry.data_runs]
        _, middle, tail = geometry.label_offsets
        assert row[1:] == [str(geometry.journal_length), str(middle), str(tail), *runs]


def test_what_the_text_says_beside_the_tables() -> None:
    assert "`block_size` is one of 4096, 8192, 16384, 32768 and 65536" in TEXT
    assert BLOCK_SIZES == (4096, 8192, 16384, 32768, 65536)
    assert (State.CLEAN, State.OPEN) == (0, 1)
    assert MAGIC == b"rustord pool\x0d\x0a\x1a\x00"
    assert module_of("journal").MAGIC == b"rustjrnl"
    assert module_of("footer").MAGIC == b"rustobj\0"
    assert module_of("footer").TRAILER.size == 72
    assert TEXT.count("72 bytes") == 3
    assert module_of("ring")._CARRY_FROM == 0.25
    assert (LABEL_BYTES, TABLES_AT) == (64 << 10, 4096)


def test_every_heading_of_the_contents_is_there() -> None:
    headings = {
        re.sub(r"[^a-z -]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^##+ (.+)$", TEXT, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= headings


class Reader:
    """A second implementation: knows nothing but the tables and the text of the document, and the bytes of an image."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        self.label = self.fields("label.HEAD", 0)
        assert self.label["magic"].startswith(b"rustord pool")
        assert self.label["checksum"] == xxh3_64_digest(image[24 : self.label["length"]])
        self.block_size = self.label["block_size"]

    def fields(self, table: str, at: int) -> dict[str, Any]:
        rows = field_tables()[table]
        values = struct.unpack_from("<" + "".join(CODES.get(row.type, f"{row.size}s") for row in rows), self.image, at)
        return {row.field: value for row, value in zip(rows, values, strict=True)}

    def size(self, table: str) -> int:
        return sum(row.size for row in field_tables()[table])

    def sign(self, *parts: bytes) -> bytes:
        return blake2b(b"".join(parts), digest_size=16, key=self.label["secret"]).digest()

    def entries(self) -> Iterator[tuple[int, int, int, int]]:
        """(kind, sequence, offset, length) of each entry of a journal that is whole, its payload's place and length."""
        at, number = 1 << 20, 1
        while True:
            batch = self.fields("journal.BATCH", at)
            end = at + batch["length"]
            if batch["magic"] != b"rustjrnl" or batch["signature"] != self.sign(self.image[at + 24 : end]):
                return
            assert (batch["number"], batch["device_uuid"]) == (number, self.label["device_uuid"])
            at += self.size("journal.BATCH")
            for _ in range(batch["entry_count"]):
                entry = self.fields("journal.ENTRY", at)
                at += self.size("journal.ENTRY")
                yield entry["kind"], entry["sequence"], at, entry["length"]
                at += entry["length"]
            assert at == end
            at += -at % self.block_size
            number += 1

    def record(self, at: int) -> tuple[dict[str, Any], list[tuple[int, int]], bytes]:
        """The head of a record, the extents of its only copy as (block, count), and its name."""
        head = self.fields("record.RECORD", at)
        raw = self.image[at : at + head["length"]]
        assert head["checksum"] == xxh3_64_digest(raw[8:])
        assert head["copy_count"] == 1
        at += self.size("record.RECORD")
        extents = []
        for number in range(self.fields("record.EXTENT_COUNT", at)["extent_count"]):
            extent = self.fields("record.EXTENT", at + 4 + number * self.size("record.EXTENT"))
            assert extent["device"] == 0
            extents.append((extent["block"], extent["count"]))
        end = len(raw) - head["metadata_length"]
        return head, extents, raw[end - head["name_length"] : end]

    def data(self, head: dict[str, Any], extents: list[tuple[int, int]]) -> bytes:
        size = self.block_size
        content = b"".join(self.image[block * size : (block + count) * size] for block, count in extents)
        return content[: head["size"]]

    def footers(self) -> Iterator[bytes]:
        """The record behind each Object, found at the ends of the blocks."""
        room = self.size("footer.TRAILER")
        for end in range(self.block_size, len(self.image) + 1, self.block_size):
            trailer = self.fields("footer.TRAILER", end - room)
            if trailer["magic"] == b"rustobj\0" and trailer["piece"] + 1 == trailer["piece_count"]:
                assert trailer["block"] == end // self.block_size - 1
                yield self._joined(trailer)

    def _joined(self, trailer: dict[str, Any]) -> bytes:
        end = (trailer["block"] + 1) * self.block_size
        at = end - self.size("footer.TRAILER")
        piece = self.image[at - trailer["length"] : at]
        assert trailer["signature"] == self.sign(piece, self.image[at + 16 : end])
        if trailer["piece"] == 0:
            return piece
        previous = (trailer["previous_block"] + 1) * self.block_size - self.size("footer.TRAILER")
        return self._joined(self.fields("footer.TRAILER", previous)) + piece


def test_a_reader_who_knows_only_the_document_finds_everything(disk_path: Path, seed: int) -> None:
    simulation = Simulation(disk_path)
    store = simulation.open()
    chance = random.Random(seed)
    objects = {f"name{size}": chance.randbytes(size) for size in (0, 100, 4000, 4096, 70_000, 300_000)}
    uuids = {name: store.put(data, name=name).uuid for name, data in objects.items()}
    store.allocator.placer = Scattered()  # so that there is a footer of several pieces in several extents
    objects["scattered"] = chance.randbytes(3_000_000)
    uuids["scattered"] = store.put(objects["scattered"], name="scattered").uuid
    gone = store.put(b"gone")
    store.delete(gone.uuid)
    store.put(b"last", name="name100")
    objects["name100"] = b"last"
    simulation.cut_power()

    reader = Reader(simulation.paths[0].read_bytes())
    found, entries = {}, []
    for kind, sequence, at, length in reader.entries():
        entries.append((Kind(kind).name, sequence))
        if kind == Kind.PUT:
            head, extents, name = reader.record(at + 16)
            assert (head["sequence"], head["length"]) == (sequence, length - 16)
            if sequence == 10:
                assert reader.image[at : at + 16] == uuids["name100"]  # what it replaces
            found[name.decode() or "gone"] = reader.data(head, extents)
    assert entries == [*(("PUT", number) for number in range(1, 9)), ("DELETE", 9), ("PUT", 10), ("ERASED", 0)]
    assert found.pop("gone") == b"last"  # its block was given to that one
    assert found == objects

    records = list(reader.footers())
    assert len(records) == len(objects)
    assert {struct.unpack_from("<8s16s", record)[1] for record in records} == {
        record.uuid for record in live(simulation.open())
    }
    simulation.close()


class Scattered:
    """Blocks by twos, with a gap between them."""

    name = "scattered"
    copies = 1

    def place(self, count: int, free: FreeView) -> list[list[Extent]]:
        block, _ = next(iter(free.longest_first(0)))
        return [[Extent(0, block + 3 * at // 2, min(2, count - at)) for at in range(0, count, 2)]]
