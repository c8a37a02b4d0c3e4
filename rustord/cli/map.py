"""The command pool map: pictures of the devices."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from rustord.cli.output import print_json, say
from rustord.cli.parameters import connect, json_option
from rustord.quantity import human_size

_ROWS = 8
_SVG_COLUMNS, _SVG_ROWS, _SVG_CELL = 128, 32, 8
_SHADES = "·░▒▓█"
_PLAIN_SHADES = ".:=+#"
"""Where the output cannot show the others."""
_RESERVED, _BAD = "-", "X"
_COLOURS = {"free": "#e8eef2", "used": "#1f6f8b", "reserved": "#a0a7ad", "bad": "#c0392b"}


@click.command("map")
@click.argument("device", required=False)
@click.option("--svg", type=click.Path(path_type=Path, dir_okay=False), help="Draw into this file instead.")
@json_option
@click.pass_obj
def map_devices(socket: Path | None, device: str | None, svg: Path | None, as_json: bool) -> None:
    """Draw what is used, free and bad on DEVICE, or on each one.

    DEVICE is an index, uuid or path.
    """
    columns = min(shutil.get_terminal_size().columns, 128)
    cells = _SVG_COLUMNS * _SVG_ROWS if svg or as_json else columns * _ROWS
    with connect(socket) as client:
        which = [device] if device else [str(one["index"]) for one in client.devices()]
        maps = [client.map_device(one, cells=cells) for one in which]
    if as_json:
        print_json(maps)
    elif svg:
        svg.write_text(draw_svg(maps), encoding="utf-8")
    else:
        for one in maps:
            _print_map(one, columns)


def _print_map(told: Mapping[str, Any], columns: int) -> None:
    say(_title(told))
    cells = characters(told, _SHADES if _can_show(_SHADES) else _PLAIN_SHADES)
    for start in range(0, len(cells), columns):
        click.echo(cells[start : start + columns])
    say(_fragmentation(told))


def characters(told: Mapping[str, Any], shades: str) -> str:
    """One character for each cell; only an empty one gets the first shade, and only a full one the last."""
    last = len(shades) - 1
    cells = [shades[0 if not used else last if used >= 1 else 1 + int(used * (last - 1))] for used in told["used"]]
    for mark, marked in ((_RESERVED, told["reserved"]), (_BAD, told["bad"])):
        for cell in marked:
            cells[cell] = mark
    return "".join(cells)


def _can_show(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _title(told: Mapping[str, Any]) -> str:
    cell = told["size_bytes"] // max(1, len(told["used"]))
    return (
        f"Device {told['index']} ({told['path'] or told['state']}), {human_size(told['size_bytes'])}; "
        f"a cell is {human_size(cell)}; {_RESERVED} labels and journal, {_BAD} bad"
    )


def _fragmentation(told: Mapping[str, Any]) -> str:
    return (
        f"{human_size(told['free_bytes'])} are free in {told['free_runs']:,} runs, the longest of "
        f"{human_size(told['longest_free_run_bytes'])}"
    )


def draw_svg(maps: Sequence[Mapping[str, Any]]) -> str:
    """A picture of the devices, one below the other."""
    from xml.sax.saxutils import escape

    size, height = _SVG_CELL, (_SVG_ROWS + 4) * _SVG_CELL
    width = _SVG_COLUMNS * size
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height * len(maps)}" '
        f'font-family="monospace" font-size="{size + 3}">'
    ]
    for number, told in enumerate(maps):
        top = number * height + 2 * size
        title = escape(f"{_title(told)}. {_fragmentation(told)}")
        parts.append(f'<text x="0" y="{top - size / 2}">{title}</text>')
        for cell, (used, kind) in enumerate(zip(told["used"], _kinds(told), strict=True)):
            x, y = cell % _SVG_COLUMNS * size, top + cell // _SVG_COLUMNS * size
            box = f'<rect x="{x}" y="{y}" width="{size - 1}" height="{size - 1}"'
            parts.append(f'{box} fill="{_COLOURS["free" if kind == "used" else kind]}"/>')
            if kind == "used" and used:
                parts.append(f'{box} fill="{_COLOURS["used"]}" fill-opacity="{max(used, 0.15):.2f}"/>')
    return "\n".join([*parts, "</svg>\n"])


def _kinds(told: Mapping[str, Any]) -> list[str]:
    kinds = ["used"] * len(told["used"])
    for kind in ("reserved", "bad"):
        for cell in told[kind]:
            kinds[cell] = kind
    return kinds
