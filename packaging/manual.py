#!/usr/bin/env python3
"""Makes the manual pages, the shells' completions and systemd's message catalog of rustord.

    packaging/manual.py DIRECTORY

Everything that the program knows itself comes from there: commands and options, settings, exit statuses, events, the
guide for plugins. The rest of each page is Markdown in packaging/man, with `{name}` where such a part belongs.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = Path(__file__).resolve().parent / "man"
sys.path.insert(0, str(ROOT))

import click  # noqa: E402
from click.shell_completion import get_completion_class  # noqa: E402

from rustord import __version__  # noqa: E402
from rustord.cli import edge, reference  # noqa: E402
from rustord.cli.commands import rustorctl  # noqa: E402
from rustord.cli.rustord import rustord  # noqa: E402
from rustord.event import EVENTS  # noqa: E402

# What man(7) would take for a typographic sign or a command is typed as it is.
ESCAPES = str.maketrans({"\\": "\\e", "-": "\\-", "'": "\\(aq", "`": "\\(ga", "^": "\\(ha", "~": "\\(ti"})

COMMANDS = {"rustord": rustord, "rustorctl": rustorctl}
LINE = 78


# --- what the program knows, as Markdown


def options(command: click.Command, name: str) -> str:
    """A definition for each option of a command, but --help."""
    context = click.Context(command, info_name=name)
    records = (option.get_help_record(context) for option in command.params if isinstance(option, click.Option))
    return "\n".join(f"- **{names}**\\\n  {text}" for names, text in filter(None, records))


def commands(group: click.Group, name: str) -> Iterator[str]:
    """A section for each command of a group, and of the groups in it."""
    context = click.Context(group, info_name=name)
    for key in group.list_commands(context):
        command = group.get_command(context, key)
        assert command is not None
        path = f"{name} {key}"
        if isinstance(command, click.Group):
            yield from commands(command, path)
        elif not command.hidden:
            usage = " ".join(command.collect_usage_pieces(click.Context(command, info_name=path)))
            title, synopsis = f"## {path.partition(' ')[2]}", f"**{path}** {usage}"
            yield "\n\n".join((title, synopsis, help_text(command), options(command, path)))


def help_text(command: click.Command) -> str:
    """The text of --help, with what is to stay as it is (after a backspace) in a fence."""
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    return "\n\n".join(
        f"```\n{paragraph[1:].strip()}\n```" if paragraph.startswith("\b") else paragraph for paragraph in paragraphs
    )


def settings() -> str:
    """The tables of SETTINGS.md."""
    return "## " + reference.markdown().partition("\n## ")[2]


def exit_statuses() -> str:
    rows = re.findall(r"^(\d+) +(.*)$", edge.__doc__ or "", re.MULTILINE)
    return "\n".join(f"- **{status}**\\\n  {meaning}" for status, meaning in rows)


def events() -> str:
    return "\n".join(
        f"- **{event.subject}**\\\n  MESSAGE_ID={event.message_id}\\\n  {event.advice}" for event in EVENTS.values()
    )


def guide() -> str:
    """plugins/README.md without its title."""
    return (ROOT / "plugins" / "README.md").read_text().partition("\n")[2]


PARTS: dict[str, Callable[[], str]] = {
    "daemon options": lambda: options(rustord, "rustord"),
    "options": lambda: options(rustorctl, "rustorctl"),
    "commands": lambda: "\n\n".join(commands(rustorctl, "rustorctl")),
    "settings": settings,
    "exit statuses": exit_statuses,
    "events": events,
    "guide": guide,
}


# --- Markdown to man(7)


def manual_page(name: str, section: str, markdown: str) -> str:
    """A page in the language of man(7). Takes the Markdown that our own texts use, and no other."""
    day = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())))
    lines = [f'.TH {name.upper()} {section} "{day}" "rustord {__version__}" "rustord"']
    for block in blocks(markdown):
        after_heading = lines[-1].startswith((".SH", ".SS"))
        lines += [line for line in roff(block) if not (after_heading and line == ".PP")]
    return "\n".join(lines) + "\n"


def blocks(markdown: str) -> Iterator[str]:
    """Paragraphs, headings, fenced texts, tables and single items of lists."""
    pieces = re.split(r"^(```.*?^```)$", markdown, flags=re.MULTILINE | re.DOTALL)
    for piece in pieces:
        if piece.startswith("```"):
            yield piece
        else:
            for paragraph in re.split(r"\n\s*\n|\n(?=- )|(?<=\n)(?=#)", piece):
                if paragraph.strip():
                    yield paragraph.strip("\n")


def roff(block: str) -> list[str]:
    if block.startswith("```"):
        body = block.partition("\n")[2].rpartition("\n")[0]
        return [".PP", ".in +4n", ".nf", *(plain(line) for line in body.split("\n")), ".fi", ".in"]
    if block.startswith("#"):
        level, _, title = block.partition(" ")
        return [f".SH {inline(title.upper())}" if len(level) == 1 else f".SS {inline(title)}"]
    if block.startswith("|"):
        return [line for row in block.split("\n")[2:] for line in table_row(row)]
    if block.startswith("- "):
        term, parted, text = block[2:].partition("\\\n")
        if parted:
            return [".TP", inline(term), *filled(text)]
        return [".IP \\(bu 2", *filled(block[2:])]
    return [".PP", *filled(block)]


def table_row(row: str) -> list[str]:
    first, *others = (cell.strip() for cell in row.strip("|").split(" | "))
    return [".TP", inline(first), *filled(", ".join(filter(None, others)))]


def filled(text: str) -> list[str]:
    """Lines of text, broken where a line of the source has a backslash."""
    lines: list[str] = []
    for number, part in enumerate(re.split(r"\\\n", text)):
        lines += [".br"] if number else []
        words = textwrap.wrap(" ".join(part.split()), LINE, break_long_words=False, break_on_hyphens=False)
        lines += [inline(line) for line in join_marks(words)]
    return lines


def join_marks(lines: list[str]) -> Iterator[str]:
    """The lines, joined where one ends within a mark such as `code` or **bold**."""
    held = ""
    for line in lines:
        held = f"{held} {line}".strip()
        if held.count("`") % 2 == 0 and held.count("**") % 2 == 0 and held.count("[") == held.count("]"):
            yield held
            held = ""
    if held:
        yield held


def inline(text: str) -> str:
    """A line with its marks: code and bold text in bold, emphasis in italics, links by their text."""
    text = re.sub(r"\[([^]]+)\]\((https?://[^)]+)\)", r"\1 (\2)", text)
    text = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", text)
    result = ""
    for part in re.split(r"(\*\*`[^`]+`\*\*|`[^`]+`|\*\*.+?\*\*|(?<!\w)\*[^*\s][^*]*\*)", text):
        if part.startswith(("`", "**")):
            result += f"\\fB{escaped(part.strip('*').strip('`'))}\\fR"
        elif part.startswith("*") and part.endswith("*") and len(part) > 2:
            result += f"\\fI{escaped(part.strip('*'))}\\fR"
        else:
            result += escaped(part)
    return f"\\&{result}" if result.startswith((".", "'")) else result


def plain(line: str) -> str:
    return f"\\&{escaped(line)}" if line.startswith((".", "'")) else escaped(line)


def escaped(text: str) -> str:
    return text.translate(ESCAPES)


# --- the files


def write_manual(directory: Path) -> None:
    for source in sorted(PAGES.glob("*.md")):
        name, section, _ = source.name.rsplit(".", 2)
        text = re.sub(r"^\{([a-z ]+)\}$", lambda found: PARTS[found[1]](), source.read_text(), flags=re.MULTILINE)
        (directory / f"{name}.{section}").write_text(manual_page(name, section, text))


def write_completions(directory: Path) -> None:
    for shell, pattern in {"bash": "{}", "zsh": "_{}", "fish": "{}.fish"}.items():
        (directory / shell).mkdir(exist_ok=True)
        found = get_completion_class(shell)
        assert found is not None
        for name, command in COMMANDS.items():
            script = found(command, {}, name, f"_{name.upper()}_COMPLETE")
            (directory / shell / pattern.format(name)).write_text(script.source_template % script.source_vars())


def write_catalog(directory: Path) -> None:
    entries = (
        f"-- {event.message_id}\nSubject: {event.subject}\nDefined-By: rustord\nDocumentation: man:rustord(8)\n\n"
        f"{textwrap.fill(event.advice, LINE)}\n"
        for event in EVENTS.values()
    )
    (directory / "rustord.catalog").write_text("\n".join(entries))


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit((__doc__ or "").strip())
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    write_manual(directory)
    write_completions(directory)
    write_catalog(directory)


if __name__ == "__main__":
    main()
