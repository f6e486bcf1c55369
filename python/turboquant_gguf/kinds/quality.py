"""What a quantized KV cache costs: perplexity, and KL divergence from the same model with an unquantized cache.

A text is cut into chunks, and in each the model predicts the tokens of the second half, as llama-perplexity does
(its perplexity of f16 is the same). Every cache reads the same chunk one after the other, so that the logits of the
unquantized cache are kept in float32, and for one chunk only. For each predicted token there are three numbers:

    nll   -log q(t), of the token t that the text has there
    kld   sum over the vocabulary of p log(p / q)
    same  whether p and q have the same most likely token

p being the distribution of the unquantized cache, and q that of the cache in question; natural logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, Self

import click
import numpy as np
from numpy.typing import NDArray

from ..core import tables, texts
from ..core.divergence import divergence, log_sum
from ..core.tables import BITS, TYPE, Column, Table
from ..core.texts import Text
from ..errors import TurboquantError
from ..llamacpp import provenance
from ..llamacpp.cachetypes import CacheTypes
from .base import Finding, Kind, Panel, Row, Step, Types, Work, option, register, types_by_bits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..llamacpp.logits import Model
    from ..measure.store import Measurement
    from ..report.plots import Theme

BASES = ("f16", "f32")
"""Caches that lose nothing, or next to it: a loss is counted from them."""

DEFAULT_CONTEXT = 512
DEFAULT_SWEEP_CHUNKS = 16

NEIGHBOURS = 64
"""Tokens that lie together have related errors: differences are averaged over as many before their noise is judged."""

Scores = NDArray[np.void]
"""A structured array, one element for each predicted token; SCORES has its fields."""

SCORES = np.dtype([("nll", "<f4"), ("kld", "<f4"), ("same", "?")])

_SLAB = 32  # positions whose probabilities are computed at once


@dataclass(frozen=True)
class Loss:
    """What a cache of these types costs, over `tokens` predicted tokens.

    ppl: perplexity; ppl_stderr: its standard error, as llama-perplexity counts it. ppl_ratio: to the base's, with its
    standard error. kld_*: KL divergence from the base, nats a token. top1: share of tokens where the most likely one
    is the base's. like: the types whose mean divergence differs from this by no more than noise.
    """

    type_k: str
    type_v: str
    ppl: float
    ppl_stderr: float
    kld_mean: float
    kld_median: float
    kld_p99: float
    kld_max: float
    top1: float
    tokens: int
    kld_stderr: float
    ppl_ratio: float
    ppl_ratio_stderr: float
    like: tuple[str, ...] = ()


@register
@dataclass(frozen=True)
class Quality(Kind):
    """Scores of caches, a part for each chunk of a text; a row is Scores as they lie in memory.

    base: types of the cache that all are compared with. context: tokens in a chunk. decode: the second half is read
    token by token, not in batches. positions: of a chunk's first token.
    """

    name = "quality"
    title = "Quality"
    command = "ppl"
    summary = "Measure what cache types cost: perplexity and KL divergence."
    help = """Measure what quantized KV caches cost MODEL (a GGUF), against the same model with an unquantized one.

    The text is cut into chunks. In each, the model predicts the second half, with every cache in turn: perplexity (as
    llama-perplexity counts it), KL divergence from the unquantized cache, and how often the most likely token is the
    same."""
    examples = """
  turboquant-gguf ppl model.gguf
  turboquant-gguf ppl model.gguf --text mine.txt --context 2048
  turboquant-gguf ppl model.gguf --types f16,turbo4,turbo4:turbo3 --chunks 40
  turboquant-gguf ppl model.gguf --decode --chunks 4
  turboquant-gguf ppl model.gguf --text mine.txt --json > quality.json"""
    note = (
        f"KL: divergence in nats a token. ± is one standard error, over means of {NEIGHBOURS} neighbouring tokens; of "
        "ratios and of differences it is paired, token by token."
    )
    reading = (
        (
            "KL divergence",
            "says how far the model's predictions move when its cache is quantized: 0 is no change at all, and "
            "less is better. It is measured at each token of a text, in nats, and sees changes long before "
            "perplexity does. The median is a usual token, 99 % and max are the worst.",
        ),
        (
            "Perplexity",
            "is how surprised the model is by the text, less is better; times f16 is the ratio to that of an "
            "unquantized cache, where 1 is no loss. Same top is how often the most likely token stays the "
            "same: more is better.",
        ),
        (
            "The Pareto frontier",
            "joins the types that no other type beats in both bits and divergence (in bold). Types above the "
            "line are beaten by one that is as small or smaller.",
        ),
    )
    default_types = ("f16", "q8_0", "q5_0", "q4_0", "turbo4", "turbo4:turbo3", "turbo3", "turbo2")
    part = "chunk"
    shared_parts = 4  # few enough to spread, and for a crash to lose little
    options = (
        option(
            "--text",
            sweep=True,
            default=texts.WIKITEXT,
            show_default=True,
            metavar="FILE",
            help=f"What to read: a UTF-8 file, or {texts.WIKITEXT}, which is fetched.",
        ),
        option(
            "--base",
            type=click.Choice(BASES),
            default=BASES[0],
            show_default=True,
            help="The cache that they are compared with.",
        ),
        option(
            "--context",
            sweep=True,
            type=click.IntRange(min=8),
            default=DEFAULT_CONTEXT,
            show_default=True,
            help="Tokens in a chunk.",
        ),
        option(
            "--chunks",
            old_name="--windows",
            sweep=True,
            sweep_default=DEFAULT_SWEEP_CHUNKS,
            type=click.IntRange(min=1),
            help="How many chunks, from the first [default: all]",
        ),
        option(
            "--positions",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            metavar="OFFSET",
            help="The position of a chunk's first token: the same tokens, as if that many others had come before. Where "
            "attention depends on distances alone, as with RoPE, an unquantized cache loses nothing there.",
        ),
        option("--decode", is_flag=True, help="Read the second half of each chunk token by token, as answers are."),
    )

    text: Text
    base: CacheTypes
    context: int
    decode: bool = False
    positions: int = 0

    #
    # measuring
    #

    @classmethod
    def reference(cls, options: Mapping[str, Any]) -> CacheTypes:
        return options["base"]

    @classmethod
    def prepare(cls, *, text: str = texts.WIKITEXT, base: str = BASES[0], **options: Any) -> dict[str, Any]:
        return {"text": texts.load(str(text)), "base": CacheTypes.parse(base), **options}

    @classmethod
    def plan(
        cls,
        work: Work,
        *,
        text: Text,
        base: CacheTypes,
        context: int = DEFAULT_CONTEXT,
        chunks: int | None = None,
        **options: Any,
    ) -> Iterator[Self]:
        from ..llamacpp.ggufile import GGUFModel
        from ..llamacpp.logits import Model

        piece = cls(work.model, work.facts, work.placement, {}, text, base, context, **options)
        if piece.positions:
            with GGUFModel(work.model) as file:
                learned = file.learned_positions
            if learned and piece.positions + context > learned:
                raise TurboquantError(
                    f"{work.model} knows {learned} positions, and this would read up to {piece.positions + context}. "
                    "Give a shorter --context or fewer --positions."
                )
        with Model(work.model, vocabulary_only=True) as model:
            count = len(piece.cut(model)[:chunks])
        yield replace(piece, parts=dict.fromkeys(range(count), work.types))

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "text": self.text.name,
            "text_sha256": self.text.sha256,
            "base": str(self.base),
            "context": self.context,
            "decode": self.decode,
            "build": provenance.build(),
            **self.placement.settings(),
            **({"positions": self.positions} if self.positions else {}),  # rows of older versions have none
        }

    def measure(self, step: Step) -> Iterator[Row]:
        from ..llamacpp.logits import Model

        with Model(self.model, self.placement) as model:
            cut = self.cut(model)
            for done, (number, types) in enumerate(self.parts.items()):
                step(f"chunk {number + 1}", done / len(self.parts))
                for pair, scores in self.scores(model, cut[number], types):
                    yield Row(pair, scores.tobytes(), number)

    def cut(self, model: Model) -> list[list[int]]:
        """The chunks of the text: tokens, each beginning as a text does. Raises TurboquantError if there is none."""
        tokens = model.tokenize(self.text.content.removesuffix("\n"))  # as llama.cpp's programs read files
        chunks = [tokens[begin : begin + self.context] for begin in range(0, len(tokens), self.context)]
        if len(chunks[-1]) < self.context:
            chunks.pop()
        if not chunks:
            raise TurboquantError(
                f"{self.text.name} has {len(tokens)} tokens, which is less than one chunk of {self.context}. Give a "
                "longer text, or a shorter chunk with --context."
            )
        if model.beginning is not None:
            for chunk in chunks:
                chunk[0] = model.beginning
        return chunks

    def scores(self, model: Model, chunk: Sequence[int], types: Types) -> Iterator[tuple[CacheTypes, Scores]]:
        """The scores of each of `types` in one chunk, as soon as they are known."""
        truth = [logits.copy() for logits in self.read(model, self.base, chunk)]
        for pair in types:
            read = truth if pair == self.base else self.read(model, pair, chunk)
            targets = iter(chunk[self.context // 2 + 1 :])
            pieces = [compare(p, q, list(islice(targets, len(p)))) for p, q in zip(truth, read, strict=True)]
            yield pair, np.concatenate(pieces)

    def read(self, model: Model, types: CacheTypes, chunk: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Logits that predict the second half of the chunk but its first token, in pieces that the next overwrites."""
        from ..llamacpp.logits import UBATCH

        first, last = self.context // 2, self.context - 1
        starts = [*range(0, first, UBATCH), *range(first, last)] if self.decode else range(0, self.context, UBATCH)
        with model.open(self.context, types) as context:
            context.facts  # noqa: B018 - raises unless the cache is what was asked for
            for begin, end in pairwise((*starts, last if self.decode else self.context)):
                outputs = max(0, end - max(begin, first))
                logits = context.read(chunk[begin:end], self.positions + begin, outputs=outputs)
                if outputs:
                    yield logits[: last - max(begin, first)]

    #
    # what the scores say
    #

    @classmethod
    def summarize(
        cls, rows: Mapping[tuple[CacheTypes, int], Measurement]
    ) -> Iterator[tuple[dict[CacheTypes, Loss], list[Measurement]]]:
        """Types measured on other chunks than the rest are apart."""
        base = CacheTypes.parse(next(iter(rows.values())).settings["base"])
        chunks: dict[CacheTypes, set[int]] = {}
        for types, part in rows:
            chunks.setdefault(types, set()).add(part)
        of_base = chunks.get(base, set())
        others = [own for types, own in chunks.items() if types != base] or list(chunks.values())
        for parts in dict.fromkeys(frozenset(own & of_base) for own in others):
            if not parts:
                continue
            alike = [types for types, own in chunks.items() if own & of_base == parts or types == base]
            scores = {
                types: np.frombuffer(b"".join(rows[types, part].value for part in sorted(parts)), SCORES)
                for types in alike
            }
            yield summarize(scores, base), [rows[types, part] for types in alike for part in sorted(parts)]

    @classmethod
    def results(cls, finding: Finding) -> Iterator[tuple[CacheTypes, dict[str, Any]]]:
        for types, loss in finding.values.items():
            yield types, asdict(loss)

    @classmethod
    def conditions(cls, finding: Finding) -> list[str]:
        settings = finding.settings
        return [
            settings["text"],
            f"{tables.count(finding.parts, 'chunk')} of {settings['context']} tokens",
            "token by token" if settings["decode"] else "in batches",
            *([f"at positions from {settings['positions']} on"] if settings.get("positions") else []),
        ]

    @classmethod
    def table(cls, finding: Finding) -> Table:
        base, losses = finding.settings["base"], finding.values
        columns = [
            TYPE, BITS, Column("\nperplexity"), Column(f"times\n{base}"), Column("KL\nmean"),
            Column("KL\nmedian", detail=True), Column("KL\n99 %"), Column("KL\nmax", detail=True),
            Column("same\ntop, %"),
        ]  # fmt: skip
        rows = [
            [
                str(types),
                f"{types.bits:.4g}",
                tables.with_error(losses[types].ppl, losses[types].ppl_stderr),
                tables.with_error(losses[types].ppl_ratio, losses[types].ppl_ratio_stderr),
                tables.with_error(losses[types].kld_mean, losses[types].kld_stderr),
                *map(tables.short, (losses[types].kld_median, losses[types].kld_p99, losses[types].kld_max)),
                f"{100 * losses[types].top1:.1f}",
            ]
            for types in types_by_bits(losses)
        ]
        tokens = next(iter(losses.values())).tokens
        caption = f"Quality against {base}, over {tokens} predicted tokens"
        return Table(caption, columns, {"": rows}, noise(list(losses.values()), base))

    @classmethod
    def panels(cls, finding: Finding) -> list[Panel]:
        points, base = _points(finding), finding.settings["base"]
        if not points:
            return []
        best = ", ".join(map(str, frontier(finding)))
        alt = (
            f"Mean KL divergence from {base} (logarithmic) against bits a value, for {len(points)} cache types. On the "
            f"Pareto frontier, from the fewest bits: {best}. The table has the numbers."
        )
        title = f"KL divergence from {base} against bits a value"
        return [Panel(title, alt, lambda axes, theme: _draw(axes, theme, finding))]

    @classmethod
    def numbers(cls, finding: Finding) -> Iterator[tuple[CacheTypes, dict[str, Any]]]:
        errors = {"ppl": "ppl_stderr", "ppl_ratio": "ppl_ratio_stderr", "kld_mean": "kld_stderr"}
        for types, loss in finding.values.items():
            for metric in ("ppl", "ppl_ratio", "kld_mean", "kld_median", "kld_p99", "kld_max", "top1", "tokens"):
                row = {"metric": metric, "value": getattr(loss, metric)}
                yield types, row | ({"stderr": getattr(loss, errors[metric])} if metric in errors else {})


def compare(p: NDArray[np.float32], q: NDArray[np.float32], targets: Sequence[int]) -> Scores:
    """The scores of q's logits against p's, both (positions, vocabulary). targets: the token of the text at each."""
    scores = np.empty(len(targets), SCORES)
    for begin in range(0, len(targets), _SLAB):
        slab = slice(begin, begin + _SLAB)
        part = scores[slab]
        part["kld"] = divergence(p[slab], q[slab])
        part["nll"] = log_sum(q[slab])[0] - q[slab][np.arange(len(part)), targets[slab]]
        part["same"] = p[slab].argmax(-1) == q[slab].argmax(-1)
    return scores


def summarize(scores: Mapping[CacheTypes, Scores], base: CacheTypes) -> dict[CacheTypes, Loss]:
    """What the scores of several caches on the same tokens say. scores: those of `base` must be among them."""
    return {pair: _summarize(pair, scores, base) for pair in scores}


def _summarize(pair: CacheTypes, scores: Mapping[CacheTypes, Scores], base: CacheTypes) -> Loss:
    nll, kld = (scores[pair][name].astype(np.float64) for name in ("nll", "kld"))
    more = nll - scores[base]["nll"]
    ppl, ratio = np.exp(nll.mean()), np.exp(more.mean())
    return Loss(
        type_k=pair.k,
        type_v=pair.v,
        ppl=float(ppl),
        ppl_stderr=float(ppl * nll.std() / max(1, len(nll) - 1) ** 0.5),
        kld_mean=float(kld.mean()),
        kld_median=float(np.median(kld)),
        kld_p99=float(np.percentile(kld, 99)),
        kld_max=float(kld.max()),
        top1=float(scores[pair]["same"].mean()),
        tokens=len(nll),
        kld_stderr=_stderr(kld),
        ppl_ratio=float(ratio),
        ppl_ratio_stderr=float(ratio * _stderr(more)),
        like=tuple(
            str(other)
            for other in scores
            if other not in (pair, base) and pair != base and _is_noise(kld - scores[other]["kld"])
        ),
    )


def noise(results: Sequence[Loss], base: str) -> list[str]:
    """What the results do not tell apart, in sentences."""
    names = {result: str(CacheTypes(result.type_k, result.type_v)) for result in results}
    close = [
        name
        for result, name in names.items()
        if name != base and abs(result.ppl_ratio - 1) <= 2 * result.ppl_ratio_stderr
    ]
    pairs = {frozenset((name, other)): f"{name} and {other}" for result, name in names.items() for other in result.like}
    return [
        *([f"Perplexity within noise of {base}'s (two standard errors): {', '.join(close)}."] if close else []),
        *([f"KL divergence within noise of each other: {'; '.join(pairs.values())}."] if pairs else []),
    ]


def _stderr(values: NDArray[np.float64]) -> float:
    """Standard error of the mean of values that lie in the order of the text."""
    blocks = len(values) // NEIGHBOURS
    if blocks < 2:
        return float(values.std() / max(1, len(values) - 1) ** 0.5)
    means = values[: blocks * NEIGHBOURS].reshape(blocks, NEIGHBOURS).mean(-1)
    return float(means.std(ddof=1) / blocks**0.5)


def _is_noise(differences: NDArray[np.float64]) -> bool:
    return bool(abs(differences.mean()) <= 2 * _stderr(differences))


#
# the plot: divergence against bits
#


def frontier(finding: Finding) -> list[CacheTypes]:
    """The Pareto frontier: the types than which none has both fewer bits and less divergence. Fewest bits first."""
    best, least = [], math.inf
    points = _points(finding)
    for types in sorted(points, key=lambda pair: (pair.bits, points[pair].kld_mean)):
        if points[types].kld_mean < least:
            best.append(types)
            least = points[types].kld_mean
    return best


def _points(finding: Finding) -> dict[CacheTypes, Loss]:
    """What a logarithmic axis can show: not the types that all are compared with."""
    return {types: loss for types, loss in finding.values.items() if 0 < loss.kld_mean < math.inf}


def _draw(axes: Axes, theme: Theme, finding: Finding) -> None:
    points, best = _points(finding), frontier(finding)
    axes.set_xscale("log")  # most types lie at the lower end
    axes.set_yscale("log", nonpositive="clip")
    corners = [(types.bits, points[types].kld_mean) for types in best]
    steps = [corners[0], *(step for (_, y), (x, y2) in pairwise(corners) for step in ((x, y), (x, y2)))]
    axes.plot(*zip(*steps, strict=True), color=theme.ink, alpha=0.5, linewidth=1, label="Pareto frontier")
    for turbo, name in ((True, "turbo types"), (False, "stock types")):
        own = {types: result for types, result in points.items() if types.is_turbo == turbo}
        if own:
            axes.errorbar(
                [types.bits for types in own],
                [result.kld_mean for result in own.values()],
                [result.kld_stderr for result in own.values()],
                fmt="o" if turbo else "s",
                color=theme.turbo if turbo else theme.stock,
                markerfacecolor=None if turbo else "none",
                markersize=7,
                capsize=3,
                label=name,
            )
    for types in types_by_bits(points):
        axes.annotate(
            str(types),
            (types.bits, points[types].kld_mean),
            (0, 0),
            textcoords="offset points",
            fontweight="bold" if types in best else "normal",
            arrowprops={"arrowstyle": "-", "color": theme.ink, "alpha": 0.4, "linewidth": 0.6, "shrinkB": 5},
        ).set_in_layout(False)
    _plain_numbers(axes)
    axes.margins(x=0.1, y=0.1)
    axes.set_xlabel("bits a value")
    axes.set_ylabel(f"mean KL divergence from {finding.settings['base']}, nats")
    axes.grid(color="0.5", alpha=0.2)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize="small")


def _plain_numbers(axes: Axes) -> None:
    """Numbers such as 0.02 beside logarithmic axes, instead of powers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    for axis, locator in (
        (axes.xaxis, FixedLocator((2, 3, 4, 5, 6, 8, 12, 16, 24, 32))),
        (axes.yaxis, LogLocator(subs=(1, 2, 5))),
    ):
        axis.set_major_locator(locator)
        axis.set_major_formatter(FuncFormatter(lambda value, _: np.format_float_positional(value, trim="-")))
        axis.set_minor_locator(NullLocator())
