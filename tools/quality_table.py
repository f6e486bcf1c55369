#!/usr/bin/env python3
"""The table of quality in README.md, and the losses that `turboquant-gguf recommend` predicts from.

    python tools/quality_table.py wiki.test.raw

measures SmolLM2-135M-Instruct, as it is and with calibrated keys, with the recent window that is the default, in a
short context and in the longest one, and puts what comes out into README.md, docs/quality.png and
python/turboquant_gguf/data/reference.json. What was measured is kept: interrupted, it goes on from there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from turboquant_gguf.core import outputfile
from turboquant_gguf.core.folders import cache_folder
from turboquant_gguf.kinds import Finding
from turboquant_gguf.kinds.quality import Loss
from turboquant_gguf.llamacpp import models
from turboquant_gguf.llamacpp.cachetypes import CacheTypes
from turboquant_gguf.measure import store
from turboquant_gguf.measure.sweep import measure
from turboquant_gguf.report.page import report
from turboquant_gguf.weights.calibration import calibrate

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "python" / "turboquant_gguf" / "data" / "reference.json"
PLOT = ROOT / "docs" / "quality.png"
TYPES = (
    "f16", "q8_0", "q5_1", "q5_0", "q4_0", "q8_0:turbo4", "q8_0:turbo3", "turbo4", "turbo4:turbo3", "turbo4:turbo2",
    "turbo3", "turbo2",
)  # fmt: skip
LONG_TYPES = ("f16", "q5_0", "q4_0", "turbo4", "turbo3", "turbo2")
LONG_CONTEXT, LONG_CHUNKS = 8192, 1
BEGIN, END = "<!-- by tools/quality_table.py -->", "<!-- end -->"


@click.command(help=__doc__)
@click.argument("text", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--chunks", default=8, show_default=True)
@click.option("--context", default=1024, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=None, help="A file of measurements.")
def main(text: Path, chunks: int, context: int, results: Path | None) -> None:
    console = Console(stderr=True)
    results = results or store.default_results()
    model = models.fetch("smollm2-135m")
    calibrated = cache_folder() / "SmolLM2-135M-Instruct-calibrated.gguf"
    if not calibrated.exists():  # made again with other threads it would be a little different, and so another model
        calibrate(model, calibrated, console=console)

    def measured(path: Path, types: Sequence[str] = TYPES, results: Path = results, **other: int) -> Finding:
        how = {"text": str(text), "types": types, "context": context, "chunks": chunks} | other
        found = measure("quality", path, results=results, console=console, **how)
        if found.interrupted or found.failures:
            raise click.ClickException("; ".join(one.message for one in found.failures) or "It was interrupted.")
        return found.findings[0]

    found = [measured(model), measured(calibrated)]
    apart = results.with_stem(f"{results.stem}-long")  # the plot shows what is in `results`
    long = [measured(path, LONG_TYPES, apart, context=LONG_CONTEXT, chunks=LONG_CHUNKS) for path in (model, calibrated)]
    _write(ROOT / "README.md", _in_readme(f"{_table(*found)}\n\n{_long_table(*found, *long)}"))
    report(results, outputs=[PLOT], models=[path.stem for path in (model, calibrated)], console=console)
    _write(REFERENCE, json.dumps(_reference(*found), indent=2) + "\n")


def _table(*findings: Finding) -> str:
    """The table. findings: as it is, and calibrated."""
    settings = findings[-1].settings
    lines = [
        "SmolLM2-135M-Instruct Q4_1, a small model with heads of 64 values, which suffers more than large ones; "
        f"{settings['text']}, {findings[-1].parts} chunks of {settings['context']} tokens, with the recent window of turbo "
        "types (others have none):",
        "",
        "| keys : values | bits | KL divergence, as it is | **calibrated** | same top token | perplexity, times f16 |",
        "|---|---|---|---|---|---|",
    ]
    plain, calibrated = (found.values for found in findings)
    for types, best in calibrated.items():
        lines.append(
            f"| {_name(types)} | {types.bits:g} | {_loss(plain[types])} | {_loss(best)} | {best.top1:.1%} "
            f"| {best.ppl_ratio:.3f} ± {best.ppl_ratio_stderr:.3f} |"
        )
    return "\n".join(lines)


def _long_table(*findings: Finding) -> str:
    """What is usual and what is rare, by context. findings: as it is and calibrated, in the short and the long one."""
    contexts = [finding.settings["context"] for finding in findings[::2]]
    lines = [
        f"Both contexts, with the recent window of turbo types ({LONG_CHUNKS} chunk of {LONG_CONTEXT}): KL divergence, mean / "
        "median / 99th percentile",
        "",
        "| keys : values | "
        + " | ".join(f"{context}, as it is | {context}, **calibrated**" for context in contexts)
        + " |",
        "|---|---|---|---|---|",
    ]
    for types in map(CacheTypes.parse, LONG_TYPES[1:]):
        losses = (finding.values[types] for finding in findings)
        cells = (f"{one.kld_mean:.4f} / {one.kld_median:.4f} / {one.kld_p99:.3f}" for one in losses)
        lines.append(f"| {_name(types)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _name(types: CacheTypes) -> str:
    name = str(types).replace(":", " : ")
    return f"**{name}**" if types.is_turbo else name


def _loss(result: Loss) -> str:
    return f"{result.kld_mean:.4f} ± {result.kld_stderr:.4f}"


def _in_readme(table: str) -> str:
    readme = (ROOT / "README.md").read_text("utf-8")
    block = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if len(block.findall(readme)) != 1:
        raise click.ClickException(f"README.md has no place for the table, between {BEGIN} and {END}.")
    return block.sub(lambda _: f"{BEGIN}\n{table}\n{END}", readme)


def _reference(plain: Finding, calibrated: Finding) -> dict:
    both = {"as it is": plain, "calibrated": calibrated}
    return {"model": plain.model["name"], "text": plain.settings["text"]} | {
        name: {str(types): round(loss.kld_mean, 5) for types, loss in found.values.items()}
        for name, found in both.items()
    }


def _write(path: Path, content: str) -> None:
    with outputfile.beside(path) as unfinished:
        unfinished.write_text(content, "utf-8")


if __name__ == "__main__":
    main()
