"""A report as CSV: a row for each number."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..kinds import KINDS
from .contents import Section
from .tables import machines_of, parts

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\0")
"""What a cell begins with that spreadsheets compute."""


def columns() -> list[str]:
    """The names of the columns, with those that kinds have of their own. low, high: the range over several rounds."""
    own = dict.fromkeys(column for kind in KINDS.values() for column in kind.columns)
    model = ("model", "fingerprint", "calibrated", "kind", "conditions", "source", "type_k", "type_v", "bits")
    return [*model, *own, "metric", "value", "stderr", "low", "high"]


def write(sections: Sequence[Section], path: Path) -> None:
    """Write what `sections` say to `path`. Metrics are called as in the JSON form. Raises OSError if that fails."""
    machines = machines_of(sections)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns())
        writer.writeheader()
        for section in sections:
            model = {"model": section.model["name"]}
            model |= {name: section.model[name] for name in ("fingerprint", "calibrated")}
            for part in parts(section, machines):
                kind = part.finding.kind
                same = model | {"kind": kind.name, "conditions": part.conditions, "source": part.source}
                for types, row in kind.numbers(part.finding):
                    cells = same | {"type_k": types.k, "type_v": types.v, "bits": types.bits} | row
                    writer.writerow({name: _inert(cell) for name, cell in cells.items()})


def _inert(cell: Any) -> Any:
    """A text that no spreadsheet takes for a formula: names of models and texts are not ours. Numbers stay."""
    return f"'{cell}" if isinstance(cell, str) and cell.lstrip(" ").startswith(_FORMULA) else cell
