"""Everything that can be measured of cache types, for a grid of models and types, into one file that grows."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from ..core import progress, texts
from ..kinds import quality
from ..llamacpp import provenance
from ..llamacpp.cachetypes import CacheTypes
from ..llamacpp.logits import Model
from . import workers
from .cells import Cell, Failure, QualityCell, RetrievalCell, SpeedCell, TaskCell
from .store import POLL_SECONDS, Store

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
            facts = provenance.model(model, console)
            refused = quality.refused(model, pairs)
            report.failures += [Failure(f"{model.name}, {pair}", reason) for pair, reason in refused.items()]
            common = (model, facts, tuple(pair for pair in pairs if pair not in refused), threads)
            if experiment:
                with Model(model) as opened:
                    count = min(windows, len(experiment.windows(opened)))
                cells.append(QualityCell(*common, experiment, dict.fromkeys(range(count), common[2])))
            cells += [TaskCell(*common, task, task_folder, limit) for task in tasks]
            if "retrieval" in measure:
                within = [length for length in lengths if length <= (facts["trained_length"] or length)]
                cells += [RetrievalCell(*common, length, NEEDLE_DEPTHS, trials) for length in within]
            if "speed" in measure:
                cells.append(SpeedCell(*common, tuple(depths), PREFILL, DECODE, repetitions))
        try:
            _measure(cells, cluster, store, report, console)
        except KeyboardInterrupt:
            report.interrupted = True
    return report


def _measure(cells: Sequence[Cell], cluster: str | None, store: Store, report: Report, console: Console) -> None:
    with progress.bar(console) as bar:
        plan = [lacks for cell in cells if (lacks := _lacks(cell, store, cluster)).rows]
        report.asked = sum(cell.rows for cell in plan)
        report.known = sum(cell.rows for cell in cells) - report.asked
        totals = Counter()
        for cell in plan:
            totals[cell.kind] += cell.rows
        tasks = {kind: bar.add_task(kind, total=total) for kind, total in totals.items()}

        def wait(cell: Cell, other: str) -> None:
            bar.update(tasks[cell.kind], description=f"{cell.kind}: waiting for {other}, which measures it")

        for batch in _claimed(plan, store, cluster, wait):
            todo: list[Cell] = []
            for cell in batch:
                lacks = _lacks(cell, store, cluster)
                others = cell.rows - lacks.rows  # measured by another process meanwhile
                report.asked -= others
                report.known += others
                bar.update(tasks[cell.kind], description=cell.kind, advance=others)
                if lacks.rows:
                    todo += lacks.split(_SHARED_WINDOWS) if cluster else [lacks]
            for cell, found, machine in workers.on_cluster(cluster, todo) if cluster else workers.here(todo):
                if isinstance(found, Failure):
                    report.failures.append(found)
                    continue
                row = (cell.kind, cell.facts, found.types, cell.settings, found.value)
                store.add(*row, part=found.part, machine=machine)
                report.added += 1
                bar.advance(tasks[cell.kind])


def _lacks(cell: Cell, store: Store, cluster: str | None) -> Cell:
    """The cell without what the store has. Speed counts from any machine of a cluster, else from this one."""
    machine = provenance.machine() if isinstance(cell, SpeedCell) and not cluster else None
    return cell.without(store.find(cell.kind, cell.facts, cell.settings, machine=machine))


def _claimed(
    cells: Sequence[Cell], store: Store, cluster: str | None, on_wait: Callable[[Cell, str], object]
) -> Iterator[list[Cell]]:
    """All of `cells`, in groups to be measured at once, each claimed until the next is asked for.

    A cluster gets all at once that can be claimed, else there is one at a time. Speed comes last, and alone: what else
    a machine does would count. on_wait: called again and again while other processes have what is left.
    """
    left = list(cells)
    while left:
        together = [cell for cell in left if not isinstance(cell, SpeedCell)]
        batch: list[Cell] = []
        for cell in together or left:
            if other := store.claim(cell.kind, cell.facts, cell.settings):
                on_wait(cell, other)
                continue
            batch.append(cell)
            if not (cluster and together):
                break
        try:
            if batch:
                yield batch
            else:
                time.sleep(POLL_SECONDS)
        finally:
            for cell in batch:
                store.release(cell.kind, cell.facts, cell.settings)
        left = [cell for cell in left if not any(cell is done for done in batch)]
