"""The commands for setting up: plugin, config and completion."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rustord.cli.edge import Commands
from rustord.cli.output import print_json, print_table, say
from rustord.cli.parameters import connect, json_option
from rustord.errors import PluginError

if TYPE_CHECKING:
    from rustord.config import Config
    from rustord.plugins import Plugin, PluginManager

config_option = click.option(
    "--config", "file", type=click.Path(path_type=Path), help="The configuration [/etc/rustord/rustord.toml]."
)


@click.group(cls=Commands)
def plugin() -> None:
    """List and check plugins."""


@plugin.command("list")
@json_option
@click.pass_obj
def list_plugins(socket: Path | None, as_json: bool) -> None:
    """List the plugins that the daemon has loaded, and those that are only installed."""
    with connect(socket) as client:
        plugins = client.plugins()
    if as_json:
        print_json(plugins)
        return
    rows = [
        (entry["name"], "loaded" if entry["loaded"] else "installed", entry["version"], _offers_text(entry["offers"]))
        for entry in plugins
    ]
    print_table(("PLUGIN", "STATE", "VERSION", "OFFERS"), rows)


def _offers_text(offers: dict[str, list[str]]) -> str:
    return "; ".join(f"{role} {', '.join(names)}" for role, names in offers.items())


@plugin.command("check")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@config_option
def check_plugins(names: tuple[str, ...], file: Path | None) -> None:
    """Load plugins, say what they offer, and run the contract of each role on it.

    The contract needs pytest and hypothesis, and takes a while. Without a NAME, those that the configuration names are
    loaded, and no more. Works without the daemon.
    """
    from rustord.config import load
    from rustord.plugins import PluginManager

    plugins = PluginManager(names or load(file).plugins)
    for entry in plugins.plugins():
        if entry.loaded:
            offers = {role: list(offered) for role, offered in entry.offers.items()}
            say(f"{entry.name} ({entry.distribution} {entry.version}): {_offers_text(offers)}")
    failed = [_run_contracts(plugins, entry) for entry in plugins.plugins() if entry.name in names]
    if any(failed):
        raise PluginError(f"{sum(failed)} tests of the contract failed", hint="rustord.testing has the contracts")


def _run_contracts(plugins: PluginManager, entry: Plugin) -> int:
    """Say how each thing that a plugin offers does; the number of tests that failed."""
    from rustord.testing import check

    failed = 0
    for role, offered in entry.offers.items():
        for name in offered:
            report = check(role, plugins.find(role, name)[1])
            say(f"{role} {name}: {report.passed} tests of the contract passed, {len(report.failures)} failed")
            for failure in report.failures:
                say(f"  {failure.test}: {failure.what.splitlines()[0]}")
            failed += len(report.failures)
    return failed


@click.group(cls=Commands)
def config() -> None:
    """Check the configuration."""


@config.command("check")
@click.argument("file", required=False, type=click.Path(path_type=Path))
def check_config(file: Path | None) -> None:
    """Check what the daemon would read: FILE, by default /etc/rustord/rustord.toml, and conf.d beside it.

    The plugins that it names are loaded, and what it chooses of them is tried; so are the files for TLS. Works without
    the daemon.
    """
    from rustord.config import load
    from rustord.frontends.nbd import server_tls, tcp_address
    from rustord.plugins import PluginManager

    loaded = load(file)
    _make_all(PluginManager(loaded.plugins), loaded)
    tls = server_tls(loaded.nbd.tls_certificate, loaded.nbd.tls_key, loaded.nbd.tls_authority)
    if loaded.nbd.listen:
        tcp_address(loaded.nbd.listen, tls)
    for source in loaded.sources:
        say(f"{source}: ok")
    if not loaded.sources:
        say("there is no configuration file: all defaults count")


def _make_all(plugins: PluginManager, config: Config) -> None:
    plugins.make("keygen", config.keygen.algorithm, config.keygen.options)
    plugins.make("placer", config.placer.policy, config.placer.options)
    plugins.make("keystore", config.keystore.backend, config.keystore.options)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a shell's completion script.

    It completes commands, options and names of Objects.

    \b
    bash: put it into ~/.local/share/bash-completion/completions/rustorctl
    zsh:  put it into a file _rustorctl in a directory of $fpath
    fish: put it into ~/.config/fish/completions/rustorctl.fish
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    script = found(context.find_root().command, {}, "rustorctl", "_RUSTORCTL_COMPLETE")
    click.echo(script.source_template % script.source_vars())


COMMANDS = (plugin, config, completion)
