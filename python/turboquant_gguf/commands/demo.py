"""`turboquant-gguf demo`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from ..core import tables
from ..llamacpp import models
from ..measure import demo as library
from . import options

EPILOG = """\b
Examples:
  turboquant-gguf demo
  turboquant-gguf demo --model my.gguf --prompt "Write a haiku about memory."
  turboquant-gguf demo --types f16,q8_0,turbo4:turbo3
  turboquant-gguf demo --json > results.json
"""


@click.command(epilog=EPILOG, short_help="Ask a model one question with several cache types, and compare.")
@click.option(
    "--model", type=click.Path(path_type=Path), help="A GGUF file [default: SmolLM2-135M-Instruct, 93 MB, fetched once]"
)
@options.types(library.DEFAULT_TYPES)
@click.option("--prompt", default=library.DEFAULT_PROMPT, help="The question.")
@click.option("--context", type=click.IntRange(min=256), default=4096, help="Tokens the cache is made for.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=96, help="Longest answer, in tokens.")
@options.window
@options.placement
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default=False,
    help="Port of llama-server [default: a free one]",
)
@options.json("the results")
def demo(as_json: bool, **settings: Any) -> None:
    """Ask a model one question with several KV-cache types, and compare them.

    For each type, llama-server runs on loopback with its KV cache stored in that type and answers the question;
    then llama-perplexity reads a short bundled text with the same cache. One table sums up: size of the cache,
    how many tokens fit in 1 GiB, decode speed and perplexity (lower is better).
    """
    results = library.demo(**settings, console=Console(stderr=as_json))
    if as_json:
        click.echo(json.dumps([asdict(one) for one in results], indent=2))
    else:
        console = Console()
        console.rule()
        console.print(tables.Shown(library.table(results)), highlight=False)
        model = settings["model"] or models.location(models.catalogue()[models.DEFAULT_MODEL])
        console.print(f"\n{escape(library.invitation(model, results))}", highlight=False, soft_wrap=True)
