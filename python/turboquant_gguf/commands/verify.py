"""`turboquant-gguf verify`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from ..llamacpp import cachetypes
from ..weights import verify as library
from . import options

EPILOG = """\b
Examples:
  turboquant-gguf verify SmolLM2-135M smollm2.gguf
  turboquant-gguf verify plain.gguf rotated.gguf --max-kl 1e-6
  turboquant-gguf verify model.gguf model-q4_k_m.gguf --tokens 1024 --json
"""


@click.command(epilog=EPILOG, short_help="Compare the logits of two models.")
@click.argument("a", type=click.Path(path_type=Path, exists=True))
@click.argument("b", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--text",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="The text to read [default: one in the package]",
)
@click.option("--tokens", type=click.IntRange(min=1), default=library.DEFAULT_TOKENS, help="How many tokens of it.")
@click.option(
    "--types",
    default="f32",
    shell_complete=cachetypes.complete,
    help="KV-cache type of GGUFs; K:V sets keys and values apart.",
)
@click.option(
    "--max-kl",
    type=click.FloatRange(min=0),
    default=library.DEFAULT_MAX_KL,
    help="Largest mean KL divergence, in nats a token, that still passes.",
)
@options.trust_remote_code
@options.window
@options.placement
@options.json("the figures")
@click.pass_context
def verify(context: click.Context, a: Path, b: Path, max_kl: float, as_json: bool, **settings: Any) -> None:
    """Read the same tokens with A and B, and compare what they predict.

    Each is a GGUF, run by llama.cpp, or the folder of a Hugging Face checkpoint, run by transformers in float32.
    Exit code 0: the mean KL divergence is at most --max-kl; 1: it is more.
    """
    found = library.verify(a, b, **settings, console=Console(stderr=True))
    same = found.kl_mean <= max_kl
    if as_json:
        click.echo(json.dumps({**asdict(found), "max_kl": max_kl, "same": same}, indent=2))
    else:
        Console().print(lines(found, max_kl), highlight=False)
    context.exit(0 if same else 1)


def lines(found: library.Comparison, max_kl: float) -> str:
    """The figures for people."""
    verdict = "[green]the same model[/]" if found.kl_mean <= max_kl else "[bold red]not the same model[/]"
    return (
        escape(
            f"{found.tokens} tokens: largest logit difference {found.difference:.2g}, relative error "
            f"{found.relative_error:.1e},\nKL divergence {found.kl_mean:.1e} (mean), {found.kl_max:.1e} (largest), "
            f"same first choice {found.top1:.1%}\n"
        )
        + f"{verdict} (mean KL divergence at most {max_kl:g})"
    )
