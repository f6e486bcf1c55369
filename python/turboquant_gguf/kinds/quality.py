"""What a quantized KV cache costs: perplexity, and KL divergence from the same model with an unquantized cache.

A text is cut into windows, and in each the model predicts the tokens of the second half, as llama-perplexity does
(its perplexity of f16 is the same). Every cache reads the same window one after the other, so that the logits of the
unquantized cache are kept in float32, and for one window only. For each predicted token there are three numbers:

    nll   -log q(t), of the token t that the text has there
    kld   sum over the vocabulary of p log(p / q)
    same  whether p and q have the same most likely token

p being the distribution of the unquantized cache, and q that of the cache in question; natural logarithms.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from ..core import progress, texts
from ..core.texts import Text
from ..errors import TurboquantError
from ..llamacpp import provenance
from ..llamacpp.cachetypes import CacheTypes
from ..llamacpp.logits import UBATCH, Model
from ..llamacpp.modelmemory import ModelMemory
from ..measure.store import Store, default_results

DEFAULT_TYPES = ("f16", "q8_0", "q5_0", "q4_0", "turbo4", "turbo4:turbo3", "turbo3", "turbo2")
DEFAULT_CONTEXT = 512
BASES = ("f16", "f32")
"""Caches that lose nothing, or next to it: a loss is counted from them."""

KIND = "quality"
"""Of these measurements in a Store."""

NEIGHBOURS = 64
"""Tokens that lie together have related errors: differences are averaged over as many before their noise is judged."""

Scores = NDArray[np.void]
"""A structured array, one element for each predicted token; SCORES has its fields."""

SCORES = np.dtype([("nll", "<f4"), ("kld", "<f4"), ("same", "?")])

_SLAB = 32  # positions whose probabilities are computed at once


@dataclass(frozen=True)
class Experiment:
    """What the scores of a window depend on, besides the model and the cache types.

    base: types of the cache that all are compared with. context: tokens in a window. decode: the second half is read
    token by token, not in batches. threads and gpu_layers are those of logits.py.
    """

    text: Text
    base: CacheTypes
    context: int
    decode: bool = False
    threads: int | None = None
    gpu_layers: int = 0

    @property
    def settings(self) -> dict:
        """What tells these scores from others in a Store; threads do not."""
        return {
            "text": self.text.name,
            "text_sha256": self.text.sha256,
            "base": str(self.base),
            "context": self.context,
            "decode": self.decode,
            "gpu_layers": self.gpu_layers,
            "build": provenance.build(),
        }

    def windows(self, model: Model) -> list[list[int]]:
        """The windows of the text: tokens, each beginning as a text does. Raises TurboquantError if there is none."""
        tokens = model.tokenize(self.text.content.removesuffix("\n"))  # as llama.cpp's programs read files
        windows = [tokens[begin : begin + self.context] for begin in range(0, len(tokens), self.context)]
        if len(windows[-1]) < self.context:
            windows.pop()
        if not windows:
            raise TurboquantError(
                f"{self.text.name} has {len(tokens)} tokens, which is less than one window of {self.context}. Give a "
                "longer text, or a shorter window with --context."
            )
        if model.beginning is not None:
            for window in windows:
                window[0] = model.beginning
        return windows

    def measure(
        self, model: Model, window: Sequence[int], types: Sequence[CacheTypes]
    ) -> Iterator[tuple[CacheTypes, Scores]]:
        """The scores of each of `types` in one window, as soon as they are known; those of the base are the first."""
        truth = [logits.copy() for logits in self._read(model, self.base, window)]
        for pair in types:
            read = truth if pair == self.base else self._read(model, pair, window)
            targets = iter(window[self.context // 2 + 1 :])
            pieces = [compare(p, q, list(islice(targets, len(p)))) for p, q in zip(truth, read, strict=True)]
            yield pair, np.concatenate(pieces)

    def _read(self, model: Model, types: CacheTypes, window: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Logits that predict the second half of the window but its first token, in pieces that the next overwrites."""
        first, last = self.context // 2, self.context - 1
        starts = [*range(0, first, UBATCH), *range(first, last)] if self.decode else range(0, self.context, UBATCH)
        with model.open(self.context, types, threads=self.threads) as context:
            context.facts  # noqa: B018 - raises unless the cache is what was asked for
            for begin, end in pairwise((*starts, last if self.decode else self.context)):
                outputs = max(0, end - max(begin, first))
                logits = context.read(window[begin:end], begin, outputs=outputs)
                if outputs:
                    yield logits[: last - max(begin, first)]


def compare(p: NDArray[np.float32], q: NDArray[np.float32], targets: Sequence[int]) -> Scores:
    """The scores of q's logits against p's, both (positions, vocabulary). targets: the token of the text at each."""
    scores = np.empty(len(targets), SCORES)
    for begin in range(0, len(targets), _SLAB):
        slab = slice(begin, begin + _SLAB)
        part = scores[slab]
        rows = np.arange(len(part))
        log_p, weights = _log_sum(p[slab])
        log_q, _ = _log_sum(q[slab])
        # KL = E_p[p's logit - q's logit] - (log sum exp of p's - that of q's): exactly 0 for equal logits.
        expected = np.einsum("ij,ij->i", weights, p[slab] - q[slab], dtype=np.float64) / weights.sum(
            -1, dtype=np.float64
        )
        part["kld"] = np.maximum(expected - (log_p - log_q), 0)  # rounding can make it -1e-7
        part["nll"] = log_q - q[slab][rows, targets[slab]]
        part["same"] = p[slab].argmax(-1) == q[slab].argmax(-1)
    return scores


def _log_sum(logits: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """log sum exp of each row, and exp(row - its largest)."""
    largest = logits.max(-1, keepdims=True)
    weights = np.exp(logits - largest)
    return largest[:, 0] + np.log(weights.sum(-1, dtype=np.float64)), weights


def refused(model: Path, types: Sequence[CacheTypes]) -> dict[CacheTypes, str]:
    """Those of `types` that llama.cpp does not take for this model, and why."""
    with ModelMemory(model) as memory:
        return {pair: reason for pair in types if (reason := memory.refusal(pair))}


#
# what the scores say
#


@dataclass(frozen=True)
class Quality:
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


def summarize(scores: Mapping[CacheTypes, Scores], base: CacheTypes) -> list[Quality]:
    """What the scores of several caches on the same tokens say. scores: those of `base` must be among them."""
    return [_summarize(pair, scores, base) for pair in scores]


def _summarize(pair: CacheTypes, scores: Mapping[CacheTypes, Scores], base: CacheTypes) -> Quality:
    nll, kld = (scores[pair][name].astype(np.float64) for name in ("nll", "kld"))
    more = nll - scores[base]["nll"]
    ppl, ratio = np.exp(nll.mean()), np.exp(more.mean())
    return Quality(
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


def noise(results: Sequence[Quality], base: str) -> list[str]:
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
# a whole text, and what is known of it already
#


@dataclass(frozen=True)
class Refusal:
    """Cache types that llama.cpp does not take for this model, and why."""

    types: str
    message: str


@dataclass
class Report:
    """What was found. windows: how many all types were measured on, of `windows_asked`."""

    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    windows: int
    windows_asked: int
    results: list[Quality]
    refusals: list[Refusal]
    interrupted: bool = False


def ppl(
    model: Path,
    *,
    text: str = texts.WIKITEXT,
    types: Sequence[str] = DEFAULT_TYPES,
    base: str = "f16",
    context: int = DEFAULT_CONTEXT,
    windows: int | None = None,
    decode: bool = False,
    threads: int | None = None,
    gpu_layers: int = 0,
    results: Path | None = None,
    console: Console,
) -> Report:
    """Measure what caches of `types` cost `model` (a GGUF) on a text, against a cache of type `base`.

    text: a UTF-8 file, or "wikitext-2". context: tokens in a window. windows: how many of them, from the first; None
    takes all. decode: read the second half of each window token by token, as when a model answers. results: a file of
    measurements (store.Store): those in it are not made again, and all others are added to it; None takes one in the
    user's cache folder. console: where the progress goes.

    Types that llama.cpp does not take are listed in the report while the others go on. Ctrl-C ends it early: the report
    then has the windows so far, and says `interrupted`. Raises TurboquantError if nothing can be measured.
    """
    asked = list(dict.fromkeys(CacheTypes.parse(name) for name in types))
    experiment = Experiment(texts.load(text), CacheTypes.parse(base), context, decode, threads, gpu_layers)
    facts = provenance.model(model, console)
    refusals = refused(model, [experiment.base, *asked])
    if experiment.base in refusals:
        raise TurboquantError(refusals[experiment.base])
    asked = [pair for pair in asked if pair not in refusals]
    needed = list(dict.fromkeys([experiment.base, *asked]))
    if not results:
        results = default_results()
        with suppress(OSError):  # Store says so, and what to do
            results.parent.mkdir(parents=True, exist_ok=True)
    interrupted = False
    with (
        Store(results) as store,
        Model(model, gpu_layers=gpu_layers) as opened,
        progress.bar(console, progress.LEFT) as bar,
    ):
        cut = experiment.windows(opened)[:windows]
        key = (KIND, facts, experiment.settings)
        task = bar.add_task("", total=None, left="")

        def wait(other: str) -> None:
            bar.update(task, description=f"waiting for {other}, which measures the same")

        try:
            with store.claimed(*key, wait):
                todo = plan(store.find(*key), dict.fromkeys(range(len(cut)), needed))
                if len(todo) < len(cut):
                    console.print(f"{len(cut) - len(todo)} of {len(cut)} windows were measured before.", highlight=False)
                passes = sum(map(len, todo.values()))
                bar.reset(task, total=passes, left=passes)
                for number, missing in todo.items():
                    bar.update(task, description=f"window {number + 1} of {len(cut)}")
                    for pair, scores in experiment.measure(opened, cut[number], missing):
                        store.add(*key[:2], pair, key[2], scores.tobytes(), part=number)
                        passes -= 1
                        bar.update(task, advance=1, left=passes)
        except KeyboardInterrupt:
            interrupted = True
        with store.reading():
            scores, complete = gather(store.find(*key), len(cut), needed)
    found = summarize(scores, experiment.base) if complete else []
    return Report(
        model=facts,
        settings=experiment.settings,
        windows=complete,
        windows_asked=len(cut),
        results=[result for result in found if CacheTypes(result.type_k, result.type_v) in asked],
        refusals=[Refusal(str(pair), message) for pair, message in refusals.items()],
        interrupted=interrupted,
    )


def plan(
    known: Collection[tuple[CacheTypes, int]], wanted: Mapping[int, Sequence[CacheTypes]]
) -> dict[int, list[CacheTypes]]:
    """Of the types `wanted` in each window those that are missing; windows that lack none are left out."""
    missing = {number: [pair for pair in types if (pair, number) not in known] for number, types in wanted.items()}
    return {number: pairs for number, pairs in missing.items() if pairs}


def gather(
    known: Mapping[tuple[CacheTypes, int], bytes], windows: int, types: Sequence[CacheTypes]
) -> tuple[dict[CacheTypes, Scores], int]:
    """The scores of each type over the windows in which all were measured, and the number of these windows."""
    complete = [number for number in range(windows) if all((pair, number) in known for pair in types)]
    scores = {pair: np.frombuffer(b"".join(known[pair, number] for number in complete), SCORES) for pair in types}
    return scores, len(complete)
