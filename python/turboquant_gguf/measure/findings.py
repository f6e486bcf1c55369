"""What a file of measurements says, put together from its rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kinds import quality
from ..llamacpp.cachetypes import CacheTypes
from .store import Measurement, Store


@dataclass(frozen=True)
class Finding:
    """Measurements of one kind and one model with the same settings. time: of the last of them, UTC, ISO 8601.

    machines: where they were made. values: by cache types, in the order in which they were measured; a list of what the
    cells of that kind say (cells.py).
    """

    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    machines: list[Mapping[str, Any]]
    time: str
    values: dict[CacheTypes, list[dict[str, Any]]]


@dataclass(frozen=True)
class QualityFinding:
    """The same for quality, over the windows that all of these types were measured on."""

    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    machines: list[Mapping[str, Any]]
    time: str
    windows: int
    results: list[quality.Quality]


def of_kind(store: Store, kind: str) -> list[Finding]:
    """What there is of a kind other than quality, the oldest first; speed is apart for each machine."""
    found = []
    for rows in _groups(store, kind, by_machine=kind == "speed"):
        values = {row.types: json.loads(row.value) for row in rows}
        found.append(Finding(rows[-1].model, rows[0].settings, _machines(rows), rows[-1].time, values))
    return sorted(found, key=lambda one: one.time)


def of_quality(store: Store) -> list[QualityFinding]:
    """What there is of quality, the oldest first. Types measured on other windows than the rest are apart."""
    found = []
    for rows in _groups(store, quality.KIND, by_machine=False):
        latest = {(row.types, row.part): row for row in rows}
        base = CacheTypes.parse(rows[0].settings["base"])
        windows: dict[CacheTypes, set[int]] = {}
        for types, part in latest:
            windows.setdefault(types, set()).add(part)
        others = [own for types, own in windows.items() if types != base] or list(windows.values())
        for parts in {frozenset(own & windows.get(base, set())) for own in others} - {frozenset()}:
            alike = [types for types, own in windows.items() if own & windows[base] == parts or types == base]
            used = [latest[types, part] for types in alike for part in sorted(parts)]
            scores = {
                types: np.frombuffer(b"".join(latest[types, part].value for part in sorted(parts)), quality.SCORES)
                for types in alike
            }
            results = quality.summarize(scores, base)
            time = max(row.time for row in used)
            found.append(QualityFinding(rows[-1].model, rows[0].settings, _machines(used), time, len(parts), results))
    return sorted(found, key=lambda one: one.time)


def _groups(store: Store, kind: str, *, by_machine: bool) -> Iterator[list[Measurement]]:
    groups: dict[str, list[Measurement]] = {}
    for row in store.all(kind):
        key = [row.model["fingerprint"], row.settings, row.machine if by_machine else None]
        groups.setdefault(json.dumps(key), []).append(row)
    yield from groups.values()


def _machines(rows: list[Measurement]) -> list[Mapping[str, Any]]:
    return list({json.dumps(row.machine): row.machine for row in rows}.values())
