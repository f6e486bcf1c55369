"""The command line: collects the subcommands and turns errors into sentences and exit codes.

`turboquant-gguf` runs it in a process of its own (__main__.py), so that a crash of llama.cpp is a sentence, too.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence

import click

from .__main__ import CRASH_LOG
from .commands.calibrate import calibrate
from .commands.convert import convert
from .commands.demo import demo
from .commands.inspect import inspect
from .commands.measure import command as measurement
from .commands.recommend import recommend
from .commands.report import report
from .commands.sweep import command as sweep
from .commands.types import types
from .commands.verify import verify
from .commands.version import show as show_version
from .commands.version import version
from .core import messages
from .core.signals import unwind
from .errors import TurboquantError
from .kinds import KINDS

EPILOG = """\b
Exit codes: 0 done, 1 it failed and said why, 2 the command was wrong,
130 interrupted. TURBOQUANT_DEBUG=1 shows where an error came from.
"""
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}


@click.group(epilog=EPILOG, context_settings=SETTINGS)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=show_version,
    help="Tell the versions, as `turboquant-gguf version` does, and exit.",
)
def cli() -> None:
    """Small KV caches for llama.cpp: the types turbo2, turbo3 and turbo4."""


for command in (calibrate, convert, demo, inspect, recommend, report, sweep(), types, verify, version):
    cli.add_command(command)
for kind in KINDS.values():
    if kind.command in cli.commands:
        raise TypeError(f"{kind.__module__}: there is a command {kind.command!r} already")
    cli.add_command(measurement(kind))


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with `args` (default: those of the process) and return its exit code."""
    unwind()
    if descriptor := os.environ.pop(CRASH_LOG, None):
        _redirect_c(int(descriptor))
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")  # a terminal, or a file, may not have all characters
    try:
        code = cli.main(args=args, prog_name="turboquant-gguf", standalone_mode=False) or 0
        sys.stdout.flush()  # here, where it can still be said that it fails
        return code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        messages.say("Interrupted.")
        return 128 + signal.SIGINT
    except TurboquantError as error:
        _report(str(error), error.details)
        return error.exit_code
    except BrokenPipeError:  # whoever read what we print has seen enough
        return _flushed(1)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        _report(f"{error.strerror or error}{where}.")
        return _flushed(1)
    except Exception as error:
        _report(
            f"turboquant-gguf failed over something it does not expect ({type(error).__name__}: {error}). That is a "
            "fault of ours: please report it, with what TURBOQUANT_DEBUG=1 shows."
        )
        return 1


def _redirect_c(descriptor: int) -> None:
    """Makes what C prints to stderr go there; what Python prints goes where it did."""
    sys.stderr = open(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding)  # noqa: SIM115 - as long as we live
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _flushed(code: int) -> int:
    """`code`, with stdout flushed; or given up, so that Python does not try it again as it ends, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code


def _report(message: str, details: str = "") -> None:
    if os.environ.get("TURBOQUANT_DEBUG"):
        traceback.print_exc()
    messages.error(message, details)


if __name__ == "__main__":
    sys.exit(main())
