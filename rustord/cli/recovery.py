"""The commands for a pool that is not well: pool check and pool rebuild."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rustord.cli.output import print_json, say
from rustord.cli.parameters import connect, json_option
from rustord.errors import Damaged
from rustord.quantity import human_size

if TYPE_CHECKING:
    from rustord.audit import Audit
    from rustord.blockdevice import BlockDevice
    from rustord.config import Config
    from rustord.keystore.backend import Backend
    from rustord.rebuild import Report

config_option = click.option(
    "--config", "file", type=click.Path(path_type=Path), help="The configuration [/etc/rustord/rustord.toml]."
)
directory_option = click.option(
    "--directory", type=click.Path(path_type=Path), help="Where the index is [as in the configuration]."
)
devices_argument = click.argument("devices", metavar="[DEVICE]...", nargs=-1, type=click.Path(path_type=Path))


@click.command()
@devices_argument
@config_option
@directory_option
@click.option("--without", type=int, multiple=True, metavar="INDEX", help="Do without this device, which is lost.")
@click.option("--replace", is_flag=True, help="Discard the index that is there.")
@click.option("--dry-run", is_flag=True, help="Only look, and say what would be found.")
@json_option
def rebuild(
    devices: tuple[Path, ...],
    file: Path | None,
    directory: Path | None,
    without: tuple[int, ...],
    replace: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make a lost index anew, from what the devices hold.

    Works while the daemon is stopped. All devices of the pool are needed: those that the configuration means, or each
    DEVICE that is named. They are read from end to end, and not written to.
    """
    from rustord.cli.transfer import Bar
    from rustord.config import load
    from rustord.rebuild import rebuild as make_anew

    config = load(file)
    opened = open_pool_devices(devices, config)
    with Bar("reading the devices", sum(device.size for device in opened)) as bar:
        report = make_anew(
            opened,
            backend=make_backend(config),
            directory=directory.absolute() if directory else config.pool.directory,
            without=without,
            replace=replace,
            dry_run=dry_run,
            progress=bar.advance,
        )
    if as_json:
        print_json(_plain(report))
    else:
        _say_report(report, dry_run)


def open_pool_devices(devices: Sequence[Path], config: Config, *, read_only: bool = True) -> list[BlockDevice]:
    """The devices that were named, or those that the configuration means, locked. Raises DeviceError, ConfigError."""
    from rustord.hotplug import find_devices
    from rustord.pool import open_devices

    return open_devices(devices or find_devices(config), read_only=read_only)


def make_backend(config: Config) -> Backend:
    """What the configuration chooses to keep the index in. Raises PluginError."""
    from rustord.plugins import PluginManager

    return PluginManager(config.plugins).make("keystore", config.keystore.backend, config.keystore.options)


def _plain(report: Report) -> dict[str, Any]:
    from rustord.objkey import uuid_text

    return {
        "uuid": uuid_text(report.pool_uuid),
        "name": report.pool_name,
        "objects": report.object_count,
        "data_bytes": report.data_bytes,
        "names": report.name_count,
        "volumes": report.volume_count,
        "to_erase": report.grave_count,
        "never_committed": report.void_count,
        "losses": list(report.losses),
        "doubtful": list(report.doubtful),
    }


def _say_report(report: Report, dry_run: bool) -> None:
    for text in (*report.losses, *report.doubtful):
        say(f"note: {text}")
    found = f"{report.object_count:,} Objects with {human_size(report.data_bytes)} of data, {report.name_count:,} names"
    say(f"{'would find' if dry_run else 'found'} {found}")
    if report.volume_count:
        say(f"volumes: {report.volume_count:,}")
    if report.grave_count:
        say(f"deleted, and left for the next start to erase: {report.grave_count:,}")
    if report.void_count:
        say(f"never committed, and left out: {report.void_count:,}")


@click.command()
@devices_argument
@config_option
@directory_option
@click.option("--online", is_flag=True, help="Ask the daemon for what it can tell at work.")
@click.option("--data", is_flag=True, help="Compare the checksums of all data, too.")
@click.option("--repair", is_flag=True, help="Put right what can be, after asking.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@click.pass_obj
def check(
    socket: Path | None,
    devices: tuple[Path, ...],
    file: Path | None,
    directory: Path | None,
    online: bool,
    data: bool,
    repair: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Check labels, journals, index, names, footers and free blocks.

    Works while the daemon is stopped, on all devices of the pool: those that the configuration means, or each DEVICE
    that is named. Without --repair nothing is changed. Fails if something is wrong that is not repaired; what a crash
    may leave is only told. With --online the daemon looks at labels, index, names and blocks.
    """
    if online:
        if devices or data or repair:
            raise click.UsageError("--online takes no DEVICE, and neither --data nor --repair")
        _check_online(socket, as_json)
        return
    from rustord.audit import Audit
    from rustord.cli.transfer import Bar
    from rustord.config import load

    config = load(file)
    opened = open_pool_devices(devices, config, read_only=not repair)
    with Bar("reading the devices", sum(device.size for device in opened)) as bar:
        audit = Audit(
            opened,
            backend=make_backend(config),
            directory=directory.absolute() if directory else config.pool.directory,
            policy=config.erase.policy,
            data=data,
            progress=bar.advance,
        )
    with audit:
        if not as_json:
            _say_findings(audit)
        repaired = repair and _repair(audit, yes, quiet=as_json)
    if as_json:
        print_json(_plain_findings(audit, repaired))
    wrong = [finding for finding in audit.findings if not finding.harmless]
    if any(not (repaired and finding.mend.value) for finding in wrong):
        raise click.exceptions.Exit(Damaged.exit_status)


def _check_online(socket: Path | None, as_json: bool) -> None:
    with connect(socket) as client:
        findings = client.check()
    if as_json:
        print_json({"findings": findings})
    else:
        for finding in findings:
            _say_finding(finding["kind"], finding["what"], finding["remedy"])
        say(f"{len(findings)} things are wrong" if findings else "nothing is wrong, as far as the daemon can tell")
    if findings:
        raise click.exceptions.Exit(Damaged.exit_status)


def _say_finding(kind: str, what: str, remedy: str) -> None:
    say(f"{kind}: {what}")
    say(f"  {remedy}")


def _repair(audit: Audit, yes: bool, *, quiet: bool) -> bool:
    """Say what will be done, and do it if that is wanted; whether it was done."""
    if not audit.plan:
        return False
    click.echo("\n".join(["--repair will", *(f"  - {mend.value}" for mend in audit.plan)]), err=quiet)
    if not yes and not click.confirm("Go on?", err=True):
        return False
    audit.mend()
    click.echo("done: check once more to see that all is well", err=quiet)
    return True


def _say_findings(audit: Audit) -> None:
    for finding in audit.findings:
        _say_finding(finding.kind, finding.what, finding.remedy)
    wrong = sum(not finding.harmless for finding in audit.findings)
    state = f"{wrong} things are wrong" if wrong else "nothing is wrong"
    say(f"{audit.object_count:,} Objects with {human_size(audit.data_bytes)} of data: {state}")


def _plain_findings(audit: Audit, repaired: bool) -> dict[str, Any]:
    return {
        "objects": audit.object_count,
        "data_bytes": audit.data_bytes,
        "findings": [
            {**finding.plain(), "repaired": repaired and bool(finding.mend.value)} for finding in audit.findings
        ],
    }


COMMANDS = (check, rebuild)
"""For the group ``pool``."""
