"""Setting: one documented key of the configuration, and how its value is read, checked and written.

A table of the configuration is a frozen dataclass whose fields are made by `setting`. The field's metadata is all there
is to know about the key: the reference (SETTINGS.md) and the example configuration are printed from it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rustord.errors import ConfigError
from rustord.quantity import duration_text, human_size, parse_duration, parse_size, size_text

Table = Any
"""A dataclass, every field of which `setting`, `table` or `tables` made."""

_Parsed = TypeVar("_Parsed")


class Kind(NamedTuple):
    """What values a setting takes.

    ``parse`` turns what TOML gave into the program's value, or raises ValueError; ``allowed`` says what it accepts, to
    be read behind "must be"; ``write`` gives the TOML text of a value.
    """

    allowed: str
    parse: Callable[[object], Any]
    write: Callable[[Any], str]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the field of a table says about its key, beside the name."""

    kind: Kind
    default: Any
    doc: str
    reload: bool
    """Whether SIGHUP is enough for a change to count; otherwise the daemon has to be restarted."""


def setting(kind: Kind, default: Any, doc: str, *, reload: bool = False) -> Any:
    """A dataclass field for one key. ``default`` is the program's value, not the TOML text."""
    metadata = {"setting": Setting(kind, default, doc, reload)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def table(cls: type, doc: str) -> Any:
    """A dataclass field for the sub-table ``cls``."""
    return dataclasses.field(default_factory=cls, metadata={"table": cls, "doc": doc})


def tables(cls: type, doc: str, *, reload: bool = False) -> Any:
    """A dataclass field for an array of tables, each a ``cls``; the program sees a tuple of them."""
    return dataclasses.field(default=(), metadata={"tables": cls, "doc": doc, "reload": reload})


def settings_of(cls: Table) -> Iterator[tuple[str, Setting]]:
    """Name and `Setting` of each plain key of a table, in the order of the class."""
    for field in dataclasses.fields(cls):
        if "setting" in field.metadata:
            yield field.name, field.metadata["setting"]


# Kinds


def _typed(value: object, kind: type[_Parsed]) -> _Parsed:
    # bool is an int to Python, but `true` is no number to the person who wrote it.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError
    return value


def quoted(text: str) -> str:
    """``text`` as a TOML basic string."""
    return json.dumps(text).replace("\x7f", "\\u007f")


def _list_text(values: tuple[object, ...]) -> str:
    return "[" + ", ".join(quoted(str(value)) for value in values) + "]"


def text(allowed: str, pattern: str = r"[^\x00-\x1f\x7f]{1,255}") -> Kind:
    """A string that matches ``pattern`` as a whole."""

    def parse(value: object) -> str:
        string = _typed(value, str)
        if re.fullmatch(pattern, string) is None:
            raise ValueError
        return string

    return Kind(allowed, parse, quoted)


def texts(allowed: str, pattern: str = r"[^\x00-\x1f\x7f]{1,255}") -> Kind:
    """A list of such strings; the program sees a tuple."""
    one = text(allowed, pattern)
    return Kind(allowed, lambda value: tuple(one.parse(item) for item in _typed(value, list)), _list_text)


def choice(*names: str) -> Kind:
    """One of ``names``."""

    def parse(value: object) -> str:
        if value not in names:
            raise ValueError
        return str(value)

    return Kind("one of " + ", ".join(f'"{name}"' for name in names), parse, quoted)


def _absolute(value: object) -> Path:
    path = Path(_typed(value, str))
    if not path.is_absolute() or "\0" in str(path):
        raise ValueError
    return path


def path() -> Kind:
    """An absolute path: the daemon's working directory means nothing to who writes the file."""
    return Kind("an absolute path", _absolute, lambda value: quoted(str(value)))


def paths() -> Kind:
    """A list of absolute paths; the program sees a tuple."""
    return Kind(
        "a list of absolute paths", lambda value: tuple(_absolute(item) for item in _typed(value, list)), _list_text
    )


def integer(first: int, last: int, unit: str = "") -> Kind:
    """A whole number from ``first`` to ``last``, both included."""

    def parse(value: object) -> int:
        number = _typed(value, int)
        if not first <= number <= last:
            raise ValueError
        return number

    return Kind(f"a whole number from {first:,} to {last:,}" + (unit and f" ({unit})"), parse, str)


def boolean() -> Kind:
    """true or false."""
    return Kind("true or false", lambda value: _typed(value, bool), lambda value: str(value).lower())


def size(first: int, last: int, *, power_of_two: bool = False) -> Kind:
    """A size in bytes from ``first`` to ``last``, both included; the program sees an int."""

    def parse(value: object) -> int:
        number = parse_size(value) if isinstance(value, str) else _typed(value, int)
        if not first <= number <= last or (power_of_two and number & (number - 1)):
            raise ValueError
        return number

    shape = "a power of two" if power_of_two else "a size, in bytes or with a unit,"
    return Kind(
        f"{shape} from {human_size(first)} to {human_size(last)}",
        parse,
        lambda number: quoted(size_text(number)) if " " in size_text(number) else str(number),
    )


def duration(first: float, last: float) -> Kind:
    """A duration from ``first`` to ``last`` seconds, both included; the program sees a float of seconds."""

    def parse(value: object) -> float:
        seconds = parse_duration(_typed(value, str))
        if not first <= seconds <= last:
            raise ValueError
        return seconds

    allowed = f"a duration with its unit, from {duration_text(first)} to {duration_text(last)}"
    return Kind(allowed, parse, lambda seconds: quoted(duration_text(seconds)))


def file_mode() -> Kind:
    """Permission bits as an octal string; the program sees an int."""

    def parse(value: object) -> int:
        string = _typed(value, str)
        if re.fullmatch(r"0?[0-7]{3}", string) is None:
            raise ValueError
        return int(string, 8)

    return Kind('permissions as an octal string, such as "0660"', parse, lambda mode: f'"{mode:04o}"')


def options(allowed: str) -> Kind:
    """A table whose keys belong to a plugin, which checks them; the program sees a dict of plain TOML values."""

    def parse(value: object) -> Mapping[str, object]:
        return dict(_typed(value, dict))

    def write(value: Mapping[str, object]) -> str:
        return "{" + ", ".join(f"{key} = {json.dumps(item)}" for key, item in value.items()) + "}"

    return Kind(allowed, parse, write)


# Reading


class Place(NamedTuple):
    """Where in the configuration we are, for messages: a file (if it is known) and a table (empty: the top)."""

    file: Path | None
    table: str = ""

    def __str__(self) -> str:
        parts = (str(self.file or ""), self.table and f"[{self.table}]")
        return ": ".join(filter(None, parts))

    def key(self, name: str) -> str:
        return f"{self}{' ' if self.table else ': '}{name}"


def parse_options(cls: type[_Parsed], given: Mapping[str, object], role: str) -> _Parsed:
    """The options of a role's table as a ``cls``, a dataclass of settings. Raises ConfigError naming the option."""
    built: _Parsed = _built(cls, given, Place(None, f"{role}.options"))
    return built


def credential(name: str) -> str:
    """A secret that systemd handed to the service, without the line's end; see LoadCredential= in systemd.exec(5).

    Raises ConfigError if there is none of that name.
    """
    directory = os.environ.get("CREDENTIALS_DIRECTORY", "")
    try:
        if not directory:
            raise FileNotFoundError
        return Path(directory, name).read_text().rstrip("\n")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            f"there is no credential {name!r}",
            hint=f"put 'LoadCredential={name}:FILE' below [Service] in a drop-in ('systemctl edit rustord')",
        ) from None


def parse_table(cls: Table, given: object, place: Place) -> dict[str, Any]:
    """The values that ``given`` (a TOML table) sets, by field name, checked; sub-tables are dicts of the same form.

    Raises ConfigError, naming file, table and key.
    """
    if not isinstance(given, dict):
        raise ConfigError(f"{place} must be a table", hint=f"write it as [{place.table}] on a line of its own")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.metadata}
    return {key: _parse_key(fields, key, value, place) for key, value in given.items()}


def _parse_key(fields: Mapping[str, dataclasses.Field[Any]], key: str, value: object, place: Place) -> Any:
    if key not in fields:
        raise ConfigError(f"{place.key(key)}: there is no such setting", hint=_nearest(key, list(fields)))
    metadata = fields[key].metadata
    inner = place._replace(table=f"{place.table}.{key}" if place.table else key)
    if "table" in metadata:
        return parse_table(metadata["table"], value, inner)
    if "tables" in metadata:
        if not isinstance(value, list):
            raise ConfigError(f"{inner} must be an array of tables", hint=f"write it as [[{inner.table}]]")
        return tuple(_built(metadata["tables"], item, inner) for item in value)
    kind: Kind = metadata["setting"].kind
    try:
        return kind.parse(value)
    except ValueError as error:
        why = f": {error}" if error.args else ""
        message = f"{place.key(key)}: {value!r} is not allowed{why}"
        raise ConfigError(message, hint=f"it takes {kind.allowed}") from None


def _built(cls: Table, item: object, place: Place) -> Any:
    values = parse_table(cls, item, place)
    try:
        return cls(**values)
    except ValueError as error:  # what the class says about its fields together
        raise ConfigError(f"{place}: {error}") from None


def _nearest(key: str, known: list[str]) -> str:
    if not known:
        return "there are none here"
    import difflib  # only needed to explain a mistake

    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "the settings here are: " + ", ".join(sorted(known))
