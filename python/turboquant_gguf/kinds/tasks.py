"""Scores of several KV-cache types on tasks of lm-evaluation-harness, compared with f16 document by document.

The same model answers the same prompts with every type, so what a type changes shows in the differences between paired
answers. Their standard error is smaller than that of the scores, which is mostly that of the choice of documents.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from ..core import callbacks, tables
from ..core.tables import BITS, NOTHING, TYPE, Column, Table
from ..errors import TurboquantError
from ..llamacpp import provenance
from ..llamacpp.cachetypes import F16, CacheTypes
from ..llamacpp.ggufile import GGUFModel
from .base import Failure, Finding, Kind, Row, Step, Types, Work, option, register, types_by_bits

if TYPE_CHECKING:
    from lm_eval.result_schema import EvalResults

    from .runners.harness import Tasks as Loaded

NOISE = 1.96
"""Standard errors of a difference within which 95 % of differences fall where there is none."""


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


@register
@dataclass(frozen=True)
class Tasks(Kind):
    """A task of lm-evaluation-harness, at temperature 0; a row is a JSON array of Score.

    folder: where to look for YAML files of tasks besides lm-eval's own. limit: documents, None for all. num_fewshot:
    examples in each prompt, None for what the task says. chat: put prompts as messages in the model's chat template.
    context: tokens of one prompt and its answer. parallel: documents at a time. max_tokens: of an answer; None for what
    the task says. seed: of the choice of examples. samples: a JSON Lines file to which the record of every document is
    appended.
    """

    name = "task"
    title = "Tasks"
    command = "eval"
    summary = "Score cache types on tasks of lm-evaluation-harness."
    help = """Let MODEL, a GGUF file, do tasks of EleutherAI's lm-evaluation-harness with several KV-cache types.

    Answers are greedy (temperature 0), and each type is compared with f16 on the same documents. Only tasks in which
    the model writes its answer work: multiple choice needs log-probabilities of prompts, and llama-server gives
    none."""
    examples = """
  turboquant-gguf eval my.gguf --tasks gsm8k --limit 200
  turboquant-gguf eval my.gguf --tasks gsm8k --types turbo4,turbo4:turbo3
  turboquant-gguf eval my.gguf --tasks mine --task-folder my-tasks
  turboquant-gguf eval my.gguf --tasks gsm8k --samples answers.jsonl
  turboquant-gguf eval my.gguf --tasks gsm8k --parallel 4 --json > scores.json"""
    note = (
        "Against f16: the difference on the same documents; its standard error is that of the differences between "
        f"paired answers. Within noise: at most {NOISE} of them."
    )
    reading = (
        (
            "Tasks",
            "are scored on the same documents with every type; the difference from f16 counts only where it is "
            "not within noise.",
        ),
    )
    in_sweep = False
    merged = "task"
    columns = ("task",)
    options = (
        option(
            "--tasks",
            sweep=True,
            required=True,
            metavar="NAMES",
            callback=callbacks.names,
            help="Tasks, groups or tags of lm-eval, separated by commas (lm-eval ls tasks lists them).",
        ),
        option(
            "--task-folder",
            sweep=True,
            type=click.Path(path_type=Path, exists=True, file_okay=False),
            metavar="FOLDER",
            help="Look for tasks in the YAML files of FOLDER, too.",
        ),
        option("--limit", sweep=True, type=click.IntRange(min=1), help="Documents of each task [default: all]"),
        option(
            "--num-fewshot", type=click.IntRange(min=0), help="Examples in each prompt [default: the task's number]"
        ),
        option(
            "--chat/--completions",
            default=None,
            help="Put prompts in the model's chat template, or as plain text [default: --chat if it has one]",
        ),
        option(
            "--context",
            type=click.IntRange(min=256),
            default=4096,
            help="Tokens that the cache holds of each prompt with its answer.",
        ),
        option(
            "--parallel",
            type=click.IntRange(min=1),
            default=1,
            help="Documents at a time. Runs with more than 1 can differ in rare answers.",
        ),
        option(
            "--max-tokens", type=click.IntRange(min=1), help="Tokens of an answer [default: the task's number, or 256]"
        ),
        option(
            "--seed", type=click.IntRange(min=0, max=2**32 - 1), default=1234, help="Chooses the examples in prompts."
        ),
        option(
            "--samples",
            type=click.Path(path_type=Path, dir_okay=False, writable=True),
            metavar="FILE",
            callback=callbacks.new_file,
            help="Write every prompt, answer and score to FILE, as JSON Lines. All is measured again for it.",
        ),
    )

    task: str
    folder: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False
    context: int = 4096
    parallel: int = 1
    max_tokens: int | None = None
    seed: int = 1234
    samples: Path | None = None

    @classmethod
    def prepare(cls, *, tasks: Sequence[str], samples: Path | None = None, **options: Any) -> dict[str, Any]:
        from .runners import harness

        harness.check(tasks, options.get("task_folder"))
        if samples:
            samples = samples.absolute()
            samples.write_text("")
        return {"tasks": tasks, "samples": samples, **options}

    @classmethod
    def plan(
        cls,
        work: Work,
        *,
        tasks: Sequence[str],
        task_folder: Path | None = None,
        chat: bool | None = None,
        **options: Any,
    ) -> Iterator[Self]:
        if chat is None:
            with GGUFModel(work.model) as file:
                chat = "tokenizer.chat_template" in file.metadata
        for task in tasks:
            yield cls(work.model, work.facts, work.placement, {0: work.types}, task, task_folder, chat=chat, **options)

    @property
    def settings(self) -> dict[str, Any]:
        names = ("task", "limit", "num_fewshot", "chat", "context", "parallel", "max_tokens", "seed")
        asked = {name: getattr(self, name) for name in names}
        return asked | self.placement.settings() | {"build": provenance.build()}

    @property
    def label(self) -> str:
        return f"{super().label} {self.task}"

    def without(self, known: Any) -> Self:
        return self if self.samples else super().without(known)

    def measure(self, step: Step) -> Iterator[Row | Failure]:
        from .runners import harness

        step(f"loading {self.task}", 0)
        loaded = harness.Tasks([self.task], self.folder)
        types: Types = tuple(dict.fromkeys([F16, *self.types]))
        answers = loaded.requests(self.limit) * len(types)
        base: EvalResults | None = None
        done = 0
        for number, pair in enumerate(types):
            done = number * answers // len(types)

            def on_answer(pair: CacheTypes = pair) -> None:
                nonlocal done
                done += 1
                step(f"{self.task}  {pair}", done / answers)

            try:
                results = self._run(loaded, pair, on_answer)
            except TurboquantError as error:
                if base is None:  # f16: nothing could be compared
                    raise
                yield self.failure(pair, error)
                continue
            if self.samples:
                _write_samples(self.samples, str(pair), results)
            if pair in self.types:
                found = [asdict(score) for score in scores(str(pair), results, base)]
                yield Row(pair, json.dumps(found).encode())
            base = base or results

    def _run(self, loaded: Loaded, types: CacheTypes, on_answer: Any) -> EvalResults:
        from ..llamacpp import server

        # No cache of old prompts in memory, which could grow to gigabytes and hardly ever be of use.
        extra = ("--parallel", str(self.parallel), "--cache-ram", "0")
        size = self.context * self.parallel
        names = ("chat", "limit", "num_fewshot", "max_tokens", "parallel", "seed")
        how = {name: getattr(self, name) for name in names}
        with server.running(self.model, types, context=size, placement=self.placement, extra_args=extra) as running:
            try:
                return loaded.run(running.url, on_answer=on_answer, **how)
            except ConnectionError as error:
                raise running.failure() from error

    #
    # what the scores say
    #

    @classmethod
    def conditions(cls, finding: Finding) -> list[str]:
        limit, settings = finding.settings["limit"], finding.settings
        way = {True: ["chat template"], False: ["plain text"], None: []}[settings.get("chat")]
        examples = settings.get("num_fewshot")
        return [
            f"the first {tables.count(limit, 'document')} of each task" if limit else "all documents",
            *way,
            *([tables.count(examples, "example")] if examples is not None else []),
        ]

    @classmethod
    def table(cls, finding: Finding) -> Table:
        columns = [TYPE, BITS, Column("\nvalue"), Column("against\nf16"), Column("\nverdict", words=True)]
        rows: dict[str, list[list[str]]] = {}
        for types in types_by_bits(finding.values):
            for score in finding.values[types]:
                row = [str(types), f"{types.bits:.4g}", tables.with_error(score["value"], score["stderr"])]
                rows.setdefault(_group(score), []).append([*row, *_difference_cells(score)])
        return Table("Results of the tasks", columns, {task: rows[task] for task in sorted(rows)})

    @classmethod
    def numbers(cls, finding: Finding) -> Iterator[tuple[CacheTypes, dict[str, Any]]]:
        for types, found in finding.values.items():
            for score in found:
                named = {"task": score["task"], "metric": _metric(score)}
                yield types, named | {"value": score["value"], "stderr": score["stderr"]}
                if difference := score["difference"]:
                    named["metric"] += ", difference from f16"
                    yield types, named | {"value": difference["value"], "stderr": difference["stderr"]}


def _group(score: Mapping[str, Any]) -> str:
    better = {True: " (higher is better)", False: " (lower is better)", None: ""}[score["higher_is_better"]]
    return f"{score['task']}: {_metric(score)}{better}, {tables.count(score['documents'], 'document')}"


def _metric(score: Mapping[str, Any]) -> str:
    """The metric, with the filter of the answers, if there is one."""
    return ", ".join(name for name in (score["metric"], score["filter"]) if name not in (None, "none"))


def _difference_cells(score: Mapping[str, Any]) -> list[str]:
    difference = score["difference"]
    if not difference:
        return [NOTHING, NOTHING]
    value = tables.with_error(difference["value"], difference["stderr"], sign="+")
    if difference["within_noise"] is None:
        return [value, NOTHING]
    if difference["within_noise"]:
        return [value, "within noise"]
    if score["higher_is_better"] is None:
        return [value, "different"]
    return [value, "better" if (difference["value"] > 0) == score["higher_is_better"] else "worse"]


def scores(name: str, results: EvalResults, base: EvalResults | None) -> Iterator[Score]:
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


def _write_samples(path: Path, name: str, results: EvalResults) -> None:
    from lm_eval.utils import handle_non_serializable

    with path.open("a", encoding="utf-8") as file:
        for task, samples in results["samples"].items():
            for sample in samples:
                line = {"type": name, "task": task, **sample}
                file.write(json.dumps(line, ensure_ascii=False, default=handle_non_serializable) + "\n")
