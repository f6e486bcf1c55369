"""Calibrated keys: the same model where nothing is quantized, a better one where keys are, right wherever they move."""

import ctypes
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file, save_file

import checkpoints
from checkpoints import random_calibration
from sequences import Sequences
from turboquant_gguf import cli
from turboquant_gguf.errors import TurboquantError
from turboquant_gguf.llamacpp.cachetypes import CacheTypes
from turboquant_gguf.llamacpp.ggufile import GGUFFile
from turboquant_gguf.llamacpp.logits import Context, Model
from turboquant_gguf.weights.calibration import KEY, Calibration, Layer, Moments, _readings, calibrate
from turboquant_gguf.weights.convert import convert
from turboquant_gguf.weights.verify import EXACT, compare, run_gguf

PROMPT = list(range(1000, 1200))


def quietly(model: Path, output: Path | None = None, **options) -> Calibration:
    return calibrate(model, output, console=Console(quiet=True), **options)


@pytest.fixture(autouse=True)
def no_recent_window(monkeypatch):
    """What it covers is not quantized."""
    monkeypatch.setenv("TURBO_CACHE_WINDOW", "0")


@pytest.fixture
def environment(monkeypatch):
    """Sets an environment variable for llama.cpp; undone after the test."""
    return monkeypatch.setenv


# ---- centre and scale ----


def objective(q, k, weights, layer, group) -> float:
    """The sum of w |s (k - m)|^2 |q / s|^2 over all pairs, written as it reads."""
    total = 0.0
    for h in range(q.shape[1]):
        m, s = layer.center[h // group], layer.scale[h // group]
        for i, query in enumerate(q[:, h]):
            for j, key in enumerate(k[:, h // group]):
                total += weights[h, i, j] * ((s * (key - m)) ** 2).sum() * ((query / s) ** 2).sum()
    return total


def test_moments_lower_the_objective_and_end_at_a_minimum():
    rng = np.random.default_rng(1)
    tokens, heads, group, size = 12, 4, 2, 6
    spread = np.exp(rng.standard_normal((2, size)))
    k = (rng.standard_normal((tokens, 2, size)) * spread + 3 * rng.standard_normal((2, size))).astype(np.float32)
    q = rng.standard_normal((tokens, heads, size)).astype(np.float32)
    mask = np.where(np.tri(tokens, dtype=bool), 0, -np.inf).astype(np.float32)
    weights = np.zeros((heads, tokens, tokens))
    for h in range(heads):
        scores = (q[:, h] @ k[:, h // group].T * 0.3 + mask).astype(np.float64)
        p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        weights[h] = p * (1 - p)

    layer = Layer(np.zeros((2, size)), np.ones((2, size)))
    sums = []
    for _ in range(60):
        moments = Moments(2, size)
        moments.add(q, k, mask, factor=0.3, layer=layer)
        assert moments.error == pytest.approx(objective(q, k, weights, layer, group), rel=1e-5)
        sums.append(moments.error)
        layer = moments.solve(centred=True)
    assert sums[1] < 0.5 * sums[0]
    for _ in range(40):  # nothing near it is lower
        near = Layer(
            layer.center + 0.02 * rng.standard_normal(layer.center.shape),
            layer.scale * np.exp(0.02 * rng.standard_normal(layer.scale.shape)),
        )
        assert objective(q, k, weights, near, group) > sums[-1] * (1 - 1e-6)


def test_moments_leave_out_what_the_recent_window_keeps():
    """Pairs less than 64 apart do not count, and those with the first 4 keys a tenth; all do if no others are seen."""
    rng = np.random.default_rng(5)
    tokens, size = 90, 4
    q, k = (rng.standard_normal((tokens, 1, size)).astype(np.float32) for _ in range(2))
    i, j = np.indices((tokens, tokens))
    layer = Layer(np.zeros((1, size)), np.ones((1, size)))
    for seen, counted in (
        (j <= i, np.where(j < 4, 0.1, i - j >= 64)),
        ((j <= i) & (i - j < 64), 1.0),  # a sliding window
    ):
        mask = np.where(seen, 0, -np.inf).astype(np.float32)
        scores = (q[:, 0] @ k[:, 0].T * 0.3 + mask).astype(np.float64)
        p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        moments = Moments(1, size)
        moments.add(q, k, mask, factor=0.3, layer=layer)
        expected = objective(q, k, (p * (1 - p) * counted)[None], layer, 1)
        assert moments.error == pytest.approx(expected, rel=1e-5)


def test_a_channel_made_larger_in_keys_and_smaller_in_queries_changes_nothing():
    rng = np.random.default_rng(2)
    q, k = (rng.standard_normal((20, 1, 8)).astype(np.float32) for _ in range(2))
    mask = np.where(np.tri(20, dtype=bool), 0, -np.inf).astype(np.float32)
    stretch = np.array([1, 32, 1, 0.125, 1, 1, 4, 1], np.float32)  # powers of two: exact
    found = []
    for factor in (np.float32(1), stretch):
        layer = None
        for _ in range(40):  # until the start, which does differ, is forgotten
            moments = Moments(1, 8)
            moments.add(q / factor, k * factor, mask, factor=0.3, layer=layer)
            layer = moments.solve(centred=True)
        found.append(layer)
    stored = [
        layer.scale * (k[:, 0] * factor - layer.center) for layer, factor in zip(found, (1, stretch), strict=True)
    ]
    ratio = stored[1] / stored[0]
    assert ratio == pytest.approx(np.full_like(ratio, ratio[0, 0]), rel=1e-3)  # up to one factor


def test_channels_without_spread_or_queries_are_left_alone():
    q, k = np.zeros((4, 1, 8), np.float32), np.zeros((4, 1, 8), np.float32)
    moments = Moments(1, 8)
    moments.add(q, k, np.zeros((4, 4), np.float32), factor=1.0)
    layer = moments.solve(centred=True)
    assert np.array_equal(layer.scale, np.ones((1, 8))) and not layer.center.any()


# ---- the same model ----


@pytest.mark.parametrize(
    "name", ["llama", "llama, head size 80", "qwen3", "gemma3", "cohere2", "stablelm", "falcon, one KV head", "lfm2"]
)
def test_exact_where_nothing_is_quantized(name, tmp_path, environment):
    """Any centre and any scale give the same logits: sliding windows, partial RoPE, hybrids, one KV head."""
    model = checkpoints.gguf(tmp_path, name)
    other = random_calibration(model, tmp_path / "calibrated.gguf")
    prompt = [token % checkpoints.VOCABULARY for token in PROMPT[:40]]
    plain = run_gguf(model, prompt, EXACT)
    assert np.array_equal(plain, run_gguf(other, prompt, EXACT))  # off, where keys are not quantized
    environment("TURBO_CALIBRATION", "force")
    forced = run_gguf(other, prompt, EXACT)
    assert not np.array_equal(plain, forced)
    # scales up to exp(3) on either side of a product of float32
    assert compare(plain, forced).relative_error < 2e-5


def test_turned_off_it_is_the_old_model(smollm2, calibrated, environment):
    cache = CacheTypes("turbo3", "turbo3")
    plain = run_gguf(smollm2, PROMPT, cache)
    assert not np.array_equal(plain, run_gguf(calibrated, PROMPT, cache))
    environment("TURBO_CALIBRATION", "0")
    assert np.array_equal(plain, run_gguf(calibrated, PROMPT, cache))


@pytest.mark.parametrize("name, center", [("gpt-oss", False), ("gemma2", False), ("llama", True)])
def test_no_centre_where_it_would_change_the_model(name, center, tmp_path):
    model = checkpoints.gguf(tmp_path, name)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog ate the food. " * 40)
    done = quietly(model, tmp_path / "out.gguf", text=text)
    with GGUFFile(done.path) as file:
        assert (f"{KEY}center" in file.metadata) == done.centred == center
    assert (done.reason is None) == center
    with pytest.MonkeyPatch.context() as patch:
        prompt = [token % checkpoints.VOCABULARY for token in PROMPT[:40]]
        plain = run_gguf(model, prompt, EXACT)
        patch.setenv("TURBO_CALIBRATION", "force")
        assert compare(plain, run_gguf(done.path, prompt, EXACT)).relative_error < 2e-5


# ---- the positions it is for ----

WARNING = "keys are not calibrated"


def logits_and_log(path: Path, types: CacheTypes, length: int, position: int = 0) -> tuple[np.ndarray, str]:
    """The logits after each of 40 tokens from `position` on, in a context of `length`, and what llama.cpp logged."""
    prompt = [token % checkpoints.VOCABULARY for token in PROMPT[:40]]
    with Model(path) as model, model.open(length, types) as context:
        return context.read(prompt, position, outputs=len(prompt)).copy(), "".join(model.log)


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
@pytest.mark.parametrize("measured, longest", [(1000, 1024), (None, 2048)])  # llama.cpp's contexts: multiples of 256
def test_left_alone_in_longer_contexts(name, measured, longest, tmp_path, environment):
    """As if the file had no calibration, with a warning; a sliding window's cache is short, but its positions are not."""
    model = checkpoints.gguf(tmp_path, name)
    calibrated = random_calibration(model, tmp_path / "calibrated.gguf", context=measured)
    types = CacheTypes("q8_0", "q8_0")
    plain, _ = logits_and_log(model, types, longest)
    within, log = logits_and_log(calibrated, types, longest)
    assert not np.array_equal(within, plain) and WARNING not in log
    beyond, log = logits_and_log(calibrated, types, longest + 256)
    assert np.array_equal(beyond, plain)
    assert log.count(WARNING) == 1 and f"turboquant-gguf calibrate --context {longest + 256}" in log
    environment("TURBO_CALIBRATION", "force")
    forced, log = logits_and_log(calibrated, types, longest + 256)
    assert np.array_equal(forced, within) and WARNING not in log


@pytest.mark.parametrize("name", ["llama", "gemma3", "stablelm"])
def test_exact_at_late_positions(name, tmp_path, environment):
    model = checkpoints.gguf(tmp_path, name)
    other = random_calibration(model, tmp_path / "calibrated.gguf")
    environment("TURBO_CALIBRATION", "force")
    for position in (1000, 100_000):
        plain, forced = (logits_and_log(path, EXACT, 256, position)[0] for path in (model, other))
        assert not np.array_equal(plain, forced)
        assert compare(plain, forced).relative_error < 2e-5


def test_states_of_contexts_in_which_it_is_left_alone(tmp_path):
    """They are those of the model without it, and not those of shorter contexts."""
    types = CacheTypes("q8_0", "q8_0")
    model = checkpoints.gguf(tmp_path, "llama")
    path = random_calibration(model, tmp_path / "calibrated.gguf", context=256)
    short, long, plain = saved(path, types, 256), saved(path, types, 512), saved(model, types, 512)
    assert long == plain != short
    assert restored(path, types, plain, 512) is not None and restored(path, types, short, 256) is not None
    assert restored(path, types, short, 512) is None and restored(path, types, plain, 256) is None


def test_the_file_says_what_it_was_measured_for(smollm2, calibrated, tmp_path):
    def said(path: Path) -> int:
        with GGUFFile(path) as file:
            return file.metadata[f"{KEY}context"]

    assert said(calibrated) == 8192  # what the model was trained for
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog ate the food. " * 20)
    for name, trained in (("llama", 512), ("gpt2", 512), ("gemma3", 512), ("lfm2", 512)):
        model = checkpoints.gguf(tmp_path, name)
        done = quietly(model, tmp_path / f"{name}-calibrated.gguf", text=text, tokens=512)
        assert said(done.path) == done.context == trained
    done = quietly(tmp_path / "llama.gguf", tmp_path / "longer.gguf", text=text, tokens=512, context=3000)
    assert said(done.path) == done.context == 3000
    with pytest.raises(TurboquantError, match="knows 512 positions. Give a --context of at most that"):
        quietly(tmp_path / "gpt2.gguf", tmp_path / "none.gguf", text=text, context=513)


@pytest.mark.parametrize("windows, count", [(1, 12), (5, 15), (7, 14), (40, 40)])
@pytest.mark.parametrize("context", [700, 8192, 1 << 17])
def test_positions_that_are_read(windows, count, context):
    """All over the context, denser at its beginning, and every window is read equally often."""
    texts = [[number] * 512 for number in range(windows)]
    readings = _readings(texts, context)
    positions = np.array([position for position, _ in readings])
    assert len(readings) == count and (positions >= 0).all() and (positions + 512 <= context).all()
    assert {text[0]: sum(other == text for _, other in readings) for _, text in readings} == {
        number: count // windows for number in range(windows)
    }
    part = positions / (context - 512)
    assert part.min() < 0.1 and part.max() > 0.8 and 0.3 < np.median(part) < 0.4
    assert _readings(texts, 512) == [(0, text) for text in texts]


def test_positions_matter_only_where_keys_are_turned(tmp_path):
    """SmolLM3 has a layer without RoPE: whatever the positions, the same is found there."""
    model = checkpoints.gguf(tmp_path, "smollm3")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog ate the food. " * 20)
    found = []
    for context in (512, 100_000):
        done = quietly(model, tmp_path / f"{context}.gguf", text=text, tokens=512, context=context)
        with GGUFFile(done.path) as file:
            found.append(np.array(file.metadata[f"{KEY}center"][:]).reshape(5, -1))
    differences = np.abs(found[0] - found[1]).max(-1) / np.abs(found[0]).max(-1)
    assert differences[3] < 0.01 and differences[[0, 1, 2, 4]].min() > 0.1


def test_attention_that_cannot_be_measured_is_refused(tmp_path):
    model = checkpoints.gguf(tmp_path, "bloom")
    with pytest.raises(TurboquantError, match="cannot be measured: it uses ALiBi"):
        quietly(model, tmp_path / "none.gguf")


@pytest.mark.parametrize("types", ["turbo4", "turbo3"])
def test_a_gain_all_over_the_context(smollm2, calibrated, types):
    """Of 200 tokens at the beginning, in the middle and at the end, where there was a loss of more than half."""
    losses = []
    for path in (smollm2, calibrated):
        loss = 0.0
        for position in (0, 4000, 7900):
            found = []
            for model, cache in ((smollm2, EXACT), (path, CacheTypes.parse(types))):
                with Model(model) as loaded, loaded.open(256, cache) as context:
                    found.append(context.read(PROMPT, position, outputs=len(PROMPT)).copy())
            loss += compare(*found).kl_mean
        losses.append(loss)
    assert losses[1] < 0.95 * losses[0]


# ---- a better one ----


@pytest.fixture(scope="module")
def calibrated_for_1024(smollm2, tmp_path_factory) -> Path:
    """Short contexts gain most if the file is for no longer ones."""
    return quietly(smollm2, tmp_path_factory.mktemp("calibrated") / "1024.gguf", context=1024).path


@pytest.mark.parametrize("types, factor", [("turbo4", 1.3), ("turbo3", 1.5), ("turbo2", 1.5), ("q4_0:f16", 1.3)])
def test_quantized_keys_lose_less(smollm2, calibrated_for_1024, types, factor):
    cache = CacheTypes.parse(types)
    truth = run_gguf(smollm2, PROMPT, EXACT)
    plain, better = (compare(truth, run_gguf(model, PROMPT, cache)).kl_mean for model in (smollm2, calibrated_for_1024))
    assert better < plain / factor


def test_channels_with_outliers(smollm2_folder, tmp_path):
    """A RoPE pair of keys 30 times as large, the same pair of queries as small: the same model, ruined at few bits.

    This is what key biases do to Qwen 2.5. Calibrated, it is as good as without.
    """
    weights = load_file(smollm2_folder / "model.safetensors")
    for name, tensor in weights.items():
        rows = tensor.view(-1, 64, tensor.shape[-1]) if name.endswith(("k_proj.weight", "q_proj.weight")) else None
        if rows is not None:
            for channel in (3, 3 + 32):  # as transformers pairs them
                rows[:, channel] *= 30 if "k_proj" in name else 1 / 30
    folder = tmp_path / "outliers"
    folder.mkdir()
    for file in smollm2_folder.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    models = [
        convert(source, tmp_path / f"{source.name}.gguf", outtype="f16", console=Console(quiet=True)).path
        for source in (smollm2_folder, folder)
    ]
    cache = CacheTypes("turbo3", "f16")
    truth = run_gguf(models[0], PROMPT, EXACT)
    assert compare(truth, run_gguf(models[1], PROMPT, EXACT)).kl_mean < 1e-4  # f16 weights round otherwise
    assert compare(truth, run_gguf(models[1], PROMPT, cache)).kl_mean > 1
    losses = []
    for model in models:
        done = quietly(model, model.with_suffix(".calibrated.gguf"), tokens=1024, context=1024)
        losses.append(compare(truth, run_gguf(done.path, PROMPT, cache)).kl_mean)
    assert losses[1] < 1.2 * losses[0]


# ---- wherever keys move ----


@contextmanager
def opened(path: Path, types: CacheTypes, length: int = 512) -> Iterator[Context]:
    with Model(path) as model, model.open(length, types) as context:
        yield context


def unmoved(_llama, _memory, end: int) -> int:
    """Leaves `end` tokens where they are; returns the position of the next, as the others here do."""
    return end


def shift(llama, memory, end: int) -> int:
    """A context shift: 32 tokens from the eighth on are removed, and the rest moves up."""
    assert llama.llama_memory_seq_rm(memory, 0, 8, 8 + 32)
    llama.llama_memory_seq_add(memory, 0, 8 + 32, -1, -32)
    return end - 32


def self_extend(llama, memory, end: int) -> int:
    """Self-extend: the first half comes to lie at half its positions, and the rest follows."""
    half = end // 2
    llama.llama_memory_seq_div(memory, 0, 0, half, 2)
    llama.llama_memory_seq_add(memory, 0, half, -1, half // 2 - half)
    return end - half + half // 2


def moved(path: Path, types: CacheTypes, prompt: list[int], move: Callable[..., int]) -> np.ndarray:
    """The logits after the prompt's last token, when the others have been moved."""
    with opened(path, types) as context:
        context.read(prompt[:-1], 0)
        assert context.bindings.llama_memory_can_shift(context.memory)
        end = move(context.bindings, context.memory, len(prompt) - 1)
        return context.read(prompt[-1:], end).copy()


def require_no_worse_when_moved(path: Path, plain: Path, types: CacheTypes, prompt: list[int], move) -> None:
    """Moving costs no more than quantizing twice; done wrong, the logits have nothing to do with each other (about 1).

    plain: the model as it is, whose f16 cache tells what is right.
    """
    exact = CacheTypes("f16", "f16")
    pairs = [(moved(plain, exact, prompt, how), moved(path, types, prompt, how)) for how in (move, unmoved)]
    with_move, without = (compare(truth, found).relative_error for truth, found in pairs)
    assert with_move < min(3 * without, 0.3)


@pytest.mark.parametrize("move", [shift, self_extend])
@pytest.mark.parametrize("types", [CacheTypes("q8_0", "f16"), CacheTypes("turbo4", "turbo4")], ids=str)
def test_moved_keys(smollm2, calibrated, types, move):
    require_no_worse_when_moved(calibrated, smollm2, types, PROMPT, move)


@pytest.mark.parametrize("move", [shift, self_extend])
@pytest.mark.parametrize("name", ["stablelm, head size 64", "llama, head size 96", "gemma3"])
def test_moved_keys_of_other_architectures(name, move, tmp_path):
    """Partial RoPE, and heads without rotation, both of which upstream takes wrong; sliding windows."""
    types = CacheTypes("q8_0", "f16")
    model = checkpoints.gguf(tmp_path, name)
    prompt = [token % checkpoints.VOCABULARY for token in PROMPT[:80]]
    for path in (model, random_calibration(model, tmp_path / "calibrated.gguf")):
        require_no_worse_when_moved(path, model, types, prompt, move)


@pytest.mark.parametrize("unified", [True, False])
def test_sequences_that_share_a_beginning(calibrated, unified):
    """One is copied from the other, each goes on by itself, and one loses its end: as if each had been alone."""
    types = CacheTypes("turbo4", "turbo4")
    beginning = [(token, position, 0) for position, token in enumerate(PROMPT[:100])]
    with Sequences(calibrated, types, unified=unified) as both:
        both.read(*beginning)
        both.copy(0, 1)
        together = both.read((7, 100, 0), (8, 100, 1))
        both.remove(1, 90, -1)
        after = both.read((9, 90, 1), (9, 101, 0))
    with Sequences(calibrated, types, unified=unified) as alone:
        alone.read(*beginning)
        first = alone.read((7, 100, 0))
        then = alone.read((9, 101, 0))
        alone.remove(0, 100, -1)
        second = alone.read((8, 100, 0))
        alone.remove(0, 90, -1)
        shorter = alone.read((9, 90, 0))
    for found, expected in zip((*together, *after), (*first, *second, *shorter, *then), strict=True):
        # the same keys and values; a batch of two multiplies quantized weights in another order than one of one, which is
        # 0.014 for one of these tokens
        assert compare(expected[None], found[None]).relative_error < 2e-2


def saved(path: Path, types: CacheTypes, length: int = 512) -> bytes:
    with opened(path, types, length) as context:
        context.read([token % context.vocabulary_size for token in PROMPT], 0)
        size = context.bindings.llama_state_seq_get_size(context.handle, 0)
        data = (ctypes.c_uint8 * size)()
        assert context.bindings.llama_state_seq_get_data(context.handle, data, size, 0) == size
        return bytes(data)


def restored(path: Path, types: CacheTypes, state: bytes, length: int = 512) -> np.ndarray | None:
    with opened(path, types, length) as context:
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if not context.bindings.llama_state_seq_set_data(context.handle, data, len(state), 0):
            return None
        return context.read([7], len(PROMPT)).copy()


def test_saved_states(smollm2, calibrated, smollm2_rotated, smollm2_plain):
    """A state goes back into the model that saved it, and into no other that would read it otherwise."""
    types = CacheTypes("turbo4", "turbo4")
    for model in (smollm2, calibrated):
        with opened(model, types) as direct:
            direct.read(PROMPT, 0)
            expected = direct.read([7], len(PROMPT)).copy()
        assert np.array_equal(restored(model, types, saved(model, types)), expected)
    assert restored(smollm2, types, saved(calibrated, types)) is None
    assert restored(calibrated, types, saved(smollm2, types)) is None
    unquantized = CacheTypes("f16", "f16")  # which the calibration does not touch
    assert restored(smollm2, unquantized, saved(calibrated, unquantized)) is not None
    assert restored(smollm2_plain, unquantized, saved(smollm2_rotated, unquantized)) is None  # but rotated values do


# ---- files ----


def test_only_metadata_changes(smollm2, calibrated):
    with GGUFFile(smollm2) as before, GGUFFile(calibrated) as after:
        kept = {key: str(value) for key, value in before.metadata.items()}
        assert kept == {key: str(value) for key, value in after.metadata.items() if not key.startswith(KEY)}
        assert before.tensors == after.tensors
        data = [file.path.read_bytes()[file.ask("gguf_get_data_offset") :] for file in (before, after)]
    assert data[0] == data[1]


def test_again_it_writes_the_same_file(calibrated_for_1024, tmp_path):
    """A calibrated model is measured as if it were not."""
    again = quietly(calibrated_for_1024, tmp_path / "again.gguf", context=1024)
    assert again.path.read_bytes() == calibrated_for_1024.read_bytes()


def test_seed_and_length_choose_the_text(smollm2, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("".join(f"Line {number} says {number * number}. " for number in range(600)))
    a, b, c = (
        quietly(smollm2, tmp_path / f"{name}.gguf", text=text, tokens=512, context=512, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert a.tokens == 512
    assert a.path.read_bytes() == b.path.read_bytes() != c.path.read_bytes()


SHORT = ("--tokens", "256", "--context", "256")


def test_in_place_and_output_names(smollm2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model.gguf"
    model.write_bytes(smollm2.read_bytes())
    done = CliRunner().invoke(cli.cli, ["calibrate", "model.gguf", *SHORT, "--json"], catch_exceptions=False)
    report = json.loads(done.stdout)
    assert report["path"] == "model-calibrated.gguf" and report["layers"] == 30 and report["error"] < 0.7
    assert model.read_bytes() == smollm2.read_bytes()

    for arguments, message in (
        (["calibrate", "model.gguf"], "exists already"),
        (["calibrate", "model.gguf", "-o", "model.gguf"], "use --in-place"),
        (["calibrate", "model.gguf", "-o", "x.gguf", "--in-place"], "either -o or --in-place"),
        (["calibrate", "none.gguf"], "no model file"),
        (["calibrate", "model.gguf", "--text", "empty.txt", "-o", "x.gguf"], "too few to learn from"),
    ):
        Path("empty.txt").write_text("Nothing.")
        ended = subprocess.run(
            [sys.executable, "-m", "turboquant_gguf.cli", *arguments], capture_output=True, text=True
        )
        assert ended.returncode and message in ended.stderr.replace("\n", " "), ended.stderr
    assert CliRunner().invoke(cli.cli, ["calibrate", "model.gguf", *SHORT, "--in-place"]).exit_code == 0
    assert model.read_bytes() == Path("model-calibrated.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "model-calibrated.gguf", "model.gguf"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_leaves_nothing(smollm2, tmp_path, number):
    command = [sys.executable, "-m", "turboquant_gguf.cli", "calibrate", smollm2, "-o", tmp_path / "out.gguf"]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True)
    time.sleep(6)  # in the middle of the model
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert not list(tmp_path.iterdir())


def one_value(value: float) -> np.ndarray:
    """Vectors of 1, but for one channel of layer 1."""
    vector = np.ones(128, np.float32)
    vector[70] = value
    return vector


@pytest.mark.parametrize(
    "changes, because",
    [
        ({"version": 2}, "not of version 1"),
        ({"sizes": np.array([64], np.int32)}, "of a model of 1 layers"),
        ({"sizes": np.array([64, 32], np.int32)}, "has 32 channels in layer 1"),
        ({"scale": np.ones(127, np.float32)}, "too short"),
        ({"scale": np.full(128, np.nan, np.float32)}, "no scale|a number that is none"),
        ({"scale": np.full(128, -1, np.float32)}, "not positive"),
        ({"center": np.ones(64, np.float32)}, "too short"),
        ({"scale": np.ones(128, np.int32)}, "wrong type"),
        ({"sizes": np.array([64, -64], np.int32)}, "has -64 channels in layer 1"),
        ({"sizes": np.array([-(2**31), 64], np.int32)}, "has -2147483648 channels in layer 0"),
        ({"context": np.array([1024], np.int32)}, "wrong type"),
        ({"scale": one_value(np.inf)}, "a number that is none in layer 1"),
        ({"scale": one_value(0)}, "scale of 0 in layer 1, which is not positive"),
        ({"scale": one_value(1e-45)}, "scale of 1.4013e-45 in layer 1, which is far from 1"),
        ({"scale": one_value(3e38)}, "scale of 3e+38 in layer 1, which is far from 1"),
        ({"scale": one_value(1e-5)}, "which is far from 1"),  # the floors of solve allow 1e4 sqrt(head size)
        ({"scale": one_value(1e5)}, "which is far from 1"),
        ({"scale": one_value(2)}, "in layer 1 whose scales are 1.0219 in the geometric mean"),
        ({"scale": np.full(128, 1.01, np.float32)}, "in layer 0 whose scales are 1.01 in the geometric mean"),
        ({"center": one_value(3e38)}, "centre of 3e+38 in layer 1, beyond all keys"),
        ({"center": one_value(-66000)}, "centre of -66000 in layer 1"),
        ({"center": one_value(np.nan)}, "a number that is none in layer 1"),
    ],
)
def test_damaged_calibration_is_refused(tmp_path, changes, because):
    model = checkpoints.gguf(tmp_path, "llama")
    damaged = random_calibration(model, tmp_path / "damaged.gguf", **changes)
    with pytest.raises(TurboquantError) as error:
        Model(damaged)
    assert any(part in error.value.details for part in because.split("|")), error.value.details
    assert "calibrate the model again" in error.value.details


def test_the_largest_scales_that_can_be_found_are_not_refused(tmp_path):
    """The worst that the floors of `solve` allow: keys in one channel of each head, queries in another."""
    moments = Moments(checkpoints.KV_HEADS, checkpoints.HEAD_SIZE)
    moments.weight += 1
    moments.keys2[:, 0], moments.queries2[:, 1] = 1e6, 1e6
    scale = np.tile(moments.solve(centred=False).scale.ravel(), 2).astype(np.float32)
    assert scale.max() > 100 and scale.min() < 0.01
    path = random_calibration(checkpoints.gguf(tmp_path, "llama"), tmp_path / "extreme.gguf", scale=scale)
    with Model(path):
        pass


def test_centre_is_refused_where_it_would_change_the_model(tmp_path):
    for name in ("gpt-oss", "gemma2"):
        centred = random_calibration(checkpoints.gguf(tmp_path, name), tmp_path / f"{name}-centred.gguf")
        with pytest.raises(TurboquantError) as error:
            Model(centred)
        assert "attention sinks or a cap" in error.value.details
