"""rustorctl: the command for people and scripts that use a pool or look after one."""

from __future__ import annotations

import signal


def main() -> None:
    """Entry point of the command. To load it takes a tenth of a second, in which Ctrl-C shall show no traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as in a background job
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    from rustord.cli import edge
    from rustord.cli.commands import rustorctl

    edge.run(rustorctl, "rustorctl")
