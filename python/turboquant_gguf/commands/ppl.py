"""`turboquant-gguf ppl`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..core import messages, texts
from ..kinds import quality
from ..llamacpp.cachetypes import CacheTypes
from . import options

EPILOG = """\b
Examples:
  turboquant-gguf ppl model.gguf
  turboquant-gguf ppl model.gguf --text mine.txt --context 2048
  turboquant-gguf ppl model.gguf --types f16,turbo4,turbo4:turbo3 --windows 40
  turboquant-gguf ppl model.gguf --decode --windows 4
  turboquant-gguf ppl model.gguf --text mine.txt --json > quality.jsonl
"""
NOTE = (
    "KL: divergence from the {base} cache, nats a token. ± is one standard error, over means of "
    f"{quality.NEIGHBOURS} neighbouring tokens; of times {{base}} and of differences it is paired, token by token."
)


@click.command(epilog=EPILOG, short_help="Measure what cache types cost: perplexity and KL divergence.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--text",
    default=texts.WIKITEXT,
    show_default=True,
    metavar="FILE",
    help=f"What to read: a UTF-8 file, or {texts.WIKITEXT}, which is fetched.",
)
@options.types(quality.DEFAULT_TYPES, "Each is compared with --base.")
@options.window
@click.option(
    "--base",
    type=click.Choice(quality.BASES),
    default=quality.BASES[0],
    show_default=True,
    help="The cache that they are compared with.",
)
@click.option(
    "--context",
    type=click.IntRange(min=8),
    default=quality.DEFAULT_CONTEXT,
    show_default=True,
    help="Tokens in a window.",
)
@click.option("--windows", type=click.IntRange(min=1), help="How many windows, from the first [default: all]")
@click.option("--decode", is_flag=True, help="Read the second half of each window token by token, as answers are.")
@options.threads
@click.option(
    "--gpu-layers", type=click.IntRange(min=0), default=0, show_default=True, help="Layers of the model on a GPU."
)
@click.option(
    "-o",
    "--results",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where measurements are kept, and taken from if they were made before [default: in the user's cache folder]",
)
@options.json("one object a line for each type")
@click.pass_context
def ppl(
    context_: click.Context,
    model: Path,
    text: str,
    types: str,
    base: str,
    context: int,
    windows: int | None,
    decode: bool,
    threads: int | None,
    gpu_layers: int,
    results: Path | None,
    as_json: bool,
) -> None:
    """Measure what quantized KV caches cost MODEL (a GGUF), against the same model with an unquantized one.

    The text is cut into windows. In each, the model predicts the second half, with every cache in turn: perplexity (as
    llama-perplexity counts it), KL divergence from the unquantized cache, and how often the most likely token is the
    same. What was measured is kept: interrupt it, and the same command goes on where it stopped.
    """
    console = Console(stderr=as_json)
    report = quality.ppl(
        model,
        text=text,
        types=types.split(","),
        base=base,
        context=context,
        windows=windows,
        decode=decode,
        threads=threads,
        gpu_layers=gpu_layers,
        results=results,
        console=console,
    )
    if as_json:
        for result in report.results:
            click.echo(json.dumps(asdict(result)))
    elif report.results:
        console.print(f"[bold]{escape(heading(report))}[/]", highlight=False)
        console.print(table(report))
        for sentence in quality.noise(report.results, report.settings["base"]):
            console.print(sentence, highlight=False)
        console.print(f"[dim]{NOTE.format(base=report.settings['base'])}[/]", highlight=False)
    for refusal in report.refusals:
        messages.error(refusal.message, of=refusal.types)
    if report.interrupted:
        messages.say(
            f"{report.windows} of {report.windows_asked} windows measured; the same command goes on from there."
        )
        raise click.Abort
    context_.exit(1 if report.refusals else 0)


def heading(report: quality.Report) -> str:
    """What was measured, in a line."""
    settings = report.settings
    how = "token by token" if settings["decode"] else "in batches"
    return f"{report.model['name']}, {settings['text']}, {report.windows} windows of {settings['context']}, {how}"


def table(report: quality.Report) -> Table:
    """The results as a table of at most 80 columns, in the order asked for."""
    grid = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    grid.add_column("cache\ntype", no_wrap=True)
    for title in (
        "\nbits",
        "\nppl",
        f"times {report.settings['base']}\n±",
        "KL mean\n±",
        "\nmedian",
        "\n99 %",
        "\nmax",
        "same\ntop",
    ):
        grid.add_column(title, justify="right", no_wrap=True)
    for result in report.results:
        types = CacheTypes(result.type_k, result.type_v)
        grid.add_row(
            str(types),
            f"{types.bits:.4g}",
            f"{result.ppl:.4g}",
            f"{result.ppl_ratio:.3f}±{result.ppl_ratio_stderr:.3f}",
            f"{result.kld_mean:.4f}±{result.kld_stderr:.4f}",
            f"{result.kld_median:.4f}",
            f"{result.kld_p99:.2f}",
            f"{result.kld_max:.2f}",
            f"{result.top1:.1%}",
        )
    return grid
