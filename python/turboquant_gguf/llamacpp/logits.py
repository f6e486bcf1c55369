"""Logits of a GGUF, by libllama through llama-cpp-python's low-level bindings."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.owner import Owner
from ..core.signals import deferred
from ..errors import TurboquantError
from . import bindings, cachefacts, ggml
from .cachetypes import CacheTypes
from .placement import CPU, Placement
from .recentwindow import RecentWindow, set_next
from .toolerrors import check_model_file, tool_error

EXACT = CacheTypes("f32", "f32")
"""The cache that rounds nothing."""

UBATCH = 512
"""Tokens that are computed at once, as llama.cpp's programs do by default."""


class Model(Owner):
    """The weights and the vocabulary of a GGUF. A context manager: it owns memory.

    placement: of its layers, and of what its contexts compute. vocabulary_only: no weights. Raises TurboquantError if
    it cannot be loaded.
    """

    def __init__(self, path: Path, placement: Placement = CPU, *, vocabulary_only: bool = False) -> None:
        check_model_file(path)
        placement.require()
        self.placement = placement
        self.bindings = llama = bindings.load()
        ggml.load_backends()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = placement.gpu_layers
        no_devices = (ctypes.c_void_p * 1)()
        if not placement.gpu_layers:
            params.devices = ctypes.addressof(no_devices)
        params.vocab_only = vocabulary_only
        with deferred(), ExitStack() as owned:  # a signal in the middle of libllama's log would be lost
            self.log = owned.enter_context(_captured_log(llama))
            self.handle = llama.llama_model_load_from_file(str(path).encode(), params)
            if not self.handle:
                raise tool_error("libllama", 1, "".join(self.log))
            owned.callback(llama.llama_model_free, self.handle)
            self._owned = owned.pop_all()
        self._vocabulary = llama.llama_model_get_vocab(self.handle)

    @property
    def vocabulary_size(self) -> int:
        """Tokens in the vocabulary: what the model's last layer has rows for."""
        return self.bindings.llama_vocab_n_tokens(self._vocabulary)

    @property
    def beginning(self) -> int | None:
        """The token that a text begins with, if the model wants one."""
        wanted = self.bindings.llama_vocab_get_add_bos(self._vocabulary)
        return self.bindings.llama_vocab_bos(self._vocabulary) if wanted else None

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text, with those that the model wants at the beginning.

        Raises TurboquantError if there are none.
        """
        data = text.encode()
        room = len(data) + 8
        tokens = (ctypes.c_int32 * room)()
        count = self.bindings.llama_tokenize(self._vocabulary, data, len(data), tokens, room, True, False)
        if count < 0:
            raise TurboquantError("The model's tokenizer made more tokens of the text than it has bytes.")
        if not count:
            raise TurboquantError("The model's tokenizer makes no tokens of this text. Give another.")
        return list(tokens[:count])

    def open(self, length: int, types: CacheTypes = EXACT, **options: Any) -> Context:
        """An empty context of the model; `Context` has the arguments."""
        return Context(self, length, types, **options)


class Context(Owner):
    """A KV cache for one sequence, and what computes with it. A context manager: it owns memory.

    length: the most tokens it holds. types: of the cache. recent_window: None is what the environment says. observer:
    a turbo_observer (turbo-observer.h) that is to see attention; it needs all tokens at once, and flash attention.
    Threads are those of the model's placement, or the CPU's cores, by llama.cpp's rule of thumb. Raises TurboquantError
    if llama.cpp does not take this.
    """

    def __init__(
        self,
        model: Model,
        length: int,
        types: CacheTypes = EXACT,
        *,
        recent_window: RecentWindow | None = None,
        observer: int | None = None,
    ) -> None:
        self.bindings = llama = model.bindings
        self.vocabulary_size = model.vocabulary_size
        self.types = types
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = length
        params.n_ubatch = length if observer else min(length, UBATCH)
        params.n_threads = params.n_threads_batch = model.placement.threads or _cores()
        params.offload_kqv = model.placement.kv_offload
        params.type_k, params.type_v = ggml.type_number(types.k), ggml.type_number(types.v)
        # Flash attention rounds queries and sums; without it a float32 cache is exact. Quantized values need it.
        exact = types == EXACT and not observer
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED if exact else llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if observer:
            evaluate = ctypes.cast(ggml.function("turbo_observer_eval"), ctypes.c_void_p).value
            params.cb_eval = llama.ggml_backend_sched_eval_callback(evaluate)
            params.cb_eval_user_data = observer
        begin = len(model.log)
        with deferred():
            if recent_window:
                set_next(recent_window)
            self.handle = llama.llama_init_from_model(model.handle, params)
        self._log = "".join(model.log[begin:])
        if not self.handle:
            raise tool_error("libllama", 1, self._log)
        self._owned = ExitStack()
        self._owned.callback(llama.llama_free, self.handle)

    @property
    def memory(self) -> int:
        """libllama's handle of the cache."""
        return self.bindings.llama_get_memory(self.handle)

    @cached_property
    def facts(self) -> cachefacts.CacheFacts:
        """The cache in effect. Raises TurboquantError if it is not of the types asked for, or if there is none."""
        return cachefacts.require(self._log, self.types)

    def clear(self) -> None:
        """Empty the cache."""
        self.bindings.llama_memory_clear(self.memory, True)

    def read(self, tokens: Sequence[int], position: int, *, outputs: int = 1) -> NDArray[np.float32]:
        """Read `tokens` at `position` and what follows, in one batch, with what is in the cache.

        Returns the logits after each of the last `outputs` of them: float32 (outputs, vocabulary), in memory that the
        next call overwrites.
        """
        llama = self.bindings
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, position + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = i >= len(tokens) - outputs
            if status := llama.llama_decode(self.handle, batch):
                raise TurboquantError(f"llama.cpp could not run the model (llama_decode returned {status}).")
        finally:
            llama.llama_batch_free(batch)
        if not outputs:
            return np.empty((0, self.vocabulary_size), np.float32)
        return np.ctypeslib.as_array(llama.llama_get_logits(self.handle), (outputs, self.vocabulary_size))

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """The logits after each of `tokens`, read in one batch from an empty cache: float32 (tokens, vocabulary)."""
        self.clear()
        return self.read(tokens, 0, outputs=len(tokens)).copy()


@contextmanager
def _captured_log(llama: ModuleType) -> Iterator[list[str]]:
    """Collects what libllama logs inside the block, in pieces as they come, instead of printing it."""
    pieces: list[str] = []
    error = 4  # GGML_LOG_LEVEL_ERROR

    @llama.llama_log_callback
    def collect(level: int, text: bytes, _data: object) -> None:
        # As the programs of llama.cpp mark them, for whoever looks for errors.
        pieces.append((" E " if level == error else "") + text.decode("utf-8", "replace"))

    previous, data = llama.llama_log_callback(), ctypes.c_void_p()
    llama.llama_log_get(ctypes.byref(previous), ctypes.byref(data))
    llama.llama_log_set(collect, None)
    try:
        yield pieces
    finally:
        llama.llama_log_set(previous, data)


def _cores() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 4
    return available if available <= 4 else available // 2  # above that, half of them are taken for hyperthreads
