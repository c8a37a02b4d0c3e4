"""The configuration: what is written is what counts, and each mistake is told with file, table and key."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import rustord.config
from rustord.config import Config, changes, load
from rustord.errors import ConfigError
from tests.conftest import PlainUser

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(text: str, name: str = "rustord.toml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write_file


# What is read


def test_without_files_the_defaults_count(write: Write) -> None:
    assert load(write("")) == Config(sources=(write(""),))


def test_each_kind_of_value(write: Write) -> None:
    config = load(
        write("""
            plugins = ["blake3"]
            [pool]
            devices = ["/dev/disk/by-id/ata-A", "/srv/pool.img"]
            directory = "/var/lib/elsewhere"
            [socket]
            path = "/tmp/r.sock"
            mode = "0600"
            [roles]
            readers = ["alice", "@backup", "1000", "@34"]
            [placer]
            policy = "mirrored"
            options = { copies = 3 }
            [erase]
            policy = "discard"
            [limits]
            idle = "5 min"
            connections = 7
            [log]
            slow_request = "250 ms"
        """)
    )
    assert config.plugins == ("blake3",)
    assert config.pool.devices == (Path("/dev/disk/by-id/ata-A"), Path("/srv/pool.img"))
    assert config.pool.directory == Path("/var/lib/elsewhere")
    assert config.socket.mode == 0o600
    assert config.roles.readers == ("alice", "@backup", "1000", "@34")
    assert dict(config.placer.options) == {"copies": 3}
    assert config.limits.of_frontend().idle_s == 300.0
    assert config.limits.of_frontend().connections == 7
    assert config.log.slow_request == 0.25


def test_device_rules_take_sizes_in_words_and_in_bytes(write: Write) -> None:
    config = load(write('[[device]]\nmodel = "QEMU*"\nsize_min = "1 GiB"\n[[device]]\nsize_max = 1048576\n'))
    assert [(rule.model, rule.size_min, rule.size_max) for rule in config.device] == [
        ("QEMU*", 1 << 30, config.device[1].__class__().size_max),
        (config.device[1].model, 0, 1 << 20),
    ]


def test_drop_ins_are_merged_in_the_order_of_their_names(write: Write) -> None:
    main = write('[pool]\ndirectory = "/main"\n[log]\nlevel = "error"\n[[device]]\nserial = "1"\n')
    write('[pool]\ndirectory = "/late"\n', "conf.d/20-late.toml")
    write('[pool]\ndirectory = "/early"\ndevices = ["/dev/x"]\n[[device]]\nserial = "2"\n', "conf.d/10-early.toml")
    write("this is not read", "conf.d/30-note.txt")
    config = load(main)
    assert config.pool.directory == Path("/late")
    assert config.pool.devices == (Path("/dev/x"),)
    assert config.log.level == "error"
    assert [rule.serial for rule in config.device] == ["1", "2"]
    assert [source.name for source in config.sources] == ["rustord.toml", "10-early.toml", "20-late.toml"]


def test_the_default_file_may_be_absent_but_not_one_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rustord.config, "DEFAULT_FILE", tmp_path / "rustord.toml")
    assert load() == Config()
    with pytest.raises(ConfigError, match=r"rustord\.toml: it cannot be read: No such file"):
        load(tmp_path / "rustord.toml")


# What is refused


@pytest.mark.parametrize("closed", ["conf.d", "."])
def test_what_may_not_be_read_is_not_taken_for_absent(plain_user: PlainUser, closed: str) -> None:
    """A pool would go by the defaults: each Object once, say, where it was to be there twice."""
    main = plain_user.directory / "rustord" / "rustord.toml"
    main.with_name("conf.d").mkdir(parents=True)
    (main.parent / closed).chmod(0)
    program = f"import rustord.config, pathlib; rustord.config.DEFAULT_FILE = pathlib.Path({str(main)!r})\n"
    program += "try: print(rustord.config.load())\nexcept rustord.errors.ConfigError as error: print('refused:', error)"
    done = plain_user.run(sys.executable, "-c", program)
    assert done.stdout.startswith(f"refused: {main.parent}/"), done
    assert "it cannot be read: Permission denied" in done.stdout


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("plugin = []", ": plugin: there is no such setting", "did you mean 'plugins'?"),
        ("[pools]", ": pools: there is no such setting", "did you mean 'pool'?"),
        ("[pool]\ndevice = []", ": [pool] device: there is no such setting", "did you mean 'devices'?"),
        ("[pool]\nxyzzy = 1", ": [pool] xyzzy: there is no such setting", "the settings here are: devices, directory"),
        ("[[device]]\nserail = 'x'", ": [device] serail: there is no such setting", "did you mean 'serial'?"),
        ("[pool]\ndevices = '/dev/sda'", ": [pool] devices: '/dev/sda' is not allowed", "it takes a list of absolute"),
        ("[pool]\ndevices = [1]", ": [pool] devices: [1] is not allowed", "it takes a list of absolute paths"),
        ("[pool]\ndirectory = 'here'", ": [pool] directory: 'here' is not allowed", "it takes an absolute path"),
        ("[socket]\nmode = 432", ": [socket] mode: 432 is not allowed", 'such as "0660"'),
        ("[socket]\nmode = '0999'", ": [socket] mode: '0999' is not allowed", 'such as "0660"'),
        ("[roles]\nadmins = ['a b']", ": [roles] admins: ['a b'] is not allowed", "it takes a list of users"),
        ("[placer]\npolicy = ''", ": [placer] policy: '' is not allowed", "it takes the name of a placer"),
        ("[placer]\noptions = 3", ": [placer] options: 3 is not allowed", "it takes a table of options"),
        ("[erase]\npolicy = 'shred'", ": [erase] policy: 'shred' is not allowed", 'one of "zero", "discard", "none"'),
        ("[limits]\nconnections = 0", ": [limits] connections: 0 is not allowed", "a whole number from 1 to 65,536"),
        ("[limits]\nconnections = true", ": [limits] connections: True is not allowed", "a whole number from 1 to"),
        ("[limits]\nconnections = 1.5", ": [limits] connections: 1.5 is not allowed", "a whole number from 1 to"),
        ("[limits]\nidle = 30", ": [limits] idle: 30 is not allowed", "a duration with its unit, from 1 s to 1 d"),
        ("[limits]\nidle = '30'", ": [limits] idle: '30' is not allowed: a duration is", "from 1 s to 1 d"),
        ("[limits]\nidle = '3 d'", ": [limits] idle: '3 d' is not allowed", "from 1 s to 1 d"),
        ("[[device]]\nsize_min = '1 Gb'", ": [device] size_min: '1 Gb' is not allowed: a size is", "it takes a size"),
        ("[[device]]\nsize_min = -1", ": [device] size_min: -1 is not allowed", "it takes a size"),
        ("[device]\nserial = 'x'", ": [device] must be an array of tables", "[[device]]"),
        ("pool = 3", ": [pool] must be a table", "[pool]"),
        ("[[pool]]", ": [pool] must be a table", "[pool]"),
        ("[pool", ": Expected ']' at the end of a table declaration (at end of document)", "toml.io"),
        ("[log]\nlevel='info'\nlevel='info'", ": Cannot overwrite a value", "toml.io"),
    ],
)
def test_each_mistake_is_told_with_file_table_and_key(write: Write, text: str, message: str, hint: str) -> None:
    main = write("")
    drop_in = write(text, "conf.d/50-site.toml")
    with pytest.raises(ConfigError) as caught:
        load(main)
    assert caught.value.message.startswith(f"{drop_in}{message}")
    assert hint in caught.value.hint


def test_a_file_that_is_not_utf8(write: Write) -> None:
    path = write("")
    path.write_bytes(b"[log]\n# \xff\n")
    with pytest.raises(ConfigError, match=r"rustord\.toml: byte 8 is not UTF-8"):
        load(path)


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 50_000])
def test_a_value_that_is_too_much_for_any_reader(write: Write, value: str) -> None:
    with pytest.raises(ConfigError, match=r"rustord\.toml: ") as caught:
        load(write(f"[pool]\nname = {value}\n"))
    assert caught.value.hint == "the file must be TOML, see https://toml.io"


def test_a_directory_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it cannot be read: Is a directory"):
        load(tmp_path)


# What a reload finds


def test_changes_say_what_needs_a_restart(write: Write) -> None:
    old = load(write(""))
    new = load(write('[log]\nlevel = "debug"\n[socket]\nmode = "0600"\n[[device]]\nserial = "1"\n'))
    assert dict(changes(old, new)) == {"log.level": True, "socket.mode": False, "device": True}
    assert list(changes(old, load(write("")))) == []
