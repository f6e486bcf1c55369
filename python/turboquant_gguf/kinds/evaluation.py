"""Scores of several KV-cache types on tasks of lm-evaluation-harness, compared with f16 document by document.

The same model answers the same prompts with every type, so what a type changes shows in the differences between paired
answers. Their standard error is smaller than that of the scores, which is mostly that of the choice of documents.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, Group
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from ..core import outputfile, progress
from ..errors import TurboquantError
from ..llamacpp import provenance, server
from ..llamacpp.cachetypes import CacheTypes
from ..llamacpp.ggufile import GGUFModel
from .harness import Tasks

if TYPE_CHECKING:
    from lm_eval.result_schema import EvalResults

DEFAULT_TYPES = ("f16", "turbo4")
NOISE = 1.96
"""Standard errors of a difference within which 95 % of differences fall where there is none."""

_F16 = CacheTypes("f16", "f16")


@dataclass(frozen=True)
class Difference:
    """A score minus that of f16 on the same documents.

    stderr: from the differences of single documents; None where the score is no mean over documents, or of one.
    within_noise: |value| is at most 1.96 stderr; None without one.
    """

    value: float
    stderr: float | None
    within_noise: bool | None


@dataclass(frozen=True)
class Score:
    """A metric of a task, or of a group of tasks, with one cache type, after one of the task's filters.

    higher_is_better: None where the task does not say. stderr: as lm-eval gives it. difference: None for f16.
    """

    type: str
    task: str
    metric: str
    filter: str
    higher_is_better: bool | None
    documents: int
    value: float
    stderr: float | None
    difference: Difference | None


@dataclass(frozen=True)
class Failure:
    """A type that could not be measured."""

    type: str
    message: str
    details: str


@dataclass
class Report:
    """All that an evaluation found. num_fewshot: the examples in each prompt of a task."""

    settings: dict
    versions: dict
    machine: dict
    num_fewshot: dict[str, int] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    interrupted: bool = False


def evaluate(
    *,
    model: Path,
    tasks: Sequence[str],
    types: Sequence[str] = DEFAULT_TYPES,
    task_folder: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool | None = None,
    context: int = 4096,
    parallel: int = 1,
    max_tokens: int | None = None,
    seed: int = 1234,
    samples: Path | None = None,
    threads: int | None = None,
    console: Console,
) -> Report:
    """Let `model` do `tasks` of lm-eval at temperature 0 with each cache type, with progress on `console`.

    model: a GGUF. tasks: names of tasks, groups or tags that lm-eval knows, or finds in `task_folder`. types: "turbo4",
    or "turbo4:turbo3" for keys and values apart; f16 is measured in any case. limit: documents of each task, None for
    all. num_fewshot: examples in each prompt, None for what the task says. chat: put prompts as messages in the model's
    chat template; None does if it has one. context: tokens of one prompt and its answer. parallel: documents at a time.
    max_tokens: of an answer; None for what the task says. seed: of the choice of examples. samples: a JSON Lines file
    for lm-eval's record of every document. threads: of the CPU; None leaves it to llama-server.

    A type that fails is listed in the report's failures while the others go on. Ctrl-C ends it early: the report then
    holds the types that were finished, and says `interrupted`. Raises TurboquantError if not even f16 can be measured,
    or a task cannot be.
    """
    pairs = list(dict.fromkeys([_F16, *map(CacheTypes.parse, types)]))
    if samples:
        outputfile.check_folder(samples)
    with GGUFModel(model) as file:
        chat = "tokenizer.chat_template" in file.metadata if chat is None else chat
    with progress.status(console, f"loading {', '.join(tasks)}"):
        loaded = Tasks(tasks, task_folder)
    options = {"limit": limit, "num_fewshot": num_fewshot, "max_tokens": max_tokens, "parallel": parallel, "seed": seed}
    report = Report(
        settings={
            "model": model.name,
            "types": [str(pair) for pair in pairs],
            "tasks": loaded.names,
            "chat": chat,
            "context": context,
            **options,
        },
        versions={name: version(name) for name in ("turboquant_gguf", "lm_eval")},
        machine={**provenance.machine(), "python": platform.python_version()},
    )

    def run(pair: CacheTypes, on_answer: Callable[[], object]) -> EvalResults:
        # No cache of old prompts in memory, which could grow to gigabytes and hardly ever be of use.
        extra = ("--parallel", str(parallel), "--cache-ram", "0")
        size = context * parallel
        with server.running(model, pair, context=size, threads=threads, extra_args=extra) as running:
            try:
                return loaded.run(running.url, chat=chat, on_answer=on_answer, **options)
            except ConnectionError as error:
                raise running.failure() from error

    with _lines(samples) as file, progress.bar(console) as bar:
        try:
            _measure_all(report, pairs, run, loaded.requests(limit), file, bar)
        except KeyboardInterrupt:
            report.interrupted = True
    return report


def _measure_all(
    report: Report,
    pairs: Sequence[CacheTypes],
    run: Callable[[CacheTypes, Callable[[], object]], EvalResults],
    requests: int,
    samples: TextIO | None,
    bar: Progress,
) -> None:
    base = None
    task = bar.add_task("", total=requests * len(pairs))
    for done, pair in enumerate(pairs):
        bar.update(task, description=str(pair), completed=done * requests)
        try:
            results = run(pair, lambda: bar.advance(task))
        except TurboquantError as error:
            if base is None:  # f16: nothing could be compared
                raise
            report.failures.append(Failure(str(pair), str(error), error.details))
            continue
        report.scores += _scores(str(pair), results, base)
        if samples:
            _write_samples(samples, str(pair), results)
        if base is None:
            base = results
            report.num_fewshot = {name: results["n-shot"][name] or 0 for name in report.settings["tasks"]}


@contextmanager
def _lines(path: Path | None) -> Iterator[TextIO | None]:
    if path is None:
        yield None
        return
    with outputfile.beside(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        yield file


def _scores(name: str, results: EvalResults, base: EvalResults | None) -> Iterator[Score]:
    """The scores of the type `name`, compared with those in `base`. None: it is f16."""
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, comma, filtered = key.partition(",")  # other keys are no metrics
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = metrics[f"{metric}_stderr,{filtered}"]
            yield Score(
                type=name,
                task=task,
                metric=metric,
                filter=filtered,
                higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
                documents=metrics["sample_len"],
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, Real) else None,
                difference=_difference(results, base, task, key) if base else None,
            )


def _difference(results: EvalResults, base: EvalResults, task: str, key: str) -> Difference:
    ours, theirs = (_documents(run, task, key) for run in (results, base))
    if ours and theirs:
        return paired([ours[document] for document in theirs], list(theirs.values()))
    return Difference(results["results"][task][key] - base["results"][task][key], None, None)


def _documents(results: EvalResults, task: str, key: str) -> dict[int, float] | None:
    """The metric of each document by its number. None if the task's score is something else than their mean."""
    metric, _, filtered = key.partition(",")
    found = [sample for sample in results["samples"].get(task, ()) if sample["filter"] == filtered]
    values = {sample["doc_id"]: sample[metric] for sample in found if isinstance(sample.get(metric), Real)}
    is_mean = values and math.isclose(statistics.fmean(values.values()), results["results"][task][key], abs_tol=1e-12)
    return values if is_mean else None


def paired(values: Sequence[float], base: Sequence[float]) -> Difference:
    """The mean difference of two equally long series, a document each, with its standard error."""
    differences = [ours - theirs for ours, theirs in zip(values, base, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return Difference(mean, None, None)
    stderr = statistics.stdev(differences) / math.sqrt(len(differences))
    return Difference(mean, stderr, abs(mean) <= NOISE * stderr)


def _write_samples(file: TextIO, name: str, results: EvalResults) -> None:
    from lm_eval.utils import handle_non_serializable

    for task, samples in results["samples"].items():
        for sample in samples:
            line = {"type": name, "task": task, **sample}
            file.write(json.dumps(line, ensure_ascii=False, default=handle_non_serializable) + "\n")
    file.flush()


def tables(report: Report) -> Group:
    """The scores, a table of at most 80 columns for each metric."""
    by_metric: dict[tuple[str, str, str], list[Score]] = {}
    for score in report.scores:
        by_metric.setdefault((score.task, score.metric, score.filter), []).append(score)
    return Group(*(part for scores in by_metric.values() for part in (_title(scores[0]), _table(scores, report))))


def _title(score: Score) -> str:
    better = {True: ", higher is better", False: ", lower is better", None: ""}[score.higher_is_better]
    filtered = "" if score.filter == "none" else f", filter {score.filter}"
    text = f"{score.metric}{filtered}, {score.documents} document{'s' * (score.documents != 1)}{better}"
    return f"\n[bold]{escape(score.task)}[/]: {escape(text)}"


def _table(scores: Sequence[Score], report: Report) -> Table:
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    names = [*report.settings["types"], "cache"]
    grid.add_column("cache\ntype", no_wrap=True, min_width=max(map(len, names)))
    for heading in ("\nscore", "standard\nerror", "minus\nf16", "standard\nerror"):
        grid.add_column(heading, justify="right", no_wrap=True, min_width=8)
    grid.add_column("", no_wrap=True)
    for score in scores:
        difference = score.difference
        cells = [score.type, f"{score.value:.4f}", _error(score.stderr)]
        if difference:
            cells += [f"{difference.value:+.4f}", _error(difference.stderr), _verdict(score)]
        grid.add_row(*cells)
    return grid


def _error(stderr: float | None) -> str:
    return "-" if stderr is None else f"{stderr:.4f}"


def _verdict(score: Score) -> str:
    difference = score.difference
    if difference.within_noise is None:
        return ""
    if difference.within_noise:
        return "within noise"
    if score.higher_is_better is None:
        return "[bold]different[/]"
    return "[green]better[/]" if (difference.value > 0) == score.higher_is_better else "[bold red]worse[/]"


def heading(report: Report) -> str:
    """What was measured, in a line."""
    settings = report.settings
    way = "chat template" if settings["chat"] else "plain text"
    return f"{settings['model']}, lm-eval {report.versions['lm_eval']}, {way}, temperature 0"


def as_json(report: Report) -> dict:
    """The report as plain values, field by field."""
    return asdict(report)
