"""Comparison of two models: the same tokens go through both, and their logits are compared."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from ..core import progress, texts
from ..core.divergence import divergence
from ..errors import TurboquantError
from ..llamacpp.cachetypes import CacheTypes
from ..llamacpp.ggufile import GGUFModel
from ..llamacpp.logits import EXACT, Model
from ..llamacpp.placement import CPU, Placement
from . import checkpoint, remotecode

DEFAULT_TOKENS = 256
DEFAULT_MAX_KL = 0.01
"""Above this mean KL divergence (nats a token), no common storage type explains the difference."""

_SPELLED_DIFFERENTLY = 0.01
"""The share of tokens that a GGUF may spell in another way than a checkpoint: special ones, and those not used."""


@dataclass(frozen=True)
class Comparison:
    """How far the logits of b lie from those of a, over all positions.

    tokens: positions compared. difference: the largest |b - a|. relative_error: ||b - a|| / ||a||. kl_mean, kl_max: KL
    divergence of b's next-token distribution from a's, in nats. top1: share of positions where both prefer one token.
    """

    tokens: int
    difference: float
    relative_error: float
    kl_mean: float
    kl_max: float
    top1: float


def verify(
    a: Path,
    b: Path,
    *,
    text: Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    types: str = str(EXACT),
    placement: Placement = CPU,
    trust_remote_code: bool = False,
    console: Console,
) -> Comparison:
    """Compare two models, each a GGUF or the folder of a Hugging Face checkpoint; at least one must be a GGUF.

    text: a UTF-8 file to read; None takes a bundled one. tokens: how many of it. types: cache types of the GGUFs, f32
    to round nothing. placement: where they are computed. trust_remote_code: run Python files of a folder where
    transformers needs them. A GGUF is run by libllama, a folder by transformers in float32. Raises TurboquantError.
    """
    gguf = next((path for path in (a, b) if not path.is_dir()), None)
    if gguf is None:
        raise TurboquantError(f"Both {a} and {b} are folders. One of the two must be a GGUF.")
    _require_same_vocabulary(a, b)
    content = texts.read(text) if text else texts.bundled("demo.txt")
    cache = CacheTypes.parse(types)
    with Model(gguf) as model:
        prompt = model.tokenize(content)[:tokens]
    found = []
    for path in (a, b):
        with progress.status(console, f"running {path.name}"):
            if path.is_dir():
                found.append(run_checkpoint(path, prompt, trust_remote_code=trust_remote_code, console=console))
            else:
                found.append(run_gguf(path, prompt, cache, placement))
    return compare(*found)


def _require_same_vocabulary(a: Path, b: Path) -> None:
    """Raise TurboquantError if tokens mean one thing to a and another to b; what only one of them has is padding."""
    theirs, ours = _vocabulary(a), _vocabulary(b)
    if not theirs or not ours:
        return
    shared = theirs.keys() & ours.keys()
    differ = sum(theirs[number] != ours[number] for number in shared)
    if differ > len(shared) * _SPELLED_DIFFERENTLY:
        raise TurboquantError(
            f"{a.name} and {b.name} have different vocabularies: {differ} of {len(shared)} tokens stand for something "
            "else. So their logits cannot be compared."
        )


def _vocabulary(model: Path) -> dict[int, str]:
    """The tokens of a GGUF, or of a checkpoint's tokenizer.json; none if it does not say."""
    if not model.is_dir():
        with GGUFModel(model) as file:
            return dict(enumerate(file.metadata.get("tokenizer.ggml.tokens", ())))
    if not (model / checkpoint.CONFIG).is_file():
        raise TurboquantError(
            f"{model} is a folder without {checkpoint.CONFIG}: neither a GGUF nor a checkpoint. Give the path of one."
        )
    try:
        content = json.loads((model / "tokenizer.json").read_text("utf-8"))
        tokens = content["model"]["vocab"]
        if isinstance(tokens, list):  # of a unigram model: token and score
            return {number: token for number, (token, _) in enumerate(tokens)}
        added = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
        return {number: token for token, number in (tokens | added).items()}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def compare(a: NDArray[np.float32], b: NDArray[np.float32]) -> Comparison:
    """Compare logits of shape (tokens, vocabulary). A checkpoint may pad the vocabulary: what both have counts."""
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"logits of {a.shape[0]} and of {b.shape[0]} tokens")
    vocabulary = min(a.shape[1], b.shape[1])
    a, b = a[:, :vocabulary], b[:, :vocabulary]
    # Row by row, since all of it in float64 would take twice the memory.
    kl = np.concatenate([divergence(p[None].astype(float), q[None].astype(float)) for p, q in zip(a, b, strict=True)])
    return Comparison(
        tokens=len(a),
        difference=float(np.abs(b - a).max()),
        relative_error=float(np.linalg.norm(b - a) / np.linalg.norm(a)),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        top1=float((a.argmax(-1) == b.argmax(-1)).mean()),
    )


def run_gguf(path: Path, prompt: Sequence[int], types: CacheTypes, placement: Placement = CPU) -> NDArray[np.float32]:
    """Logits of a GGUF by libllama, with a KV cache of `types`: float32 (tokens, vocabulary)."""
    with Model(path, placement) as model, model.open(len(prompt), types) as context:
        return context.logits(prompt)


def run_checkpoint(
    folder: Path, prompt: Sequence[int], *, trust_remote_code: bool = False, console: Console | None = None
) -> NDArray[np.float32]:
    """Logits of a checkpoint by transformers, in float32: (tokens, vocabulary).

    trust_remote_code: run its own Python files where it needs them, and say so on `console`.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ModuleNotFoundError as error:
        raise TurboquantError(
            f"Running a checkpoint folder needs the Python package {error.name}. Install what it takes: "
            "pip install 'turboquant-gguf[convert]'"
        ) from error
    logging.disable_progress_bar()  # the caller shows its own
    try:
        with remotecode.allowed(trust_remote_code, console or Console(stderr=True)):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except remotecode.RemoteCodeError:
        raise
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise TurboquantError(f"transformers cannot load {folder}.", str(error)) from error
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0].numpy()
