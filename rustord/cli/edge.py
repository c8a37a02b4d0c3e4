"""The edge: where a command's errors become text on standard error and an exit status.

======  ================================================================
status  meaning
======  ================================================================
0       done
1       a fault of rustord itself
2       the command line or the request is wrong
3       no such Object, name or device
4       a precondition failed: the name is taken, or the Object another
5       the range begins beyond the end of the Object
6       not enough free space in the pool
7       the role of the user does not allow it
8       the daemon does not answer, or is starting, stopping or overloaded
9       the pool takes no writes
10      data or a structure on a device is damaged
11      a device failed, is missing, too small or in use
12      a device was refused, since it is not proven free
13      the devices do not make up a pool that can be opened
14      a plugin is missing, broken or of the wrong version
15      an Object or volume is in use as a block device
16      this cannot be done here
74      a local file cannot be read or written
78      the configuration is wrong
130     interrupted (Ctrl-C)
141     the reader of standard output went away
143     terminated (SIGTERM)
======  ================================================================
"""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import NoReturn

import click

from rustord.cli.output import safe
from rustord.errors import InvalidRequest, RustordError

FAULT = 1
LOCAL_FILE = 74  # EX_IOERR of sysexits.h
INTERRUPTED = 128 + signal.SIGINT
OUTPUT_CLOSED = 128 + signal.SIGPIPE
TERMINATED = 128 + signal.SIGTERM


class Commands(click.Group):
    """A group of commands. Without one, it prints its help, and fails: a script whose variable was empty should."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(click.UsageError.exit_code)
        return super().parse_args(ctx, args)


def run(command: click.Command, program: str) -> NoReturn:
    """Run a command line to its end. Never shows a traceback, except for a fault of rustord with RUSTORD_TRACEBACK."""
    _open_what_is_closed()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as it is for standard error
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if f"_{program.upper()}_COMPLETE" in os.environ:  # the shell asks for completions
        command.main(prog_name=program)
    status = _status(command, program)
    _let_go_of_output()
    sys.exit(status)


def _open_what_is_closed() -> None:
    """Leave no number of standard input, output or error free that whoever started us has closed.

    Else the next file that is opened would have it, which may be a disk, and be told what is said there. To read from
    or write to what is closed stays an error, but for standard error.
    """
    for number, how in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, how), True)  # it gets the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def _terminate(signum: int, frame: object) -> NoReturn:
    # As an exception, so that a half-written file is cleared away.
    raise SystemExit(TERMINATED)


def _status(command: click.Command, program: str) -> int:
    try:
        with command.make_context(program, sys.argv[1:]) as context:
            command.invoke(context)
        flush_output()
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except RustordError as error:
        complain(program, error.message, error.hint, getattr(error, "reasons", ()))
        return error.exit_status
    except click.ClickException as error:
        complain(program, error.format_message(), _usage_hint(error))
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        return OUTPUT_CLOSED
    except OSError as error:
        complain(program, os_error_text(error))
        return LOCAL_FILE
    except UnicodeEncodeError as error:
        complain(program, f"{error.object[:80]!r} is not UTF-8", "names and attributes are text; give them as UTF-8")
        return InvalidRequest.exit_status
    except Exception as error:
        return _fault(program, error)
    return 0


def flush_output() -> None:
    """Flush standard output while its errors can still be told."""
    if sys.stdout is None:  # closed by whoever started us
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        error.filename = "standard output"
        raise


def _let_go_of_output() -> None:
    # What cannot be written is not tried again (and complained about) by the interpreter while it ends.
    try:
        flush_output()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(program: str, message: str, hint: str = "", reasons: tuple[str, ...] = ()) -> None:
    """Say what happened, why, and what to do, on standard error."""
    lines = [f"{program}: {message}", *(f"  - {reason}" for reason in reasons)]
    if hint:
        lines.append(f"hint: {hint}")
    click.echo("\n".join(safe(line) for text in lines for line in text.split("\n")), err=True)


def _usage_hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f"'{context.command_path} --help' shows what it takes" if context is not None else ""


def os_error_text(error: OSError) -> str:
    """What went wrong with which file."""
    # What click prints is all that is done without a name at hand.
    name = "standard output" if error.filename is None else os.fsdecode(error.filename) or "''"
    return f"{name}: {error.strerror or error}"


def _fault(program: str, error: Exception) -> int:
    if os.environ.get("RUSTORD_TRACEBACK"):
        raise error
    hint = "this is a fault of rustord: please report it with the output under RUSTORD_TRACEBACK=1"
    complain(program, f"{type(error).__name__}: {error}", hint)
    return FAULT
