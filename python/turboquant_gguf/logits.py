"""Logits of a GGUF, by libllama through llama-cpp-python's low-level bindings."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from . import ggml
from .cachetypes import CacheTypes
from .errors import TurboquantError
from .signals import deferred
from .toolerrors import check_model_file, tool_error

EXACT = CacheTypes("f32", "f32")
"""The cache that rounds nothing."""

_LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_NOT_QUANTIZED = ("f32", "f16", "bf16")


class Model:
    """A GGUF with one sequence. A context manager: it owns memory.

    path: the GGUF. context: the most tokens it is asked about. types: of the KV cache. observer: a turbo_observer
    (turbo-observer.h) that is to see attention; it needs flash attention, which is on then. Raises TurboquantError if
    the model cannot be loaded with them.
    """

    def __init__(self, path: Path, *, context: int, types: CacheTypes = EXACT, observer: int | None = None) -> None:
        check_model_file(path)
        self.bindings = llama = _bindings()
        with deferred(), ExitStack() as owned:  # a signal in the middle of libllama's log would be lost
            errors = owned.enter_context(_captured_errors(llama))
            params = llama.llama_model_default_params()
            params.n_gpu_layers = 0
            self._model = llama.llama_model_load_from_file(str(path).encode(), params)
            if not self._model:
                raise tool_error("libllama", 1, "".join(errors))
            owned.callback(llama.llama_model_free, self._model)
            params = self._context_params(context, types, observer)
            self.context = llama.llama_init_from_model(self._model, params)
            if not self.context:
                raise tool_error("libllama", 1, "".join(errors))
            owned.callback(llama.llama_free, self.context)
            self._owned = owned.pop_all()
        self._vocabulary = llama.llama_model_get_vocab(self._model)

    def _context_params(self, context: int, types: CacheTypes, observer: int | None) -> ctypes.Structure:
        params = self.bindings.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.type_k, params.type_v = ggml.type_number(types.k), ggml.type_number(types.v)
        # Flash attention rounds queries and sums; without it a float32 cache is exact. Quantized values need it.
        exact = types.k in _NOT_QUANTIZED and types.v in _NOT_QUANTIZED and not observer
        params.flash_attn_type = (
            self.bindings.LLAMA_FLASH_ATTN_TYPE_DISABLED if exact else self.bindings.LLAMA_FLASH_ATTN_TYPE_ENABLED
        )
        if observer:
            evaluate = ctypes.cast(ggml.function("turbo_observer_eval"), ctypes.c_void_p).value
            params.cb_eval = self.bindings.ggml_backend_sched_eval_callback(evaluate)
            params.cb_eval_user_data = observer
        return params

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._owned.close()

    @property
    def vocabulary_size(self) -> int:
        """Tokens in the vocabulary: what the model's last layer has rows for."""
        return self.bindings.llama_vocab_n_tokens(self._vocabulary)

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text, with those that the model wants at the beginning."""
        data = text.encode()
        room = len(data) + 8
        tokens = (ctypes.c_int32 * room)()
        count = self.bindings.llama_tokenize(self._vocabulary, data, len(data), tokens, room, True, False)
        if count < 0:
            raise TurboquantError("The model's tokenizer made more tokens of the text than it has bytes.")
        return list(tokens[:count])

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """The logits after each of `tokens`, read in one batch from an empty cache: float32 (tokens, vocabulary)."""
        self.run(tokens, logits=True)
        return self._last_logits(len(tokens))

    def next_logits(self, token: int, position: int) -> NDArray[np.float32]:
        """The logits after one more token at `position`, with what is in the cache: float32 (1, vocabulary)."""
        self._decode([token], position, logits=False)
        return self._last_logits(1)

    def run(self, tokens: Sequence[int], *, logits: bool = False) -> None:
        """Read `tokens` in one batch from an empty cache. logits: of each of them, not of the last alone."""
        llama = self.bindings
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        self._decode(tokens, 0, logits=logits)

    def _last_logits(self, count: int) -> NDArray[np.float32]:
        logits = self.bindings.llama_get_logits(self.context)
        return np.ctypeslib.as_array(logits, (count, self.vocabulary_size)).copy()

    def _decode(self, tokens: Sequence[int], position: int, *, logits: bool) -> None:
        llama = self.bindings
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, position + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = logits or i == len(tokens) - 1
            if status := llama.llama_decode(self.context, batch):
                raise TurboquantError(f"llama.cpp could not run the model (llama_decode returned {status}).")
        finally:
            llama.llama_batch_free(batch)


@contextmanager
def _captured_errors(llama: ModuleType) -> Iterator[list[str]]:
    """Collects what libllama logs as errors inside the block, and keeps the rest of its log from the terminal."""
    errors: list[str] = []

    @llama.llama_log_callback
    def collect(level: int, text: bytes, _data: object) -> None:
        if level == _LOG_ERROR:
            errors.append(text.decode("utf-8", "replace"))

    previous, data = llama.llama_log_callback(), ctypes.c_void_p()
    llama.llama_log_get(ctypes.byref(previous), ctypes.byref(data))
    llama.llama_log_set(collect, None)
    try:
        yield errors
    finally:
        llama.llama_log_set(previous, data)


def _bindings() -> ModuleType:
    try:
        from llama_cpp import llama_cpp
    except ModuleNotFoundError as error:
        raise TurboquantError(
            "This needs llama-cpp-python. Install it without a second llama.cpp: CMAKE_ARGS=-DLLAMA_BUILD=OFF "
            "pip install 'turboquant-gguf[python]'"
        ) from error
    return llama_cpp
