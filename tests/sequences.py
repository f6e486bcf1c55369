"""Several sequences in one cache of llama.cpp, with all that may happen to them."""

import ctypes
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import gguf
import numpy as np
import pytest

from turboquant_gguf.llamacpp import ggml, recentwindow
from turboquant_gguf.llamacpp.cachetypes import CacheTypes
from turboquant_gguf.llamacpp.logits import EXACT, Model

Entry = tuple[int, int | tuple[int, int, int], int | list[int]]
"""A token, its position, and its sequence or sequences. Of a part of an image its time, row and column."""


def window_slots(sequences: int = 1, length: int = 0) -> int:
    """Tokens in f16 that the recent window of turbo types has room for by default, in a cache of some sequences.

    A last one takes what is not kept. length: of a sequence. Short contexts have less room.
    """
    return sequences * (min(max(length // 64, 64), 1024) + 4) + max(64, 16 * sequences) + 1


class RefusedError(AssertionError):
    """llama_init_from_model made no context. Its text is the last line of the log."""


class Sequences:
    """A context of several sequences. A context manager.

    model: of the file, if it is open already; it stays so. types: names, or numbers of ggml_type. window, sinks:
    tokens; None: the default of the types. length: cells for each sequence. flash: attention: "enabled", which is the
    default where the types are not EXACT, "disabled" or "auto". other: of llama_context_params.
    """

    def __init__(
        self,
        path: Path,
        types: CacheTypes,
        *,
        model: Model | None = None,
        window: int | None = 0,
        sinks: int = 4,
        unified: bool = True,
        sequences: int = 8,
        length: int = 256,
        flash: str | None = None,
        **other: object,
    ) -> None:
        self._owned = ExitStack()
        self._path, self._model = path, model or self._owned.enter_context(Model(path))
        self.llama = llama = self._model.bindings
        params = llama.llama_context_default_params()
        self.length = length * (sequences if unified else 1)
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = length * sequences, 128, 128, sequences
        params.n_threads = params.n_threads_batch = 2
        params.type_k, params.type_v = (
            kind if isinstance(kind, int) else ggml.type_number(kind) for kind in (types.k, types.v)
        )
        flash = flash or ("disabled" if types == EXACT else "enabled")
        params.flash_attn_type = getattr(llama, f"LLAMA_FLASH_ATTN_TYPE_{flash.upper()}")
        params.kv_unified = unified
        for name, value in other.items():
            setattr(params, name, value)
        begin = len(self._model.log)
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("TURBO_WINDOW_POISON", "1")
            recentwindow.set_next(recentwindow.RecentWindow(window, sinks))
            self.context = llama.llama_init_from_model(self._model.handle, params)
        if not self.context:
            self._owned.close()
            raise RefusedError("".join(self._model.log[begin:]).strip().rpartition("\n")[2])
        self._owned.callback(llama.llama_free, self.context)
        self.log = "".join(self._model.log[begin:])
        self.memory = llama.llama_get_memory(self.context)

    def __enter__(self) -> "Sequences":
        return self

    def __exit__(self, *_: object) -> None:
        self._owned.close()

    @property
    def embeddings(self) -> np.ndarray:
        """Of all tokens: float32 (vocabulary, width)."""
        tensor = next(tensor for tensor in gguf.GGUFReader(self._path).tensors if tensor.name == "token_embd.weight")
        return gguf.dequantize(tensor.data, tensor.tensor_type)

    def read(self, *entries: Entry) -> np.ndarray:
        """The logits after each entry, in one batch: float32 (entries, vocabulary)."""
        assert self.decode(*entries) == 0
        return self.logits(len(entries))

    @property
    def messages(self) -> list[str]:
        """All that libllama has logged with this model so far."""
        return self._model.log

    def logits(self, count: int) -> np.ndarray:
        """Of the last batch's outputs: float32 (count, vocabulary)."""
        logits = self.llama.llama_get_logits(self.context)
        return np.ctypeslib.as_array(logits, (count, self._model.vocabulary_size)).copy()

    def decode(self, *entries: Entry, embeddings: np.ndarray | None = None, outputs: bool = True) -> int:
        """What llama_decode says. embeddings: float32 (entries, width), in place of tokens."""
        return self._batch(self.llama.llama_decode, entries, embeddings, outputs)

    def encode(self, tokens: list[int]) -> int:
        """What llama_encode says of a text, in sequence 0."""
        entries = [(token, i, 0) for i, token in enumerate(tokens)]
        return self._batch(self.llama.llama_encode, entries, None, outputs=True)

    def _batch(self, compute: Callable, entries: Sequence[Entry], embeddings: np.ndarray | None, outputs: bool) -> int:
        batch = self.llama.llama_batch_init(len(entries), 0 if embeddings is None else embeddings.shape[1], 64)
        batch.n_tokens = len(entries)
        allocated = ctypes.cast(batch.pos, ctypes.c_void_p).value
        if embeddings is not None:
            ctypes.memmove(batch.embd, embeddings.ctypes.data, embeddings.nbytes)
            if self.llama.llama_model_rope_type(self._model.handle) in (
                self.llama.LLAMA_ROPE_TYPE_MROPE,
                self.llama.LLAMA_ROPE_TYPE_IMROPE,
            ):  # four positions, of which a text has the same in the first three
                three = [position if isinstance(position, tuple) else (position,) * 3 for _, position, _ in entries]
                four = np.array([(*one, 0) for one in three], np.int32).T.ravel()
                batch.pos = four.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        for i, (token, position, sequences) in enumerate(entries):
            if embeddings is None:
                batch.token[i] = token
            batch.pos[i], batch.logits[i] = position[0] if isinstance(position, tuple) else position, outputs
            sequences = [sequences] if isinstance(sequences, int) else sequences
            batch.n_seq_id[i] = len(sequences)
            for j, sequence in enumerate(sequences):
                batch.seq_id[i][j] = sequence
        result = compute(self.context, batch)
        batch.pos = ctypes.cast(allocated, ctypes.POINTER(ctypes.c_int32))
        self.llama.llama_batch_free(batch)
        return result

    def prompt(self, tokens: list[int], sequence: int = 0, first: int = 0) -> np.ndarray:
        return self.read(*((token, first + i, sequence) for i, token in enumerate(tokens)))

    def answer(self, tokens: list[int], first: int, sequence: int = 0) -> np.ndarray:
        """Token by token."""
        return np.concatenate([self.read((token, first + i, sequence)) for i, token in enumerate(tokens)])

    @property
    def can_shift(self) -> bool:
        """Whether positions can be changed at all; asked before, as the programs of llama.cpp do."""
        return self.llama.llama_memory_can_shift(self.memory)

    def try_to_remove(self, sequence: int, begin: int, end: int) -> bool:
        """False where this memory cannot take back a part of a sequence; then nothing has changed."""
        return self.llama.llama_memory_seq_rm(self.memory, sequence, begin, end)

    def remove(self, sequence: int, begin: int, end: int) -> None:
        assert self.try_to_remove(sequence, begin, end)

    def add(self, sequence: int, begin: int, end: int, delta: int) -> None:
        self.llama.llama_memory_seq_add(self.memory, sequence, begin, end, delta)

    def divide(self, sequence: int, begin: int, end: int, divisor: int) -> None:
        self.llama.llama_memory_seq_div(self.memory, sequence, begin, end, divisor)

    def copy(self, source: int, destination: int) -> None:
        self.llama.llama_memory_seq_cp(self.memory, source, destination, -1, -1)

    def keep(self, sequence: int) -> None:
        self.llama.llama_memory_seq_keep(self.memory, sequence)

    def clear(self) -> None:
        self.llama.llama_memory_clear(self.memory, True)

    def saved(self, sequence: int, flags: int = 0) -> bytes:
        size = self.llama.llama_state_seq_get_size_ext(self.context, sequence, flags)
        data = (ctypes.c_uint8 * size)()
        assert self.llama.llama_state_seq_get_data_ext(self.context, data, size, sequence, flags) == size
        return bytes(data)

    def read_state(self, state: bytes, sequence: int, flags: int = 0) -> int:
        """How many bytes of a state were read: all, or 0 if it was refused."""
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        return self.llama.llama_state_seq_set_data_ext(self.context, data, len(state), sequence, flags)

    def restore(self, state: bytes, sequence: int, flags: int = 0) -> None:
        assert self.read_state(state, sequence, flags) == len(state)

    def saved_whole(self) -> bytes:
        size = self.llama.llama_state_get_size(self.context)
        data = (ctypes.c_uint8 * size)()
        size = self.llama.llama_state_get_data(self.context, data, size)
        return bytes(data)[:size]

    def restore_whole(self, state: bytes) -> None:
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        assert self.llama.llama_state_set_data(self.context, data, len(state)) == len(state)
