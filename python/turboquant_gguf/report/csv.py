"""A report as CSV: a row for each number."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..kinds import niah
from ..llamacpp.cachetypes import CacheTypes
from ..measure.findings import Finding, QualityFinding
from .contents import Section, answers, types_of
from .tables import machines_of, metric_name, parts

COLUMNS = (
    "model", "fingerprint", "calibrated", "kind", "conditions", "source", "type_k", "type_v", "bits", "depth", "length",
    "task", "metric", "value", "stderr", "low", "high",
)  # fmt: skip
"""depth: tokens in the cache, or for needles a percentage. low, high: over the rounds. Empty where there is none."""

_QUALITY = {
    "ppl": "ppl_stderr", "ppl_ratio": "ppl_ratio_stderr", "kld_mean": "kld_stderr", "kld_median": None, "kld_p99": None,
    "kld_max": None, "top1": None, "tokens": None,
}  # fmt: skip
_SPEED = ("decode_speed", "decode_ratio", "cache_traffic", "prefill_speed", "prefill_ratio")

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\0")
"""What a cell begins with that spreadsheets compute."""

Rows = Iterator[tuple[CacheTypes, dict[str, Any]]]


def write(sections: Sequence[Section], path: Path) -> None:
    """Write what `sections` say to `path`. Metrics are called as in the JSON form. Raises OSError if that fails."""
    machines = machines_of(sections)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for section in sections:
            model = {"model": section.model["name"]}
            model |= {name: section.model[name] for name in ("fingerprint", "calibrated")}
            for part in parts(section, machines):
                same = model | {"kind": part.kind, "conditions": part.conditions, "source": part.source}
                for types, row in _ROWS[part.kind](part.finding):
                    cells = same | {"type_k": types.k, "type_v": types.v, "bits": types.bits} | row
                    writer.writerow({name: _inert(cell) for name, cell in cells.items()})


def _inert(cell: Any) -> Any:
    """A text that no spreadsheet takes for a formula: names of models and texts are not ours. Numbers stay."""
    return f"'{cell}" if isinstance(cell, str) and cell.lstrip(" ").startswith(_FORMULA) else cell


def _quality(finding: QualityFinding) -> Rows:
    for types, result in zip(types_of(finding), finding.results, strict=True):
        for metric, stderr in _QUALITY.items():
            row = {"metric": metric, "value": getattr(result, metric)}
            yield types, row | ({"stderr": getattr(result, stderr)} if stderr else {})


def _speed(finding: Finding) -> Rows:
    for types, cells in finding.values.items():
        for cell in cells:
            for metric in _SPEED:
                if spread := cell[metric]:
                    spread = {"value": spread["median"], "low": spread["low"], "high": spread["high"]}
                    yield types, {"depth": cell["depth"], "metric": metric} | spread


def _retrieval(finding: Finding) -> Rows:
    report = answers(finding)
    scores = {score.types: score for score in report.scores}
    for types in finding.values:
        for (length, depth), share in niah.shares(report, str(types)).items():
            yield types, {"depth": depth, "length": length, "metric": "share", "value": share}
        if score := scores.get(str(types)):
            for metric in ("lost", "gained", "p_value"):
                yield types, {"metric": metric, "value": getattr(score, metric)}


def _task(finding: Finding) -> Rows:
    for types, cells in finding.values.items():
        for cell in cells:
            named = {"task": cell["task"], "metric": metric_name(cell)}
            yield types, named | {"value": cell["value"], "stderr": cell["stderr"]}
            if difference := cell["difference"]:
                named["metric"] += ", difference from f16"
                yield types, named | {"value": difference["value"], "stderr": difference["stderr"]}


_ROWS = {"quality": _quality, "speed": _speed, "retrieval": _retrieval, "task": _task}
