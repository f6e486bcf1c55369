"""`turboquant-gguf calibrate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from ..core import messages
from ..llamacpp.placement import Placement
from ..weights import calibration as library
from . import options

EPILOG = """\b
Examples:
  turboquant-gguf calibrate model.gguf
  turboquant-gguf calibrate model.gguf -o better.gguf --text my-domain.txt
  turboquant-gguf calibrate model.gguf --in-place
  llama-server -m model-calibrated.gguf -ctk turbo3 -ctv turbo3
"""


def _no_longer_needed(_context: click.Context, _parameter: click.Parameter, value: int | None) -> None:
    if value is not None:
        messages.say(
            "[bold yellow]Note:[/] --context is no longer needed: a calibration holds in contexts of any length."
        )


@click.command(epilog=EPILOG, short_help="Make a model's quantized key caches more exact.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The copy to write [default: MODEL's name and -calibrated, here]",
)
@click.option("--in-place", is_flag=True, help="Replace MODEL instead.")
@click.option(
    "--text",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="What to read [default: mixed text in the package]",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=library.MIN_TOKENS),
    default=library.DEFAULT_TOKENS,
    show_default=True,
    help="How much of it to read.",
)
@click.option("--context", type=int, hidden=True, expose_value=False, callback=_no_longer_needed)
@click.option("--seed", type=int, default=0, show_default=True, help="Which parts of a longer text.")
@options.placement
@options.force
@options.json("what was done")
def calibrate(
    model: Path,
    output: Path | None,
    in_place: bool,
    text: Path | None,
    tokens: int,
    seed: int,
    placement: Placement,
    force: bool,
    as_json: bool,
) -> None:
    """Measure how MODEL (a GGUF) uses its keys, and write that into a copy of it.

    With it, a quantized key cache stores each key minus the mean key of its position and scaled channel by channel, and
    queries make up for it: the same model, but the cache loses less, in contexts of any length. It serves all quantized
    key types, q8_0 and q4_0 as well. The model runs over a text twice. Stock llama.cpp runs the file as
    before.
    """
    if in_place and output:
        raise click.UsageError("Give either -o or --in-place.")
    console = Console(stderr=as_json)
    done = library.calibrate(
        model,
        output,
        in_place=in_place,
        text=text,
        tokens=tokens,
        seed=seed,
        placement=placement,
        force=force,
        console=console,
    )
    if as_json:
        click.echo(json.dumps(asdict(done), indent=2, default=str))
        return
    fixed = done.layers - done.turning
    if done.reason and fixed:
        console.print(f"Scaled, not centred in {fixed} layers: {done.reason}.", highlight=False)
    messages.say(
        f"{escape(str(done.path))}: keys of {done.layers} layers, centred by position in {done.turning}, from "
        f"{done.tokens} tokens; expected squared error of the scores {1 / done.error:.1f} times smaller",
        console,
    )
