"""`turboquant-gguf sweep`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from ..core import messages, texts
from ..kinds import quality
from ..measure import sweep as library
from . import options

RESULTS = Path("turboquant-results.sqlite")
EPILOG = """\b
Examples:
  turboquant-gguf sweep my.gguf
  turboquant-gguf sweep my.gguf other.gguf -o all.sqlite --text mine.txt
  turboquant-gguf sweep my.gguf --measure quality --windows 100
  turboquant-gguf sweep my.gguf --tasks gsm8k --limit 100
  turboquant-gguf sweep my.gguf --cluster tcp://10.0.0.1:8786
  turboquant-gguf report turboquant-results.sqlite -o report.html
"""


def _kinds(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(filter(None, text.split(","))))
    for kind in kinds:
        if kind not in library.KINDS:
            raise click.BadParameter(f"{kind!r} is none of {', '.join(library.KINDS)}.")
    return kinds


@click.command(epilog=EPILOG, short_help="Measure all there is of cache types, into one file that grows.")
@click.argument("models", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "-o",
    "--results",
    type=click.Path(path_type=Path, dir_okay=False),
    default=RESULTS,
    show_default=True,
    metavar="FILE",
    callback=options.output,
    help="An SQLite file that measurements are added to; what it has is not measured again.",
)
@options.types(library.DEFAULT_TYPES, "f16 is always measured.")
@options.window
@click.option(
    "--measure",
    default=",".join(library.KINDS),
    show_default=True,
    callback=_kinds,
    help="What to measure: some of these.",
)
@click.option(
    "--text",
    default=texts.WIKITEXT,
    show_default=True,
    metavar="FILE",
    help=f"For quality: a UTF-8 file, or {texts.WIKITEXT}, which is fetched.",
)
@click.option(
    "--context",
    type=click.IntRange(min=8),
    default=quality.DEFAULT_CONTEXT,
    show_default=True,
    help="For quality: tokens in a window.",
)
@click.option(
    "--windows",
    type=click.IntRange(min=1),
    default=library.DEFAULT_WINDOWS,
    show_default=True,
    help="For quality: how many, from the first.",
)
@click.option(
    "--lengths",
    default=",".join(map(str, library.DEFAULT_LENGTHS)),
    show_default=True,
    callback=options.numbers(least=1),
    help="For retrieval: prompt tokens. Those beyond what a model was trained for are left out.",
)
@click.option(
    "--trials", type=click.IntRange(min=1), default=1, show_default=True, help="For retrieval: needles at each place."
)
@click.option(
    "--depths",
    default=",".join(map(str, library.DEFAULT_DEPTHS)),
    show_default=True,
    callback=options.numbers(least=0),
    help="For speed: tokens already in the cache.",
)
@click.option(
    "--repetitions", type=click.IntRange(min=1), default=3, show_default=True, help="For speed: interleaved rounds."
)
@click.option("--tasks", default="", help="Tasks of lm-evaluation-harness as well, separated by commas.")
@click.option(
    "--task-folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="FOLDER",
    help="Where tasks of your own are.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Documents of each task [default: all]")
@options.threads
@click.option(
    "--cluster",
    metavar="ADDRESS",
    help="Share the work among the workers of a Dask scheduler, such as tcp://10.0.0.1:8786.",
)
@options.json("what was done")
@click.pass_context
def sweep(
    context_: click.Context,
    models: tuple[Path, ...],
    results: Path,
    types: str,
    measure: tuple[str, ...],
    text: str,
    context: int,
    windows: int,
    lengths: tuple[int, ...],
    trials: int,
    depths: tuple[int, ...],
    repetitions: int,
    tasks: str,
    task_folder: Path | None,
    limit: int | None,
    threads: int | None,
    cluster: str | None,
    as_json: bool,
) -> None:
    """Measure quality (as ppl does), retrieval (niah) and speed (bench) of cache types with each of MODELS (GGUFs).

    Everything goes into one file, to which later sweeps of other models and on other machines may add;
    `turboquant-gguf report` makes a page of it. Interrupt it, and the same command goes on where it stopped. A crash of
    llama.cpp loses what it was measuring, and nothing else. With --cluster, machines need this package and the models
    under the same paths.
    """
    console = Console(stderr=as_json)
    report = library.sweep(
        models,
        types=types.split(","),
        measure=measure,
        text=text,
        context=context,
        windows=windows,
        lengths=lengths,
        trials=trials,
        depths=depths,
        repetitions=repetitions,
        tasks=tuple(filter(None, tasks.split(","))),
        task_folder=task_folder,
        limit=limit,
        threads=threads,
        results=results,
        cluster=cluster,
        console=console,
    )
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2, default=str))
    for failure in report.failures:
        messages.error(failure.message, failure.details, of=failure.what)
    before = f", and {report.known} were there" if report.known else ""
    messages.say(f"{escape(str(results))}: {report.added} of {report.asked} measurements added{before}.", console)
    if report.interrupted:
        messages.say("The same command goes on from there.")
        raise click.Abort
    messages.say(f"turboquant-gguf report {escape(str(results))} -o report.html makes a page of it.", console)
    context_.exit(1 if report.failures else 0)
