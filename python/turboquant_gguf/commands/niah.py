"""`turboquant-gguf niah`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from ..core import messages
from ..kinds import niah as library
from ..report import benchplot, niahplot
from . import options

EPILOG = """\b
Examples:
  turboquant-gguf niah my.gguf
  turboquant-gguf niah my.gguf --types turbo4,turbo4:turbo3 --trials 4
  turboquant-gguf niah my.gguf --lengths 4096,16384 --depths 10,50,90
  turboquant-gguf niah my.gguf --text book.txt --plot found.png
  turboquant-gguf niah my.gguf --json > found.json
"""
NOTE = (
    "Lost, gained: needles that only f16 found, and only this type. Within noise: chance alone makes them differ as "
    f"much at least {library.SIGNIFICANCE:.0%} of the time. Fewer than 6 lost or gained never tell: more --trials see "
    "smaller differences."
)
NOTHING_FOUND = (
    "f16 found none of the needles: this model is too small for this, or the prompts are too long for it. Shares of "
    "what f16 found mean nothing then. Try shorter --lengths or a larger model."
)


def _depths(_context: click.Context, _parameter: click.Parameter, text: str) -> list[float]:
    return [_percentage(word) for word in text.split(",")]


def _percentage(word: str) -> float:
    try:
        if 0 <= (depth := float(word)) <= 100:
            return depth
    except ValueError:
        pass
    raise click.BadParameter(f"{word!r} is not a percentage from 0 to 100. Write them like 0,50,100.")


@click.command(epilog=EPILOG, short_help="Find a needle in a haystack with each cache type.")
@click.argument("model", type=click.Path(path_type=Path))
@options.types(library.DEFAULT_TYPES, "f16 is always asked.")
@options.window
@click.option(
    "--lengths",
    callback=options.numbers(least=1),
    help="Prompt tokens, separated by commas [default: those of "
    f"{', '.join(map(str, library.DEFAULT_LENGTHS))} that the model was trained for]",
)
@click.option(
    "--depths",
    default=",".join(map(str, library.DEFAULT_DEPTHS)),
    show_default=True,
    callback=_depths,
    help="Where the needle lies, in percent of the text, separated by commas.",
)
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Prompts of each length and depth; each has a needle of its own.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="The haystack [default: generated sentences]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the needles and the generated sentences.")
@options.threads
@options.plot_file("a heat map for each type")
@options.force
@options.json("all of it, every answer and the machine,")
@click.pass_context
def niah(
    context: click.Context,
    model: Path,
    types: str,
    lengths: tuple[int, ...] | None,
    depths: list[float],
    trials: int,
    text: Path | None,
    seed: int,
    threads: int | None,
    plot_file: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Hide a number in long prompts, and see with which KV-cache types MODEL finds it.

    "The magic number of Lisbon is 48213." is put at several depths into texts of several lengths, and llama-server is
    asked for the number, once with each cache type. It is found if the answer holds the number. All types get the same
    prompts, so the differences from f16 can be told from noise. Ctrl-C stops and shows what was found so far.
    """
    if plot_file:
        benchplot.check()
    console = Console(stderr=as_json)
    report = library.niah(
        model=model,
        types=types.split(","),
        lengths=lengths,
        depths=depths,
        trials=trials,
        text=text,
        seed=seed,
        threads=threads,
        console=console,
    )
    _show(report, console)
    if as_json:
        click.echo(json.dumps(library.as_json(report), indent=2))
    if plot_file and report.scores:
        niahplot.write(report, plot_file)
    if report.interrupted:
        raise click.Abort
    context.exit(1 if report.failures else 0)


def _show(report: library.Report, console: Console) -> None:
    if report.scores:
        console.print(f"[bold]{escape(library.heading(report))}[/]", highlight=False)
        console.print(library.maps(report), highlight=False)
        console.print()
        console.print(library.table(report), highlight=False)
        console.print(f"[dim]{NOTE}[/]", highlight=False)
        if not report.scores[0].found:
            messages.say(f"[bold yellow]Note:[/] {NOTHING_FOUND}")
    for failure in report.failures:
        messages.error(failure.message, failure.details, of=failure.types)
