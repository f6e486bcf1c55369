"""The tables of a report, and what it says around them; written as Markdown and for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.markup import escape

from ..core import tables
from ..core.tables import NOTHING, Column, HeatMap, Table, marked
from ..core.units import count_text, size_text
from ..kinds import KINDS, Finding
from ..llamacpp import placement
from ..measure.findings import unique
from .contents import VERSIONS, Section


@dataclass(frozen=True)
class Part:
    """What one finding says. conditions: what was measured, in words. source: where, with which build, and when."""

    finding: Finding
    conditions: str
    source: str
    table: Table
    maps: list[HeatMap] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The heading of the part."""
        return self.finding.kind.title

    @property
    def tables(self) -> list[Table]:
        """The tables, for where heat maps cannot be drawn."""
        return [self.table, *([table_of_maps(self.maps)] if self.maps else [])]


def parts(section: Section, machines: Sequence[Mapping[str, Any]]) -> list[Part]:
    """What the findings of a model say. machines: all of the report, which tells those of the same name apart."""
    names = machine_names(machines)
    found = []
    for one in (one for every in section.findings.values() for one in every):
        kind, build = one.kind, one.settings["build"]
        used = " and ".join(names[machines.index(machine)] for machine in one.machines)
        source = f"{used}; {build_name(build)}; {one.time[:10]}"
        gpus = unique(gpu for machine in one.machines for gpu in machine.get("gpus", ()))  # old rows have none
        conditions = ", ".join([*kind.conditions(one), *placement.words(one.settings, gpus), *_switches(build)])
        found.append(Part(one, conditions, source, kind.table(one), kind.maps(one)))
    return found


def facts(model: Mapping[str, Any]) -> dict[str, str]:
    """What is known of a model, in words, by name."""
    trained = model.get("trained_length")
    return {
        "architecture": model["architecture"],
        "parameters": count_text(model["parameters"]),
        "file": size_text(model["bytes"]),
        **({"trained for": f"{trained} tokens"} if trained else {}),
        "keys": "calibrated" if model["calibrated"] else "not calibrated",
        "fingerprint": model["fingerprint"],
    }


def left_out(section: Section) -> list[str]:
    """What is not shown, in sentences."""
    return [
        f"{KINDS[name].title}: only an earlier build measured {', '.join(map(str, types))}, so it is not shown."
        for name, types in section.left_out.items()
    ]


def machines_of(sections: Sequence[Section]) -> list[Mapping[str, Any]]:
    """All machines that anything was measured on."""
    return unique(machine for one in _findings(sections) for machine in one.machines)


def _findings(sections: Sequence[Section]) -> Iterator[Finding]:
    for section in sections:
        for found in section.findings.values():
            yield from found


def machine_names(machines: Sequence[Mapping[str, Any]]) -> list[str]:
    """A short name for each, no two alike."""
    names = [
        f"{', '.join(machine['devices'])} ({tables.count(machine['logical_cpus'], 'CPU')})" for machine in machines
    ]
    return [f"{name}, no. {i + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def build_name(build: Mapping[str, str]) -> str:
    """The versions, in words."""
    return f"turboquant-gguf {build['turboquant_gguf']} (llama.cpp {build['llama_cpp']})"


def _switches(build: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in build.items() if name not in VERSIONS]


def provenance(sections: Sequence[Section]) -> list[Table]:
    """The machines and the builds."""
    machines = machines_of(sections)
    rows = [
        [name, machine.get("instruction_set", NOTHING), machine["system"]]  # older measurements do not tell
        for name, machine in zip(machine_names(machines), machines, strict=True)
    ]
    builds = unique(one.settings["build"] for one in _findings(sections))
    versions = [
        [build["turboquant_gguf"], build["llama_cpp"], ", ".join(_switches(build)) or NOTHING] for build in builds
    ]
    words = [Column(heading, words=True) for heading in ("turboquant-gguf", "llama.cpp, digest", "switches")]
    return [
        Table("Machines", [Column(name, words=True) for name in ("machine", "instructions", "system")], {"": rows}),
        Table("Builds", words, {"": versions}),
    ]


def table_of_maps(maps: Sequence[HeatMap]) -> Table:
    """Heat maps of the same lengths as one table: a group for each, a row for each depth, a column for each length."""
    rows = {
        one.types: [[f"{depth:g} %", *map(tables.share, shares)] for depth, shares in one.shares.items()]
        for one in maps
    }
    columns = [Column("depth", words=True), *(Column(str(length)) for length in maps[0].lengths)]
    return Table("Share of needles found, by depth and by the tokens of the prompt", columns, rows)


def markdown(sections: Sequence[Section]) -> str:
    """All tables, as GitHub reads them."""
    machines = machines_of(sections)
    blocks = []
    for section in sections:
        said = ", ".join(f"{name} {text}" for name, text in facts(section.model).items())
        blocks += [f"## {marked(section.model['name'])}", marked(said)]
        for part in parts(section, machines):
            blocks += [f"### {part.title}", marked(f"{part.conditions} ({part.source})")]
            for table in part.tables:
                blocks += [f"{marked(table.caption)}:", tables.markdown(table), *map(marked, table.notes)]
        blocks += map(marked, left_out(section))
    return "\n\n".join(blocks) + "\n"


def terminal(sections: Sequence[Section]) -> Group:
    """All tables, without their details: at most 80 columns."""
    machines = machines_of(sections)
    lines: list = []
    for section in sections:
        said = ", ".join(f"{name} {text}" for name, text in facts(section.model).items())
        lines += ["" if lines else None, f"[bold]{escape(section.model['name'])}[/]", f"[dim]{escape(said)}[/]"]
        for part in parts(section, machines):
            lines += ["", f"[bold]{part.title}[/]: {escape(part.conditions)}", f"[dim]{escape(part.source)}[/]"]
            for table in part.tables:
                lines += ["", tables.Shown(table, gap=1), *map(escape, table.notes)]
        lines += map(escape, left_out(section))
    return Group(*(line for line in lines if line is not None))
