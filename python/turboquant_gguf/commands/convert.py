"""`turboquant-gguf convert`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from ..weights import convert as library
from . import options

EPILOG = """\b
Examples:
  turboquant-gguf convert ~/models/SmolLM2-135M
  turboquant-gguf convert Qwen3-4B -o qwen3-4b.gguf --outtype q8_0 --calibrate
  turboquant-gguf convert Qwen3-4B --rotate none --verify --json
  llama-server -m qwen3-4b.gguf --cache-type-k turbo4 --cache-type-v turbo3
"""


@click.command(epilog=EPILOG, short_help="Convert a Hugging Face checkpoint to GGUF.")
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The GGUF to write [default: MODEL_DIR's name and the outtype, here]",
)
@click.option(
    "--outtype",
    type=click.Choice(list(library.OUTTYPES)),
    default="auto",
    help="Type of the large tensors; auto keeps the checkpoint's 16-bit type.",
)
@click.option(
    "--rotate",
    type=click.Choice(library.ROTATIONS),
    help="Rotate the values in the weights, or not [default: where it changes nothing]",
)
@click.option("--calibrate", is_flag=True, help="Calibrate the keys as well, as `turboquant-gguf calibrate` does.")
@click.option(
    "--verify", is_flag=True, help="Compare the logits with those of transformers; keep the file if they agree."
)
@options.force
@options.trust_remote_code
@options.json("what was written")
def convert(model_dir: Path, output: Path | None, as_json: bool, **settings: Any) -> None:
    """Convert the Hugging Face checkpoint in MODEL_DIR (config.json, safetensors, tokenizer) to GGUF.

    llama.cpp's own converter does it, so every architecture it knows is converted. On the way, the Walsh-Hadamard
    rotation that quantized value caches need is folded into the attention weights, for architectures where that was
    checked to change nothing: it is the same model, and the rotation is saved at run time. Any llama.cpp runs the file.
    """
    console = Console(stderr=as_json)
    done = library.convert(model_dir, output, **settings, console=console)
    if as_json:
        click.echo(json.dumps(asdict(done), indent=2, default=str))
    else:
        name = escape(str(done.path))
        console.print(f"{name}: {done.tensors} tensors, {done.outtype}, {done.size / 1e6:,.0f} MB", highlight=False)
