"""What a file of measurements says, put together from its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..kinds import Finding, Kind
from .store import Measurement, Store, text_of


def of_kind(store: Store, kind: type[Kind]) -> list[Finding]:
    """Findings of a kind, the oldest first; of a kind that wants a machine for itself, apart for each machine."""
    return _of_rows(kind, store.all(kind.name))


def of_work(store: Store, done: Sequence[Kind]) -> list[Finding]:
    """Findings from the rows of these pieces of work, all of one kind."""
    if not done:
        return []
    kind = type(done[0])
    wanted = {(one.facts["fingerprint"], text_of(one.settings)): one.parts for one in done}
    rows = []
    for row in store.all(kind.name):
        parts = wanted.get((row.model["fingerprint"], text_of(row.settings)), {})
        if row.types in parts.get(row.part, ()):
            rows.append(row)
    return merged(kind, _of_rows(kind, rows))


def _of_rows(kind: type[Kind], rows: Iterable[Measurement]) -> list[Finding]:
    found = []
    where = (lambda row: row.machine) if kind.alone else (lambda row: None)
    for same in _groups(rows, lambda row: [row.model["fingerprint"], row.settings, where(row)]):
        latest = {(row.types, row.part): row for row in same}
        for values, used in kind.summarize(latest):
            time, parts = max(row.time for row in used), len({row.part for row in used})
            machines = unique(row.machine for row in used)
            found.append(Finding(kind, same[-1].model, same[0].settings, machines, time, values, parts))
    return sorted(found, key=lambda one: one.time)


def merged(kind: type[Kind], found: Sequence[Finding]) -> list[Finding]:
    """Findings that differ in the setting `kind.merged` alone, as one whose setting is the list of theirs."""
    if not kind.merged:
        return list(found)
    joined = []
    for same in alike(found, lambda one: {name: one.settings[name] for name in one.settings if name != kind.merged}):
        values: dict[Any, list] = {}
        for one in same:
            for types, own in one.values.items():
                values[types] = values.get(types, []) + own
        setting = sorted(one.settings[kind.merged] for one in same)
        machines = unique(machine for one in same for machine in one.machines)
        settings = {**same[-1].settings, kind.merged: setting}
        joined.append(replace(same[-1], settings=settings, machines=machines, values=values))
    return joined


def alike(found: Iterable[Finding], what: Callable[[Finding], Any]) -> Iterator[list[Finding]]:
    """Findings of the same model that agree in `what`."""
    return _groups(found, lambda one: [one.model["fingerprint"], what(one)])


def unique(facts: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The facts without repetitions."""
    return list({text_of(one): one for one in facts}.values())


def _groups(things: Iterable[Any], key: Callable[[Any], Any]) -> Iterator[list[Any]]:
    groups: dict[str, list[Any]] = {}
    for thing in things:
        groups.setdefault(text_of(key(thing)), []).append(thing)
    yield from groups.values()
