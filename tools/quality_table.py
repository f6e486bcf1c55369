#!/usr/bin/env python3
"""The table of quality in README.md, and the losses that `turboquant-gguf recommend` predicts from.

    python tools/quality_table.py wiki.test.raw

measures SmolLM2-135M-Instruct, as it is and with calibrated keys, with turboquant-gguf, and puts what comes out into
README.md, docs/quality.png and python/turboquant_gguf/data/reference.json. What was measured is kept: interrupted, it
goes on from there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
from rich.console import Console
from turboquant_gguf import models, outputfile, quality
from turboquant_gguf.cachetypes import CacheTypes
from turboquant_gguf.calibration import calibrate
from turboquant_gguf.report import report

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "python" / "turboquant_gguf" / "data" / "reference.json"
PLOT = ROOT / "docs" / "quality.png"
TYPES = (
    "f16", "q8_0", "q5_1", "q5_0", "q4_0", "q8_0:turbo4", "q8_0:turbo3", "turbo4", "turbo4:turbo3", "turbo4:turbo2",
    "turbo3", "turbo2",
)  # fmt: skip
BEGIN, END = "<!-- by tools/quality_table.py -->", "<!-- end -->"


@click.command(help=__doc__)
@click.argument("text", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--windows", default=8, show_default=True)
@click.option("--context", default=1024, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=None, help="A file of measurements.")
def main(text: Path, windows: int, context: int, results: Path | None) -> None:
    console = Console(stderr=True)
    results = results or quality.default_results()
    model = models.fetch("smollm2-135m")
    calibrated = models.cache_folder() / "SmolLM2-135M-Instruct-calibrated.gguf"
    if not calibrated.exists():  # made again with other threads it would be a little different, and so another model
        calibrate(model, calibrated, console=console)
    found = [
        quality.ppl(
            path, text=str(text), types=TYPES, context=context, windows=windows, results=results, console=console
        )
        for path in (model, calibrated)
    ]
    if any(one.interrupted for one in found):
        raise click.Abort
    _write(ROOT / "README.md", _in_readme(_table(*found)))
    report(results, outputs=[PLOT], models=[path.stem for path in (model, calibrated)], console=console)
    _write(REFERENCE, json.dumps(_reference(*found), indent=2) + "\n")


def _table(plain: quality.Report, calibrated: quality.Report) -> str:
    settings = plain.settings
    lines = [
        "SmolLM2-135M-Instruct Q4_1, a small model with heads of 64 values, which suffers more than large ones; "
        f"{settings['text']}, {plain.windows} windows of {settings['context']} tokens:",
        "",
        "| keys : values | bits | perplexity, times f16 | KL divergence | same top token "
        "| calibrated: KL divergence | same top token |",
        "|---|---|---|---|---|---|---|",
    ]
    for one, other in zip(plain.results, calibrated.results, strict=True):
        types = CacheTypes(one.type_k, one.type_v)
        lines.append(
            f"| {_name(types)} | {types.bits:g} | {one.ppl_ratio:.3f} ± {one.ppl_ratio_stderr:.3f} "
            f"| {_loss(one)} | {one.top1:.1%} | {_loss(other)} | {other.top1:.1%} |"
        )
    return "\n".join(lines)


def _name(types: CacheTypes) -> str:
    name = str(types).replace(":", " : ")
    return f"**{name}**" if "turbo" in name else name


def _loss(result: quality.Quality) -> str:
    return f"{result.kld_mean:.4f} ± {result.kld_stderr:.4f}"


def _in_readme(table: str) -> str:
    readme = (ROOT / "README.md").read_text("utf-8")
    block = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if len(block.findall(readme)) != 1:
        raise click.ClickException(f"README.md has no place for the table, between {BEGIN} and {END}.")
    return block.sub(lambda _: f"{BEGIN}\n{table}\n{END}", readme)


def _reference(plain: quality.Report, calibrated: quality.Report) -> dict:
    reports = {"as it is": plain, "calibrated": calibrated}
    return {"model": plain.model["name"], "text": plain.settings["text"]} | {
        name: {str(CacheTypes(one.type_k, one.type_v)): round(one.kld_mean, 5) for one in found.results}
        for name, found in reports.items()
    }


def _write(path: Path, content: str) -> None:
    with outputfile.beside(path) as unfinished:
        unfinished.write_text(content, "utf-8")


if __name__ == "__main__":
    main()
