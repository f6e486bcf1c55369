"""Needle in a haystack: what a model still finds in a long prompt with each KV-cache type, against f16.

Every type gets the identical prompts, so that types are compared prompt by prompt. No prompt reuses what the cache
holds of the one before: it would save a quarter of the time, but batches would begin elsewhere, which is enough to
change answers of quantized caches. So an answer depends on its own prompt alone, whatever else is asked.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from ..core import callbacks, tables, texts
from ..core.tables import BITS, NOTHING, TYPE, Column, HeatMap, Table
from ..core.texts import Text
from ..errors import TurboquantError
from ..llamacpp import provenance
from ..llamacpp.cachetypes import F16, CacheTypes
from .base import Failure, Finding, Kind, Panel, Row, Step, Work, option, register, types_by_bits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..llamacpp.server import Server
    from ..report.plots import Theme
    from .runners.needles import Needle

DEFAULT_LENGTHS = (1024, 2048, 4096, 8192)
DEFAULT_DEPTHS = (0, 25, 50, 75, 100)
ANSWER_TOKENS = 32
SIGNIFICANCE = 0.05
"""A difference that chance alone makes at least this often counts as noise."""

SERVER_ARGUMENTS = (
    "--parallel", "1", "--no-cache-prompt", "--cache-ram", "0",
    "--reasoning", "off", "--reasoning-budget", "0",
)  # fmt: skip
"""Each prompt is read from its beginning, and answered at once."""

_MOST_LABELS = 120  # a heat map of more cells has no room for numbers

Place = tuple[int, float, int]
"""A prompt: length, depth and trial."""


@dataclass(frozen=True)
class Prompt:
    """A question that every type is asked. depth: of the needle, a percentage; tokens: what it has. trial: from 0."""

    depth: float
    trial: int
    text: str
    tokens: int
    needle: Needle


@dataclass(frozen=True)
class Answer:
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
    """One type over all prompts it was asked that f16 was asked as well. Shares from 0 to 1.

    kept: the share found of those that f16 found; None if f16 found none. lost, gained: found by f16 alone, and by
    this type alone. p_value: how often chance alone makes them differ as much, by the exact McNemar test (two-sided).
    verdict: "reference" (f16 itself), "within noise", "better" or "worse"; None if f16 found nothing.
    """

    asked: int
    found: int
    share: float
    kept: float | None
    lost: int
    gained: int
    p_value: float
    verdict: str | None


@register
@dataclass(frozen=True)
class Retrieval(Kind):
    """Needles found in prompts of one length, a part for each trial; a row is a JSON array of Answer.

    In files of earlier versions a row is of all trials.
    """

    name = "retrieval"
    title = "Retrieval"
    command = "niah"
    summary = "Find a needle in a haystack with each cache type."
    help = """Hide a number in long prompts, and see with which KV-cache types MODEL (a GGUF) finds it.

    "The magic number of Lisbon is 48213." is put at several depths into texts of several lengths, and llama-server is
    asked for the number, once with each cache type. It is found if the answer holds the number. All types get the same
    prompts, so the differences from f16 can be told from noise."""
    examples = """
  turboquant-gguf niah my.gguf
  turboquant-gguf niah my.gguf --types turbo4,turbo4:turbo3 --trials 4
  turboquant-gguf niah my.gguf --lengths 4096,16384 --depths 10,50,90
  turboquant-gguf niah my.gguf --text book.txt --plot found.png
  turboquant-gguf niah my.gguf --json > found.json"""
    note = (
        "Lost, gained: needles that only f16 found, and only this type. Within noise: chance alone makes them differ "
        f"as much at least {SIGNIFICANCE:.0%} of the time. Fewer than 6 lost or gained never tell: more --trials see "
        "smaller differences."
    )
    reading = (
        (
            "Retrieval",
            "hides a number in a long prompt and asks for it. Lost are needles that only f16 found, gained "
            "those that only this type found; within noise means that chance alone makes them differ as much "
            "at least 5 % of the time (exact McNemar test).",
        ),
    )
    default_types = ("f16", "q8_0", "q4_0", "turbo4", "turbo3", "turbo2")
    part = "trial"
    merged = "length"
    columns = ("depth", "length")
    options = (
        option(
            "--lengths",
            sweep=True,
            sweep_default="1024,2048",
            callback=callbacks.numbers(least=1),
            help="Prompt tokens, separated by commas [default: those of "
            f"{', '.join(map(str, DEFAULT_LENGTHS))} that the model was trained for]",
        ),
        option(
            "--depths",
            default=",".join(map(str, DEFAULT_DEPTHS)),
            callback=callbacks.percentages,
            help="Where the needle lies, in percent of the text, separated by commas.",
        ),
        option(
            "--trials",
            sweep=True,
            type=click.IntRange(min=1),
            default=1,
            help="Prompts of each length and depth; each has a needle of its own.",
        ),
        option(
            "--text",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            metavar="FILE",
            help="The haystack [default: generated sentences]",
        ),
        option("--seed", type=int, default=0, help="Seed of the needles and of the generated sentences."),
    )

    length: int
    depths: tuple[float, ...]
    text: Text | None
    seed: int

    @classmethod
    def prepare(cls, *, text: Path | None = None, **options: Any) -> dict[str, Any]:
        return {"text": text and texts.load(str(text)), **options}

    @classmethod
    def plan(
        cls,
        work: Work,
        *,
        lengths: Sequence[int] | None = None,
        depths: Sequence[float] = DEFAULT_DEPTHS,
        trials: int = 1,
        text: Text | None = None,
        seed: int = 0,
    ) -> Iterator[Self]:
        trained = work.facts["trained_length"]
        longest = trained or max(DEFAULT_LENGTHS)
        if lengths is None:
            lengths = [length for length in DEFAULT_LENGTHS if length <= longest] or [longest]
        elif trained and max(lengths) > trained and not work.sweep:
            raise TurboquantError(
                f"{work.model.name} was trained for {trained} tokens, so it cannot be asked about {max(lengths)}. Give "
                f"--lengths of at most {trained}."
            )
        parts = dict.fromkeys(range(trials), work.types)
        for length in sorted(set(lengths)):
            if length <= (trained or length):
                yield cls(work.model, work.facts, work.placement, parts, length, tuple(depths), text, seed)

    @property
    def settings(self) -> dict[str, Any]:
        asked = {"length": self.length, "depths": list(self.depths), "seed": self.seed}
        text = {"text": self.text.name, "text_sha256": self.text.sha256} if self.text else {"text": None}
        return asked | text | self.placement.settings() | {"build": provenance.build()}

    def measure(self, step: Step) -> Iterator[Row | Failure]:
        from ..llamacpp import server

        prompts: dict[int, list[Prompt]] = {}
        context = self.length + ANSWER_TOKENS
        asked, done = self.rows * len(self.depths), 0
        for types in self.types:
            step(f"{types}  loading the model", done / asked)
            try:
                with server.running(
                    self.model, types, context=context, placement=self.placement, extra_args=SERVER_ARGUMENTS
                ) as running:
                    if not prompts:
                        step("writing the prompts", 0)
                        prompts = self._prompts(running)
                    for trial in (trial for trial, wanted in self.parts.items() if types in wanted):
                        answers = []
                        for prompt in prompts[trial]:
                            step(f"{types}  {self.length} tokens  depth {prompt.depth:g} %", done / asked)
                            answers.append(asdict(self._ask(running, types, prompt)))
                            done += 1
                        yield Row(types, json.dumps(answers).encode(), trial)
            except TurboquantError as error:
                if types == F16:  # nothing could be compared
                    raise
                yield self.failure(types, error)

    def _prompts(self, running: Server) -> dict[int, list[Prompt]]:
        """The prompts of each trial."""
        from .runners import needles
        from .runners.needles import Needle

        if self.text:
            sentences = needles.sentences_of(self.text.content)
        else:
            sentences = list(islice(needles.generated(self.seed), self.length))  # a sentence has more than one token
        trained = self.facts["trained_length"]
        # llama-server keeps prompt and answer within the trained length.
        most = min(self.length, trained - ANSWER_TOKENS) if trained else self.length
        found: dict[int, list[Prompt]] = {}
        with running.token_counter() as count:
            for trial in self.parts:
                for depth in self.depths:
                    needle = Needle.draw(random.Random(f"{self.seed} {self.length} {depth:g} {trial}"))
                    text, tokens = needles.fill(sentences, needle, depth, most, count)
                    found.setdefault(trial, []).append(Prompt(depth, trial, text, tokens, needle))
        return found

    def _ask(self, running: Server, types: CacheTypes, prompt: Prompt) -> Answer:
        answer = running.ask(prompt.text, max_tokens=ANSWER_TOKENS).text
        return Answer(
            types=str(types),
            type_k=types.k,
            type_v=types.v,
            length=self.length,
            depth=prompt.depth,
            trial=prompt.trial + 1,
            prompt_tokens=prompt.tokens,
            needle=prompt.needle.sentence,
            expected=prompt.needle.number,
            answer=answer,
            found=prompt.needle.is_in(answer),
        )

    #
    # what the answers say
    #

    @classmethod
    def results(cls, finding: Finding) -> Iterator[tuple[CacheTypes, dict[str, Any]]]:
        found = scores(finding)
        for types, answers in finding.values.items():
            score = {"score": asdict(found[types]) if types in found else None}
            yield types, score | {"answers": answers}

    @classmethod
    def conditions(cls, finding: Finding) -> list[str]:
        lengths, depths = (", ".join(f"{value:g}" for value in _asked(finding, name)) for name in ("length", "depth"))
        trials = tables.count(_asked(finding, "trial")[-1], "trial")
        text = [f"in {finding.settings['text']}"] if finding.settings.get("text") else []
        return [f"prompts of {lengths} tokens", *text, f"needles at {depths} %", f"{trials} of each"]

    @classmethod
    def table(cls, finding: Finding) -> Table:
        columns = [TYPE, BITS, Column("needles\nfound"), Column("\nshare")]
        compared = [Column("\nlost"), Column("\ngained"), Column("McNemar\np"), Column("against\nf16", words=True)]
        by_types = scores(finding)
        rows = []
        for types in types_by_bits(finding.values):
            found = found_by(finding, types).values()
            row = [str(types), f"{types.bits:.4g}", f"{sum(found)}/{len(found)}"]
            row += [tables.share(sum(found) / len(found))]
            if score := by_types.get(types):
                row += [str(score.lost), str(score.gained), f"{score.p_value:.2g}", score.verdict or "f16 found none"]
            else:
                row += [NOTHING] * len(compared)
            rows.append(row if by_types else row[: -len(compared)])
        notes = []
        if F16 in by_types and not by_types[F16].found:
            notes = [
                "f16 found none of the needles: this model is too small for this, or the prompts are too long for it. "
                "Shares of what f16 found mean nothing then. Try shorter --lengths or a larger model."
            ]
        return Table("Needles found", columns + (compared if by_types else []), {"": rows}, notes)

    @classmethod
    def maps(cls, finding: Finding) -> list[HeatMap]:
        lengths, depths = (_asked(finding, name) for name in ("length", "depth"))
        found = []
        for types in types_by_bits(finding.values):
            of_type = shares(finding, types)
            rows = {depth: [of_type.get((length, depth)) for length in lengths] for depth in depths}
            found.append(HeatMap(str(types), lengths, rows))
        return found

    @classmethod
    def panels(cls, finding: Finding) -> list[Panel]:
        """A heat map for each type."""
        return [
            Panel(
                f"Needles found with {one.types}, %",
                f"The share of needles found with {one.types}, by depth and length. The table has the numbers.",
                lambda axes, theme, one=one: _draw(axes, theme, one),
            )
            for one in cls.maps(finding)
        ]

    @classmethod
    def numbers(cls, finding: Finding) -> Iterator[tuple[CacheTypes, dict[str, Any]]]:
        by_types = scores(finding)
        for types in finding.values:
            for (length, depth), share in shares(finding, types).items():
                yield types, {"depth": depth, "length": length, "metric": "share", "value": share}
            if score := by_types.get(types):
                for metric in ("lost", "gained", "p_value"):
                    yield types, {"metric": metric, "value": getattr(score, metric)}


def _asked(finding: Finding, what: str) -> list:
    """The lengths, depths or trials ("length", "depth", "trial") of all prompts, each once and in order."""
    return sorted({answer[what] for answers in finding.values.values() for answer in answers})


def found_by(finding: Finding, types: CacheTypes) -> dict[Place, bool]:
    """Whether `types` found the needle of each prompt it was asked."""
    answers = finding.values.get(types, ())
    return {(answer["length"], answer["depth"], answer["trial"]): answer["found"] for answer in answers}


def shares(finding: Finding, types: CacheTypes) -> dict[tuple[int, float], float]:
    """The share of needles that `types` found, by (length, depth), where any was asked for."""
    trials: dict[tuple[int, float], list[bool]] = {}
    for (length, depth, _), found in found_by(finding, types).items():
        trials.setdefault((length, depth), []).append(found)
    return {place: sum(found) / len(found) for place, found in trials.items()}


def scores(finding: Finding) -> dict[CacheTypes, Score]:
    """The scores of the types that were asked something that f16 was asked."""
    reference = found_by(finding, F16)
    found = {}
    for types in finding.values:
        own = found_by(finding, types)
        if shared := {prompt: own[prompt] for prompt in own if prompt in reference}:
            found[types] = score(types, shared, reference)
    return found


def score(types: CacheTypes, own: Mapping[Any, bool], reference: Mapping[Any, bool]) -> Score:
    """Compare what `types` found (own) with what f16 found (reference): prompt -> bool, over the prompts of own."""
    lost = sum(reference[prompt] and not found for prompt, found in own.items())
    gained = sum(found and not reference[prompt] for prompt, found in own.items())
    of_reference = sum(reference[prompt] for prompt in own)
    p_value = mcnemar(lost, gained)
    verdict = "within noise" if p_value >= SIGNIFICANCE else "worse" if lost > gained else "better"
    if types == F16:
        verdict = "reference"
    return Score(
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


def _draw(axes: Axes, theme: Theme, one: HeatMap) -> None:
    shown = [[math.nan if share is None else 100 * share for share in row] for row in one.shares.values()]
    # Gray prints keep the order of these colors: they grow steadily lighter.
    axes.imshow(shown, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(one.lengths)), [str(length) for length in one.lengths], fontsize="small")
    axes.set_yticks(range(len(one.shares)), [f"{depth:g}" for depth in one.shares], fontsize="small")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel("depth of the needle, %")
    if len(one.lengths) * len(one.shares) > _MOST_LABELS:
        return
    for y, row in enumerate(shown):
        for x, share in enumerate(row):
            if not math.isnan(share):
                color = "black" if share > 50 else "white"
                axes.text(x, y, f"{share:.0f}", ha="center", va="center", color=color, fontsize="small")
