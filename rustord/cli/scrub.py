"""The commands of scrubbing: have everything that is stored read and verified."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from rustord.cli.edge import Commands
from rustord.cli.output import print_facts, print_json, say
from rustord.cli.parameters import ask_patiently, connect, json_option
from rustord.errors import Damaged, RustordError
from rustord.quantity import human_size

_POLL_S = 1.0


@click.group(cls=Commands)
def scrub() -> None:
    """Verify everything that is stored, and mend what is damaged.

    All copies of all Objects are read from the devices, in their order, at
    the rate that the configuration allows ([scrub] rate), and compared with
    their checksums. What is damaged is made good from another copy, on other
    blocks; the bad ones are never used again.
    """


@scrub.command()
@click.option("--again", is_flag=True, help="Begin from the start, not where the last one was stopped.")
@click.option("--wait", is_flag=True, help="Wait for the end; fail if something is damaged and not mended.")
@json_option
@click.pass_obj
def start(socket: Path | None, again: bool, wait: bool, as_json: bool) -> None:
    """Begin, or go on where it was stopped."""
    with connect(socket) as client:
        report = client.start_scrub(again=again)
        while wait and report["running"]:
            time.sleep(_POLL_S)
            report = ask_patiently(client.scrub)
    _show(report, as_json)
    if wait:
        _judge(report)


@scrub.command()
@json_option
@click.pass_obj
def stop(socket: Path | None, as_json: bool) -> None:
    """End it where it is; 'start' goes on from there."""
    with connect(socket) as client:
        _show(client.stop_scrub(), as_json)


@scrub.command()
@json_option
@click.pass_obj
def status(socket: Path | None, as_json: bool) -> None:
    """Show how far it is, and what it, or the last one, has found."""
    with connect(socket) as client:
        _show(client.scrub(), as_json)


def _judge(report: dict[str, Any]) -> None:
    if report["state"] != "done":
        raise RustordError(f"the scrub is {report['state']}: {report['error'] or 'somebody ended it'}")
    left = report["damaged"] - report["mended"]
    if left:
        raise Damaged(f"{left} chunks are damaged and not mended", hint="'rustorctl scrub status' lists the Objects")


def _show(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    print_facts(_facts(report))
    for damaged in report["damaged_objects"]:
        ranges = ", ".join(_range_text(part) for part in damaged["ranges"])
        name = f" ({damaged['name']})" if damaged["name"] else ""
        say(f"{damaged['state']}: {damaged['uuid']}{name}: {ranges}" + (damaged["reason"] and f": {damaged['reason']}"))


def _facts(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    done, total = report["done_bytes"], max(report["total_bytes"], report["done_bytes"])
    yield "Scrub", report["state"] + (f": {report['error']}" if report["error"] else "")
    if report["state"] == "never":
        return
    yield "Began", _time_text(report["began"])
    if report["ended"]:
        yield "Ended", _time_text(report["ended"])
    else:
        where = f"at block {report['block']:,} of device {report['device']}"
        yield "Read", f"{human_size(done)} of {human_size(total)} ({done / total if total else 1:.0%}), {where}"
    yield "Examined", f"{report['copies']:,} copies, {report['unread']:,} more on missing devices"
    yield "Damaged", f"{report['damaged']:,} chunks and footers, {report['mended']:,} mended, {report['lost']:,} lost"
    yield "Transient", f"{report['transient']:,} read wrong only once"
    bad = report["bad_extents"]
    if bad:
        yield "Bad blocks", ", ".join(f"{e['block']}+{e['count']} on device {e['device']}" for e in bad[:10])


def _range_text(part: dict[str, Any]) -> str:
    what = "footer" if part["what"] == "footer" else f"bytes {part['start']} to {part['end'] - 1}"
    return f"{what} of copy {part['copy']}"


def _time_text(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


COMMANDS = (scrub,)
