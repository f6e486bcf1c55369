"""The recent window: what it covers is exact, and whatever moves in the cache, nothing stale is ever read."""

import ctypes
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import checkpoints
from sequences import Sequences
from turboquant_gguf.llamacpp import native
from turboquant_gguf.llamacpp.cachetypes import CacheTypes
from turboquant_gguf.weights.verify import EXACT, compare

F16, TURBO3, Q4_0 = map(CacheTypes.parse, ("f16", "turbo3", "q4_0"))
PROMPT = list(range(1000, 1120))
SMALL_PROMPT = [token % checkpoints.VOCABULARY for token in PROMPT]


# ---- what it covers is exact ----

ARCHITECTURES = {  # with what makes their heads 64 wide
    "stablelm": dict(hidden_size=256),
    "qwen3": dict(head_dim=64),
    "gemma3": dict(head_dim=64),
    "lfm2": dict(hidden_size=256),
    "gpt-oss": dict(head_dim=64),
    "gemma2": dict(head_dim=64),
    "bloom": dict(hidden_size=256),
    "exaone4": dict(hidden_size=256),
}


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_a_window_longer_than_the_context(name, unified, tmp_path):
    """As near to float32 as an f16 cache, whose flash attention rounds queries and sums as well."""
    model = checkpoints.gguf(tmp_path, name, **ARCHITECTURES[name])
    found = {}
    for types, window in ((EXACT, 0), (F16, 0), (Q4_0, 0), (Q4_0, 256)):
        with Sequences(model, types, window=window, unified=unified) as cache:
            cache.prompt(SMALL_PROMPT[:50])
            found[types, window] = np.concatenate(
                [cache.prompt(SMALL_PROMPT[50:100], first=50), cache.answer(SMALL_PROMPT[100:], 100)]
            )
    exact, *others = found.values()
    half, without, within = (compare(exact, other).relative_error for other in others)
    assert within < half
    assert without > 10 * within


def test_the_default_is_a_window_for_turbo_types_alone(smollm2):
    for types, expected in ((TURBO3, True), (CacheTypes("q8_0", "turbo3"), True), (Q4_0, False), (F16, False)):
        with Sequences(smollm2, types, window=None) as cache:
            assert ("recent window: the last 64 tokens and the first 4 of each sequence" in cache.log) == expected
    with Sequences(smollm2, F16, window=32) as cache:  # nothing to be exact beside
        assert "recent window" not in cache.log


def refusal(model: Path, types: CacheTypes) -> str:
    """What the log says of a window that was asked for, and is not there. The model runs all the same."""
    with Sequences(model, types, window=32) as cache:
        assert np.isfinite(cache.prompt(list(range(50)))).all()
        return re.search(r"no recent window: (.*)", cache.log)[1]


def test_no_window_where_it_cannot_be(tmp_path):
    latent = checkpoints.gguf(tmp_path, "deepseek2", qk_rope_head_dim=64)
    assert refusal(latent, Q4_0) == refusal(latent, TURBO3) == "values are part of the keys (MLA)"
    narrow = checkpoints.gguf(tmp_path, "llama")
    assert refusal(narrow, Q4_0) == "its kernel takes head sizes that are multiples of 64"


def test_without_a_window_the_graph_is_the_old_one(smollm2, stock_libraries):
    """The nodes that stock llama.cpp has with a quantized cache."""

    def nodes(types: str, libraries: Path = native.library_dir(), **environment: str) -> str:
        script = [sys.executable, Path(__file__).with_name("graph_nodes.py"), smollm2, types]
        environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(libraries), **environment}
        return subprocess.run(script, env=environment, capture_output=True, text=True, check=True).stdout

    stock = nodes("q4_0", stock_libraries)
    assert stock.count("FLASH_ATTN_EXT") == 30
    assert nodes("q4_0") == nodes("turbo3", TURBO_CACHE_WINDOW="0") == stock
    assert nodes("turbo3").count("CUSTOM") == 30


def test_batches_and_single_tokens_see_the_same(tiny):
    """The window is a matter of positions, not of batches. Weights are not quantized, which would blow up roundings."""
    found = []
    for sizes in ((120,), (1,) * 120, (50, 1, 1, 30, 38)):
        with Sequences(tiny, TURBO3, window=32) as cache:
            first = 0
            for size in sizes:
                last = cache.prompt(SMALL_PROMPT[first : first + size], first=first)[-1:]
                first += size
        found.append(last)
    for other in found[1:]:
        assert compare(found[0], other).relative_error < 0.02


@pytest.mark.parametrize("begin", [0, 1000])
def test_first_tokens_are_those_of_the_sequence(begin, tiny):
    """Wherever it begins: as exact as f16 where all of them are first tokens, also in another batch and after a restart."""
    found = {}
    for types, sinks in ((F16, 4), (TURBO3, 4), (TURBO3, 128)):
        with Sequences(tiny, types, window=8, sinks=sinks, sequences=2, length=512) as cache:
            cache.prompt(SMALL_PROMPT[:60], first=begin)
            cache.prompt(SMALL_PROMPT[60:100], first=begin + 60)
            read = cache.answer(SMALL_PROMPT[100:], begin + 100)
            cache.remove(0, begin + 100, -1)
            state = cache.saved(0)
            cache.remove(0, -1, -1)
            cache.restore(state, 1)
            found[types, sinks] = np.concatenate([read, cache.answer(SMALL_PROMPT[100:], begin + 100, 1)])
    exact, few, all_of_them = found.values()
    assert compare(exact, all_of_them).relative_error < 1e-2 < compare(exact, few).relative_error


def test_an_image_at_the_beginning_leaves_room_for_what_follows(tmp_path):
    """Its parts have one position (M-RoPE): were all of them first tokens, the ring would be full of them for good."""
    model = checkpoints.with_image_positions(tmp_path)
    found = []
    for types, window in ((F16, 0), (TURBO3, 128)):
        with Sequences(model, types, window=window, sequences=1, length=512) as cache:
            for first in (0, 120):
                image = [(0, (0, i // 16, i % 16), 0) for i in range(first, first + 120)]
                assert cache.decode(*image, embeddings=cache.embeddings[:120]) == 0
            cache.answer(SMALL_PROMPT[:100], 16)
            cache.remove(0, 0, 1)  # what is left is the text, which the window has
            found.append(cache.answer(SMALL_PROMPT[100:], 116))
    assert compare(*found).relative_error < 0.04


# ---- wherever tokens go ----


def removal_in_the_middle(cache: Sequences) -> np.ndarray:
    cache.prompt(PROMPT[:100])
    cache.remove(0, 70, 90)  # partly in the window
    return cache.answer(PROMPT[:5], 100)


def removal_of_the_end(cache: Sequences) -> np.ndarray:
    """As when drafted tokens are rejected: what comes instead takes the same positions, and often the same cells."""
    cache.prompt(PROMPT[:100])
    for _ in range(3):
        cache.prompt([7, 8, 9, 10, 11], first=100)
        cache.remove(0, 101, -1)
        cache.answer([12], 101)
        cache.remove(0, 100, -1)
    return cache.answer(PROMPT[100:105], 100)


def context_shift(cache: Sequences) -> np.ndarray:
    cache.prompt(PROMPT[:100])
    cache.remove(0, 4, 44)
    cache.add(0, 44, -1, -40)
    return cache.answer(PROMPT[100:105], 60)


def late_beginnings(cache: Sequences) -> np.ndarray:
    """Also of an end alone, whose first tokens were none when they came."""
    cache.prompt(PROMPT[:100], first=5000)
    cache.copy(0, 1)
    cache.remove(1, 5000, 5050)
    cache.prompt(PROMPT[20:60], first=7, sequence=2)
    cache.remove(0, 5000, 5098)
    return np.concatenate([cache.answer(PROMPT[100:110], *at) for at in ((5100, 0), (5100, 1), (47, 2))])


def shared_beginning(cache: Sequences) -> np.ndarray:
    cache.prompt(PROMPT[:100])
    cache.copy(0, 1)
    together = [cache.read((PROMPT[100 + i], 100 + i, 0), (PROMPT[110 - i], 100 + i, 1)) for i in range(8)]
    cache.remove(0, -1, -1)
    return np.concatenate([*together, cache.answer(PROMPT[:3], 108, 1)])


def saved_and_restored(cache: Sequences) -> np.ndarray:
    cache.prompt(PROMPT[:100])
    state = cache.saved(0)
    cache.prompt(PROMPT[20:90], first=100)
    cache.remove(0, -1, -1)
    cache.prompt(PROMPT[::-1][:80])
    cache.restore(state, 0)
    return cache.answer(PROMPT[100:105], 100)


def another_prompt(cache: Sequences) -> np.ndarray:
    """A part of the first is used again, as llama-server does."""
    cache.prompt(PROMPT[:110])
    cache.remove(0, 60, -1)
    cache.prompt(PROMPT[80:110], first=60)
    return cache.answer(PROMPT[:5], 90)


def eight_interleaved(cache: Sequences) -> np.ndarray:
    for sequence in range(8):
        cache.prompt(PROMPT[sequence : sequence + 50], sequence)
    lengths, found = [50] * 8, []
    for i in range(6):  # some take part, some wait
        taking_part = [sequence for sequence in range(8) if (sequence + i) % 3]
        entries = ((PROMPT[60 + sequence + i], lengths[sequence], sequence) for sequence in taking_part)
        found.append(cache.read(*entries))
        for sequence in taking_part:
            lengths[sequence] += 1
    return np.concatenate(found)


def emptied(cache: Sequences) -> np.ndarray:
    cache.prompt(PROMPT[:100])
    cache.llama.llama_memory_clear(cache.memory, True)
    cache.prompt(PROMPT[40:90])
    return cache.answer(PROMPT[:5], 50)


def embeddings_alone(cache: Sequences) -> np.ndarray:
    """Batches without tokens, as of images, and without outputs."""
    rng = np.random.default_rng(0)
    rows = cache.embeddings[rng.choice(PROMPT, 60)]
    for first in range(0, 60, 20):
        entries = ((0, first + i, 0) for i in range(20))
        assert cache.decode(*entries, embeddings=rows[first : first + 20], outputs=False) == 0
    return cache.answer(PROMPT[:5], 60)


def full_and_wrapped(cache: Sequences) -> np.ndarray:
    """No cell is left; a part is dropped, the rest moves up, and what comes takes the cells of what was dropped."""
    for first in range(0, cache.length, 128):
        cache.prompt((PROMPT * 2)[first % 5 :][: min(128, cache.length - first)], first=first)
    assert cache.decode((7, cache.length, 0)) == 1
    half = cache.length // 2
    cache.remove(0, 4, half)
    cache.add(0, half, -1, 4 - half)
    cache.prompt(PROMPT[:50], first=half + 4)
    return cache.answer(PROMPT[50:60], half + 54)


SCENARIOS = [
    removal_in_the_middle, removal_of_the_end, context_shift, late_beginnings, shared_beginning, saved_and_restored,
    another_prompt, eight_interleaved, emptied, embeddings_alone, full_and_wrapped,
]  # fmt: skip


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_nothing_stale_is_read(calibrated, scenario: Callable[[Sequences], np.ndarray], unified):
    """No farther from an f16 cache than without a window; a poisoned entry that were read would change everything."""
    found = []
    for types, window in ((F16, 0), (TURBO3, 0), (TURBO3, 32)):
        sequences = 2 if scenario is full_and_wrapped else 8
        with Sequences(calibrated, types, window=window, unified=unified, sequences=sequences) as cache:
            found.append(scenario(cache))
    exact, without, within = found
    errors = [compare(exact, other).kl_mean for other in (without, within)]
    assert errors[1] < errors[0] * 1.1, errors


@pytest.mark.parametrize("length", [16, 64])
@pytest.mark.parametrize("unified", [True, False])
def test_drafts_that_are_rejected_leave_no_trace(unified, length, tiny):
    """The ring has room for what is taken back: the window before it is whole. llama-server drafts up to 64."""
    with Sequences(tiny, TURBO3, window=32, unified=unified, sequences=1) as cache:
        cache.prompt(SMALL_PROMPT[:100])
        expected = cache.answer(SMALL_PROMPT[100:110], 100)
        cache.remove(0, 100, -1)
        found = []
        for i in range(10):
            draft = cache.prompt(SMALL_PROMPT[100 + i : 101 + i] + SMALL_PROMPT[:length], first=100 + i)
            cache.remove(0, 101 + i, -1)
            found.append(draft[:1])
    assert compare(expected, np.concatenate(found)).relative_error < 1e-3


@pytest.mark.parametrize("unified", [True, False])
def test_a_saved_sequence_gives_the_logits_it_had(unified, tiny):
    """Its window is saved with it. In a cache without a window, or from one, it loads as well."""
    with Sequences(tiny, TURBO3, window=32, unified=unified) as cache:
        cache.prompt(SMALL_PROMPT[:100])
        state = cache.saved(0)
        expected = cache.answer(SMALL_PROMPT[100:110], 100)
        cache.remove(0, -1, -1)
        cache.prompt(SMALL_PROMPT[::-1])
        cache.restore(state, 0)
        assert compare(expected, cache.answer(SMALL_PROMPT[100:110], 100)).relative_error < 1e-3
        cache.restore(state, 3)
        assert compare(expected, cache.answer(SMALL_PROMPT[100:110], 100, 3)).relative_error < 1e-3
    with Sequences(tiny, TURBO3, window=0, unified=unified) as cache:
        cache.prompt(SMALL_PROMPT[:100])
        bare = cache.saved(0)
        without = cache.answer(SMALL_PROMPT[100:110], 100)
        cache.restore(state, 1)
        assert compare(expected, cache.answer(SMALL_PROMPT[100:110], 100, 1)).relative_error < 0.5
    with Sequences(tiny, TURBO3, window=32, unified=unified) as cache:
        cache.restore(bare, 0)
        error = compare(expected, cache.answer(SMALL_PROMPT[100:110], 100)).relative_error
    assert len(bare) < len(state)
    assert 1e-3 < error < 2 * compare(expected, without).relative_error


@pytest.mark.parametrize("unified", [True, False])
def test_a_restored_sequence_takes_nothing_from_others(unified, tiny):
    with Sequences(tiny, TURBO3, window=32, unified=unified) as cache:
        cache.prompt(SMALL_PROMPT[:100])
        expected = cache.answer(SMALL_PROMPT[100:110], 100)
        cache.remove(0, 100, -1)
        cache.prompt(SMALL_PROMPT[::-1][:60], sequence=1)
        state = cache.saved(1)
        cache.remove(1, -1, -1)
        cache.restore(state, 1)
        assert compare(expected, cache.answer(SMALL_PROMPT[100:110], 100)).relative_error < 1e-3


@pytest.mark.parametrize("what", ["a count", "an index", "the bytes of a token"])
def test_a_damaged_window_of_a_state_is_refused(what, tiny):
    """And leaves its sequence empty, and the others as they were."""
    with Sequences(tiny, TURBO3, window=32) as cache:
        cache.prompt(SMALL_PROMPT[:60])
        cache.prompt(SMALL_PROMPT[:60], sequence=1)
        expected = cache.answer(SMALL_PROMPT[60:70], 60)
        state = bytearray(cache.saved(1))
        begin = state.index(b"idnw") + 4  # a number of tokens, the bytes of one, which of the saved ones they are
        offset, size = {"a count": (0, 4), "an index": (16, 4), "the bytes of a token": (4, 8)}[what]
        state[begin + offset : begin + offset + size] = b"\xff" * size
        data = (ctypes.c_uint8 * len(state)).from_buffer(state)
        assert not cache.llama.llama_state_seq_set_data(cache.context, data, len(state), 1)
        assert "recent window of this state is damaged" in "".join(cache.messages)
        assert cache.llama.llama_memory_seq_pos_max(cache.memory, 1) == -1
        cache.remove(0, 60, -1)
        assert compare(expected, cache.answer(SMALL_PROMPT[60:70], 60)).relative_error < 1e-3


def test_a_window_that_is_skipped_takes_no_memory_for_what_is_said_of_its_size(tiny):
    """A damaged state says that a token has 4 GB, to a context without a window."""

    def peak() -> int:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    with Sequences(tiny, TURBO3, window=32) as cache:
        cache.prompt(SMALL_PROMPT[:60])
        state = bytearray(cache.saved(0))
    begin = state.index(b"idnw") + 8
    state[begin : begin + 8] = (2**32 - 1).to_bytes(8, "little")
    with Sequences(tiny, TURBO3, window=0) as cache:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what we have now
        before = peak()
        assert cache.read_state(bytes(state), 1) == 0
        assert peak() - before < 2**30
        assert np.isfinite(cache.prompt(SMALL_PROMPT[:60])).all()


def test_a_sequence_of_no_tokens_is_saved(tiny):
    with Sequences(tiny, TURBO3, window=32) as cache:
        expected = cache.prompt(SMALL_PROMPT[:60])
        cache.restore(cache.saved(2), 1)
        cache.remove(0, -1, -1)
        assert compare(expected, cache.prompt(SMALL_PROMPT[:60])).relative_error < 1e-3


def test_a_state_that_names_a_sequence_twice_is_refused(tiny):
    """The cell would count twice for it, and the sequence keep a cell that is empty."""
    with Sequences(tiny, TURBO3, window=32) as cache:
        cache.prompt(SMALL_PROMPT[:60])
        cache.copy(0, 1)
        state = bytearray(cache.saved_whole())
        cell = struct.pack("<iIii", 7, 2, 0, 1)  # a position, and how many sequences have it: 0 and 1
        assert state.count(cell) == 1
        begin = state.index(cell)
        state[begin : begin + len(cell)] = struct.pack("<iIii", 7, 2, 0, 0)
        data = (ctypes.c_uint8 * len(state)).from_buffer(state)
        assert cache.llama.llama_state_set_data(cache.context, data, len(state)) == 0
        cache.clear()
        expected = cache.prompt(SMALL_PROMPT[:60])
        cache.remove(0, -1, -1)
        assert compare(expected, cache.prompt(SMALL_PROMPT[:60])).relative_error < 1e-3


def test_windows_of_many_sequences_never_outweigh_what_the_cache_saves(tiny):
    """With less room than all windows want, all become shorter; what is there is right."""
    found = {}
    for types, window in ((F16, 0), (TURBO3, 0), (TURBO3, None)):
        with Sequences(tiny, types, window=window, sequences=64, length=64) as cache:
            for sequence in range(64):
                cache.prompt(SMALL_PROMPT[:48], sequence)
            found[types, window] = np.concatenate([
                cache.read(*((SMALL_PROMPT[48 + i], 48 + i, sequence) for sequence in range(64))) for i in range(8)
            ])  # fmt: skip
            log = cache.log
    sizes = re.findall(r"llama_kv_cache: (?:recent.* in f16,|size =) +([\d.]+) MiB", log)
    megabytes = [float(number) for number in sizes]
    channels = 2 * 64 * checkpoints.KV_HEADS  # of keys and values
    assert len(megabytes) == 2
    assert sum(megabytes) * 2**20 <= 64 * 64 * channels * 2 * checkpoints.LAYERS  # an f16 cache
    assert "it is shorter while all of 64 sequences are in use" in log
    exact, without, within = found.values()
    assert compare(exact, within).kl_mean < compare(exact, without).kl_mean / 2


@pytest.mark.parametrize("unified", [True, False])
def test_a_copied_sequence_has_the_window_of_the_first(unified, tiny):
    with Sequences(tiny, TURBO3, window=32, unified=unified) as cache:
        cache.prompt(SMALL_PROMPT[:100])
        cache.copy(0, 1)
        copied = cache.answer(SMALL_PROMPT[100:110], 100, 1)
        assert compare(cache.answer(SMALL_PROMPT[100:110], 100, 0), copied).relative_error < 1e-3


@pytest.mark.parametrize("name", ["gemma3", "gpt-oss"])
def test_sliding_windows_that_wrap(name, tmp_path):
    """Their cells are used over and over."""
    model = checkpoints.gguf(tmp_path, name, head_dim=64)
    prompt = [token * 7 % checkpoints.VOCABULARY for token in range(600)]
    found = []
    for types, window in ((F16, 0), (TURBO3, 0), (TURBO3, 32)):
        with Sequences(model, types, window=window, sequences=1, length=1024) as cache:
            for first in range(0, 500, 100):
                cache.prompt(prompt[first : first + 100], first=first)
            found.append(cache.answer(prompt[500:600], 500))
    exact, without, within = found
    assert compare(exact, within).relative_error < compare(exact, without).relative_error
