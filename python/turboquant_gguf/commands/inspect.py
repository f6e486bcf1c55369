"""`turboquant-gguf inspect`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console

from ..errors import TurboquantError
from ..measure import inspection as library
from ..measure import inspectiontables
from . import options

EPILOG = """\b
Examples:
  turboquant-gguf inspect my.gguf
  turboquant-gguf inspect my.gguf --memory 8GiB
  turboquant-gguf inspect my-00001-of-00003.gguf --memory 24GB
  turboquant-gguf inspect my.gguf --memory 8GiB --types f16,turbo4,turbo3
  turboquant-gguf inspect my.gguf --memory 8GiB --json > my.json
"""


@click.command(epilog=EPILOG, short_help="Show what a GGUF holds and which contexts fit in memory.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--memory",
    metavar="SIZE",
    callback=options.memory,
    help="Show the longest context that fits in SIZE with the weights and all buffers: 8GiB, 500MB or bytes.",
)
@options.types(library.DEFAULT_TYPES, "each is tried for keys and for values.")
@options.window
@options.json("all of it, every pair of types,")
def inspect(file: Path, memory: int | None, types: list[str], as_json: bool) -> None:
    """Show what the GGUF FILE holds, what its KV cache takes with every pair of types, and what fits in memory.

    Any part of a split model stands for all of it. Sizes come from llama.cpp itself, which is asked for contexts
    without loading weights or allocating caches, so this takes a second and hardly any memory. They hold for one
    sequence (--parallel 1), batches of 512 tokens (llama-server's default), flash attention and the CPU.
    """
    report = library.inspect(file=file, memory=memory, types=types)
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2))
    else:
        _show(report)
    if report.error:
        raise TurboquantError(report.error)


def _show(report: library.Report) -> None:
    console = Console(highlight=False)
    console.print(inspectiontables.heading(report))
    console.print(inspectiontables.facts(report))
    if report.tensors:
        console.print()
        console.print(inspectiontables.tensors(report))
    if report.caches:
        console.print()
        console.print(inspectiontables.caches(report))
    elif report.no_caches:
        console.print()
        console.print(report.no_caches)
