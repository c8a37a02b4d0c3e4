"""Config: what an administrator decides, read from rustord.toml and the files in conf.d beside it.

Files are read in this order: rustord.toml, then conf.d/*.toml by name. A later file's value replaces an earlier one's,
key by key; `[[device]]` rules add up. Each class is a table of the file, and SETTINGS.md is printed from it.
"""

# ruff: noqa: RUF009 (`setting` and `table` make dataclass fields, which is what the rule cannot see)

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from rustord import settings
from rustord.errors import ConfigError
from rustord.settings import Place, setting, table, tables
from rustord.wire.limits import Limits, NbdLimits

DEFAULT_FILE = Path("/etc/rustord/rustord.toml")
DEFAULT_DIRECTORY = Path("/var/lib/rustord")
DEFAULT_SOCKET = Path("/run/rustord/rustord.sock")

_LIMITS = Limits()
_NBD_LIMITS = NbdLimits()
_NAME = r"[a-z0-9][a-z0-9._-]{0,31}"
_PRINCIPAL = r"@?[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}\$?"
_ADDRESS = r"(\[[0-9a-fA-F:.]+\]|[0-9.]+):[0-9]{1,5}"
_PRINCIPALS = 'a list of users ("alice", "1000") and groups ("@backup", "@34")'


@dataclasses.dataclass(frozen=True)
class PoolTable:
    devices: tuple[Path, ...] = setting(
        settings.paths(),
        (),
        "Devices and image files to open at start. Use names that stay the same over reboots, such as those in "
        "/dev/disk/by-id. They must carry this pool's label: nothing is ever claimed by a name in this list.",
    )
    directory: Path = setting(
        settings.path(),
        DEFAULT_DIRECTORY,
        "Where the index of the pool is kept; a local filesystem is needed.",
    )


@dataclasses.dataclass(frozen=True)
class SocketTable:
    path: Path = setting(
        settings.path(),
        DEFAULT_SOCKET,
        "The Unix socket on which the object API is served. When systemd passes a socket, that one is used instead.",
    )
    mode: int = setting(
        settings.file_mode(),
        0o660,
        "Permissions of the socket: who may connect at all. What they may do is in [roles].",
    )


@dataclasses.dataclass(frozen=True)
class NbdTable:
    path: Path | None = setting(
        settings.path(),
        None,
        "The Unix socket on which Objects are served as block devices, over NBD. If it is not set, that is nbd.sock "
        "beside socket.path. When systemd passes a socket of rustord-nbd.socket, that one is used instead.",
    )
    mode: int = setting(
        settings.file_mode(),
        0o660,
        "Permissions of that socket: who may connect at all. What they may do is in [roles].",
    )
    listen: str = setting(
        settings.text(
            'an address and a port, such as "192.0.2.1:10809" or "[::1]:10809"',
            r"(\[[0-9a-fA-F:.]+\]|[0-9.]+):[0-9]{1,5}",
        ),
        "",
        "An address on which block devices are served over TCP, too. Beyond this machine (127.0.0.0/8, ::1), TLS is "
        "required, so the three files below are. rustord.service lets nobody in from a network before its "
        "IPAddressDeny= and RestrictAddressFamilies= are changed.",
    )
    tls_certificate: Path | None = setting(
        settings.path(), None, "The certificate that clients on TCP are shown, and those above it; a file in PEM."
    )
    tls_key: Path | None = setting(settings.path(), None, "The key of that certificate; a file in PEM.")
    tls_authority: Path | None = setting(
        settings.path(),
        None,
        "The certificates of the authorities, one of which must have signed the certificate of every client on TCP.",
    )
    tcp_role: Literal["reader", "writer"] = setting(
        settings.choice("reader", "writer"),
        "reader",
        "What clients on TCP may do: read Objects and volumes, or write to volumes, too.",
    )
    connections: int = setting(
        settings.integer(1, 65536),
        _NBD_LIMITS.connections,
        "How many clients may be connected at once, each with a thread and up to 2 MiB. A further one is refused.",
    )
    connections_per_client: int = setting(
        settings.integer(1, 65536),
        _NBD_LIMITS.connections_per_client,
        "How many of them may be the same user, or come from the same address.",
    )
    handshake: float = setting(
        settings.duration(0.1, 3600.0),
        _NBD_LIMITS.handshake_s,
        "How long a client may take to choose an export.",
    )

    def limits(self) -> NbdLimits:
        """The limits of the NBD frontend."""
        return dataclasses.replace(
            _NBD_LIMITS,
            connections=self.connections,
            connections_per_client=self.connections_per_client,
            handshake_s=self.handshake,
        )


@dataclasses.dataclass(frozen=True)
class RolesTable:
    readers: tuple[str, ...] = setting(
        settings.texts(_PRINCIPALS, _PRINCIPAL), (), "Who may read and list Objects.", reload=True
    )
    writers: tuple[str, ...] = setting(
        settings.texts(_PRINCIPALS, _PRINCIPAL),
        ("@rustord",),
        "Who may store and delete Objects, too.",
        reload=True,
    )
    admins: tuple[str, ...] = setting(
        settings.texts(_PRINCIPALS, _PRINCIPAL),
        (),
        "Who may change the pool's devices, too. root and the daemon's own user always may.",
        reload=True,
    )


@dataclasses.dataclass(frozen=True)
class KeygenTable:
    algorithm: str = setting(
        settings.text("the name of a hash: xxh3-128, xxh3-64, blake2b, sha256 or a plugin's", _NAME),
        "xxh3-128",
        "The hash of new Objects. Each Object records its own, so changing this leaves stored ones readable.",
    )
    options: Mapping[str, object] = setting(
        settings.options("a table of options of the hash"),
        {},
        "What the hash takes; those that come with rustord take none. For a plugin's, see its documentation.",
    )


@dataclasses.dataclass(frozen=True)
class PlacerTable:
    policy: str = setting(
        settings.text("the name of a placer: contiguous, first-fit, striped, mirrored or a plugin's", _NAME),
        "contiguous",
        "How new Objects are laid out. contiguous: one run of blocks, the shortest that holds it; first-fit: the first "
        "run; striped: in turn over all devices; mirrored: several copies on distinct devices.",
    )
    options: Mapping[str, object] = setting(
        settings.options("a table of options of the placer"),
        {},
        "What the placer takes: unit_blocks for striped, copies for mirrored. For a plugin's, see its documentation.",
    )


@dataclasses.dataclass(frozen=True)
class KeystoreTable:
    backend: str = setting(
        settings.text("the name of an index backend: lmdb, sqlite or a plugin's", _NAME),
        "lmdb",
        "The database that holds the index of the pool.",
    )
    options: Mapping[str, object] = setting(
        settings.options("a table of options of the backend"),
        {},
        "What the backend takes; lmdb and sqlite take none. For a plugin's, see its documentation.",
    )


@dataclasses.dataclass(frozen=True)
class EraseTable:
    policy: Literal["zero", "discard", "none"] = setting(
        settings.choice("zero", "discard", "none"),
        "zero",
        "What happens to the blocks of a deleted Object before they are free again. zero: they read as zeros when "
        "the deletion is answered; discard: the device is told that they are unused (whether the data is gone then is "
        "up to the device); none: the data stays until it is overwritten.",
    )


@dataclasses.dataclass(frozen=True)
class LimitsTable:
    connections: int = setting(
        settings.integer(1, 65536),
        _LIMITS.connections,
        "How many clients may be connected at once. A further one is refused.",
    )
    uploads: int = setting(
        settings.integer(1, 4096),
        _LIMITS.uploads,
        "How many large bodies may come in at once, each with a buffer of 1 MiB. Others wait.",
    )
    downloads: int = setting(
        settings.integer(1, 4096),
        _LIMITS.downloads,
        "How many large bodies may go out at once, each with a buffer of 256 KiB. Others wait.",
    )
    transfer_threads: int = setting(
        settings.integer(1, 256),
        _LIMITS.transfer_threads,
        "How many threads move large bodies and read what is not cached. More pay off with many fast devices.",
    )
    head: float = setting(
        settings.duration(0.1, 3600.0),
        _LIMITS.head_s,
        "How long the head of a request may take from its first byte to its last.",
    )
    body: float = setting(
        settings.duration(1.0, 86400.0),
        _LIMITS.body_s,
        "How long each MiB of a body may take to come in, before the upload is given up.",
    )
    send: float = setting(
        settings.duration(1.0, 86400.0),
        _LIMITS.send_s,
        "How long a client may take to accept the next piece of a reply.",
    )
    idle: float = setting(
        settings.duration(1.0, 86400.0), _LIMITS.idle_s, "How long a connection may be idle between two requests."
    )

    def of_frontend(self) -> Limits:
        """The limits of the HTTP frontend."""
        return dataclasses.replace(
            _LIMITS,
            connections=self.connections,
            uploads=self.uploads,
            downloads=self.downloads,
            transfer_threads=self.transfer_threads,
            head_s=self.head,
            body_s=self.body,
            send_s=self.send,
            idle_s=self.idle,
        )


@dataclasses.dataclass(frozen=True)
class ScrubTable:
    rate: int = setting(
        settings.size(1 << 20, 1 << 40),
        64 << 20,
        "How much a scrub reads in a second at most. Less leaves more of slow devices to others.",
        reload=True,
    )


@dataclasses.dataclass(frozen=True)
class MoverTable:
    rate: int = setting(
        settings.size(1 << 20, 1 << 40),
        256 << 20,
        "How much is moved in a second at most, from devices that leave or to where copies are missing.",
        reload=True,
    )


@dataclasses.dataclass(frozen=True)
class LogTable:
    level: str = setting(
        settings.choice("debug", "info", "warning", "error"), "info", "The least severity that is logged.", reload=True
    )
    slow_request: float = setting(
        settings.duration(0.001, 3600.0),
        1.0,
        "A request that takes longer than this is logged with the time of each of its phases.",
        reload=True,
    )


@dataclasses.dataclass(frozen=True)
class DeviceTable:
    path: str = setting(
        settings.text('a path or a pattern of it, such as "/dev/disk/by-id/nvme-*"', r"/[^\x00-\x1f\x7f]{1,4095}"),
        "",
        "One of the device's names in /dev, links included.",
    )
    serial: str = setting(settings.text("a serial number or a pattern"), "", "The serial number that udev knows.")
    model: str = setting(settings.text("a model or a pattern of it"), "", "The model that udev knows.")
    size_min: int = setting(settings.size(0, 1 << 60), 0, "The least size.")
    size_max: int | None = setting(settings.size(0, 1 << 60), None, "The greatest size; without it, there is none.")


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings. ``sources`` are the files that were read, in order."""

    plugins: tuple[str, ...] = setting(
        settings.texts("a list of plugin names", _NAME),
        (),
        "Plugins to load, by name. What is installed but not named here is never imported.",
    )
    pool: PoolTable = table(PoolTable, "The devices of the pool, and where its index is.")
    device: tuple[DeviceTable, ...] = tables(
        DeviceTable,
        "A rule for devices that may belong to the pool, beside those in pool.devices. A device that fits all keys of "
        "one rule and carries this pool's label is opened when it appears. Nothing is ever claimed by a rule, and one "
        "without keys means no device.",
        reload=True,
    )
    socket: SocketTable = table(SocketTable, "Where clients connect.")
    nbd: NbdTable = table(NbdTable, "How Objects are served as block devices.")
    roles: RolesTable = table(
        RolesTable, "Who may do what, told by the user and the groups of the process that connects."
    )
    keygen: KeygenTable = table(KeygenTable, "How Objects are identified.")
    placer: PlacerTable = table(PlacerTable, "Where Objects are put.")
    keystore: KeystoreTable = table(KeystoreTable, "Where names and places of Objects are looked up.")
    erase: EraseTable = table(EraseTable, "What deletion does on the devices.")
    limits: LimitsTable = table(LimitsTable, "How much clients may ask at once, and how slow they may be.")
    scrub: ScrubTable = table(ScrubTable, "How everything that is stored is verified; see 'rustorctl scrub --help'.")
    mover: MoverTable = table(MoverTable, "How Objects are moved from device to device in the background.")
    log: LogTable = table(LogTable, "What is logged. Under systemd it goes to the journal, else to standard error.")
    sources: tuple[Path, ...] = ()


def load(file: Path | None = None) -> Config:
    """The configuration of ``file`` and of conf.d beside it; without ``file``, of `DEFAULT_FILE` if that exists.

    Raises ConfigError that names file, table and key.
    """
    main = DEFAULT_FILE if file is None else file
    sources = _drop_ins(main.parent / "conf.d")
    if file is not None or main.exists():
        sources.insert(0, main)
    merged: dict[str, Any] = {}
    for source in sources:
        _merge(merged, settings.parse_table(Config, _read(source), Place(source)))
    return _build(merged, tuple(sources))


def _drop_ins(directory: Path) -> list[Path]:
    """What is in conf.d. Only an absent one is like one that is empty."""
    try:
        return sorted(path for path in directory.iterdir() if path.suffix == ".toml")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(directory, error) from error


def _unreadable(path: Path, error: OSError) -> ConfigError:
    hint = "name another file, or let the user who runs this read it"
    return ConfigError(f"{path}: it cannot be read: {error.strerror}", hint=hint)


def _read(source: Path) -> dict[str, Any]:
    try:
        with source.open("rb") as opened:
            return tomllib.load(opened)
    except OSError as error:
        raise _unreadable(source, error) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: byte {error.start} is not UTF-8", hint="save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:  # also a number that is too long, or tables in tables without end
        raise ConfigError(f"{source}: {error}", hint="the file must be TOML, see https://toml.io") from error


def _merge(earlier: dict[str, Any], later: Mapping[str, Any]) -> None:
    for key, value in later.items():
        field = Config.__dataclass_fields__[key]
        if "table" in field.metadata:
            earlier[key] = {**earlier.get(key, {}), **value}
        elif "tables" in field.metadata:
            earlier[key] = earlier.get(key, ()) + value
        else:
            earlier[key] = value


def _build(merged: Mapping[str, Any], sources: tuple[Path, ...]) -> Config:
    values = dict(merged)
    for field in dataclasses.fields(Config):
        if "table" in field.metadata:
            values[field.name] = field.metadata["table"](**merged.get(field.name, {}))
    return Config(**values, sources=sources)


def changes(old: Config, new: Config) -> Iterator[tuple[str, bool]]:
    """Each setting that differs, as "table.key", and whether it counts without a restart."""
    for field in dataclasses.fields(Config):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if "table" in field.metadata:
            for name, entry in settings.settings_of(field.metadata["table"]):
                if getattr(before, name) != getattr(after, name):
                    yield f"{field.name}.{name}", entry.reload
        elif field.metadata and before != after:
            yield field.name, field.metadata.get("reload", False)
