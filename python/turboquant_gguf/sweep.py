"""Everything that can be measured of cache types, for a grid of models and types, into one file that grows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import provenance, quality, texts, workers
from .cachetypes import CacheTypes
from .cells import Cell, Failure, QualityCell, RetrievalCell, SpeedCell, TaskCell
from .logits import Model
from .store import Store

DEFAULT_TYPES = quality.DEFAULT_TYPES
DEFAULT_WINDOWS = 16
DEFAULT_LENGTHS = (1024, 2048)
DEFAULT_DEPTHS = (0, 4096)
KINDS = ("quality", "retrieval", "speed")

NEEDLE_DEPTHS = (0, 25, 50, 75, 100)
PREFILL, DECODE = 512, 32
"""Tokens whose speed is measured."""

_REFERENCE = CacheTypes("f16", "f16")
_SHARED_WINDOWS = 4  # in one piece of work for a cluster: few enough to spread, and for a crash to lose little
_DAY = 24 * 3600


@dataclass
class Report:
    """What a sweep did. known: rows that the file had already; added: to it, of those `asked` for."""

    results: Path
    known: int = 0
    asked: int = 0
    added: int = 0
    failures: list[Failure] = field(default_factory=list)
    interrupted: bool = False


def sweep(
    models: Sequence[Path],
    *,
    types: Sequence[str] = DEFAULT_TYPES,
    measure: Sequence[str] = KINDS,
    text: str = texts.WIKITEXT,
    context: int = quality.DEFAULT_CONTEXT,
    windows: int = DEFAULT_WINDOWS,
    lengths: Sequence[int] = DEFAULT_LENGTHS,
    trials: int = 1,
    depths: Sequence[int] = DEFAULT_DEPTHS,
    repetitions: int = 3,
    tasks: Sequence[str] = (),
    task_folder: Path | None = None,
    limit: int | None = None,
    threads: int | None = None,
    results: Path,
    cluster: str | None = None,
    console: Console,
) -> Report:
    """Measure caches of `types` with each of `models` (GGUFs), and add what comes out to the file `results`.

    types: f16 is measured in any case. measure: some of KINDS. text, context, windows: of quality.ppl. lengths, trials:
    of niah.niah; lengths beyond what a model was trained for are left out. depths, repetitions: of bench.bench. tasks,
    task_folder, limit: of evaluation.evaluate. threads: of the CPU. cluster: the address of a Dask scheduler; None
    measures here. console: where the progress goes.

    What the file has already is not measured again. What fails is listed in the report while the rest goes on. Ctrl-C
    ends it early: the report then says `interrupted`, and the same call goes on from there. Raises TurboquantError
    before anything is measured if a model, a type or the text cannot be used.
    """
    pairs = list(dict.fromkeys([_REFERENCE, *map(CacheTypes.parse, types)]))
    experiment = (
        quality.Experiment(texts.load(text), _REFERENCE, context, threads=threads) if "quality" in measure else None
    )
    report = Report(results)
    with Store(results) as store:
        cells: list[Cell] = []
        for model in models:
            facts = provenance.model(model)
            refused = quality.refused(model, pairs)
            report.failures += [Failure(f"{model.name}, {pair}", reason) for pair, reason in refused.items()]
            common = (model, facts, tuple(pair for pair in pairs if pair not in refused), threads)
            if experiment:
                cells += _quality(QualityCell(*common, experiment, {}), windows, store, report, shared=bool(cluster))
            others: list[Cell] = [TaskCell(*common, task, task_folder, limit) for task in tasks]
            if "retrieval" in measure:
                within = [length for length in lengths if length <= (facts["trained_length"] or length)]
                others += [RetrievalCell(*common, length, NEEDLE_DEPTHS, trials) for length in within]
            if "speed" in measure:
                others.append(SpeedCell(*common, tuple(depths), PREFILL, DECODE, repetitions))
            cells += _missing(others, store, report, anywhere=bool(cluster))
        report.asked = sum(cell.rows for cell in cells)
        try:
            _measure(cells, cluster, store, report, console)
        except KeyboardInterrupt:
            report.interrupted = True
    return report


def _quality(cell: QualityCell, windows: int, store: Store, report: Report, *, shared: bool) -> list[QualityCell]:
    """The cell with the windows and types that the store lacks; in several, if the work is to be shared."""
    known = store.find(cell.kind, cell.facts, cell.settings)
    with Model(cell.model) as model:
        count = min(windows, len(cell.experiment.windows(model)))
    todo = quality.plan(known, count, cell.types)
    report.known += count * len(cell.types) - sum(map(len, todo.values()))
    if not todo:
        return []
    whole = replace(cell, windows=todo)
    return whole.split(_SHARED_WINDOWS) if shared else [whole]


def _missing(cells: Sequence[Cell], store: Store, report: Report, *, anywhere: bool) -> Iterator[Cell]:
    """The cells with the types that the store lacks. anywhere: speed counts from any machine, else from this one."""
    for cell in cells:
        machine = provenance.machine() if isinstance(cell, SpeedCell) and not anywhere else None
        known = store.find(cell.kind, cell.facts, cell.settings, machine=machine)
        missing = tuple(pair for pair in cell.types if (pair, 0) not in known)
        report.known += len(cell.types) - len(missing)
        if missing:
            yield replace(cell, types=missing)


def _measure(cells: Sequence[Cell], cluster: str | None, store: Store, report: Report, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, speed_estimate_period=_DAY) as bar:
        totals = {cell.kind: sum(other.rows for other in cells if other.kind == cell.kind) for cell in cells}
        tasks = {kind: bar.add_task(kind, total=total) for kind, total in totals.items()}
        for cell, found, machine in _run(cells, cluster):
            if isinstance(found, Failure):
                report.failures.append(found)
                continue
            store.add(cell.kind, cell.facts, found.types, cell.settings, found.value, part=found.part, machine=machine)
            report.added += 1
            bar.advance(tasks[cell.kind])


def _run(cells: Sequence[Cell], cluster: str | None) -> Iterator[workers.Found]:
    # Speed comes last, and alone: what else a machine does would count.
    alone = [cell for cell in cells if isinstance(cell, SpeedCell)]
    together = [cell for cell in cells if not isinstance(cell, SpeedCell)]
    if not cluster:
        yield from workers.here([*together, *alone])
        return
    for batch in (together, *([cell] for cell in alone)):
        if batch:
            yield from workers.on_cluster(cluster, batch)
