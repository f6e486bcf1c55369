"""Several sequences in one cache of llama.cpp, with all that may happen to them."""

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest

from turboquant_gguf import ggml
from turboquant_gguf.cachetypes import CacheTypes
from turboquant_gguf.logits import EXACT, Model


WINDOW_SLOTS = 64 + 4 + 16
"""Of the recent window that turbo types have by default: in f16, for each sequence; a cache has one more."""


class Sequences:
    """A context of several sequences. A context manager.

    window, sinks: tokens; None: the default of the types. length: cells for each sequence.
    """

    def __init__(
        self,
        path: Path,
        types: CacheTypes,
        *,
        window: int | None = 0,
        sinks: int = 4,
        unified: bool = True,
        sequences: int = 8,
        length: int = 256,
    ) -> None:
        self._path, self._model = path, Model(path)
        self.llama = llama = self._model.bindings
        params = llama.llama_context_default_params()
        self.length = length * (sequences if unified else 1)
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = length * sequences, 128, 128, sequences
        params.n_threads = params.n_threads_batch = 2
        params.type_k, params.type_v = ggml.type_number(types.k), ggml.type_number(types.v)
        flash = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED if types == EXACT else llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.flash_attn_type, params.kv_unified = flash, unified
        with pytest.MonkeyPatch.context() as environment:
            for name, value in (("WINDOW", window), ("SINKS", sinks)):
                if value is not None:
                    environment.setenv(f"LLAMA_ARG_CACHE_{name}", str(value))
            environment.setenv("LLAMA_TURBO_WINDOW_POISON", "1")
            self.context = llama.llama_init_from_model(self._model.handle, params)
        assert self.context, self.log
        self.memory = llama.llama_get_memory(self.context)

    def __enter__(self) -> "Sequences":
        return self

    def __exit__(self, *_: object) -> None:
        self.llama.llama_free(self.context)
        self._model.__exit__()

    @property
    def log(self) -> str:
        return "".join(self._model.log)

    @property
    def embeddings(self) -> np.ndarray:
        """Of all tokens: float32 (vocabulary, width)."""
        tensor = next(tensor for tensor in gguf.GGUFReader(self._path).tensors if tensor.name == "token_embd.weight")
        return gguf.dequantize(tensor.data, tensor.tensor_type)

    def read(self, *entries: tuple[int, int, int]) -> np.ndarray:
        """The logits after each (token, position, sequence), in one batch: float32 (entries, vocabulary)."""
        assert self.decode(*entries) == 0
        logits = self.llama.llama_get_logits(self.context)
        return np.ctypeslib.as_array(logits, (len(entries), self._model.vocabulary_size)).copy()

    def decode(self, *entries: tuple[int, int, int], embeddings: np.ndarray | None = None, outputs: bool = True) -> int:
        """What llama_decode says. embeddings: float32 (entries, width), in place of tokens."""
        batch = self.llama.llama_batch_init(len(entries), 0 if embeddings is None else embeddings.shape[1], 1)
        batch.n_tokens = len(entries)
        if embeddings is not None:
            ctypes.memmove(batch.embd, embeddings.ctypes.data, embeddings.nbytes)
        for i, (token, position, sequence) in enumerate(entries):
            if embeddings is None:
                batch.token[i] = token
            batch.pos[i], batch.logits[i] = position, outputs
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        result = self.llama.llama_decode(self.context, batch)
        self.llama.llama_batch_free(batch)
        return result

    def prompt(self, tokens: list[int], sequence: int = 0, first: int = 0) -> np.ndarray:
        return self.read(*((token, first + i, sequence) for i, token in enumerate(tokens)))

    def answer(self, tokens: list[int], first: int, sequence: int = 0) -> np.ndarray:
        """Token by token."""
        return np.concatenate([self.read((token, first + i, sequence)) for i, token in enumerate(tokens)])

    def remove(self, sequence: int, begin: int, end: int) -> None:
        assert self.llama.llama_memory_seq_rm(self.memory, sequence, begin, end)

    def add(self, sequence: int, begin: int, end: int, delta: int) -> None:
        self.llama.llama_memory_seq_add(self.memory, sequence, begin, end, delta)

    def copy(self, source: int, destination: int) -> None:
        self.llama.llama_memory_seq_cp(self.memory, source, destination, -1, -1)

    def saved(self, sequence: int) -> bytes:
        size = self.llama.llama_state_seq_get_size(self.context, sequence)
        data = (ctypes.c_uint8 * size)()
        assert self.llama.llama_state_seq_get_data(self.context, data, size, sequence) == size
        return bytes(data)

    def restore(self, state: bytes, sequence: int) -> None:
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        assert self.llama.llama_state_seq_set_data(self.context, data, len(state), sequence)
