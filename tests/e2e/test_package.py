"""The Debian package, installed on a machine that has booted, as the README says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from rustord.event import DEVICE_BACK, POOL_OPENED
from tests import container as containers
from tests.container import Container
from tests.e2e.test_nbd_clients import loop_over, mounted
from tests.frontends.nbdserved import NbdPeer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text().partition("## On real disks")[2].partition("\n## ")[0]
MIB = 1 << 20
SOCKET = Path("/run/rustord/rustord.sock")
VERSION, OLD_VERSION = "0.1.0-1", "0.1.0-0.1"

pytestmark = pytest.mark.root


class Debs(NamedTuple):
    """Directories with the packages of this version, and with the same as if they were of the one before."""

    new: Path
    old: Path


@pytest.fixture(scope="module")
def debs(tmp_path_factory: pytest.TempPathFactory) -> Debs:
    if shutil.which("pybuild") is None or shutil.which("lintian") is None:
        pytest.skip("there is no debhelper or lintian; `./dev package` brings them")
    debs = Debs(tmp_path_factory.mktemp("new"), tmp_path_factory.mktemp("old"))
    run(sys.executable, ROOT / "packaging" / "build.py", debs.new, "deb")
    for path in debs.new.glob("*.deb"):
        tree = tmp_path_factory.mktemp("tree")
        run("dpkg-deb", "--raw-extract", path, tree)
        control = tree / "DEBIAN" / "control"
        control.write_text(control.read_text().replace(VERSION, OLD_VERSION))
        run("dpkg-deb", "--root-owner-group", "--build", tree, debs.old / path.name)
    return debs


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


class Machine:
    """A machine with a pool on loop devices of its own, set up as the README says."""

    def __init__(self, container: Container, images: list[Path]) -> None:
        self.container, self.images = container, images
        self.loops = [container.new_loop(image) for image in images]
        container.ok("useradd", "alice")
        container.ok("useradd", "mallory")

    def install(self, debs: Path) -> None:
        """Copy the packages onto the machine and type what the README says about that."""
        dist = self.container.files / "root" / "dist"
        shutil.rmtree(dist, ignore_errors=True)
        shutil.copytree(debs, dist)
        self.type("apt install")

    def set_up(self) -> None:
        self.type("rustorctl pool create")
        (configuration,) = re.findall(r"^```toml\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
        (self.container.files / "etc/rustord/rustord.toml").write_text(self.adapted(configuration))
        self.type("systemctl start")

    def type(self, beginning: str) -> str:
        """What the block of the README that begins like this prints."""
        (block,) = re.findall(rf"^```sh\n({beginning}.*?)^```$", README, re.MULTILINE | re.DOTALL)
        return self.container.sh(f"cd /root\n{self.adapted(block)}")

    def adapted(self, text: str) -> str:
        """With this machine's devices, and with nobody to answer apt."""
        text = text.replace("apt install", "DEBIAN_FRONTEND=noninteractive apt-get install --yes")
        for name, loop in zip(("ONE", "TWO"), self.loops, strict=True):
            text = text.replace(f"/dev/disk/by-id/ata-{name}", str(loop.path))
        return text

    def rustorctl(self, *arguments: str, user: str = "alice") -> str:
        return self.container.ok("rustorctl", *arguments, user=user)

    def put(self, name: str, data: str = "data") -> None:
        self.container.ok("rustorctl", "put", "-", "--name", name, user="alice", input=data)

    @property
    def nbd_socket(self) -> Path:
        """Where clients on the host find the machine's block devices."""
        return self.container.files / "run/rustord/nbd.sock"

    def uri(self, name: str) -> str:
        return f"nbd+unix:///{name}?socket={self.nbd_socket}"

    def show(self, what: str, unit: str = "rustord.service") -> str:
        """A property of a unit."""
        return self.container.ok("systemctl", "show", "--value", f"--property={what}", unit).strip()

    def messages(self, *matches: str) -> list[dict[str, str]]:
        """What the journal has that matches, oldest first."""
        lines = self.container.ok("journalctl", "--boot", "--output=json", *matches).splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def machine(debian: Path, debs: Debs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine whose pool is served; shared by the tests, each of which leaves it as it found it."""
    with containers.booted(debian) as container:
        machine = Machine(container, images(tmp_path_factory.mktemp("images")))
        machine.install(debs.new)
        machine.set_up()
        yield machine
        assert "Traceback" not in container.ok("journalctl", "--boot", "--unit=rustord")


def images(directory: Path) -> list[Path]:
    made = [directory / name for name in ("one.img", "two.img")]
    for path in made:
        with path.open("xb") as file:
            file.truncate(64 * MIB)
    return made


# What is there once it is installed


def test_it_serves_at_once_and_after_every_boot(machine: Machine) -> None:
    units = ["rustord.service", "rustord.socket", "rustord-nbd.socket", "rustord-scrub.timer"]
    assert set(machine.container.ok("systemctl", "is-active", *units).split()) == {"active"}
    assert set(machine.container.ok("systemctl", "is-enabled", *units).split()) == {"enabled"}


def test_a_member_of_the_group_may_use_it(machine: Machine) -> None:
    machine.put("greeting", "hello")
    assert machine.rustorctl("get", "greeting") == "hello"
    curl = ["curl", "-sS", "--unix-socket", SOCKET, "http://r/v1/names/greeting"]
    assert machine.container.ok(*curl, user="alice") == "hello"
    machine.rustorctl("delete", "greeting")
    assert machine.container.run("rustorctl", "get", "greeting", user="alice").returncode == 3


def test_another_user_may_not_even_connect(machine: Machine) -> None:
    refused = machine.container.run("rustorctl", "status", user="mallory")
    assert refused.returncode == 8
    assert "may not be used" in refused.stderr


def test_the_status_line_tells_how_the_pool_is(machine: Machine) -> None:
    assert re.fullmatch(r"main is ok: 0 Objects, .* free on 2 devices", machine.show("StatusText"))


def test_the_manual_is_there(machine: Machine) -> None:
    for page in ("man8/rustord.8", "man1/rustorctl.1", "man5/rustord.toml.5", "man7/rustord-plugins.7"):
        machine.container.ok("test", "-s", f"/usr/share/man/{page}.gz")


def test_udev_knows_whose_the_devices_are(machine: Machine) -> None:
    def properties(path: Path) -> str:
        return machine.container.ok("udevadm", "info", "--query=property", path)

    for loop in machine.loops:
        machine.container.until(
            lambda path=loop.path: "ID_FS_TYPE=rustor_member\n" in properties(path), "udev knows the label"
        )
        (link,) = re.findall(r"/dev/disk/by-id/rustord-\S+", properties(loop.path))
        assert machine.container.ok("readlink", "--canonicalize", link).strip() == str(loop.path)


def test_objects_are_block_devices_on_the_other_socket(machine: Machine) -> None:
    greeting = "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/rustord/nbd.sock'); print(s.recv(8))"
    assert machine.container.ok("python3", "-c", greeting, user="alice") == "b'NBDMAGIC'\n"
    assert "PermissionError" in machine.container.run("python3", "-c", greeting, user="mallory").stderr


# The sandbox


def refusal(machine: Machine, device: str | Path) -> str:
    """What a process that is subject to the service's rules is told when it opens a device; empty if it can."""
    hierarchies = machine.container.ok("cat", f"/proc/{machine.show('MainPID')}/cgroup").splitlines()
    (group,) = (line.removeprefix("0::") for line in hierarchies if line.startswith("0::"))
    inside = f"echo $$ > /sys/fs/cgroup{group}/cgroup.procs; exec head --bytes=1 $0"
    return machine.container.run("sh", "-euc", inside, device).stderr


def test_it_opens_block_devices_and_no_others(machine: Machine) -> None:
    assert refusal(machine, machine.loops[0].path) == ""
    for name, *numbers in (("loop-control", "10", "237"), ("kernel-messages", "1", "11")):
        machine.container.ok("mknod", device := f"/dev/{name}", "c", *numbers)
        assert "Operation not permitted" in refusal(machine, device)


def test_it_can_be_confined_to_the_devices_of_the_pool(machine: Machine, tmp_path: Path) -> None:
    (image := tmp_path / "other.img").write_bytes(bytes(MIB))
    other = machine.container.new_loop(image)
    allowed = "".join(f"DeviceAllow={loop.path} rw\n" for loop in machine.loops)
    assert refusal(machine, other.path) == ""
    with drop_in(machine, f"[Service]\nDeviceAllow=\n{allowed}"):
        assert machine.show("StatusText").startswith("main is ok")
        assert refusal(machine, machine.loops[0].path) == ""
        assert "Operation not permitted" in refusal(machine, other.path)


def test_its_exposure_is_small(machine: Machine) -> None:
    machine.container.ok("systemd-analyze", "security", "--threshold=20", "rustord.service")


def test_a_credential_is_for_the_service_alone(machine: Machine) -> None:
    (secret := machine.container.files / "root/secret").write_text("open sesame\n")
    secret.chmod(0o600)
    read = "import sys; from rustord.settings import credential; print(credential(sys.argv[1]))"
    service = ["systemd-run", "--wait", "--pipe", "--quiet", "-pUser=rustord", "-pLoadCredential=password:/root/secret"]
    assert machine.container.ok(*service, "/usr/bin/python3", "-c", read, "password") == "open sesame\n"
    refused = machine.container.run(*service, "/usr/bin/python3", "-c", read, "/root/secret")
    assert "there is no credential '/root/secret'" in refused.stderr


# The journal


def test_the_journal_finds_events_devices_and_objects(machine: Machine) -> None:
    (opened, *_) = machine.messages("--unit=rustord", f"MESSAGE_ID={POOL_OPENED.message_id}")
    assert re.fullmatch(r"pool .* is open after .* s: \d+ Objects", opened["MESSAGE"])
    explained = machine.container.ok("journalctl", "--boot", "-x", f"MESSAGE_ID={POOL_OPENED.message_id}")
    assert f"Subject: {POOL_OPENED.subject}" in explained
    assert "man:rustord(8)" in explained


# Accidents


def test_what_is_killed_starts_again_with_all_data(machine: Machine) -> None:
    machine.put("kept", "x" * 100_000)
    before = machine.show("MainPID")
    machine.container.ok("systemctl", "kill", "--signal=KILL", "rustord")
    machine.container.until(lambda: machine.show("MainPID") not in ("0", before), "systemd has started it again")
    assert machine.rustorctl("get", "kept") == "x" * 100_000  # the socket lets it wait until the pool is open
    assert int(machine.show("NRestarts")) > 0
    machine.rustorctl("delete", "kept")


def test_what_hangs_is_started_again(machine: Machine) -> None:
    machine.put("kept")
    override = "[Service]\nWatchdogSec=1\nRestartSec=100ms\n"
    with drop_in(machine, override):
        before = machine.show("MainPID")
        machine.container.ok("systemctl", "kill", "--signal=STOP", "rustord")
        machine.container.until(lambda: machine.show("MainPID") not in ("0", before), "systemd has started it again")
        assert machine.rustorctl("get", "kept") == "data"
        assert any("Watchdog timeout" in entry["MESSAGE"] for entry in machine.messages("--unit=rustord"))
        assert any("most recent call first" in entry["MESSAGE"] for entry in machine.messages("--unit=rustord"))
    machine.rustorctl("delete", "kept")


def test_what_needs_a_person_stops_and_clients_are_told(machine: Machine) -> None:
    machine.put("kept")
    container = machine.container
    container.sh("systemctl stop rustord.service; cp -a /var/lib/rustord /root/old; systemctl start rustord.service")
    container.sh("systemctl stop rustord.service; mv /var/lib/rustord /root/new; mv /root/old /var/lib/rustord")
    assert container.run("systemctl", "start", "rustord.service").returncode != 0
    container.until(lambda: machine.show("ActiveState") == "failed", "the service has failed")
    assert machine.show("ExecMainStatus") == "13"
    assert "the index is older (generation " in machine.show("StatusText")
    assert "put back the index directory" in container.run("systemctl", "status", "rustord").stdout
    refused = container.run("rustorctl", "status", user="alice")
    assert refused.returncode == 8
    assert "rustord cannot start: the index is older (generation " in refused.stderr
    assert "hint: put back the index directory" in refused.stderr
    with NbdPeer(machine.nbd_socket, flags=None) as peer:
        assert peer.is_ended()
    container.until(lambda: machine.show("ActiveState") == "failed", "the service has failed again")
    assert machine.show("NRestarts") == "0"
    container.sh("rm -r /var/lib/rustord; mv /root/new /var/lib/rustord")
    assert machine.rustorctl("get", "kept") == "data"
    machine.rustorctl("delete", "kept")


def test_a_client_waits_for_disks_that_are_late(machine: Machine) -> None:
    machine.put("kept")
    machine.container.ok("systemctl", "stop", "rustord.service")
    for loop in machine.loops:
        machine.container.unplug(loop)
    get = machine.container.command("rustorctl", "get", "kept", user="alice")
    with subprocess.Popen(get, stdout=subprocess.PIPE, text=True) as client:
        machine.container.until(lambda: machine.show("StatusText").startswith("none of /dev/loop"), "it has tried")
        machine.container.until(lambda: machine.show("NRestarts") != "0", "systemd has it try again")
        assert client.poll() is None
        for loop, image in zip(machine.loops, machine.images, strict=True):
            machine.container.plug(loop, image)
        assert client.communicate(timeout=60)[0] == "data"
    machine.container.until(lambda: "State    ok" in machine.rustorctl("status"), "both devices are taken in")
    machine.rustorctl("delete", "kept")


class drop_in:
    """Lets the service run with other settings for a while."""

    def __init__(self, machine: Machine, text: str) -> None:
        self._machine, self._text = machine, text
        self._directory = machine.container.files / "etc/systemd/system/rustord.service.d"

    def __enter__(self) -> None:
        self._directory.mkdir()
        (self._directory / "test.conf").write_text(self._text)
        self._restart()

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self._directory)
        self._restart()

    def _restart(self) -> None:
        self._machine.container.sh("systemctl daemon-reload; systemctl restart rustord")


def test_a_client_starts_it_through_the_socket(machine: Machine) -> None:
    machine.container.ok("systemctl", "stop", "rustord.service")
    assert machine.show("ActiveState") == "inactive"
    assert "State    ok" in machine.rustorctl("status")
    assert machine.show("ActiveState") == "active"


def test_a_restart_turns_no_client_away(machine: Machine) -> None:
    clients = "for i in $(seq 40); do curl -sSf -o /dev/null --unix-socket $0 http://r/v1/pool; done"
    restart = "systemctl restart rustord; systemctl restart rustord"
    machine.container.ok("sh", "-euc", f"({restart}) & {clients}; wait $!", SOCKET)


def test_a_restart_drops_no_client_of_a_block_device(machine: Machine) -> None:
    machine.rustorctl("volume", "create", "disk", "--size", "24MiB")
    job = ["--name=x", "--ioengine=nbd", f"--uri={machine.uri('disk')}", "--rw=randrw", "--bs=4k", "--size=24M"]
    job += ["--iodepth=16", "--rate_iops=1200", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"]
    before = machine.show("MainPID")
    restarts = 0

    def is_busy(name: str) -> bool:
        exports = json.loads(machine.rustorctl("exports", "--json"))
        return any(export["name"] == name and export["requests"] for export in exports)

    with subprocess.Popen(["fio", *job], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as fio:
        while fio.poll() is None:
            machine.container.until(lambda: fio.poll() is not None or is_busy("disk"), "fio is served")
            machine.container.ok("systemctl", "restart", "rustord")
            restarts += 1
        assert fio.returncode == 0, fio.stdout and fio.stdout.read()
    assert restarts > 1
    assert machine.show("MainPID") != before
    assert machine.show("NFileDescriptorStore") == "0"
    machine.rustorctl("volume", "delete", "disk")


def test_a_stop_drops_them(machine: Machine) -> None:
    machine.put("greeting", "hello")
    with NbdPeer(machine.nbd_socket) as peer:
        peer.go("greeting")
        machine.container.until(lambda: "greeting" in machine.rustorctl("exports"), "it is open")
        machine.container.ok("systemctl", "stop", "rustord.service")
        assert peer.is_ended()
    machine.rustorctl("delete", "greeting")  # which starts it


def test_a_device_that_appears_again_is_taken_in(machine: Machine) -> None:
    machine.put("kept")
    machine.container.ok("systemctl", "stop", "rustord.service")
    lost, image = machine.loops[1], machine.images[1]
    machine.container.unplug(lost)
    machine.container.ok("systemctl", "start", "rustord.service")
    assert machine.show("StatusText").startswith("main is degraded; device 1 is missing")
    machine.container.plug(lost, image)
    machine.container.until(lambda: "State    ok" in machine.rustorctl("status"), "the device is back")
    back = machine.messages(f"MESSAGE_ID={DEVICE_BACK.message_id}", f"RUSTORD_DEVICE={lost.path}")
    assert back[-1]["MESSAGE"] == f"device 1 is back: {lost.path}"
    assert machine.rustorctl("get", "kept") == "data"
    machine.rustorctl("delete", "kept")


def test_a_reload_applies_what_can_be_applied(machine: Machine) -> None:
    machine.container.ok("adduser", "mallory", "rustord")
    assert machine.rustorctl("ls", user="mallory") == ""
    roles = machine.container.files / "etc/rustord/conf.d/roles.toml"
    roles.write_text("[roles]\nwriters = ['alice']\n[erase]\npolicy = 'none'\n")
    before = machine.show("MainPID")
    machine.container.ok("systemctl", "reload", "rustord")
    machine.container.until(
        lambda: machine.container.run("rustorctl", "ls", user="mallory").returncode == 7, "the roles are those"
    )
    assert machine.show("MainPID") == before
    assert "erase.policy has changed, and takes effect when rustord is started again" in machine.container.journal()
    roles.write_text("[roles]\nwriters = 'alice'\n")
    machine.container.ok("systemctl", "reload", "rustord")
    machine.container.until(lambda: "the configuration stays as it was" in machine.container.journal(), "it is refused")
    roles.unlink()
    machine.container.ok("deluser", "mallory", "rustord")
    machine.container.ok("systemctl", "reload", "rustord")


# From the first installation to the last


@pytest.fixture
def bare(container: Container, tmp_path: Path) -> Machine:
    """A machine on which nothing has been installed."""
    return Machine(container, images(tmp_path))


def test_without_a_configuration_nothing_runs_and_nothing_has_failed(bare: Machine, debs: Debs) -> None:
    bare.install(debs.new)
    assert bare.container.ok("systemctl", "--failed", "--no-legend") == ""
    assert bare.show("ActiveState") == bare.show("ActiveState", "rustord.socket") == "inactive"
    assert bare.container.run("rustorctl", "status").returncode == 8


def test_an_upgrade_is_a_restart_and_a_purge_keeps_the_pool(bare: Machine, debs: Debs, disk_path: Path) -> None:
    bare.install(debs.old)
    bare.set_up()
    bare.put("kept", "hello")
    bare.rustorctl("volume", "create", "disk", "--size", "32MiB")
    before = bare.show("MainPID")
    clients = "while [ ! -e /tmp/done ]; do curl -sSf -o /dev/null --unix-socket $0 http://r/v1/pool; done"
    with (bare.container.files / "tmp/clients").open("wb") as said:
        waiting = subprocess.Popen(
            bare.container.command("sh", "-euc", clients, SOCKET), stdout=said, stderr=said, stdin=subprocess.DEVNULL
        )
    with loop_over(bare.uri("disk"), disk_path / "fuse") as device:
        run("mkfs.ext4", "-q", device)
        (target := disk_path / "target").mkdir()
        with mounted(device, target, "rw"):
            writes = f"while [ ! -e {disk_path}/done ]; do date >> {target}/log; sync {target}/log; done"
            with subprocess.Popen(["sh", "-euc", writes]) as writer:
                bare.install(debs.new)
                (disk_path / "done").touch()
            assert writer.returncode == 0
            assert (target / "log").stat().st_size > 0
        run("fsck.ext4", "-fn", device)
    (bare.container.files / "tmp/done").touch()
    assert waiting.wait(60) == 0, (bare.container.files / "tmp/clients").read_text()
    assert bare.container.ok("dpkg-query", "--showformat=${Version}", "--show", "rustord") == VERSION
    assert bare.show("MainPID") != before
    assert bare.rustorctl("get", "kept") == "hello"

    done = bare.container.run("apt-get", "purge", "--yes", "rustord", "python3-rustord")
    assert done.returncode == 0, done
    assert "the Objects are still on their devices" in done.stdout + done.stderr
    assert bare.container.run("systemctl", "cat", "rustord.service").returncode != 0
    bare.install(debs.new)
    bare.container.ok("systemctl", "restart", "rustord.service")
    assert bare.rustorctl("get", "kept") == "hello"


def test_the_smoke_test_of_the_package_passes(bare: Machine, debs: Debs) -> None:
    bare.install(debs.new)
    smoke = (ROOT / "packaging" / "debian" / "tests" / "smoke").read_text()
    assert "smoke" in bare.container.ok("sh", "-s", input=smoke)


def test_lintian_has_nothing_to_say(debs: Debs) -> None:
    (changes,) = debs.new.glob("*.changes")
    run("lintian", "--allow-root", "--fail-on=error,warning", changes)
