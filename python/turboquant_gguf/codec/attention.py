"""The attention operator of llama.cpp, FLASH_ATTN_EXT, on NumPy arrays: what a model's graph runs."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..llamacpp import ggml


@dataclass(frozen=True)
class Window:
    """Keys and values that are at hand in full precision beside those of a cache (turbo-window.h).

    ring_k, ring_v: float16 (sequences, slots, KV heads, head size). new_k, new_v: float32 (sequences, tokens, KV heads,
    head size). mask: float16 (sequences, 1, queries, slots + tokens). columns: int32 (sequences, keys of the cache), in
    mask, of the same key; -1 if it is not there. biases: float32 (sequences, query heads, queries, tiles), what a query
    adds to its products with all keys of a tile; None: nothing. tiles: int32 (sequences, keys + slots + tokens).
    """

    ring_k: NDArray[np.float16]
    ring_v: NDArray[np.float16]
    new_k: NDArray[np.float32]
    new_v: NDArray[np.float32]
    mask: NDArray[np.float16]
    columns: NDArray[np.int32]
    biases: NDArray[np.float32] | None = None
    tiles: NDArray[np.int32] | None = None

    @property
    def ring(self) -> NDArray[np.float16]:
        """Keys and values side by side, as the operator takes them: (sequences, 1, slots, channels)."""
        rows = [part.reshape(*part.shape[:2], -1) for part in (self.ring_k, self.ring_v)]
        return np.concatenate(rows, axis=-1)[:, None]

    def queries(self, q: NDArray[np.float32]) -> NDArray[np.float32]:
        """Queries as the operator takes them: followed by the biases."""
        return q if self.biases is None else np.concatenate([q, self.biases], axis=-1)

    @property
    def numbers(self) -> NDArray[np.int32]:
        """Columns as the operator takes them: followed by the tiles."""
        return self.columns if self.tiles is None else np.concatenate([self.columns, self.tiles], axis=-1)


@dataclass(frozen=True)
class Problem:
    """softmax(scale q k^T + slope mask) v for every query head (arXiv 2205.14135).

    q: float32 (sequences, query heads, queries, head size of K). k, v: what the cache holds, uint8 (sequences, keys,
    KV heads, bytes of a head's row), of the ggml types type_k and type_v; size_v: head size of V. mask: float16
    (1 or sequences, 1 or query heads, queries, keys), added to the scores; None: every query sees every key. sinks:
    float32 (query heads,), scores of one more key without a value. max_bias: ALiBi's largest exponent of a slope
    (arXiv 2108.12409), 0 for none. softcap: scores become softcap * tanh(score / softcap), 0 for none. window: needs a
    mask; None: there is nothing but the cache.
    """

    q: NDArray[np.float32]
    k: NDArray[np.uint8]
    v: NDArray[np.uint8]
    type_k: str
    type_v: str
    size_v: int
    scale: float
    mask: NDArray[np.float16] | None = None
    sinks: NDArray[np.float32] | None = None
    max_bias: float = 0.0
    softcap: float = 0.0
    window: Window | None = None


class Attention(ggml.Graph):
    """A graph of that one operator, ready to run; with a window, of turbo_window_attention.

    Raises ValueError for a type that ggml does not have.
    """

    def __init__(
        self, problem: Problem, threads: int = 1, *, reference: bool = False, device: str | None = None
    ) -> None:
        super().__init__(threads, reference=reference, device=device)
        sequences, heads, queries, size_k = problem.q.shape
        rows = problem.window.queries(problem.q) if problem.window else problem.q
        q = self.tensor(rows, "f32", rows.shape[-1], queries, heads, sequences)
        k = self._cache(problem.k, problem.type_k, size_k)
        v = self._cache(problem.v, problem.type_v, problem.size_v)
        mask = None if problem.mask is None else self._mask(problem.mask)
        sinks = None if problem.sinks is None else self.tensor(problem.sinks, "f32", heads, 1, 1, 1)
        factors = problem.scale, problem.max_bias, problem.softcap
        if window := problem.window:
            ring = self.tensor(window.ring, "f16", *window.ring.shape[::-1])
            new = [self._cache(rows, "f32", rows.shape[-1]) for rows in (window.new_k, window.new_v)]
            columns = self.tensor(window.numbers, "i32", window.numbers.shape[1], 1, 1, sequences)
            sources = (ctypes.c_void_p * 10)(q, k, v, mask, sinks, ring, *new, self._mask(window.mask), columns)
            self._out = self.operator("turbo_window_attention", sources, *factors)
        else:
            self._out = self.operator("ggml_flash_attn_ext", q, k, v, mask, *factors)
            if sinks:
                ggml.function("ggml_flash_attn_ext_add_sinks")(self._out, sinks)
        self._shape = (sequences, queries, heads, problem.size_v)
        self.finish(self._out)

    def _mask(self, mask: NDArray[np.float16]) -> int:
        return self.tensor(mask.astype(np.float16), "f16", *mask.shape[::-1])

    def _cache(self, rows: NDArray, type: str, head_size: int) -> int:
        sequences, keys, heads, _ = rows.shape
        # heads of a token side by side in memory; the operator wants the keys of a head as its rows
        return self.operator("ggml_permute", self.tensor(rows, type, head_size, heads, keys, sequences), 0, 2, 1, 3)

    def result(self) -> NDArray[np.float32]:
        """What the last run computed: float32 (sequences, queries, query heads, head size of V)."""
        return self.read(self._out, np.empty(self._shape, np.float32))
