"""`turboquant-gguf bench`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from ..core import messages
from ..kinds import bench as library
from ..report import benchplot
from . import options

EPILOG = """\b
Examples:
  turboquant-gguf bench
  turboquant-gguf bench my.gguf --types turbo4,turbo4:turbo3 --depths 0,8192
  turboquant-gguf bench my.gguf --prefill 0 --repetitions 7 --plot speed.png
  turboquant-gguf bench my.gguf --baseline ~/llama.cpp/build/bin
  turboquant-gguf bench my.gguf --json > speed.json
"""
NOTE = (
    "Times f16: the median over the rounds of the ratio to f16 in the same round. Cache GB/s: keys and values read "
    "while decoding, if each token reads its whole context once."
)


@click.command(epilog=EPILOG, short_help="Measure the speed of cache types against f16.")
@click.argument("model", type=click.Path(path_type=Path), required=False)
@options.types(library.DEFAULT_TYPES, "f16 is always measured.")
@options.window
@click.option(
    "--depths",
    default=",".join(map(str, library.DEFAULT_DEPTHS)),
    show_default=True,
    callback=options.numbers(least=0),
    help="Tokens already in the cache, separated by commas.",
)
@click.option(
    "--prefill",
    type=click.IntRange(min=0),
    default=512,
    show_default=True,
    help="Prompt tokens to measure; 0 leaves it out.",
)
@click.option(
    "--decode",
    type=click.IntRange(min=0),
    default=32,
    show_default=True,
    help="Tokens to generate one by one; 0 leaves it out.",
)
@options.threads
@click.option(
    "--repetitions",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Rounds; each measures everything once.",
)
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Take f16 from the llama-bench in FOLDER, such as a stock llama.cpp's.",
)
@options.plot_file("speed against depth")
@options.force
@options.json("all of it, every sample and the machine,")
@click.pass_context
def bench(
    context: click.Context,
    model: Path | None,
    types: str,
    depths: tuple[int, ...],
    prefill: int,
    decode: int,
    threads: int | None,
    repetitions: int,
    baseline: Path | None,
    plot_file: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Measure how fast MODEL runs with several KV-cache types, as multiples of f16.

    MODEL is a GGUF file; without it, SmolLM2-135M-Instruct (93 MB) is fetched once. llama-bench measures every type
    at every depth once in each round, and a type is compared with the f16 of its own round, so a machine that
    slows down meanwhile does not favour any. Leave the machine alone while it runs. Ctrl-C stops and shows what
    was measured so far.
    """
    if not prefill and not decode:
        raise click.UsageError("--prefill and --decode are both 0, so there is nothing to measure.")
    if plot_file:
        benchplot.check()
    console = Console(stderr=as_json)
    report = library.bench(
        model=model,
        types=types.split(","),
        depths=depths,
        prefill=prefill,
        decode=decode,
        threads=threads,
        repetitions=repetitions,
        baseline=baseline,
        console=console,
    )
    _show(report, console)
    if as_json:
        click.echo(json.dumps(library.as_json(report), indent=2))
    if plot_file and report.results:
        benchplot.write(report, plot_file)
    if report.interrupted:
        raise click.Abort
    context.exit(1 if report.failures else 0)


def _show(report: library.Report, console: Console) -> None:
    if report.results:
        console.print(f"[bold]{escape(library.heading(report))}[/]", highlight=False)
        console.print(library.table(report))
        console.print(f"[dim]{NOTE}[/]", highlight=False)
    for failure in report.failures:
        messages.error(failure.message, failure.details, of=f"{failure.name} at depth {failure.depth}")
