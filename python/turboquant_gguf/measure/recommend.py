"""Which cache types to run a model with in a given memory."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from ..core import texts
from ..core.units import size_text
from ..errors import TurboquantError
from ..kinds import Finding, quality
from ..kinds.quality import Quality
from ..llamacpp import provenance, recentwindow
from ..llamacpp.cachetypes import CacheTypes
from ..llamacpp.modelmemory import ModelMemory, Size
from . import findings, store
from .store import Store

_LONG_ENOUGH = 512
"""Tokens of context from which on a measurement tells what longer ones lose."""

_TIMES_WINDOW = 4  # in a context of that many recent windows, most of what is read is quantized


@dataclass(frozen=True)
class Candidate:
    """Cache types that llama.cpp takes for the model.

    bits: of storage for a value. size: bytes of weights, cache and buffers at the context asked for. fits: whether that
    is at most the memory asked for. longest_context: tokens that fit. measured: KL divergence from f16 (nats a token)
    of this model, None if it was not measured. predicted: that of the reference model, times how much more or less than
    it this model loses with the types that were measured.
    """

    types: str
    bits: float
    size: Size
    fits: bool
    longest_context: int
    measured: float | None
    predicted: float

    @property
    def loss(self) -> float:
        """KL divergence from f16 in nats a token: measured, or else predicted."""
        return self.predicted if self.measured is None else self.measured


@dataclass(frozen=True)
class Measured:
    """The measurements of the model that were used: all of one text, read in one way by one build.

    base: what losses are counted from. context: tokens in a chunk. tokens: predicted ones, of the type that has most.
    own_build: whether this build of turboquant-gguf made them. time: of the last, UTC, ISO 8601.
    """

    text: str
    base: str
    context: int
    decode: bool
    tokens: int
    own_build: bool
    time: str

    def __str__(self) -> str:
        how = ", token by token" if self.decode else ""
        build = "" if self.own_build else ", with another build"
        tokens = f"{self.tokens} tokens of {self.text} in a context of {self.context}{how}"
        return f"{tokens}, against {self.base}, {self.time[:10]}{build}"


@dataclass(frozen=True)
class Recommendation:
    """The best types, and all that were considered, the best first. best: None if nothing fits.

    reason: why this one, or why none, in a sentence. command: the line that runs llama-server with it. measured: where
    measured losses come from; None if there are none. left_out: what else there is of the model, and why it does not
    compare.
    """

    model: str
    memory: int
    context: int
    trained_length: int | None
    candidates: list[Candidate]
    best: Candidate | None
    reason: str
    command: str | None
    measured: Measured | None
    left_out: list[str]


@dataclass(frozen=True)
class Reference:
    """The model whose losses stand in for those of models that were not measured. losses: types -> KL divergence."""

    model: str
    text: str
    losses: dict[str, float]


@cache
def reference(calibrated: bool) -> Reference:
    """The losses of the reference model, as it is or with calibrated keys; tools/quality_table.py measures them."""
    table = json.loads(texts.bundled("reference.json"))
    return Reference(table["model"], table["text"], table["calibrated" if calibrated else "as it is"])


def recommend(
    model: Path,
    *,
    memory: int,
    context: int,
    types: Sequence[str] = (),
    results: Sequence[Path] = (),
    console: Console | None = None,
) -> Recommendation:
    """The types that lose least among those with which `context` tokens of `model` (a GGUF) fit in `memory` bytes.

    types: which to choose from; none means all that the reference model was measured with. results: files of
    measurements (store.Store), besides the one in the user's cache folder. console: where the progress goes. Raises
    TurboquantError if the model cannot be used.
    """
    facts = provenance.model(model, console)
    known = reference(facts["calibrated"])
    asked = [CacheTypes.parse(name) for name in types or known.losses]
    if unknown := [str(pair) for pair in asked if str(pair) not in known.losses]:
        raise TurboquantError(
            f"There is no prediction for {', '.join(unknown)}. Choose from {', '.join(known.losses)}."
        )
    paths = [path for path in (store.default_results(), *results) if path.is_file()]
    measured, used, left_out = _measured(facts, paths, asked, context)
    factor = _factor(measured, known)
    candidates = []
    with ModelMemory(model) as counted:
        for pair in asked:
            if counted.refusal(pair):
                continue
            size = counted.size(pair, context)
            candidates.append(
                Candidate(
                    types=str(pair),
                    bits=pair.bits,
                    size=size,
                    fits=size.total <= memory,
                    longest_context=counted.longest_context(pair, memory),
                    measured=measured.get(pair),
                    predicted=known.losses[str(pair)] * factor,
                )
            )
    candidates.sort(key=lambda one: (not one.fits, one.loss, one.bits))
    best = candidates[0] if candidates and candidates[0].fits else None
    return Recommendation(
        model=model.name,
        memory=memory,
        context=context,
        trained_length=facts["trained_length"],
        candidates=candidates,
        best=best,
        reason=_reason(best, candidates, known, used, memory, context)
        + ("" if facts["calibrated"] else _gain(best, known)),
        command=_command(model, context, best) if best else None,
        measured=used,
        left_out=left_out,
    )


def _measured(
    facts: Mapping[str, Any], paths: Sequence[Path], asked: Sequence[CacheTypes], context: int
) -> tuple[dict[CacheTypes, float], Measured | None, list[str]]:
    """Mean KL divergences of the model by types, where they come from, and what was left out.

    Of measurements that compare with each other, those of this build go first, then those of most of the types asked
    for, of most tokens, the latest. Among them, each type counts as measured over most tokens.
    """
    groups: dict[str, list[Finding]] = {}
    left_out: dict[str, None] = {}
    for path in paths:
        with Store(path, read_only=True) as opened, opened.reading():
            for one in findings.of_kind(opened, Quality):
                if one.model["fingerprint"] != facts["fingerprint"]:
                    continue
                if reason := _not_comparable(one.settings, context):
                    left_out[reason] = None
                else:
                    groups.setdefault(store.text_of(one.settings), []).append(one)
    sets = [_merged(same) for same in groups.values()]
    if not sets:
        return {}, None, list(left_out)
    losses, used = max(
        sets, key=lambda one: (one[1].own_build, len(one[0].keys() & set(asked)), one[1].tokens, one[1].time)
    )
    return losses, used, list(left_out)


def _not_comparable(settings: Mapping[str, Any], context: int) -> str:
    """Why measurements do not tell what a context of `context` tokens loses here; empty if they do."""
    base, build, own = CacheTypes.parse(settings["base"]), settings["build"], provenance.build()
    if str(base) not in quality.BASES:
        return f"compared with {base}"
    if build["turboquant_gguf"] != own["turboquant_gguf"]:
        return f"by version {build['turboquant_gguf']}"
    for name in (name for name in provenance.VARIABLES if build.get(name) != own.get(name)):
        said = recentwindow.VARIABLES.get(name, name)
        return f"with {said}={build[name]}" if name in build else f"without {said}"
    if settings["context"] < min(context, max(_LONG_ENOUGH, _TIMES_WINDOW * (recentwindow.in_effect().recent or 0))):
        return f"with a context of {settings['context']} tokens, too short to tell"
    return ""


def _merged(same: Sequence[Finding]) -> tuple[dict[CacheTypes, float], Measured]:
    """Findings of the same settings as one."""
    best: dict[CacheTypes, quality.Loss] = {}
    for one in same:
        for pair, result in one.values.items():
            if pair not in best or result.tokens >= best[pair].tokens:
                best[pair] = result
    settings = same[0].settings
    used = Measured(
        text=settings["text"],
        base=settings["base"],
        context=settings["context"],
        decode=settings["decode"],
        tokens=max(result.tokens for result in best.values()),
        own_build=settings["build"] == provenance.build(),
        time=max(one.time for one in same),
    )
    return {pair: result.kld_mean for pair, result in best.items()}, used


def _factor(measured: Mapping[CacheTypes, float], known: Reference) -> float:
    """How many times the reference's losses this model's are: the geometric mean over what was measured of both."""
    pairs = [(loss, known.losses.get(str(pair))) for pair, loss in measured.items()]
    ratios = [loss / expected for loss, expected in pairs if loss and expected]
    return statistics.geometric_mean(ratios) if ratios else 1.0


def _reason(
    best: Candidate | None,
    candidates: Sequence[Candidate],
    known: Reference,
    used: Measured | None,
    memory: int,
    context: int,
) -> str:
    if not candidates:
        return "llama.cpp takes none of these types for this model."
    if not best:
        longest = max(candidates, key=lambda one: one.longest_context)
        least = min(candidates, key=lambda one: one.size.total)
        if not longest.longest_context:
            return f"Nothing fits: weights and buffers alone take more than {size_text(memory)}."
        return (
            f"Nothing fits: {context} tokens take {size_text(least.size.total)} with {least.types}. "
            f"{longest.longest_context} tokens fit with {longest.types}."
        )
    if best.measured is not None:
        return (
            f"It loses least of those that fit: KL divergence {best.measured:.4f} from {used.base}, measured on this "
            "model."
        )
    return (
        f"It should lose least of those that fit: KL divergence {best.predicted:.4f} from f16, predicted from "
        f"{known.model}; larger models lose less. `turboquant-gguf ppl` measures this one."
    )


def _gain(best: Candidate | None, as_is: Reference) -> str:
    """What calibrated keys would gain with the best types; empty if nothing."""
    calibrated = reference(True)
    if not best or calibrated.losses[best.types] >= as_is.losses[best.types]:
        return ""
    return (
        f" Calibrate it first, with `turboquant-gguf calibrate`: with these types {as_is.model} loses "
        f"{calibrated.losses[best.types]:.4f} then, instead of {as_is.losses[best.types]:.4f}."
    )


def _command(model: Path, context: int, best: Candidate) -> str:
    types = CacheTypes.parse(best.types)
    words = ["llama-server", "--model", str(model), "--ctx-size", str(context), "--parallel", "1", "--flash-attn", "on"]
    words += ["--cache-type-k", types.k, "--cache-type-v", types.v]
    return shlex.join(words + recentwindow.in_effect().arguments())
