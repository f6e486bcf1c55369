"""`turboquant-gguf recommend`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from ..core import tables
from ..core.units import size_text
from ..llamacpp import cachetypes
from ..measure import recommend as library
from . import options

_WIDE = 80
"""Columns of a terminal that shows what a size consists of."""

EPILOG = """\b
Examples:
  turboquant-gguf recommend my.gguf --memory 8GiB --context 32768
  turboquant-gguf recommend my.gguf --memory 6GB --context 16384 --json
  turboquant-gguf recommend m.gguf --memory 8GB --context 8192 --types turbo4
"""


@click.command(epilog=EPILOG, short_help="Choose cache types for a memory and a context length.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--memory",
    metavar="SIZE",
    required=True,
    callback=options.memory,
    help="What weights, cache and buffers may take together: 8GiB, 500MB or bytes.",
)
@click.option("--context", type=click.IntRange(min=1), required=True, help="Tokens of context that must fit.")
@click.option(
    "--types",
    callback=lambda _context, _parameter, text: text.split(",") if text else (),
    shell_complete=cachetypes.complete,
    help="Cache types to choose from, separated by commas [default: all that have a prediction]",
)
@click.option(
    "--results",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    metavar="FILE",
    help="Measurements of ppl --results or sweep, besides those in the user's cache folder. May be repeated.",
)
@options.window
@options.json("all of it")
@click.pass_context
def recommend(click_context: click.Context, /, model: Path, as_json: bool, **settings: Any) -> None:
    """Choose the cache types that lose least among those with which MODEL (a GGUF) fits in memory.

    llama.cpp says what weights, cache and buffers take, for one sequence on the CPU, without loading them. What types
    lose comes from measurements of this model (`turboquant-gguf ppl` keeps them), or else from those of a small
    reference model. Prints the llama-server command to run.
    """
    found = library.recommend(model, **settings, console=Console(stderr=as_json))
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
    else:
        _show(found)
    click_context.exit(0 if found.best else 1)


def _show(found: library.Recommendation) -> None:
    console = Console(highlight=False)
    base = found.measured.base if found.measured else "f16"
    cells = {
        "cache\ntype": lambda one: one.types,
        "\nbits": lambda one: f"{one.bits:.4g}",
        "\nweights": lambda one: size_text(one.size.weights),
        "\ncache": lambda one: size_text(one.size.cache),
        "\nbuffers": lambda one: size_text(one.size.compute),
        "\ntotal": lambda one: size_text(one.size.total),
        "\nfits": lambda one: "yes" if one.fits else "no",
        "longest\ncontext": lambda one: str(one.longest_context),
        f"KL from\n{base}": lambda one: f"{'~' if one.measured is None else ''}{one.loss:.4f}",
    }
    for heading in ("\nbits", "\nweights", "\nbuffers") if console.width < _WIDE else ("\ntotal",):
        del cells[heading]
    rows = [[cell(one) for cell in cells.values()] for one in found.candidates]
    styles = ["bold" if one is found.best else "" if one.fits else "dim" for one in found.candidates]
    console.print(f"[bold]{escape(found.model)}, {found.context} tokens in {size_text(found.memory)}[/]")
    console.print(tables.Shown(tables.Table("Candidates", tables.columns(*cells), {"": rows}), styles=styles))
    if any(one.measured is None for one in found.candidates):
        console.print("[dim]~ predicted from what a small reference model loses.[/]")
    if found.measured:
        console.print(f"[dim]Measured on {escape(str(found.measured))}.[/]")
    if found.left_out:
        others = escape("; ".join(found.left_out))
        console.print(f"[dim]Measurements of this model that do not compare were left out: {others}.[/]")
    if found.trained_length and found.context > found.trained_length:
        console.print(f"[bold yellow]Note:[/] this model was trained for {found.trained_length} tokens.")
    if not found.best:
        console.print(f"[bold red]{escape(found.reason)}[/]")
        return
    console.print(f"\n[bold]{found.best.types}[/]: {escape(found.reason)}\n")
    console.print(found.command, soft_wrap=True, markup=False)
