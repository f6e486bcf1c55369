"""`turboquant-gguf types`."""

from __future__ import annotations

import json
from dataclasses import asdict

import click
from rich.console import Console
from rich.table import Table

import turboquant_gguf

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
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    grid.add_column("type")
    for heading in ("bits/value", "bytes/block", "smaller than f16", "mean squared error"):
        grid.add_column(heading, justify="right")
    for kind in known:
        grid.add_row(
            kind.name,
            f"{kind.bits_per_value:g}",
            str(kind.bytes_per_block),
            f"{F16_BITS / kind.bits_per_value:.2f}x",
            f"{kind.mse:.4f}",
        )
    Console().print(grid)
