"""Which cache types to run a model with in a given memory."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from . import findings, provenance, quality
from .cachetypes import CacheTypes
from .errors import TurboquantError
from .inspection import size_text
from .modelmemory import ModelMemory, Size
from .store import Store


@dataclass(frozen=True)
class Candidate:
    """Cache types that llama.cpp takes for the model.

    bits: a value. size: bytes of weights, cache and buffers at the context asked for; fits: in the memory asked for.
    longest_context: tokens that fit. measured: KL divergence from f16 (nats a token) of this model, None if it was not
    measured. predicted: that of the reference model, times how much more or less than it this model loses with the
    types that were measured.
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
        """As measured, or else as predicted."""
        return self.predicted if self.measured is None else self.measured


@dataclass(frozen=True)
class Recommendation:
    """The best types, and all that were considered, the best first. best: None if nothing fits.

    reason: why this one, or why none, in a sentence. command: the line that runs llama-server with it.
    """

    model: str
    memory: int
    context: int
    trained_length: int | None
    candidates: list[Candidate]
    best: Candidate | None
    reason: str
    command: str | None


@dataclass(frozen=True)
class Reference:
    """The model whose losses stand in for those of models that were not measured. losses: types -> KL divergence."""

    model: str
    text: str
    losses: dict[str, float]


@cache
def reference(calibrated: bool) -> Reference:
    """Of the reference model as it is, or with calibrated keys; written by tools/quality_table.py."""
    table = json.loads(files(__package__).joinpath("data/reference.json").read_text("utf-8"))
    return Reference(table["model"], table["text"], table["calibrated" if calibrated else "as it is"])


def recommend(
    model: Path, *, memory: int, context: int, types: Sequence[str] = (), results: Sequence[Path] = ()
) -> Recommendation:
    """The types that lose least among those with which `context` tokens of `model` (a GGUF) fit in `memory` bytes.

    types: which to choose from; none means all that the reference model was measured with. results: files of
    measurements (store.Store), besides the one in the user's cache folder. Raises TurboquantError if the model
    cannot be used.
    """
    facts = provenance.model(model)
    known = reference(facts["calibrated"])
    asked = [CacheTypes.parse(name) for name in types or known.losses]
    if unknown := [str(pair) for pair in asked if str(pair) not in known.losses]:
        raise TurboquantError(
            f"There is no prediction for {', '.join(unknown)}. Choose from {', '.join(known.losses)}."
        )
    measured = _measured(facts, [path for path in (quality.default_results(), *results) if path.is_file()])
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
        reason=_reason(best, candidates, known, memory, context),
        command=_command(model, context, best) if best else None,
    )


def _measured(facts: dict, paths: Sequence[Path]) -> dict[CacheTypes, float]:
    """Mean KL divergences of the model, from the measurement over most tokens, and of several such the last."""
    found: dict[CacheTypes, quality.Quality] = {}
    for path in paths:
        with Store(path, read_only=True) as store:
            for one in findings.of_quality(store):
                if one.model["fingerprint"] != facts["fingerprint"]:
                    continue
                for result in one.results:
                    pair = CacheTypes(result.type_k, result.type_v)
                    if pair not in found or result.tokens >= found[pair].tokens:
                        found[pair] = result
    return {pair: result.kld_mean for pair, result in found.items()}


def _factor(measured: Mapping[CacheTypes, float], known: Reference) -> float:
    """How many times the reference's losses this model's are: the geometric mean over what was measured of both."""
    pairs = [(loss, known.losses.get(str(pair))) for pair, loss in measured.items()]
    ratios = [loss / expected for loss, expected in pairs if loss and expected]
    return statistics.geometric_mean(ratios) if ratios else 1.0


def _reason(
    best: Candidate | None, candidates: Sequence[Candidate], known: Reference, memory: int, context: int
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
        return f"It loses least of those that fit: KL divergence {best.measured:.4f} from f16, measured on this model."
    return (
        f"It should lose least of those that fit: KL divergence {best.predicted:.4f} from f16, predicted from "
        f"{known.model}; larger models lose less. `turboquant-gguf ppl` measures this one."
    )


def _command(model: Path, context: int, best: Candidate) -> str:
    types = CacheTypes.parse(best.types)
    words = ["llama-server", "--model", str(model), "--ctx-size", str(context), "--parallel", "1", "--flash-attn", "on"]
    return shlex.join([*words, "--cache-type-k", types.k, "--cache-type-v", types.v])
