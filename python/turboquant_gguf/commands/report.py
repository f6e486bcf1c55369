"""`turboquant-gguf report`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from ..core import callbacks, messages
from ..measure import store
from ..report import contents, tables
from ..report import page as library
from . import options

EPILOG = """\b
Forms, by the suffix of -o:
  .html      one page with figures and tables, which needs nothing else
  .md        the tables, as GitHub shows them
  .png .svg  the figures: a row for each model
  .json      all of it
  .csv       a row for each number: model, what was measured, cache types,
             bits, depth, length, task, metric, value; its standard error,
             or the lowest and the highest of several rounds

\b
Examples:
  turboquant-gguf report
  turboquant-gguf report measured.sqlite -o report.html
  turboquant-gguf report measured.sqlite --model smollm2 -o q.md -o q.png
  turboquant-gguf report measured.sqlite --json > measured.json
"""


@click.command(epilog=EPILOG, short_help="Write measurements as a page, as tables or as figures.")
@click.argument("results", type=click.Path(path_type=Path), required=False)
@click.option(
    "-o",
    "--output",
    "outputs",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    callback=lambda *of: tuple(callbacks.new_file(*of[:2], path) for path in of[2]),
    help="What to write; may be given several times [default: tables on the terminal]",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME",
    help="Only models whose names contain NAME; may be given several times.",
)
@options.force
@options.json("all of it")
def report(
    results: Path | None, outputs: tuple[Path, ...], models: tuple[str, ...], force: bool, as_json: bool
) -> None:
    """Show what is in RESULTS, a file of measurements, model by model.

    RESULTS comes from sweep, or from the command of one kind of measurement, such as ppl; without it, the file in the
    user's cache folder is taken. Where the same was measured with several builds of turboquant-gguf, the latest counts.
    """
    console = Console(stderr=as_json)
    sections = library.report(results or store.default_results(), outputs=outputs, models=models, console=console)
    for output in outputs:
        messages.say(f"{escape(str(output))} written", console)
    if as_json:
        click.echo(json.dumps(contents.as_json(sections), indent=2))
    elif not outputs:
        console.print(tables.terminal(sections), highlight=False)
