"""The settings, printed: as a reference to read (SETTINGS.md) and as an example configuration to edit."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from rustord import defaults
from rustord.config import Config
from rustord.settings import Setting, settings_of

OPTIONS = {"placer": {"striped": defaults.StripedOptions, "mirrored": defaults.MirroredOptions}}
"""The options of what rustord brings along, by table and name; the others take none."""

MARKDOWN_HEAD = """\
# Settings

Made by `rustord --print-settings`; the text stands beside each setting in `config.py`.

rustord reads `/etc/rustord/rustord.toml` (or what `--config` names), then the files `conf.d/*.toml` beside it in the
order of their names. A later value replaces an earlier one, key by key; `[[device]]` rules add up. A key that does not
exist is an error, and so is a value that is not allowed: `rustorctl config check` says where.

A size is a number of bytes or a string such as `"64 MiB"`; a duration is a string such as `"30 s"`. After a change,
`systemctl reload rustord` (SIGHUP) is enough where it says *reload*; the others need a restart.
"""

TOML_HEAD = """\
# The configuration of rustord: every setting with its default, commented out.
# Put your own in here, or into files conf.d/*.toml beside this one; those are read later, in the order of their names,
# and a later value replaces an earlier one. `rustorctl config check` checks it all.
"""


def _tables() -> Iterator[tuple[str, str, Any]]:
    """Name (brackets included), documentation and class of each table; the keys outside of any table come first."""
    yield "", "", Config
    for field in dataclasses.fields(Config):
        if "table" in field.metadata:
            yield f"[{field.name}]", field.metadata["doc"], field.metadata["table"]
        elif "tables" in field.metadata:
            yield f"[[{field.name}]]", field.metadata["doc"], field.metadata["tables"]


def _default_text(setting: Setting) -> str:
    return "" if setting.default in (None, "") else setting.kind.write(setting.default)


def markdown() -> str:
    """SETTINGS.md."""
    lines = [MARKDOWN_HEAD]
    for title, doc, cls in _tables():
        lines += [f"## {title}\n\n{textwrap.fill(doc, 120)}\n" if title else "## Outside of any table\n"]
        lines += [_markdown_item(name, setting) for name, setting in settings_of(cls)]
        for name, options in OPTIONS.get(title.strip("[]"), {}).items():
            lines.append(f"\n`options` of `{name}`:\n")
            lines += [_markdown_item(key, setting) for key, setting in settings_of(options)]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _markdown_item(name: str, setting: Setting) -> str:
    default = _default_text(setting)
    head = f"- **`{name}`**" + (f" = `{default}`" if default else "") + (" *(reload)*" if setting.reload else "")
    body = textwrap.fill(
        f"{setting.doc} Takes {setting.kind.allowed}.", 120, initial_indent="  ", subsequent_indent="  "
    )
    return f"{head}\\\n{body}"


def toml() -> str:
    """packaging/rustord.toml."""
    lines = [TOML_HEAD]
    for title, doc, cls in _tables():
        commented = "#" if title.startswith("[[") else ""  # such a table in the file is a rule, even if it is empty
        lines += [f"\n{_toml_comment(doc)}\n{commented}{title}\n"] if title else []
        lines += [_toml_item(name, setting) for name, setting in settings_of(cls)]
    return "\n".join(lines)


def _toml_item(name: str, setting: Setting) -> str:
    return f"{_toml_comment(f'{setting.doc} Takes {setting.kind.allowed}.')}\n#{name} = {_default_text(setting)}\n"


def _toml_comment(text: str) -> str:
    return textwrap.fill(text, 120, initial_indent="# ", subsequent_indent="# ")
