"""What options of several subcommands have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from ..core import outputfile
from ..errors import TurboquantError
from ..measure.inspection import parse_size
from ..report import benchplot
from ..weights import remotecode

_FILE = click.Path(path_type=Path, dir_okay=False, writable=True)


def types(default: Sequence[str], more: str) -> Callable:
    """The option --types. more: a sentence that ends its help."""
    return click.option(
        "--types",
        default=",".join(default),
        show_default=", ".join(default),  # with blanks, where lines may break
        help=f"Cache types, separated by commas; K:V sets keys and values apart. {more}",
    )


def window(command: Callable) -> Callable:
    """The options --cache-window and --cache-sinks. They set the variables that every program of llama.cpp reads."""
    for name, what, default in (
        ("SINKS", "first", "4, where there is a window"),
        ("WINDOW", "last", "64 with turbo types, 0 with others"),
    ):
        command = click.option(
            f"--cache-{name.lower()}",
            type=click.IntRange(min=0),
            metavar="N",
            expose_value=False,
            callback=_variable,
            help=f"Keep the {what} N tokens at full precision beside a quantized cache. [default: {default}]",
        )(command)
    return command


def _variable(context: click.Context, parameter: click.Parameter, value: int | None) -> int | None:
    if value is not None:
        variable = f"LLAMA_ARG_{parameter.name.upper()}"
        before = {variable: os.environ[variable]} if variable in os.environ else {}

        def undo() -> None:
            del os.environ[variable]
            os.environ.update(before)

        os.environ[variable] = str(value)
        context.call_on_close(undo)
    return value


def trust_remote_code(command: Callable) -> Callable:
    """The option --trust-remote-code."""
    return click.option(
        remotecode.FLAG,
        is_flag=True,
        help="Run Python files of the checkpoint where it cannot be read without; which is said. They can do anything "
        "on this machine: look at them first.",
    )(command)


def numbers(*, least: int) -> Callable[[click.Context, click.Parameter, str | None], tuple[int, ...] | None]:
    """A callback: numbers of tokens from `least` on, separated by commas."""

    def parse(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
        if text is None:
            return None
        for word in (words := text.split(",")):
            if not word.strip().isdecimal() or int(word) < least:
                raise click.BadParameter(f"{word!r} is not a number of tokens. Write them like 1024,4096.")
        return tuple(map(int, words))

    return parse


def memory(_context: click.Context, _parameter: click.Parameter, text: str | None) -> int | None:
    """A callback: bytes, written like 8GiB."""
    try:
        return parse_size(text) if text is not None else None
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def output(_context: click.Context, _parameter: click.Parameter, path: Path | None) -> Path | None:
    """A callback: a file that can be written, found out now, not after an hour of measuring."""
    if path:
        try:
            outputfile.check_folder(path)
        except TurboquantError as error:
            raise click.BadParameter(str(error)) from error
    return path


def new_file(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """A callback: the same for a file that must not exist, but for --force."""
    if path and path.exists() and not context.params.get("force"):
        raise click.BadParameter(f"{path} exists already. Give another name, or replace it with --force.")
    return output(context, parameter, path)


def force(command: Callable) -> Callable:
    """The option --force, which `new_file` asks for."""
    return click.option("--force", is_flag=True, is_eager=True, help="Replace the output if it exists.")(command)


def json(what: str) -> Callable:
    """The option --json. what: what is printed."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print {what} as JSON; all else goes to stderr.")


def threads(command: Callable) -> Callable:
    """The option --threads."""
    kind = click.IntRange(min=1)
    return click.option("--threads", type=kind, help="CPU threads [default: llama.cpp's choice]")(command)


def plot_file(what: str) -> Callable:
    """The option --plot FILE. what: the plot that is drawn."""
    return click.option(
        "--plot",
        "plot_file",
        type=_FILE,
        metavar="FILE",
        callback=_plot,
        help=f"Draw {what}, as .png, .svg or .pdf; needs matplotlib.",
    )


def _plot(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    if path and path.suffix.lower() not in benchplot.FORMATS:
        raise click.BadParameter(f"{path.name!r} does not end in {', '.join(benchplot.FORMATS)}.")
    return new_file(context, parameter, path)
