"""`turboquant-gguf types`."""

from __future__ import annotations

import json
from dataclasses import asdict

import click
from rich.console import Console

import turboquant_gguf

from ..core import tables
from . import options

F16_BITS = 16


@click.command(short_help="List the turbo types, their size and their error.")
@options.json("the table")
def types(as_json: bool) -> None:
    """List the turbo types: their size, and their error on normally distributed values.

    The error is the mean squared error of values with variance 1, so 0.005 is half a percent of their energy.
    """
    known = turboquant_gguf.types()
    if as_json:
        click.echo(json.dumps([asdict(kind) for kind in known], indent=2))
        return
    columns = tables.columns("\ntype", "bits a\nvalue", "bytes a\nblock", "smaller\nthan f16", "mean squared\nerror")
    rows = [
        [
            kind.name,
            f"{kind.bits_per_value:g}",
            str(kind.bytes_per_block),
            f"{F16_BITS / kind.bits_per_value:.2f}x",
            f"{kind.mse:.4f}",
        ]
        for kind in known
    ]
    Console(highlight=False).print(tables.Shown(tables.Table("Turbo types", columns, {"": rows})))
