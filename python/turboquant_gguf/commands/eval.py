"""`turboquant-gguf eval`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from ..core import messages
from ..kinds import evaluation as library
from . import options

EPILOG = """\b
Examples:
  turboquant-gguf eval my.gguf --tasks gsm8k --limit 200
  turboquant-gguf eval my.gguf --tasks gsm8k --types turbo4,turbo4:turbo3
  turboquant-gguf eval my.gguf --tasks mine --task-folder my-tasks
  turboquant-gguf eval my.gguf --tasks gsm8k --samples answers.jsonl
  turboquant-gguf eval my.gguf --tasks gsm8k --parallel 4 --json > scores.json
"""
NOTE = (
    "Minus f16: on the same documents; its standard error is that of the differences between paired answers. "
    f"Within noise: at most {library.NOISE} of them."
)


@click.command("eval", epilog=EPILOG, short_help="Score cache types on tasks of lm-evaluation-harness.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--tasks",
    required=True,
    metavar="NAMES",
    help="Tasks, groups or tags of lm-eval, separated by commas (lm-eval ls tasks lists them).",
)
@options.types(library.DEFAULT_TYPES, "f16 is always measured.")
@options.window
@click.option(
    "--task-folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="FOLDER",
    help="Look for tasks in the YAML files of FOLDER, too.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Documents of each task [default: all]")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples in each prompt [default: the task's number]")
@click.option(
    "--chat/--completions",
    default=None,
    help="Put prompts in the model's chat template, or as plain text [default: --chat if it has one]",
)
@click.option(
    "--context",
    type=click.IntRange(min=256),
    default=4096,
    show_default=True,
    help="Tokens that the cache holds of each prompt with its answer.",
)
@click.option(
    "--parallel",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Documents at a time. Runs with more than 1 can differ in rare answers.",
)
@click.option(
    "--max-tokens", type=click.IntRange(min=1), help="Tokens of an answer [default: the task's number, or 256]"
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**32 - 1),
    default=1234,
    show_default=True,
    help="Chooses the examples in prompts.",
)
@click.option(
    "--samples",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    metavar="FILE",
    callback=options.new_file,
    help="Write every prompt, answer and score to FILE, as JSON Lines.",
)
@options.threads
@options.force
@options.json("the scores and how they came about")
@click.pass_context
def evaluate(
    click_context: click.Context, tasks: str, types: str, force: bool, as_json: bool, **settings: object
) -> None:
    """Let MODEL, a GGUF file, do tasks of EleutherAI's lm-evaluation-harness with several KV-cache types.

    Answers are greedy (temperature 0), and each type is compared with f16 on the same documents. Only tasks in which
    the model writes its answer work: llama-server gives no log-probabilities of prompts, which multiple choice needs.
    Ctrl-C stops and shows the types that are finished.
    """
    console = Console(stderr=as_json)
    report = library.evaluate(tasks=_names(tasks), types=types.split(","), console=console, **settings)
    if as_json:
        click.echo(json.dumps(library.as_json(report), indent=2))
    else:
        _show(report, console)
    for failure in report.failures:
        messages.error(failure.message, failure.details, of=failure.type)
    if report.interrupted:
        raise click.Abort
    click_context.exit(1 if report.failures else 0)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise click.UsageError("--tasks names no task.")
    return list(dict.fromkeys(names))


def _show(report: library.Report, console: Console) -> None:
    if report.scores:
        console.print(f"[bold]{escape(library.heading(report))}[/]", highlight=False)
        console.print(library.tables(report), highlight=False)
        console.print(f"\n[dim]{NOTE}[/]", highlight=False)
