"""The tables of a report, as plain text in rows and columns, and written as Markdown and for a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table as Grid

from ..core.units import GB, count_text, size_text
from ..kinds import niah, quality
from ..measure.findings import Finding, QualityFinding
from .contents import Section, answers, by_bits, types_of, unique

TITLES = {"quality": "Quality", "speed": "Speed", "retrieval": "Retrieval", "task": "Tasks"}
NOTHING = "–"
_MOST_DECIMALS = 5


@dataclass(frozen=True)
class Column:
    """heading: with line breaks for narrow tables. words: not numbers. detail: left out where room is short."""

    heading: str
    words: bool = False
    detail: bool = False

    @property
    def title(self) -> str:
        """The heading in one line."""
        return " ".join(self.heading.split())


@dataclass(frozen=True)
class Table:
    """rows: in groups, by what they have in common ("" if there is one group). The first column names the row."""

    caption: str
    columns: list[Column]
    rows: dict[str, list[list[str]]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class HeatMap:
    """The share of needles that a type found, 0 to 1, by depth (rows) and length; None where none was asked for."""

    types: str
    lengths: list[int]
    shares: dict[float, list[float | None]]


@dataclass(frozen=True)
class Part:
    """What one finding says. conditions: what was measured, in words. source: where, with which build, and when."""

    kind: str
    finding: QualityFinding | Finding
    conditions: str
    source: str
    table: Table
    maps: list[HeatMap] = field(default_factory=list)

    @property
    def title(self) -> str:
        return TITLES[self.kind]

    @property
    def tables(self) -> list[Table]:
        """For where heat maps cannot be drawn."""
        return [self.table, *([_table_of_maps(self.maps)] if self.maps else [])]


def parts(section: Section, machines: Sequence[Mapping[str, Any]]) -> list[Part]:
    """Of a model. machines: all of the report, which tells those of the same name apart."""
    names = machine_names(machines)
    found = []
    for kind, one in ((kind, one) for kind, every in section.findings.items() for one in every):
        conditions, table = _WRITERS[kind](one)
        switches = _switches(one.settings["build"])
        used = " and ".join(names[machines.index(machine)] for machine in one.machines)
        source = f"{used}; {build_name(one.settings['build'])}; {one.time[:10]}"
        maps = list(_maps(one)) if kind == "retrieval" else []
        found.append(Part(kind, one, ", ".join([*conditions, *switches]), source, table, maps))
    return found


def facts(model: Mapping[str, Any]) -> dict[str, str]:
    """Of a model, by what they are."""
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
        f"{TITLES[kind]}: only an earlier build measured {', '.join(map(str, types))}, so it is not shown."
        for kind, types in section.left_out.items()
    ]


def machines_of(sections: Sequence[Section]) -> list[Mapping[str, Any]]:
    """All machines that anything was measured on."""
    return unique(machine for one in _findings(sections) for machine in one.machines)


def _findings(sections: Sequence[Section]) -> Iterator[QualityFinding | Finding]:
    for section in sections:
        for found in section.findings.values():
            yield from found


def machine_names(machines: Sequence[Mapping[str, Any]]) -> list[str]:
    """A short name for each, no two alike."""
    names = [f"{', '.join(machine['devices'])} ({_count(machine['logical_cpus'], 'CPU')})" for machine in machines]
    return [f"{name}, no. {i + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def build_name(build: Mapping[str, str]) -> str:
    """The versions, in words."""
    return f"turboquant-gguf {build['turboquant_gguf']} (llama.cpp {build['llama_cpp']})"


def _switches(build: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in build.items() if name not in ("turboquant_gguf", "llama_cpp")]


def provenance(sections: Sequence[Section]) -> list[Table]:
    """The machines and the builds."""
    machines = machines_of(sections)
    rows = [[name, machine["system"]] for name, machine in zip(machine_names(machines), machines, strict=True)]
    builds = unique(one.settings["build"] for one in _findings(sections))
    versions = [
        [build["turboquant_gguf"], build["llama_cpp"], ", ".join(_switches(build)) or NOTHING] for build in builds
    ]
    words = [Column(heading, words=True) for heading in ("turboquant-gguf", "llama.cpp, digest", "switches")]
    return [
        Table("Machines", [Column("machine", words=True), Column("system", words=True)], {"": rows}),
        Table("Builds", words, {"": versions}),
    ]


#
# what each kind of finding says: its conditions, and its table
#

TYPE = Column("cache\ntype", words=True)
BITS = Column("\nbits")


def _quality(finding: QualityFinding) -> tuple[list[str], Table]:
    settings, base = finding.settings, finding.settings["base"]
    conditions = [
        settings["text"],
        f"{_count(finding.windows, 'window')} of {settings['context']} tokens",
        "token by token" if settings["decode"] else "in batches",
        *([f"{_count(settings['gpu_layers'], 'layer')} on a GPU"] if settings["gpu_layers"] else []),
    ]
    columns = [
        TYPE, BITS, Column("\nperplexity"), Column(f"times\n{base}"), Column("KL\nmean"),
        Column("KL\nmedian", detail=True), Column("KL\n99 %"), Column("KL\nmax", detail=True), Column("same\ntop, %"),
    ]  # fmt: skip
    results = dict(zip(types_of(finding), finding.results, strict=True))
    rows = [
        [
            str(types),
            f"{types.bits:.4g}",
            with_error(result.ppl, result.ppl_stderr),
            with_error(result.ppl_ratio, result.ppl_ratio_stderr),
            with_error(result.kld_mean, result.kld_stderr),
            *(short(value) for value in (result.kld_median, result.kld_p99, result.kld_max)),
            f"{100 * result.top1:.1f}",
        ]
        for types, result in ((types, results[types]) for types in by_bits(results))
    ]
    caption = f"Quality against {base}, over {finding.results[0].tokens} predicted tokens"
    return conditions, Table(caption, columns, {"": rows}, quality.noise(finding.results, base))


def _speed(finding: Finding) -> tuple[list[str], Table]:
    settings = finding.settings
    kinds = [kind for kind in ("decode", "prefill") if settings[kind]]
    conditions = [
        *(f"{kind} of {_count(settings[kind], 'token')}" for kind in kinds),
        *([_count(settings["threads"], "thread")] if settings["threads"] else []),
        _count(settings["repetitions"], "round"),
    ]
    columns = [TYPE]
    for kind in kinds:
        columns += [Column(f"{kind}\ntok/s"), Column("times\nf16"), Column("lowest..\nhighest")]
        columns += [Column("cache\nGB/s", detail=True)] if kind == "decode" else []
    rows: dict[str, list[list[str]]] = {}
    cells = [(types, cell) for types in by_bits(finding.values) for cell in finding.values[types]]
    for types, cell in sorted(cells, key=lambda one: one[1]["depth"]):
        row = [str(types)]
        for kind in kinds:
            speed, ratio = cell[f"{kind}_speed"], cell[f"{kind}_ratio"]
            row += [f"{speed['median']:.1f}" if speed else NOTHING]
            row += (
                [f"{ratio['median']:.2f}", f"{ratio['low']:.2f}..{ratio['high']:.2f}"] if ratio else [NOTHING, NOTHING]
            )
            if kind == "decode":
                traffic = cell["cache_traffic"]
                row += [short(traffic["median"] / GB) if traffic else NOTHING]
        rows.setdefault(f"depth {cell['depth']}", []).append(row)
    return conditions, Table("Speed by depth, the tokens already in the cache", columns, rows)


def _retrieval(finding: Finding) -> tuple[list[str], Table]:
    report = answers(finding)
    settings = report.settings
    lengths, depths = (", ".join(f"{value:g}" for value in settings[name]) for name in ("lengths", "depths"))
    trials = _count(finding.settings["trials"], "trial")
    conditions = [f"prompts of {lengths} tokens", f"needles at {depths} %", f"{trials} of each"]
    columns = [TYPE, BITS, Column("needles\nfound"), Column("\nshare")]
    compared = [Column("\nlost"), Column("\ngained"), Column("McNemar\np"), Column("against\nf16", words=True)]
    scores = {score.types: score for score in report.scores}
    rows = []
    for types in by_bits(finding.values):
        found = niah.found_by(report, str(types)).values()
        row = [str(types), f"{types.bits:.4g}", f"{sum(found)}/{len(found)}", share_text(sum(found) / len(found))]
        if score := scores.get(str(types)):
            row += [str(score.lost), str(score.gained), f"{score.p_value:.2g}", score.verdict or "f16 found none"]
        else:
            row += [NOTHING] * len(compared)
        rows.append(row if scores else row[: -len(compared)])
    return conditions, Table("Needles found", columns + (compared if scores else []), {"": rows})


def _maps(finding: Finding) -> Iterator[HeatMap]:
    report = answers(finding)
    lengths, depths = report.settings["lengths"], report.settings["depths"]
    for types in report.settings["types"]:
        found = niah.shares(report, types)
        yield HeatMap(types, lengths, {depth: [found.get((length, depth)) for length in lengths] for depth in depths})


def _table_of_maps(maps: Sequence[HeatMap]) -> Table:
    rows = {
        one.types: [[f"{depth:g} %", *map(share_text, shares)] for depth, shares in one.shares.items()] for one in maps
    }
    columns = [Column("depth", words=True), *(Column(str(length)) for length in maps[0].lengths)]
    return Table("Share of needles found, by depth and by the tokens of the prompt", columns, rows)


def share_text(share: float | None) -> str:
    """A percentage."""
    return NOTHING if share is None else f"{100 * share:.0f} %"


def _tasks(finding: Finding) -> tuple[list[str], Table]:
    limit = finding.settings["limit"]
    conditions = [f"the first {_count(limit, 'document')} of each task" if limit else "all documents"]
    columns = [TYPE, BITS, Column("\nvalue"), Column("against\nf16"), Column("\nverdict", words=True)]
    rows: dict[str, list[list[str]]] = {}
    for types in by_bits(finding.values):
        for cell in finding.values[types]:
            row = [str(types), f"{types.bits:.4g}", with_error(cell["value"], cell["stderr"]), *_difference(cell)]
            rows.setdefault(_task(cell), []).append(row)
    return conditions, Table("Results of the tasks", columns, {task: rows[task] for task in sorted(rows)})


def _task(cell: Mapping[str, Any]) -> str:
    better = "higher" if cell["higher_is_better"] else "lower"
    return f"{cell['task']}: {metric_name(cell)} ({better} is better), {_count(cell['documents'], 'document')}"


def metric_name(cell: Mapping[str, Any]) -> str:
    """Of a task's result: with the filter of the answers, if there is one."""
    return ", ".join(name for name in (cell["metric"], cell["filter"]) if name not in (None, "none"))


def _difference(cell: Mapping[str, Any]) -> list[str]:
    difference = cell["difference"]
    if not difference:
        return [NOTHING, NOTHING]
    better = (difference["value"] > 0) == cell["higher_is_better"]
    verdict = "within noise" if difference["within_noise"] else "better" if better else "worse"
    return [with_error(difference["value"], difference["stderr"], sign="+"), verdict]


_WRITERS = {"quality": _quality, "speed": _speed, "retrieval": _retrieval, "task": _tasks}


#
# numbers and words
#


def with_error(value: float, error: float | None, sign: str = "") -> str:
    """A value and its standard error with two digits, such as "17.53 ± 0.35"; with one where it is very small."""
    if not error or not math.isfinite(error):
        return f"{value:{sign}.4g}"
    exponent = math.floor(math.log10(error))
    decimals = max(0, min(1 - exponent, max(_MOST_DECIMALS, -exponent)))
    return f"{value:{sign}.{decimals}f} ± {error:.{decimals}f}"


def short(value: float) -> str:
    """Three digits, without an exponent."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{min(max(0, 2 - math.floor(math.log10(abs(value)))), _MOST_DECIMALS)}f}"


def _count(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


#
# forms
#


def markdown(sections: Sequence[Section]) -> str:
    """All tables, as GitHub reads them."""
    machines = machines_of(sections)
    blocks = []
    for section in sections:
        said = ", ".join(f"{name} {text}" for name, text in facts(section.model).items())
        blocks += [f"## {_marked(section.model['name'])}", _marked(said)]
        for part in parts(section, machines):
            blocks += [f"### {part.title}", _marked(f"{part.conditions} ({part.source})")]
            for table in part.tables:
                blocks += [f"{_marked(table.caption)}:", _markdown_table(table), *map(_marked, table.notes)]
        blocks += map(_marked, left_out(section))
    return "\n\n".join(blocks) + "\n"


def _markdown_table(table: Table) -> str:
    rows = [[column.title for column in table.columns]]
    rows.append(["---" if column.words else "---:" for column in table.columns])
    for group, members in table.rows.items():
        rows += [[f"**{_marked(group)}**", *[""] * (len(table.columns) - 1)]] if group else []
        rows += [list(map(_marked, row)) for row in members]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _marked(text: str) -> str:
    """Text that means itself in Markdown. Underscores within words already do."""
    return re.sub(r"([\\`*<>|\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


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
                lines += ["", *_grids(table), *map(escape, table.notes)]
        lines += map(escape, left_out(section))
    return Group(*(line for line in lines if line is not None))


def _grids(table: Table) -> Iterator[Grid | str]:
    """A table, then each group under its name, with columns of the same width."""
    shown = [i for i, column in enumerate(table.columns) if not column.detail]
    groups = {
        group: [[row[i].replace(" ± ", "±") for i in shown] for row in rows] for group, rows in table.rows.items()
    }
    headings = [table.columns[i].heading.split("\n") for i in shown]
    cells = [[*heading, *(row[n] for rows in groups.values() for row in rows)] for n, heading in enumerate(headings)]
    for group, rows in {"": [], **groups}.items():
        grid = Grid(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", show_header=not group)
        for i, column in zip(shown, cells, strict=True):
            grid.add_column(
                table.columns[i].heading,
                justify="left" if table.columns[i].words else "right",
                min_width=max(map(len, column)),
                no_wrap=True,
            )
        for row in rows:
            grid.add_row(*map(escape, row))
        if group:
            yield f"[bold]{escape(group)}[/]"
        yield grid
