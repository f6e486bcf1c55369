"""Measurements of a grid of kinds, models and cache types, into one file that grows."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ..core import progress
from ..kinds import KINDS, Failure, Finding, Kind
from ..kinds.base import Work
from ..llamacpp import provenance
from ..llamacpp.cachetypes import CacheTypes
from ..llamacpp.modelmemory import ModelMemory
from ..llamacpp.models import fetch_with_bar
from ..llamacpp.placement import CPU, Placement
from . import findings, workers
from .store import POLL_SECONDS, Store, default_results


@dataclass
class Outcome:
    """What was done. known: rows that the file had already; added: to it, of those `asked` for.

    failures: what could not be measured. findings: what the file says now of what was asked for; empty where several
    kinds or models were.
    """

    results: Path
    known: int = 0
    asked: int = 0
    added: int = 0
    failures: list[Failure] = field(default_factory=list)
    interrupted: bool = False
    findings: list[Finding] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "results": str(self.results),
            "known": self.known,
            "asked": self.asked,
            "added": self.added,
            "failures": [{name: text for name, text in asdict(one).items() if name != "exit_code"}
                         for one in self.failures],
            "interrupted": self.interrupted,
        }  # fmt: skip


def measure(
    kind: str,
    model: Path | None,
    *,
    types: Sequence[str] | None = None,
    results: Path | None = None,
    placement: Placement = CPU,
    cluster: str | None = None,
    console: Console,
    **options: Any,
) -> Outcome:
    """A sweep of one kind and one model (a GGUF), with what it found.

    kind: one of KINDS. model: None takes that of the kind. types: None takes the kind's. results: a file of
    measurements; None takes the one in the user's cache folder. options: of the kind (its `plan`). The rest as in
    `sweep`.
    """
    if not results:
        results = default_results()
        with suppress(OSError):  # Store says so, and what to do
            results.parent.mkdir(parents=True, exist_ok=True)
    common = {"placement": placement, "results": results, "cluster": cluster, "console": console}
    return sweep([model], {kind: options}, types=KINDS[kind].default_types if types is None else types, **common)


def sweep(
    models: Sequence[Path | None],
    kinds: Mapping[str, Mapping[str, Any]],
    *,
    types: Sequence[str],
    placement: Placement = CPU,
    results: Path,
    cluster: str | None = None,
    console: Console,
) -> Outcome:
    """Measure caches of `types` with each of `models` (GGUFs), and add what comes out to the file `results`.

    kinds: which of KINDS, with the options of each. types: those that the others are compared with are measured in any
    case. placement: where it is computed. cluster: the address of a Dask scheduler; None measures here. console: where
    the progress goes.

    What the file has already is not measured again. What fails is listed in the outcome while the rest goes on. Ctrl-C
    ends it early: the outcome then says `interrupted`, and the same call goes on from there. Raises TurboquantError
    before anything is measured if a model, a type or an option cannot be used.
    """
    pairs = [CacheTypes.parse(name) for name in types]
    asked = {KINDS[name]: KINDS[name].prepare(**options) for name, options in kinds.items()}
    one = len(models) == 1 and len(asked) == 1
    outcome = Outcome(results)
    with Store(results) as store:
        work: list[Kind] = []
        for model in models:
            path = model or fetch_with_bar(next(iter(asked)).default_model, console)
            work += _plan(path, asked, pairs, placement, one, outcome, console)
        try:
            _measure(work, cluster, store, outcome, console)
        except KeyboardInterrupt:
            outcome.interrupted = True
        if one:
            with store.reading():
                outcome.findings = findings.of_work(store, work)
    return outcome


def _plan(
    model: Path,
    asked: Mapping[type[Kind], Mapping[str, Any]],
    pairs: Sequence[CacheTypes],
    placement: Placement,
    one: bool,
    outcome: Outcome,
    console: Console,
) -> Iterator[Kind]:
    facts = provenance.model(model, console)
    wanted = {kind: tuple(dict.fromkeys([kind.reference(options), *pairs])) for kind, options in asked.items()}
    with ModelMemory(model) as memory:
        every = dict.fromkeys(pair for types in wanted.values() for pair in types)
        refused = {pair: reason for pair in every if (reason := memory.refusal(pair))}
    outcome.failures += [Failure(f"{model.name}, {pair}", reason) for pair, reason in refused.items()]
    for kind, options in asked.items():
        if kind.reference(options) not in refused:
            types = tuple(pair for pair in wanted[kind] if pair not in refused)
            for piece in kind.plan(Work(model, facts, types, placement, sweep=not one), **options):
                _check_settings(piece)
                yield piece


def _check_settings(piece: Kind) -> None:
    """Raises TypeError if the settings cannot be kept in a file of measurements, or read from it by a report."""
    where = f"{type(piece).__module__}: settings of {type(piece).__name__}"
    settings = piece.settings
    if "build" not in settings:
        raise TypeError(f'{where} have no "build", which is provenance.build()')
    try:
        json.dumps(settings)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{where} are no plain values: {error}") from error


def _measure(work: Sequence[Kind], cluster: str | None, store: Store, outcome: Outcome, console: Console) -> None:
    with progress.bar(console) as bar:
        plan = [lacks for one in work if (lacks := _lacks(one, store, cluster)).rows]
        outcome.asked = sum(one.rows for one in plan)
        outcome.known = sum(one.rows for one in work) - outcome.asked
        totals = Counter()
        for one in plan:
            totals[one.name] += one.rows
        tasks = {name: bar.add_task(name, total=total) for name, total in totals.items()}
        done = dict.fromkeys(totals, 0)  # rows

        def show(one: Kind, text: str, share: float = 0) -> None:
            """share: of `one`, which may be more than its rows say."""
            completed = max(done[one.name], before + share * one.rows)
            bar.update(tasks[one.name], description=f"{one.name}: {text}", completed=completed)

        before = 0
        for batch in _claimed(plan, store, cluster, lambda one, other: show(one, f"waiting for {other}")):
            todo: list[Kind] = []
            for one in batch:
                lacks = _lacks(one, store, cluster)
                others = one.rows - lacks.rows  # measured by another process meanwhile
                outcome.asked -= others
                outcome.known += others
                done[one.name] += others
                if lacks.rows:
                    todo += lacks.split() if cluster else [lacks]
            before = done[batch[0].name]
            for one, found, machine in workers.on_cluster(cluster, todo) if cluster else workers.here(todo):
                if isinstance(found, workers.Progress):
                    show(one, found.text, found.share)
                elif isinstance(found, Failure):
                    outcome.failures.append(found)
                else:
                    row = (one.name, one.facts, found.types, one.settings, found.value)
                    store.add(*row, part=found.part, machine=machine)
                    outcome.added += 1
                    done[one.name] += 1
                    bar.update(tasks[one.name], completed=done[one.name])


def _lacks(one: Kind, store: Store, cluster: str | None) -> Kind:
    """The work without what the store has. What wants a machine for itself counts from any of a cluster, else from
    this one."""
    machine = provenance.machine() if one.alone and not cluster else None
    return one.without(store.find(one.name, one.facts, one.settings, machine=machine))


def _claimed(
    work: Sequence[Kind], store: Store, cluster: str | None, on_wait: Callable[[Kind, str], object]
) -> Iterator[list[Kind]]:
    """All of `work`, in groups to be measured at once, each claimed until the next is asked for.

    A cluster gets all at once that can be claimed, else there is one at a time. What wants a machine for itself comes
    last, and alone: what else a machine does would count. on_wait: called again and again while other processes have
    what is left.
    """
    left = list(work)
    while left:
        together = [one for one in left if not one.alone]
        batch: list[Kind] = []
        for one in together or left:
            if other := store.claim(one.name, one.facts, one.settings):
                on_wait(one, other)
                continue
            batch.append(one)
            if not (cluster and together):
                break
        try:
            if batch:
                yield batch
            else:
                time.sleep(POLL_SECONDS)
        finally:
            for one in batch:
                store.release(one.name, one.facts, one.settings)
        left = [one for one in left if not any(one is done for done in batch)]
