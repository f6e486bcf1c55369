"""The recent window: what it covers is exact, and whatever moves in the cache, nothing stale is ever read."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import checkpoints
from turboquant_gguf import ggml
from turboquant_gguf.cachetypes import CacheTypes
from turboquant_gguf.convert import convert
from turboquant_gguf.logits import Model
from turboquant_gguf.verify import compare

F16, TURBO3, Q4_0 = map(CacheTypes.parse, ("f16", "turbo3", "q4_0"))
PROMPT = list(range(1000, 1120))


class Cache:
    """A context of several sequences. A context manager. window, sinks: tokens; None: the default of the types."""

    def __init__(
        self,
        path: Path,
        types: CacheTypes,
        *,
        window: int | None = 0,
        sinks: int = 4,
        unified: bool = True,
        sequences: int = 8,
    ) -> None:
        self._model = Model(path)
        self.llama = llama = self._model.bindings
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 256 * sequences, 128, 128, sequences
        params.n_threads = params.n_threads_batch = 2
        params.type_k, params.type_v = ggml.type_number(types.k), ggml.type_number(types.v)
        params.flash_attn_type, params.kv_unified = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED, unified
        with pytest.MonkeyPatch.context() as environment:
            for name, value in (("WINDOW", window), ("SINKS", sinks)):
                if value is not None:
                    environment.setenv(f"LLAMA_ARG_CACHE_{name}", str(value))
            environment.setenv("LLAMA_TURBO_WINDOW_POISON", "1")
            self.context = llama.llama_init_from_model(self._model.handle, params)
        assert self.context, self.log
        self.memory = llama.llama_get_memory(self.context)

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, *_: object) -> None:
        self.llama.llama_free(self.context)
        self._model.__exit__()

    @property
    def log(self) -> str:
        return "".join(self._model.log)

    def read(self, *entries: tuple[int, int, int]) -> np.ndarray:
        """The logits after each (token, position, sequence), in one batch: float32 (entries, vocabulary)."""
        batch = self.llama.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for i, (token, position, sequence) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        assert self.llama.llama_decode(self.context, batch) == 0
        self.llama.llama_batch_free(batch)
        logits = self.llama.llama_get_logits(self.context)
        return np.ctypeslib.as_array(logits, (len(entries), self._model.vocabulary_size)).copy()

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
        import ctypes

        size = self.llama.llama_state_seq_get_size(self.context, sequence)
        data = (ctypes.c_uint8 * size)()
        assert self.llama.llama_state_seq_get_data(self.context, data, size, sequence) == size
        return bytes(data)

    def restore(self, state: bytes, sequence: int) -> None:
        import ctypes

        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        assert self.llama.llama_state_seq_set_data(self.context, data, len(state), sequence)


def tiny(folder: Path, name: str) -> Path:
    checkpoint = checkpoints.write(folder / name, name)
    with checkpoints.any_pre_tokenizer():
        return convert(
            checkpoint, folder / f"{name}.gguf", outtype="f32", rotate="none", console=Console(quiet=True)
        ).path


# ---- what it covers is exact ----

ARCHITECTURES = ["stablelm, head size 64", "qwen3", "gemma3", "lfm2", "gpt-oss", "gemma2"]


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_window_longer_than_the_context(name, unified, tmp_path):
    """Keys and values are those of an f16 cache, or better; queries are those of flash attention in float32."""
    model = tiny(tmp_path, name)
    prompt = [token % checkpoints.VOCABULARY for token in PROMPT]
    found = {}
    for types, window in ((F16, 0), (Q4_0, 0), (Q4_0, 256)):
        with Cache(model, types, window=window, unified=unified) as cache:
            cache.prompt(prompt[:50])
            found[types, window] = np.concatenate(
                [cache.prompt(prompt[50:100], first=50), cache.answer(prompt[100:], 100)]
            )
    exact, without, within = found.values()
    assert compare(exact, within).relative_error < 2e-3
    assert compare(exact, without).relative_error > 10 * compare(exact, within).relative_error


def test_the_default_is_a_window_for_turbo_types_alone(smollm2):
    for types, expected in ((TURBO3, True), (CacheTypes("q8_0", "turbo3"), True), (Q4_0, False), (F16, False)):
        with Cache(smollm2, types, window=None) as cache:
            assert ("recent window: the last 32 tokens and the first 4 of each sequence" in cache.log) == expected
    with Cache(smollm2, F16, window=32) as cache:  # nothing to be exact beside
        assert "recent window" not in cache.log


def test_batches_and_single_tokens_see_the_same(tmp_path):
    """The window is a matter of positions, not of batches. Weights are not quantized, which would blow up roundings."""
    model = tiny(tmp_path, "stablelm, head size 64")
    prompt = [token % checkpoints.VOCABULARY for token in PROMPT]
    found = []
    for sizes in ((120,), (1,) * 120, (50, 1, 1, 30, 38)):
        with Cache(model, TURBO3, window=32) as cache:
            first = 0
            for size in sizes:
                last = cache.prompt(prompt[first : first + size], first=first)[-1:]
                first += size
        found.append(last)
    for other in found[1:]:
        assert compare(found[0], other).relative_error < 0.02


# ---- wherever tokens go ----


def removal_in_the_middle(cache: Cache) -> np.ndarray:
    cache.prompt(PROMPT[:100])
    cache.remove(0, 70, 90)  # partly in the window
    return cache.answer(PROMPT[:5], 100)


def removal_of_the_end(cache: Cache) -> np.ndarray:
    """As when drafted tokens are rejected: what comes instead takes the same positions, and often the same cells."""
    cache.prompt(PROMPT[:100])
    for _ in range(3):
        cache.prompt([7, 8, 9, 10, 11], first=100)
        cache.remove(0, 101, -1)
        cache.answer([12], 101)
        cache.remove(0, 100, -1)
    return cache.answer(PROMPT[100:105], 100)


def context_shift(cache: Cache) -> np.ndarray:
    cache.prompt(PROMPT[:100])
    cache.remove(0, 4, 44)
    cache.add(0, 44, -1, -40)
    return cache.answer(PROMPT[100:105], 60)


def shared_beginning(cache: Cache) -> np.ndarray:
    cache.prompt(PROMPT[:100])
    cache.copy(0, 1)
    together = [cache.read((PROMPT[100 + i], 100 + i, 0), (PROMPT[110 - i], 100 + i, 1)) for i in range(8)]
    cache.remove(0, -1, -1)
    return np.concatenate([*together, cache.answer(PROMPT[:3], 108, 1)])


def saved_and_restored(cache: Cache) -> np.ndarray:
    cache.prompt(PROMPT[:100])
    state = cache.saved(0)
    cache.prompt(PROMPT[20:90], first=100)
    cache.remove(0, -1, -1)
    cache.prompt(PROMPT[::-1][:80])
    cache.restore(state, 0)
    return cache.answer(PROMPT[100:105], 100)


def another_prompt(cache: Cache) -> np.ndarray:
    """A part of the first is used again, as llama-server does."""
    cache.prompt(PROMPT[:110])
    cache.remove(0, 60, -1)
    cache.prompt(PROMPT[80:110], first=60)
    return cache.answer(PROMPT[:5], 90)


def eight_interleaved(cache: Cache) -> np.ndarray:
    for sequence in range(8):
        cache.prompt(PROMPT[sequence : sequence + 50], sequence)
    found = [
        cache.read(*((PROMPT[60 + sequence + i], 50 + i, sequence) for sequence in range(8) if (sequence + i) % 3))
        for i in range(0, 1)
    ]
    return np.concatenate(found)


def emptied(cache: Cache) -> np.ndarray:
    cache.prompt(PROMPT[:100])
    cache.llama.llama_memory_clear(cache.memory, True)
    cache.prompt(PROMPT[40:90])
    return cache.answer(PROMPT[:5], 50)


SCENARIOS = [
    removal_in_the_middle, removal_of_the_end, context_shift, shared_beginning, saved_and_restored, another_prompt,
    eight_interleaved, emptied,
]  # fmt: skip


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_nothing_stale_is_read(calibrated, scenario: Callable[[Cache], np.ndarray], unified):
    """No farther from an f16 cache than without a window; a poisoned entry that were read would change everything."""
    found = []
    for types, window in ((F16, 0), (TURBO3, 0), (TURBO3, 32)):
        with Cache(calibrated, types, window=window, unified=unified) as cache:
            found.append(scenario(cache))
    exact, without, within = found
    errors = [compare(exact, other).kl_mean for other in (without, within)]
    assert errors[1] < errors[0] * 1.1, errors
