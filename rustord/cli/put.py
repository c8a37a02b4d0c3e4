"""The command that stores: put."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from rustord.cli import edge
from rustord.cli.output import print_json, safe
from rustord.cli.parameters import connect, json_option
from rustord.cli.transfer import Bar, named, open_source, shown
from rustord.errors import InvalidRequest, PreconditionFailed, RustordError
from rustord.objkey import is_uuid

if TYPE_CHECKING:
    from concurrent.futures import Future

    from rustord.client import Stored

_COMPRESSED = {"gzip": "application/gzip", "bzip2": "application/x-bzip2", "xz": "application/x-xz"}
_OF_ONE_FILE = (OSError, InvalidRequest, PreconditionFailed)
"""Errors after which the next file may well be stored."""


class _Source(NamedTuple):
    """A local file ("-": standard input), and the name that its Object gets ("": none)."""

    path: str
    name: str


@dataclass
class _Storing:
    """What is the same for all files of one call."""

    socket: Path | None
    bar: Bar
    attributes: Mapping[str, str]
    content_type: str | None
    replace: bool
    stop: threading.Event = field(default_factory=threading.Event)

    def __call__(self, source: _Source) -> Stored:
        """Store one file. Raises OSError with its name, RustordError, or KeyboardInterrupt once ``stop`` is set."""
        _check_name(source.name)
        content_type = _guess_type(source) if self.content_type is None else self.content_type
        with open_source(source.path) as file, connect(self.socket) as client, named(shown(source.path)):
            return client.put(
                file,
                name=source.name,
                content_type=content_type,
                attributes=self.attributes,
                replace=self.replace,
                progress=self._progress,
            )

    def _progress(self, size: int) -> None:
        if self.stop.is_set():
            raise KeyboardInterrupt
        self.bar.advance(size)


def _check_name(name: str) -> None:
    if is_uuid(name):
        raise InvalidRequest(
            f"the name {name!r} would be taken for a uuid", hint="choose another one, or put a --prefix before it"
        )
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"the name {safe(name)} is not UTF-8", hint="choose another one with --name") from None


def _guess_type(source: _Source) -> str:
    """By the ending of its name, or else by that of the file's."""
    import mimetypes

    for path in (source.name, source.path):
        kind, compression = mimetypes.guess_type("file:" + os.path.basename(path))
        if compression or kind:
            return _COMPRESSED.get(compression, "") if compression else kind or ""
    return ""


def _to_attributes(context: click.Context, parameter: click.Parameter, values: Iterable[str]) -> dict[str, str]:
    attributes: dict[str, str] = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{value!r} is not of the form KEY=VALUE")
        if key in attributes:
            raise click.BadParameter(f"{key!r} is given twice")
        attributes[key] = text
    return attributes


@click.command()
@click.argument("files", metavar="FILE...|-", nargs=-1, required=True, type=click.Path(allow_dash=True))
@click.option("-n", "--name", metavar="NAME", help="Its name; an Object that has it is replaced.")
@click.option(
    "-m",
    "--meta",
    "attributes",
    metavar="KEY=VALUE",
    multiple=True,
    callback=_to_attributes,
    help="An attribute to keep; repeatable.",
)
@click.option("-t", "--content-type", metavar="TYPE", help="By default it is guessed from the name.")
@click.option("--no-clobber", is_flag=True, help="Fail if the name is taken.")
@click.option("-r", "--recursive", is_flag=True, help="Store the files in directories, named by path.")
@click.option("-p", "--prefix", metavar="TEXT", default="", help="Put before names; then single files get theirs.")
@click.option(
    "-j", "--jobs", metavar="N", type=click.IntRange(1, 64), default=4, help="Store N files at the same time [4]."
)
@json_option
@click.pass_context
def put(
    context: click.Context,
    files: tuple[str, ...],
    name: str | None,
    attributes: dict[str, str],
    content_type: str | None,
    no_clobber: bool,
    recursive: bool,
    prefix: str,
    jobs: int,
    as_json: bool,
) -> None:
    """Store files as Objects, and print their uuids.

    - is standard input. An Object is durable when its uuid is printed. Of several files, each one's path is printed
    behind its uuid.
    """
    several = recursive or len(files) > 1
    if name == "":
        raise click.UsageError("--name is empty; leave it out to store without a name")
    if name and (several or prefix):
        raise click.UsageError("--name is for one FILE, and without --prefix")
    if name or not (recursive or prefix):
        sources = [_Source(file, name or "") for file in files]
    else:
        sources = [source for file in files for source in _named_sources(file, recursive, prefix)]
        _check_names_differ(sources)
    with Bar(f"{len(sources)} files" if several else shown(files[0]), _total(sources)) as bar:
        storing = _Storing(context.obj, bar, attributes, content_type, replace=not no_clobber)
        tell = _print_stored if as_json else _say_uuid_and_path if several else _say_uuid
        if several:
            context.exit(_store_all(sources, storing, jobs, tell))
        tell(bar, sources[0], storing(sources[0]))


def _say_uuid(bar: Bar, source: _Source, stored: Stored) -> None:
    bar.say(stored.uuid)


def _say_uuid_and_path(bar: Bar, source: _Source, stored: Stored) -> None:
    bar.say(f"{stored.uuid}  {safe(source.path)}")


def _print_stored(bar: Bar, source: _Source, stored: Stored) -> None:
    values = {name: value for name, value in stored._asdict().items() if name not in ("content_type", "created")}
    print_json({**values, "file": source.path})


def _named_sources(file: str, recursive: bool, prefix: str) -> Iterator[_Source]:
    """A file under its own name, or the files below a directory under their paths there, in order."""
    if file == "-":
        raise click.UsageError("standard input has no name of its own; use --name")
    if not (recursive and os.path.isdir(file)):
        yield _Source(file, prefix + os.path.basename(file))
        return
    for directory, below, names in os.walk(file, onerror=_fail):
        below.sort()
        links = [name for name in below if os.path.islink(os.path.join(directory, name))]
        for name in sorted(names + links):
            path = os.path.join(directory, name)
            if os.path.isfile(path) or not os.path.exists(path):  # a link that leads nowhere is an error later
                yield _Source(path, prefix + os.path.relpath(path, file))
            else:
                edge.complain("rustorctl", f"{path} is left out: it is not a file")


def _check_names_differ(sources: Iterable[_Source]) -> None:
    """Raise InvalidRequest if a file would replace another one that was stored a moment before."""
    paths: dict[str, str] = {}
    for path, name in sources:
        if (other := paths.setdefault(name, path)) != path:
            raise InvalidRequest(
                f"{other} and {path} would both be named {name!r}",
                hint="store them one after the other, each with a --prefix of its own",
            )


def _fail(error: OSError) -> None:
    raise error


def _total(sources: Iterable[_Source]) -> int | None:
    """The size of all files together in bytes; None if one has none."""
    total = 0
    for source in sources:
        if not os.path.isfile(source.path):
            return None
        total += os.path.getsize(source.path)
    return total


def _store_all(
    sources: list[_Source], storing: _Storing, jobs: int, tell: Callable[[Bar, _Source, Stored], None]
) -> int:
    """Store files, several at a time, and tell of each in order. Returns the exit status: that of the first error."""
    status = 0
    try:
        for source, future in _begin(sources, storing, jobs):
            try:
                tell(storing.bar, source, future.result())
            except BrokenPipeError:
                raise
            except _OF_ONE_FILE as error:
                failed = _complain(source, error)
                status = status or failed
    finally:
        storing.stop.set()
    return status


def _begin(sources: list[_Source], storing: _Storing, jobs: int) -> list[tuple[_Source, Future[Stored]]]:
    """Have files stored, each in its turn, until ``storing.stop`` is set."""
    from concurrent.futures import Future

    begun: list[tuple[_Source, Future[Stored]]] = [(source, Future()) for source in sources]
    waiting = iter(begun)

    def work() -> None:
        for source, future in waiting:
            if storing.stop.is_set():
                return
            try:
                future.set_result(storing(source))
            except BaseException as error:
                future.set_exception(error)

    for _ in range(min(jobs, len(sources))):
        # Not those of an executor: what they wait for may never come, and the command shall end when it is told to.
        threading.Thread(target=work, daemon=True).start()
    return begun


def _complain(source: _Source, error: OSError | RustordError) -> int:
    if isinstance(error, RustordError):
        edge.complain("rustorctl", f"{source.path}: {error.message}", error.hint)
        return error.exit_status
    edge.complain("rustorctl", edge.os_error_text(error))
    return edge.LOCAL_FILE


COMMANDS = (put,)
