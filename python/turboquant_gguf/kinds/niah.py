"""Needle in a haystack: what a model still finds in a long prompt with each KV-cache type, against f16.

Every type gets the identical prompts, so that types are compared prompt by prompt. No prompt reuses what the cache
holds of the one before: it would save a quarter of the time, but batches would begin elsewhere, which is enough to
change answers of quantized caches. So an answer depends on its own prompt alone, whatever else is asked.
"""

from __future__ import annotations

import math
import platform
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.table import Table

from ..core import progress, texts
from ..errors import TurboquantError
from ..llamacpp import provenance, server
from ..llamacpp.cachetypes import CacheTypes
from ..llamacpp.ggufile import GGUFModel
from ..llamacpp.server import Server
from . import haystack
from .haystack import Needle

DEFAULT_TYPES = ("f16", "q8_0", "q4_0", "turbo4", "turbo3", "turbo2")
DEFAULT_LENGTHS = (1024, 2048, 4096, 8192)
DEFAULT_DEPTHS = (0, 25, 50, 75, 100)
REFERENCE = CacheTypes("f16", "f16")
ANSWER_TOKENS = 32
SIGNIFICANCE = 0.05
"""A difference that chance alone makes at least this often counts as noise."""

SERVER_ARGUMENTS = (
    "--parallel", "1", "--no-cache-prompt", "--cache-ram", "0",
    "--reasoning", "off", "--reasoning-budget", "0",
)  # fmt: skip
"""Each prompt is read from its beginning, and answered at once."""

_SHADES = ("white on #440154", "white on #3b528b", "white on #21918c", "black on #5ec962", "black on #fde725")
_LENGTHS_ABREAST = 9
"""Columns of a heat map that fit a terminal of 80 columns."""


@dataclass(frozen=True)
class Prompt:
    """A question that every type is asked. length: the tokens asked for; tokens: what it has. depth: a percentage."""

    length: int
    depth: float
    trial: int
    text: str
    tokens: int
    needle: Needle


@dataclass(frozen=True)
class Cell:
    """One answer. length: prompt tokens asked for; prompt_tokens: what the prompt has. depth: a percentage."""

    types: str
    type_k: str
    type_v: str
    length: int
    depth: float
    trial: int
    prompt_tokens: int
    needle: str
    expected: str
    answer: str
    found: bool


@dataclass(frozen=True)
class Score:
    """One type over all prompts it was asked. Shares from 0 to 1.

    kept: the share found of those that f16 found; None if f16 found none. lost, gained: found by f16 alone, and by
    this type alone. p_value: how often chance alone makes them differ as much, by the exact McNemar test (two-sided).
    verdict: "reference" (f16 itself), "within noise", "better" or "worse"; None if f16 found nothing.
    """

    types: str
    asked: int
    found: int
    share: float
    kept: float | None
    lost: int
    gained: int
    p_value: float
    verdict: str | None


@dataclass(frozen=True)
class Failure:
    """A type whose server failed. What it had answered before that counts."""

    types: str
    message: str
    details: str


@dataclass
class Report:
    """All that was found. scores: a type each, in the order of settings["types"], f16 first."""

    settings: dict
    machine: dict = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    interrupted: bool = False


def niah(
    *,
    model: Path,
    types: Sequence[str] = DEFAULT_TYPES,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEFAULT_DEPTHS,
    trials: int = 1,
    text: Path | None = None,
    seed: int = 0,
    threads: int | None = None,
    console: Console,
) -> Report:
    """Hide a number in long prompts, and see with which cache types `model` finds it, with progress on `console`.

    types: "turbo4", or "turbo4:turbo3" for keys and values apart; f16 is asked in any case, as the reference. lengths:
    of prompts, in tokens, the chat template's included; None takes those of DEFAULT_LENGTHS that the model was trained
    for. depths: where the needle lies, percentages of the text. trials: prompts of each length and depth, each with
    a needle of its own. text: a UTF-8 file for the haystack; None generates one. seed: of needles and generated text.
    threads: None leaves it to llama-server.

    A type that fails is listed in the report's failures while the others go on. Ctrl-C ends it early: the report then
    holds what was answered so far, and says `interrupted`. Raises TurboquantError if not even f16 can be asked, if a
    length is more than the model was trained for, or if the text is too short for one.
    """
    subjects = list(dict.fromkeys([REFERENCE, *map(CacheTypes.parse, types)]))
    trained = _trained_length(model)
    lengths = _lengths(lengths, trained, model)
    depths = sorted(set(depths))
    sentences = _sentences(text, seed, lengths[-1])
    report = Report(
        settings={
            "model": model.name,
            "trained_length": trained,
            "types": list(map(str, subjects)),
            "lengths": lengths,
            "depths": depths,
            "trials": trials,
            "text": str(text) if text else None,
            "seed": seed,
        }
    )
    try:
        _ask_all(report, model, subjects, sentences, threads, console)
    except KeyboardInterrupt:
        report.interrupted = True
    report.scores = list(_scores(report))
    return report


def _trained_length(model: Path) -> int | None:
    with GGUFModel(model) as file:
        return file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length")


def _lengths(asked: Sequence[int] | None, trained: int | None, model: Path) -> list[int]:
    longest = trained or max(DEFAULT_LENGTHS)
    if asked is None:
        return [length for length in DEFAULT_LENGTHS if length <= longest] or [longest]
    if trained and max(asked) > trained:
        raise TurboquantError(
            f"{model.name} was trained for {trained} tokens, so it cannot be asked about {max(asked)}. Give --lengths "
            f"of at most {trained}."
        )
    return sorted(set(asked))


def _sentences(text: Path | None, seed: int, most: int) -> list[str]:
    if text is None:
        return list(islice(haystack.generated(seed), most))
    return haystack.sentences_of(texts.read(text))


def _ask_all(
    report: Report, model: Path, subjects: Sequence[CacheTypes], sentences: Sequence[str], threads: int | None,
    console: Console,
) -> None:  # fmt: skip
    settings = report.settings
    grid = [(n, d, t) for t in range(settings["trials"]) for n in settings["lengths"] for d in settings["depths"]]
    context = settings["lengths"][-1] + ANSWER_TOKENS
    prompts: list[Prompt] = []
    with progress.bar(console, progress.LEFT) as bar:
        # Time goes with the tokens that are read. Attention takes longer for the later ones, but is the smaller part.
        total = sum(length for length, _, _ in grid)
        left = len(subjects) * len(grid)
        task = bar.add_task("", total=len(subjects) * total, left=left)
        for number, types in enumerate(subjects):
            text = f"{types}  loading the model"
            bar.update(task, description=text, completed=number * total, left=left - number * len(grid))
            try:
                with server.running(
                    model, types, context=context, threads=threads, extra_args=SERVER_ARGUMENTS
                ) as running:
                    if not prompts:
                        report.machine = _machine(running)
                        bar.update(task, description="writing the prompts")
                        prompts += _prompts(running, sentences, grid, settings["trained_length"], settings["seed"])
                    for done, prompt in enumerate(prompts):
                        text = f"{types}  {prompt.length} tokens  depth {prompt.depth:g} %"
                        bar.update(task, description=text, left=left - number * len(grid) - done)
                        report.cells.append(_ask(running, types, prompt))
                        bar.advance(task, prompt.length)
            except TurboquantError as error:
                if types == REFERENCE:
                    raise
                report.failures.append(Failure(str(types), str(error), error.details))


def _prompts(
    running: Server, sentences: Sequence[str], grid: Sequence[tuple[int, float, int]], trained: int | None, seed: int
) -> Iterator[Prompt]:
    with running.token_counter() as count:
        for length, depth, trial in grid:
            # llama-server keeps prompt and answer within the trained length.
            most = min(length, trained - ANSWER_TOKENS) if trained else length
            needle = Needle.draw(random.Random(f"{seed} {length} {depth:g} {trial}"))
            text, tokens = haystack.fill(sentences, needle, depth, most, count)
            yield Prompt(length, depth, trial, text, tokens, needle)


def _ask(running: Server, types: CacheTypes, prompt: Prompt) -> Cell:
    answer = running.ask(prompt.text, max_tokens=ANSWER_TOKENS).text
    return Cell(
        types=str(types),
        type_k=types.k,
        type_v=types.v,
        length=prompt.length,
        depth=prompt.depth,
        trial=prompt.trial + 1,
        prompt_tokens=prompt.tokens,
        needle=prompt.needle.sentence,
        expected=prompt.needle.number,
        answer=answer,
        found=prompt.needle.is_in(answer),
    )


def _machine(running: Server) -> dict:
    """Where and with what was measured."""
    threads = re.search(r"n_threads = (\d+)", running.log())
    return {
        **provenance.machine(),
        "threads": int(threads[1]) if threads else None,
        "turboquant_gguf": version("turboquant-gguf"),
        "python": platform.python_version(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _scores(report: Report) -> Iterator[Score]:
    found = {name: found_by(report, name) for name in report.settings["types"]}
    reference = found[str(REFERENCE)]
    for name, own in found.items():
        if own:
            yield score(name, own, reference)


def found_by(report: Report, types: str) -> dict[tuple[int, float, int], bool]:
    """Whether `types` found the needle of each prompt it was asked, by (length, depth, trial)."""
    return {(c.length, c.depth, c.trial): c.found for c in report.cells if c.types == types}


def score(types: str, own: dict, reference: dict) -> Score:
    """Compare what `types` found (own) with what f16 found (reference): prompt -> bool, over the prompts of own."""
    lost = sum(reference[prompt] and not found for prompt, found in own.items())
    gained = sum(found and not reference[prompt] for prompt, found in own.items())
    of_reference = sum(reference[prompt] for prompt in own)
    p_value = mcnemar(lost, gained)
    verdict = "within noise" if p_value >= SIGNIFICANCE else "worse" if lost > gained else "better"
    if types == str(REFERENCE):
        verdict = "reference"
    return Score(
        types=types,
        asked=len(own),
        found=sum(own.values()),
        share=sum(own.values()) / len(own),
        kept=(of_reference - lost) / of_reference if of_reference else None,
        lost=lost,
        gained=gained,
        p_value=p_value,
        verdict=verdict if of_reference else None,
    )


def mcnemar(lost: int, gained: int) -> float:
    """Exact McNemar test, two-sided: how probable it is that lost + gained fair coins split as unevenly, or more."""
    coins = lost + gained
    tail = sum(math.comb(coins, heads) for heads in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**coins)


def shares(report: Report, types: str) -> dict[tuple[int, float], float]:
    """The share of needles that `types` found, by (length, depth), where any was asked for."""
    trials: dict[tuple[int, float], list[bool]] = {}
    for (length, depth, _), found in found_by(report, types).items():
        trials.setdefault((length, depth), []).append(found)
    return {place: sum(found) / len(found) for place, found in trials.items()}


def heading(report: Report) -> str:
    """What was asked on which machine, in a line, once there are cells."""
    settings, machine = report.settings, report.machine
    prompts = len(settings["lengths"]) * len(settings["depths"]) * settings["trials"]
    counts = ((machine["threads"], "thread"), (prompts, "prompt"))
    texts = (f"{count} {word}{'s' * (count != 1)}" for count, word in counts if count)
    return ", ".join((settings["model"], *machine["devices"], *texts))


def table(report: Report) -> Table:
    """The scores as one table of at most 80 columns."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    grid.add_column("cache\ntype", no_wrap=True)
    for title in ("needles\nfound", "\nshare", "of those\nf16 found", "\nlost", "\ngained", "McNemar\np"):
        grid.add_column(title, justify="right", no_wrap=True)
    grid.add_column("against\nf16", no_wrap=True)
    for line in report.scores:
        grid.add_row(
            line.types,
            f"{line.found}/{line.asked}",
            f"{line.share:.0%}",
            "-" if line.kept is None else f"{line.kept:.0%}",
            str(line.lost),
            str(line.gained),
            f"{line.p_value:.2g}",
            line.verdict or "-",
        )
    return grid


def maps(report: Report) -> Columns:
    """A heat map for each type: the percentage of needles found, by depth (rows) and length (columns)."""
    lengths = report.settings["lengths"]
    parts = [lengths[start : start + _LENGTHS_ABREAST] for start in range(0, len(lengths), _LENGTHS_ABREAST)]
    return Columns([_map(report, line.types, part) for line in report.scores for part in parts], padding=(1, 3))


def _map(report: Report, types: str, lengths: Sequence[int]) -> Table:
    found = shares(report, types)
    grid = Table(box=None, pad_edge=False, padding=0, title=types, title_style="bold", title_justify="left")
    grid.add_column("depth ", justify="right", no_wrap=True)
    for length in lengths:
        grid.add_column(f" {length}", justify="right", no_wrap=True)
    for depth in report.settings["depths"]:
        grid.add_row(f"{depth:g} % ", *(_shaded(found.get((length, depth))) for length in lengths))
    return grid


def _shaded(share: float | None) -> str:
    return "-" if share is None else f"[{_SHADES[round(share * (len(_SHADES) - 1))]}]{share:6.0%} [/]"


def as_json(report: Report) -> dict:
    """The report as plain values, field by field."""
    return asdict(report)
