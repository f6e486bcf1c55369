"""What options of several subcommands have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..core import callbacks
from ..core.units import parse_size
from ..llamacpp import cachetypes, recentwindow
from ..llamacpp.placement import CPU
from ..report import plots
from ..weights import remotecode

_FILE = click.Path(path_type=Path, dir_okay=False, writable=True)


APART = "K:V sets keys and values apart."


def types(default: Sequence[str], more: str = APART) -> Callable:
    """The option --types, as a list of names. more: what ends its help."""
    return click.option(
        "--types",
        default=",".join(default),
        show_default=", ".join(default),  # with blanks, where lines may break
        callback=lambda _context, _parameter, text: text.split(","),
        shell_complete=cachetypes.complete,
        help=f"Cache types, separated by commas; {more}",
    )


def window(command: Callable) -> Callable:
    """The options --cache-window and --cache-sinks, in effect for all that the command does."""
    for name, field, what, default in (
        ("sinks", "sinks", "first", "4, where there is a window"),
        ("window", "recent", "last", "with turbo types a 64th of the context, between 64 and 1024; 0 with others"),
    ):
        command = click.option(
            f"--cache-{name}",
            type=click.IntRange(min=0),
            metavar="N",
            expose_value=False,
            callback=partial(_use_window, field),
            help=f"Keep the {what} N tokens at full precision beside a quantized cache. [default: {default}]",
        )(command)
    return command


def _use_window(field: str, context: click.Context, _parameter: click.Parameter, value: int | None) -> int | None:
    if value is not None:
        context.with_resource(recentwindow.use(recentwindow.RecentWindow(**{field: value})))
    return value


trust_remote_code = click.option(
    remotecode.FLAG,
    is_flag=True,
    help="Run Python files of the checkpoint where it cannot be read without; which is said. They can do anything "
    "on this machine: look at them first.",
)


def memory(_context: click.Context, _parameter: click.Parameter, text: str | None) -> int | None:
    """A callback: bytes, written like 8GiB."""
    try:
        return parse_size(text) if text is not None else None
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


force = click.option("--force", is_flag=True, is_eager=True, help="Replace the output if it exists.")
"""The option --force, which `callbacks.new_file` asks for."""


def json(what: str) -> Callable:
    """The option --json. what: what is printed."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print {what} as JSON; all else goes to stderr.")


def placement(command: Callable) -> Callable:
    """The options --threads, --gpu-layers and --no-kv-offload, as the argument `placement`."""
    threads = _placed("threads", type=click.IntRange(min=1), help="CPU threads [default: llama.cpp's choice]")
    kv_offload = _placed(
        "kv_offload",
        "--no-kv-offload",
        flag_value=False,
        default=None,
        help="With --gpu-layers: the cache stays in the CPU's memory, and attention with it.",
    )
    gpu_layers = _placed(
        "gpu_layers",
        type=click.IntRange(min=0),
        metavar="N",
        help="Compute N layers of the model on GPUs, and keep their caches there; 99 is more than most models have. "
        "[default: 0, the CPU does all]",
    )
    return threads(gpu_layers(kv_offload(command)))


def _placed(field: str, *names: str, **more: Any) -> Callable:
    """An option that sets a field of the argument `placement`."""
    names = names or (f"--{field.replace('_', '-')}",)
    return click.option(*names, callback=partial(_place, field), expose_value=False, **more)


def _place(field: str, context: click.Context, _parameter: click.Parameter, value: Any) -> None:
    before = context.params.get("placement", CPU)
    context.params["placement"] = before if value is None else replace(before, **{field: value})


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
    if path and path.suffix.lower() not in plots.FORMATS:
        raise click.BadParameter(f"{path.name!r} does not end in {', '.join(plots.FORMATS)}.")
    return callbacks.new_file(context, parameter, path)


cluster = click.option(
    "--cluster",
    metavar="ADDRESS",
    help="Share the work among the workers of a Dask scheduler, such as tcp://10.0.0.1:8786.",
)
