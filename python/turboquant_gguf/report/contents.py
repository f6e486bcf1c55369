"""What a report shows of a file of measurements: of each model, what the latest build measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..kinds import KINDS, Finding
from ..llamacpp.cachetypes import CacheTypes
from ..measure import findings
from ..measure.store import Store

VERSIONS = ("turboquant_gguf", "llama_cpp")
"""What a build is, besides the environment's switches."""


@dataclass(frozen=True)
class Section:
    """What was measured with a model. model: as provenance.model says. findings: by kind, the oldest first.

    left_out: by kind, the cache types that only earlier builds measured, which are in no finding.
    """

    model: Mapping[str, Any]
    findings: dict[str, list[Finding]] = field(default_factory=lambda: {name: [] for name in KINDS})
    left_out: dict[str, list[CacheTypes]] = field(default_factory=dict)


def read(store: Store) -> list[Section]:
    """A section for each model, known by its fingerprint; with the facts that the latest measurement has of it."""
    sections: dict[str, Section] = {}
    for name, kind in KINDS.items():
        found = findings.of_kind(store, kind)
        for same in findings.alike(found, lambda one: (_settings(one), one.machines if one.kind.alone else None)):
            latest = [one for one in same if one.settings["build"] == same[-1].settings["build"]]
            section = sections.setdefault(same[-1].model["fingerprint"], Section(same[-1].model))
            section.findings[name] += latest
            kept = {types for one in latest for types in one.values}
            if older := [types for one in same for types in one.values if types not in kept]:
                section.left_out[name] = list(dict.fromkeys([*section.left_out.get(name, ()), *older]))
    for section in sections.values():
        for name, kind in KINDS.items():
            section.findings[name] = findings.merged(kind, section.findings[name])
    return list(sections.values())


def _settings(finding: Finding) -> dict[str, Any]:
    """The settings but for the versions; the environment's switches stay, as they change what is measured."""
    build = {name: value for name, value in finding.settings["build"].items() if name not in VERSIONS}
    return {**finding.settings, "build": build}


def as_json(sections: Sequence[Section]) -> dict[str, Any]:
    """The sections as plain values, for JSON."""
    return {
        "models": [
            {
                "model": section.model,
                **{name: [one.as_json() for one in found] for name, found in section.findings.items()},
                "left_out": {name: list(map(str, types)) for name, types in section.left_out.items()},
            }
            for section in sections
        ]
    }
