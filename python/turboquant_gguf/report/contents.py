"""What a report shows of a file of measurements: of each model, what the latest build measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..kinds import niah, quality
from ..llamacpp.cachetypes import CacheTypes
from ..measure import findings
from ..measure.findings import Finding, QualityFinding
from ..measure.store import Store

MERGED = {"retrieval": "length", "task": "task"}
"""Kinds whose findings are shown together where nothing but this setting tells them apart."""

KINDS = (quality.KIND, "speed", *MERGED)

_VERSIONS = ("turboquant_gguf", "llama_cpp")


@dataclass(frozen=True)
class Section:
    """What there is of a model. model: as provenance.model says. findings: by kind, those of KINDS, the oldest first.

    In findings of the kinds in MERGED, that setting is a list. left_out: by kind, the cache types that only earlier
    builds measured, which are in no finding.
    """

    model: Mapping[str, Any]
    findings: dict[str, list[QualityFinding | Finding]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    left_out: dict[str, list[CacheTypes]] = field(default_factory=dict)


def read(store: Store) -> list[Section]:
    """A section for each model, known by its fingerprint; with the facts that the latest measurement has of it."""
    sections: dict[str, Section] = {}
    for kind in KINDS:
        found = findings.of_quality(store) if kind == quality.KIND else findings.of_kind(store, kind)
        for same in _alike(found, lambda one, kind=kind: (_settings(one), one.machines if kind == "speed" else None)):
            latest = [one for one in same if one.settings["build"] == same[-1].settings["build"]]
            section = sections.setdefault(same[-1].model["fingerprint"], Section(same[-1].model))
            section.findings[kind] += latest
            kept = {types for one in latest for types in types_of(one)}
            if older := [types for one in same for types in types_of(one) if types not in kept]:
                section.left_out[kind] = list(dict.fromkeys([*section.left_out.get(kind, ()), *older]))
    for section in sections.values():
        for kind, setting in MERGED.items():
            section.findings[kind] = list(_merged(section.findings[kind], setting))
    return list(sections.values())


def _settings(finding: QualityFinding | Finding) -> dict[str, Any]:
    """The settings but for the versions; the environment's switches stay, as they change what is measured."""
    build = {name: value for name, value in finding.settings["build"].items() if name not in _VERSIONS}
    return {**finding.settings, "build": build}


def _alike(found: Iterable, what: Any) -> Iterator[list]:
    """Findings of the same model that agree in `what`."""
    groups: dict[str, list] = {}
    for one in found:
        groups.setdefault(json.dumps([one.model["fingerprint"], what(one)], sort_keys=True), []).append(one)
    yield from groups.values()


def _merged(found: Sequence[Finding], setting: str) -> Iterator[Finding]:
    """Findings that differ in one setting, as one whose setting is the list of theirs."""
    for same in _alike(found, lambda one: {name: value for name, value in one.settings.items() if name != setting}):
        values: dict[CacheTypes, list[dict[str, Any]]] = {}
        for one in same:
            for types, cells in one.values.items():
                values[types] = values.get(types, []) + cells
        yield replace(
            same[-1],
            settings={**same[-1].settings, setting: sorted(one.settings[setting] for one in same)},
            machines=unique(machine for one in same for machine in one.machines),
            values=values,
        )


def unique(facts: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each once."""
    return list({json.dumps(one, sort_keys=True): one for one in facts}.values())


def types_of(finding: QualityFinding | Finding) -> list[CacheTypes]:
    """The cache types that were measured."""
    if isinstance(finding, QualityFinding):
        return [CacheTypes(result.type_k, result.type_v) for result in finding.results]
    return list(finding.values)


def by_bits(types: Iterable[CacheTypes]) -> list[CacheTypes]:
    """Those with the most bits first."""
    return sorted(types, key=lambda pair: -pair.bits)


def answers(finding: Finding) -> niah.Report:
    """A finding of the kind "retrieval" as niah has it. scores: of types that were asked what f16 was asked."""
    cells = [niah.Cell(**cell) for own in finding.values.values() for cell in own]
    report = niah.Report(
        settings={
            "types": list(map(str, by_bits(finding.values))),
            "lengths": sorted({cell.length for cell in cells}),
            "depths": sorted({cell.depth for cell in cells}),
        },
        cells=cells,
    )
    reference = niah.found_by(report, str(niah.REFERENCE))
    for types in report.settings["types"]:
        found = niah.found_by(report, types)
        if shared := {prompt: found[prompt] for prompt in found if prompt in reference}:
            report.scores.append(niah.score(types, shared, reference))
    return report


def as_json(sections: Sequence[Section]) -> dict[str, Any]:
    """All of it as plain values."""
    return {
        "models": [
            {
                "model": section.model,
                **{kind: list(map(_plain, found)) for kind, found in section.findings.items()},
                "left_out": {kind: list(map(str, types)) for kind, types in section.left_out.items()},
            }
            for section in sections
        ]
    }


def _plain(finding: QualityFinding | Finding) -> dict[str, Any]:
    facts = {"settings": finding.settings, "machines": finding.machines, "time": finding.time}
    if isinstance(finding, QualityFinding):
        results = [
            {"types": str(types), "bits": types.bits} | asdict(result)
            for types, result in zip(types_of(finding), finding.results, strict=True)
        ]
        return {**facts, "windows": finding.windows, "results": results}
    return {**facts, "values": {str(types): cells for types, cells in finding.values.items()}}
