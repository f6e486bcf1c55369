"""`turboquant-gguf sweep`."""

from __future__ import annotations

import json
from copy import copy
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from ..core import callbacks, messages
from ..kinds import KINDS
from ..kinds.base import names_to_measure
from ..kinds.quality import Quality
from ..llamacpp.placement import Placement
from ..measure import sweep as library
from . import options
from .measure import distinct, end, parameters

RESULTS = Path("turboquant-results.sqlite")
EPILOG = """\b
Examples:
  turboquant-gguf sweep my.gguf
  turboquant-gguf sweep my.gguf other.gguf -o all.sqlite --text mine.txt
  turboquant-gguf sweep my.gguf --measure quality --chunks 100
  turboquant-gguf sweep my.gguf --tasks gsm8k --limit 100
  turboquant-gguf sweep my.gguf --cluster tcp://10.0.0.1:8786
  turboquant-gguf report turboquant-results.sqlite -o report.html
"""


def _kinds(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(filter(None, text.split(","))))
    for kind in kinds:
        if kind not in names_to_measure():
            raise click.BadParameter(f"{kind!r} is none of {', '.join(names_to_measure())}.")
    return kinds


def command() -> click.Command:
    """The command, with the options of all kinds that it has."""
    theirs = [(one, kind) for kind in KINDS.values() for one in kind.options if one.sweep]
    made = copy(sweep)
    made.params = [*sweep.params, *parameters(theirs)]
    *first, last = (f"{KINDS[name].title.lower()} (as {KINDS[name].command} does)" for name in names_to_measure())
    made.help = made.help.replace("WHATEVER", f"{', '.join(first)} and {last}" if first else last)
    return distinct(options.json("what was done")(options.cluster(options.placement(made))))


@click.command(epilog=EPILOG, short_help="Measure all there is of cache types, into one file that grows.")
@click.argument("models", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "-o",
    "--results",
    type=click.Path(path_type=Path, dir_okay=False),
    default=RESULTS,
    metavar="FILE",
    callback=callbacks.output,
    help="An SQLite file that measurements are added to; what it has is not measured again.",
)
@options.types(Quality.default_types, f"{options.APART} f16 is always measured.")
@options.window
@click.option(
    "--measure",
    default=",".join(names_to_measure()),
    callback=_kinds,
    help="What to measure: some of these. Tasks are measured if there are any.",
)
@click.pass_context
def sweep(
    click_context: click.Context,
    /,
    models: tuple[Path, ...],
    results: Path,
    types: list[str],
    measure: tuple[str, ...],
    placement: Placement,
    cluster: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure WHATEVER of cache types with each of MODELS (GGUFs).

    Everything goes into one file, to which later sweeps of other models and on other machines may add;
    `turboquant-gguf report` makes a page of it. Interrupt it, and the same command goes on where it stopped. A crash of
    llama.cpp loses what it was measuring, and nothing else. With --cluster, machines need this package and the models
    under the same paths.
    """
    console = Console(stderr=as_json)
    kinds = {}
    for kind in KINDS.values():
        own = {one.parameter: settings[one.parameter] for one in kind.options if one.sweep}
        required = [own[one.parameter] for one in kind.options if one.sweep and one.more.get("required")]
        if kind.name in measure or (not kind.in_sweep and required and all(required)):
            kinds[kind.name] = own
    common = {"types": types, "placement": placement, "results": results, "cluster": cluster}
    outcome = library.sweep(models, kinds, **common, console=console)
    if as_json:
        click.echo(json.dumps(outcome.as_json(), indent=2))
    if not outcome.interrupted:
        messages.say(f"turboquant-gguf report {escape(str(results))} -o report.html makes a page of it.", console)
    end(click_context, outcome, console)
