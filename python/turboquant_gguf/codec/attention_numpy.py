"""Attention in NumPy and float64, from its definition: what the kernels are measured and tested against."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..llamacpp import ggml
from . import codec_numpy
from .attention import Problem


def decode(rows: NDArray[np.uint8], type: str) -> NDArray[np.float32]:
    """Values (..., n) of rows of a ggml type, uint8 (..., bytes). Stock quantized types need the package gguf."""
    if type in ("f16", "f32"):
        return rows.view({"f16": np.float16, "f32": np.float32}[type]).astype(np.float32)
    if ggml.is_turbo(type):
        codec = codec_numpy.codecs()[type]
        blocks = rows.reshape(-1, codec.block_bytes)
        return codec_numpy.dequantize_blocks(codec, blocks).reshape(*rows.shape[:-1], -1)
    import gguf

    return gguf.dequantize(rows, gguf.GGMLQuantizationType[type.upper()])


def slopes(heads: int, max_bias: float) -> NDArray[np.float64]:
    """ALiBi's factor of the mask for each of `heads` query heads (arXiv 2108.12409, section 3), 1 without it."""
    if max_bias <= 0:
        return np.ones(heads)
    power = 1 << heads.bit_length() - 1  # the largest power of two in heads; the heads beyond it take the odd halves
    head = np.arange(heads)
    exponent = np.where(head < power, (head + 1) / power, (2 * (head - power) + 1) / (2 * power))
    return 2.0 ** (-max_bias * exponent)


def weights(problem: Problem) -> NDArray[np.float64]:
    """Softmax weights (sequences, query heads, queries, keys). A query that sees no key has weights of 0."""
    q = problem.q
    group = q.shape[1] // problem.k.shape[2]
    k = np.repeat(decode(problem.k, problem.type_k), group, axis=2).astype(np.float64)
    scores = np.einsum("shqd,skhd->shqk", q.astype(np.float64), k) * problem.scale
    if problem.softcap:
        scores = problem.softcap * np.tanh(scores / problem.softcap)
    if problem.mask is not None:
        scores = scores + slopes(q.shape[1], problem.max_bias)[:, None, None] * problem.mask.astype(np.float64)
    largest = scores.max(axis=-1, keepdims=True)
    if problem.sinks is not None:
        largest = np.maximum(largest, problem.sinks[:, None, None])
    largest = np.where(np.isfinite(largest), largest, 0)
    unnormalized = np.exp(scores - largest)
    total = unnormalized.sum(axis=-1, keepdims=True)
    if problem.sinks is not None:
        total = total + np.exp(problem.sinks[:, None, None] - largest)
    return unnormalized / np.where(total == 0, 1, total)


def attention(problem: Problem) -> NDArray[np.float64]:
    """The result, float64 (sequences, queries, query heads, head size of V)."""
    group = problem.q.shape[1] // problem.v.shape[2]
    v = np.repeat(decode(problem.v, problem.type_v), group, axis=2)
    return np.einsum("shqk,skhd->sqhd", weights(problem), v)
