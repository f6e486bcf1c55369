"""How much memory a model and its KV cache take, as llama.cpp counts it before it allocates anything.

llama.cpp is asked for whole contexts, and the rest is arithmetic on its answers. So every architecture comes out right:
sliding windows, recurrent layers, shared and compressed keys and values.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..core.owner import Owner
from ..errors import TurboquantError
from . import ggml, toolerrors
from .cachetypes import F16, CacheTypes

UBATCH = 512
"""Tokens that llama-server computes at once, by default."""

STEP = 256
"""llama.cpp makes every context a multiple of this many tokens."""

MOST_TOKENS = (1 << 31) - STEP
"""The longest context that is counted: llama.cpp's lengths are ints."""

# Where memory may begin to grow linearly: past the sliding window, and past what a batch needs in any case. Whether it
# does is seen between there and _FAR times as far.
_STARTS = tuple(16384 << doubled for doubled in range(4))
_FAR = 16
# How far from a line is still linear, in bytes: every tensor is padded to the alignment of its buffer.
_PADDING = 1 << 16


class RefusedError(TurboquantError):
    """llama.cpp does not take this model, or not with these cache types."""


@dataclass(frozen=True)
class Size:
    """Bytes. cache: all that a context keeps. compute: buffers for intermediate results."""

    weights: int
    cache: int
    compute: int

    @property
    def total(self) -> int:
        """Bytes of it all."""
        return self.weights + self.cache + self.compute


@dataclass(frozen=True)
class Growth:
    """How memory grows with the context: by as much for each further token, from `start` tokens on.

    at_start, at_end: the size at `start` tokens and at `end` tokens, from which all longer contexts follow.
    """

    start: int
    end: int
    at_start: Size
    at_end: Size

    @property
    def cache_per_token(self) -> int:
        """Bytes of cache that each further token takes."""
        return round((self.at_end.cache - self.at_start.cache) / (self.end - self.start))

    @property
    def cache_fixed(self) -> int:
        """Bytes of cache that do not grow any more: sliding windows and recurrent states."""
        return self.at_start.cache - self.cache_per_token * self.start

    def size(self, context: int) -> Size:
        """The size at `context` tokens, `start` or more."""

        def grown(low: int, high: int) -> int:
            return low + (high - low) * (context - self.start) // (self.end - self.start)

        low, high = self.at_start, self.at_end
        return Size(low.weights, grown(low.cache, high.cache), grown(low.compute, high.compute))


@dataclass(frozen=True)
class Layer:
    """The attention of a layer.

    heads, kv_heads: of queries, and of keys and values; 0 where there is no attention. head_size_k, head_size_v: values
    in a key and in a value. window: tokens of its sliding window, 0 without. shares: it reads another layer's keys and
    values.
    """

    heads: int
    kv_heads: int
    head_size_k: int
    head_size_v: int
    window: int
    shares: bool


@dataclass(frozen=True)
class _Contents:
    """A cache of some length: how many values its keys and its values have, and the bytes that depend on no type."""

    k: int
    v: int
    other: int

    def size(self, types: CacheTypes) -> int:
        """Bytes of a cache of these types with these contents."""
        return int(self.k * ggml.bits(types.k) / 8) + int(self.v * ggml.bits(types.v) / 8) + self.other


class ModelMemory(Owner):
    """A model in a GGUF file, opened to ask what memory it takes. A context manager.

    All sizes are for one sequence, with flash attention, on the CPU back end. path: of split files the first.
    Raises RefusedError if llama.cpp cannot load the model.
    """

    def __init__(self, path: Path) -> None:
        self._sizes: dict[tuple[CacheTypes, int], Size] = {}
        self._contents: dict[int, _Contents] = {}
        self._quantized: dict[str, str] = {}
        ggml.load_backends()
        with ExitStack() as owned:
            self._memory = ggml.function("turbo_memory_open")(os.fsencode(path))
            if not self._memory:
                raise _refused("llama.cpp cannot load this model")
            owned.callback(ggml.function("turbo_memory_close"), self._memory)
            self._owned = owned.pop_all()

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The model's layers."""
        found = []
        for number in range(ggml.function("turbo_memory_n_layer")(self._memory)):
            layer = ggml.function("turbo_memory_get_layer")(self._memory, number)
            found.append(Layer(*(getattr(layer, name) for name, _ in layer._fields_)))
        return tuple(found)

    def measure(self, types: CacheTypes, context: int) -> Size:
        """The size at `context` tokens, asked of llama.cpp. Raises RefusedError if it does not take these types."""
        key = types, context
        if key not in self._sizes:
            size = ggml.MemorySize()
            numbers = ggml.type_number(types.k), ggml.type_number(types.v)
            made = ggml.function("turbo_memory_measure")(self._memory, *numbers, context, UBATCH, ctypes.byref(size))
            if not made:
                raise _refused(f"llama.cpp cannot make a cache of {types} for this model")
            self._sizes[key] = Size(size.weights, size.cache, size.compute)
        return self._sizes[key]

    def refusal(self, types: CacheTypes) -> str:
        """Why llama.cpp does not take these types, in a sentence; empty if it does."""
        if self.together:
            return self._try(types)
        return self._try(CacheTypes(types.k, "f16")) or self._try(CacheTypes("f16", types.v))

    @cached_property
    def together(self) -> bool:
        """Whether keys and values must have the same type."""
        return bool(self._try(CacheTypes("f32", "f16")))

    def _try(self, types: CacheTypes) -> str:
        try:
            self.measure(types, STEP)
        except RefusedError as error:
            return str(error)
        return ""

    def growth(self, types: CacheTypes) -> Growth:
        """How memory grows with the context, from a few measurements that all types have in common.

        Raises RefusedError if llama.cpp does not take these types.
        """
        if reason := self.refusal(types):
            raise RefusedError(reason)
        for start in _STARTS:
            growth = Growth(start, _FAR * start, self._predict(types, start), self._predict(types, _FAR * start))
            real, line = self._predict(types, 2 * start), growth.size(2 * start)
            if abs(real.cache - line.cache) <= _PADDING and abs(real.compute - line.compute) <= _PADDING:
                return growth
        raise TurboquantError(
            f"The memory of this model does not grow steadily with its context, not even beyond {_STARTS[-1]} tokens. "
            "Please report it, with the name of the model."
        )

    def size(self, types: CacheTypes, context: int) -> Size:
        """What `measure` says, found with as few contexts as it takes; beyond some length with no further one."""
        growth = self.growth(types)
        context = -(-context // STEP) * STEP
        return growth.size(context) if context >= growth.start else self._predict(types, context)

    def longest_context(self, types: CacheTypes, memory: int) -> int:
        """How many tokens of context fit in `memory` bytes with the weights and all buffers; 0 if not even 256 do."""
        growth = self.growth(types)
        left = memory - growth.at_start.total
        if left < 0:
            return self._longest_short_context(types, memory, growth.start)
        grown = growth.at_end.total - growth.at_start.total
        if grown == 0:  # nothing but sliding windows
            return MOST_TOKENS
        further = left * (growth.end - growth.start) // grown
        return min(growth.start + further // STEP * STEP, MOST_TOKENS)

    def _longest_short_context(self, types: CacheTypes, memory: int, too_long: int) -> int:
        def fits(context: int) -> bool:
            return self.measure(types, context).total <= memory

        if not fits(STEP):
            return 0
        # Without sliding windows it is a line from UBATCH on: two guesses find the place. With them they do no harm.
        here, there = self._predict(types, UBATCH).total, self._predict(types, too_long).total
        guess = UBATCH + (memory - here) * (too_long - UBATCH) // max(1, there - here) // STEP * STEP
        guesses = [guess, guess + STEP]
        low, high = STEP, too_long
        while high - low > STEP:
            middle = guesses.pop(0) if guesses else (low + high) // 2 // STEP * STEP
            if low < middle < high:
                low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _predict(self, types: CacheTypes, context: int) -> Size:
        """What `measure` says, from measurements that serve all types.

        Cache types differ in the size of the cache alone. Buffers depend on whether keys, or values, are quantized,
        since those are rotated; and on which type they have if they are not. So does the recent window, and on whether
        they are turbo types; its size is what a measured cache has beyond its contents.
        """
        like = CacheTypes(self._stand_in("k", types.k), self._stand_in("v", types.v))
        measured, contents = self.measure(like, context), self._contents_of(context)
        recent_window = measured.cache - contents.size(like)
        return Size(measured.weights, contents.size(types) + recent_window, measured.compute)

    def _stand_in(self, side: str, type: str) -> str:
        """The type that stands for `type` where only its kind matters: the first of it that was asked for."""
        quantized = ggml.function("ggml_is_quantized")(ggml.type_number(type))
        kind = f"{side} {'turbo' if type.startswith('turbo') else 'stock'}"
        return self._quantized.setdefault(kind, type) if quantized else type

    def _contents_of(self, context: int) -> _Contents:
        if context not in self._contents:
            base = self.measure(F16, context).cache

            # A value takes 2 bytes more as f32.
            def values(k: str, v: str) -> int:
                return (self.measure(CacheTypes(k, v), context).cache - base) // 2

            k, v = (values("f32", "f32"), 0) if self.together else (values("f32", "f16"), values("f16", "f32"))
            self._contents[context] = _Contents(k, v, base - 2 * (k + v))
        return self._contents[context]


def _refused(what: str) -> RefusedError:
    log = ggml.function("turbo_memory_errors")().decode(errors="replace")
    return RefusedError(toolerrors.advice(log) or f"{what}: {toolerrors.cause(log)}.")
