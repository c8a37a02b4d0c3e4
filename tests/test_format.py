"""FORMAT.md says what the code does: its tables are the structs, field by field."""

from __future__ import annotations

import ast
import importlib
import re
import struct
from itertools import pairwise
from pathlib import Path

import pytest

import rustord
from rustord import footer, journal, label, record
from rustord.journal import Kind
from rustord.manifest import CHUNK_BYTES

PACKAGE = Path(rustord.__file__).parent
TEXT = (PACKAGE / "FORMAT.md").read_text()
MODULES = {
    "label": "rustord.label",
    "record": "rustord.record",
    "journal": "rustord.journal",
    "footer": "rustord.footer",
    "ring": "rustord.keystore.ring",
    "store": "rustord.keystore.store",
}
CODES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
ROW = re.compile(r"\| (\d+) \| (u\d+|bytes\[\d+\]) \| (\w+) \|")


def documented() -> dict[str, list[tuple[int, str, str]]]:
    """The rows (offset, type, field) of each table, by the struct that its heading names."""
    tables: dict[str, list[tuple[int, str, str]]] = {}
    for section in TEXT.split("\n### ")[1:]:
        heading, _, body = section.partition("\n")
        if named := re.search(r"\(`(\w+\.\w+)`\)", heading):
            rows = ROW.findall(body.split("\n## ")[0])
            tables[named[1]] = [(int(offset), code, field) for offset, code, field in rows]
    return tables


def structs() -> dict[str, struct.Struct]:
    """Every struct of the modules that define the format."""
    found = {}
    for name, path in MODULES.items():
        module = importlib.import_module(path)
        for attribute in re.findall(r"^(\w+) = struct\.Struct", Path(module.__file__ or "").read_text(), re.MULTILINE):
            found[f"{name}.{attribute}"] = getattr(module, attribute)
    return found


def fields_in_code(name: str) -> list[str]:
    """The field names that stand below the struct's definition."""
    module, _, attribute = name.partition(".")
    body = ast.parse(Path(importlib.import_module(MODULES[module]).__file__ or "").read_text()).body
    for statement, following in pairwise(body):
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == attribute:
            assert isinstance(following, ast.Expr)
            text = ast.literal_eval(following.value).partition(":")[0]
            return re.findall(r"\w+", text)
    raise AssertionError(f"{name} has no list of fields")


def test_every_struct_has_a_table() -> None:
    assert documented().keys() == structs().keys() - {"record.EXTENT_COUNT"}


@pytest.mark.parametrize("name", documented())
def test_a_table_is_the_struct(name: str) -> None:
    rows = documented()[name]
    codes = [f"{code[6:-1]}s" if code.startswith("bytes[") else CODES[code] for _, code, _ in rows]
    layout = "<" + "".join(codes)
    assert layout == structs()[name].format
    offsets = [struct.calcsize("<" + "".join(codes[:number])) for number in range(len(codes))]
    assert [offset for offset, _, _ in rows] == offsets
    assert [field for _, _, field in rows] == fields_in_code(name)


def test_kinds_of_entries() -> None:
    rows = re.findall(r"\| (\d) \| ([A-Z]+) \|", TEXT)
    assert [(int(number), name) for number, name in rows] == [(kind.value, kind.name) for kind in Kind]


@pytest.mark.parametrize(
    ("said", "value"),
    [
        (r"magic \| `rustjrnl`", journal.MAGIC == b"rustjrnl"),
        (r"magic \| `rustobj` 0", footer.MAGIC == b"rustobj\0"),
        (r"`rustord pool` CR LF 0x1A 0", label.MAGIC == b"rustord pool\r\n\x1a\0"),
        (r"Format version 1\.", label.FORMAT_VERSION == 1),
        (r"at most 65,536 bytes, a multiple", label.LABEL_BYTES == 65536),
        (r"The tables begin at 4,096", label.TABLES_AT == 4096),
        (r"member_count \| 1 to 96", label.MEMBER_COUNT_MAX == 96),
        (r"void_count \| 0 to 3,600", label.VOID_COUNT_MAX == 3600),
        (r"smallest device has 16 MiB", label.DEVICE_BYTES_MIN == 16 << 20),
        (r"at least 4 MiB, at most 1 GiB", (label.JOURNAL_BYTES_MIN, label.JOURNAL_BYTES_MAX) == (4 << 20, 1 << 30)),
        (r"4,096 to 65,536, a power of two", tuple(4096 << power for power in range(5)) == label.BLOCK_SIZES),
        (r"a checksum for each 65,536 bytes of data", CHUNK_BYTES == 65536),
        (r"`block_size` . 72 bytes", footer.TRAILER.size == 72),
        (r"40 . `member_count` \+ 16 . `void_count`", (label.MEMBER.size, label.VOID.size) == (40, 16)),
        (r"of the bytes from 8 to `length`", record.RECORD.size == 64),
    ],
)
def test_constants(said: str, value: bool) -> None:
    assert re.search(said, TEXT), said
    assert value, said


def test_geometry() -> None:
    geometry = label.Geometry(3 << 18, 4096)  # 3 GiB
    assert geometry.label_offsets == (0, 3 << 29, (3 << 30) - (1 << 20))
    assert (geometry.journal_offset, geometry.journal_length) == (1 << 20, 12 << 20)
    assert geometry.data_runs == (
        (13 << 8, (3 << 17) - (13 << 8)),
        ((3 << 17) + 16, (3 << 18) - 256 - (3 << 17) - 16),
    )
