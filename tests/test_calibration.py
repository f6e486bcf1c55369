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
from turboquant_gguf.weights import calibration
from turboquant_gguf.weights.calibration import KEY, Calibration, Layer, Moments, Rotary, calibrate, spread
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
def few_readings(monkeypatch):
    """A short text is read twice, not twelve times: what is found does not matter."""
    monkeypatch.setattr(calibration, "READINGS", 2)


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


def random_rotary(rng: np.random.Generator, pairs: int, is_neox: bool) -> Rotary:
    channels = np.arange(2 * pairs).reshape((2, pairs) if is_neox else (pairs, 2))
    first, second = channels if is_neox else channels.T
    return Rotary(first, second, np.exp(-rng.uniform(0, 8, pairs)), tile=128)


@pytest.mark.parametrize("is_neox", [True, False])
def test_what_turns_can_be_turned_back(is_neox):
    rng = np.random.default_rng(3)
    rotary = random_rotary(rng, 3, is_neox)
    vectors, positions = rng.standard_normal((50, 2, 8)), rng.integers(0, 5000, 50)
    turned = rotary.turned(vectors, positions)
    assert turned[..., 6:] == pytest.approx(vectors[..., 6:])  # two channels that do not turn
    assert (turned**2).sum(-1) == pytest.approx((vectors**2).sum(-1))
    assert rotary.turned(turned, -positions) == pytest.approx(vectors)
    all_in_tile = [rotary.turned(vectors, np.full(50, position)) for position in range(128)]
    assert rotary.averaged(vectors) == pytest.approx(np.mean(all_in_tile, axis=0))
    layer = Layer(vectors[0], np.ones((2, 8)), rotary)
    assert layer.centers(np.array([700]))[0] == pytest.approx(
        np.mean([rotary.turned(vectors[:1], np.array([at]))[0] for at in range(640, 768)], axis=0)
    )


@pytest.mark.parametrize("is_neox", [True, False])
def test_keys_that_turn_have_a_centre_that_does(is_neox):
    """And a scale that is the same in both channels of a pair; keys that do not turn have neither."""
    rng = np.random.default_rng(4)
    rotary = random_rotary(rng, 4, is_neox)
    center = 3 * rng.standard_normal((1, 10))
    q, noise = (rng.standard_normal((200, 1, 10)).astype(np.float32) for _ in range(2))
    mask = np.where(np.tri(200, dtype=bool), 0, -np.inf).astype(np.float32)
    for turns in (True, False):
        moments = Moments(1, 10, rotary)
        for position in (0, 3000, 70_000):
            k = center + 0.3 * noise
            if turns:
                k = rotary.turned(k, np.arange(position, position + 200))
            moments.add(q, k.astype(np.float32), mask, factor=0.05, position=position)
        layer = moments.solve(centred=True)
        assert (layer.rotary is rotary) == turns
        assert layer.center == pytest.approx(center, abs=0.15)
        is_tied = layer.scale[:, rotary.first] == pytest.approx(layer.scale[:, rotary.second])
        assert is_tied == turns
    assert moments.solve(centred=False).rotary or not moments.solve(centred=False).center.any()


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


TURNING = {  # with what makes their heads 64 wide
    "llama": dict(head_dim=64),
    "qwen3": dict(head_dim=64),
    "gemma3": dict(head_dim=64),  # sliding windows, which have another base
    "gemma2": dict(head_dim=64),  # a cap on scores
    "gpt-oss": dict(head_dim=64),  # attention sinks
    "stablelm": dict(hidden_size=256),  # partial RoPE
    "glm4": dict(head_dim=64),  # partial RoPE, of pairs side by side
    "smollm3": dict(hidden_size=256),  # a layer without RoPE
    "lfm2": dict(hidden_size=256),  # a hybrid
    "cohere2": dict(hidden_size=256),
}


def other_order(rng: np.random.Generator, tokens: list[int]) -> list[tuple[int, int, int]]:
    """Two sequences of these tokens in one batch, the second at late positions; cells are in no order."""
    entries = [(token, i, 0) for i, token in enumerate(tokens)]
    entries += [(token, 5000 + i, 1) for i, token in enumerate(tokens)]
    order = np.argsort([*(i + 0.3 * rng.random() for i in range(len(tokens))), *range(len(tokens))], kind="stable")
    return [entries[i] for i in order]


@pytest.mark.parametrize("name", TURNING)
@pytest.mark.parametrize("unified", [True, False])
def test_centres_that_turn_are_exact(name, unified, tmp_path, environment):
    """The same logits as without: in batches, token by token, late, of sequences side by side, moved, copied, saved."""
    model = checkpoints.gguf(tmp_path, name, **TURNING[name])
    other = random_calibration(model, tmp_path / "calibrated.gguf")
    prompt = [token % checkpoints.VOCABULARY for token in PROMPT[:60]]

    def everything(path: Path, flash: str) -> list[np.ndarray]:
        with Sequences(path, EXACT, flash=flash, unified=unified, sequences=4, length=512) as cache:
            found = [cache.read(*other_order(np.random.default_rng(0), prompt))]
            found.append(cache.answer(prompt[:20], 60))
            found.append(cache.answer(prompt[:5], 5060, 1))
            # Part of a hybrid's memory cannot be taken back, and llama.cpp aborts where no key of a cache has RoPE.
            if name not in ("lfm2", "cohere2"):
                cache.copy(1, 2)
                found.append(cache.answer(prompt[:5], 5065, 2))
                state = cache.saved(2)
                cache.remove(0, 8, 40)
                cache.add(0, 40, -1, -32)
                cache.add(1, 0, -1, 3000)
                found.append(cache.answer(prompt[:5], 48))
                found.append(cache.answer(prompt[:5], 8065, 1))
                cache.divide(1, 0, 9000, 3)
                found.append(cache.answer(prompt[:5], 8069 // 3 + 1, 1))
                cache.restore(state, 3)
                found.append(cache.answer(prompt[:5], 5070, 3))
                cache.remove(3, -1, -1)
                found.append(cache.prompt(prompt[:40], 3, 100_000))
            return found

    plain = everything(model, "disabled")  # stock flash attention rounds
    environment("TURBO_CALIBRATION", "force")
    forced = everything(other, "enabled")
    assert not any(np.array_equal(*pair) for pair in zip(plain, forced, strict=True))
    errors = [compare(*pair).relative_error for pair in zip(plain, forced, strict=True)]
    assert max(errors) < 5e-5, errors


@pytest.mark.parametrize("unified", [True, False])
def test_centres_are_exact_where_images_are_read(unified, tmp_path, environment):
    """M-RoPE: the parts of an image share a time and differ in row and column, which turn their keys; a centre goes by time."""
    model = checkpoints.with_image_positions(tmp_path)
    other = random_calibration(model, tmp_path / "calibrated.gguf")
    prompt = [token % checkpoints.VOCABULARY for token in PROMPT[:40]]
    image = [(0, (300, 300 + i // 8, 300 + i % 8), 0) for i in range(64)]

    def everything(path: Path, flash: str) -> list[np.ndarray]:
        with Sequences(path, EXACT, flash=flash, unified=unified, sequences=2, length=512) as cache:
            found = [cache.prompt(prompt)]
            assert cache.decode(*image, embeddings=cache.embeddings[:64]) == 0
            found.append(cache.logits(64))
            cache.copy(0, 1)
            return [*found, cache.answer(prompt[:5], 308), cache.answer(prompt[5:10], 5000, 1)]

    plain = everything(model, "disabled")
    environment("TURBO_CALIBRATION", "force")
    forced = everything(other, "enabled")
    assert not any(np.array_equal(*pair) for pair in zip(plain, forced, strict=True))
    errors = [compare(*pair).relative_error for pair in zip(plain, forced, strict=True)]
    assert max(errors) < 5e-5, errors


@pytest.mark.parametrize("name", ["gpt-oss", "gemma2", "gpt2"])
def test_what_a_fixed_centre_would_change(name, tmp_path):
    """With attention sinks and capped scores there are only centres that turn, which attention knows; GPT-2 has no RoPE."""
    model = checkpoints.gguf(tmp_path, name)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog ate the food. " * 40)
    done = quietly(model, tmp_path / "out.gguf", text=text)
    assert done.turning == (0 if name == "gpt2" else done.layers)
    assert (done.reason is None) == done.centred == (name == "gpt2")
    with pytest.MonkeyPatch.context() as patch:
        prompt = [token % checkpoints.VOCABULARY for token in PROMPT[:40]]
        plain = run_gguf(model, prompt, EXACT)
        patch.setenv("TURBO_CALIBRATION", "force")
        assert compare(plain, run_gguf(done.path, prompt, EXACT)).relative_error < 2e-5


def test_attention_that_knows_no_centres(tmp_path, environment):
    """Without flash attention, or with heads that the kernel does not take, keys are scaled alone, and the log says so."""
    for head_size, flash, because in (
        (96, "enabled", "its kernel takes head sizes that are multiples of 64"),
        (64, "disabled", "it needs flash attention"),
    ):
        model = checkpoints.gguf(tmp_path / f"{head_size}", "llama", head_dim=head_size)
        path = random_calibration(model, tmp_path / "calibrated.gguf")
        types = CacheTypes("q8_0", "f16")
        with Sequences(model, types, flash=flash) as plain, Sequences(path, types, flash=flash) as cache:
            assert f"keys are not centred by position in 2 layers: {because}" in cache.log
            prompt = [token % checkpoints.VOCABULARY for token in PROMPT[:40]]
            assert compare(plain.prompt(prompt), cache.prompt(prompt)).relative_error < 0.1


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
    """A file of version 1, whose centres do not turn: as if the file had no calibration, with a warning; a sliding window's cache is short, but its positions are not."""
    model = checkpoints.gguf(tmp_path, name)
    calibrated = random_calibration(model, tmp_path / "calibrated.gguf", 1, context=measured)
    types = CacheTypes("q8_0", "q8_0")
    plain, _ = logits_and_log(model, types, longest)
    within, log = logits_and_log(calibrated, types, longest)
    assert not np.array_equal(within, plain) and WARNING not in log
    beyond, log = logits_and_log(calibrated, types, longest + 256)
    assert np.array_equal(beyond, plain)
    assert log.count(WARNING) == 1 and "turboquant-gguf calibrate makes one for all contexts" in log
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
    path = random_calibration(model, tmp_path / "calibrated.gguf", 1, context=256)
    short, long, plain = saved(path, types, 256), saved(path, types, 512), saved(model, types, 512)
    assert long == plain != short
    assert restored(path, types, plain, 512) is not None and restored(path, types, short, 256) is not None
    assert restored(path, types, short, 512) is None and restored(path, types, plain, 256) is None


@pytest.mark.parametrize("windows, count", [(1, 6), (5, 10), (7, 7), (40, 40)])
@pytest.mark.parametrize("positions", [700, 8192, 1 << 17])
def test_positions_that_are_read(windows, count, positions):
    """From the first to the last, and every window is read equally often."""
    texts = [[number] * 512 for number in range(windows)]
    readings = spread(texts, positions)
    starts = np.array([start for start, _ in readings])
    assert len(readings) == count and starts.min() == 0 and starts.max() == positions - 512
    assert {text[0]: sum(other == text for _, other in readings) for _, text in readings} == {
        number: count // windows for number in range(windows)
    }
    assert spread(texts, 512) == [(0, text) for text in texts]


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=128, rope_theta=10000.0)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=128,
    rope_theta=10000.0,
)
LINEAR = dict(rope_type="linear", factor=4.0, rope_theta=10000.0)
LONGROPE = dict(
    rope_type="longrope",
    short_factor=[1.0] * 8 + [1.5] * 8,
    long_factor=[2.0] * 8 + [4.0] * 8,
    original_max_position_embeddings=128,
    rope_theta=10000.0,
)


@pytest.mark.parametrize(
    "name, changes, fixed",
    [
        ("smollm3", {}, [3]),  # has a layer without RoPE
        ("llama", {}, []),
        ("llama", dict(rope_parameters=LINEAR), []),
        ("llama", dict(rope_parameters=LLAMA3), []),
        ("qwen3", dict(rope_parameters=YARN), []),
        ("gemma3", {}, []),
        ("stablelm", {}, []),
        ("glm4", {}, []),
        ("gptneox", {}, []),
        (
            "phi3",
            dict(rope_parameters=LONGROPE, max_position_embeddings=4096, original_max_position_embeddings=128),
            [],
        ),
    ],
    ids=lambda value: value.get("rope_parameters", {}).get("rope_type", "-") if isinstance(value, dict) else str(value),
)
def test_centres_hold_at_all_positions(name, changes, fixed, tmp_path, monkeypatch):
    """Whatever positions a text is read at, the same is found: the angles are those of the model's own RoPE."""
    model = checkpoints.gguf(tmp_path, name, **changes)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog ate the food. " * 20)
    found = []
    for positions in (4096, 60_000):
        monkeypatch.setattr(calibration, "POSITIONS", positions)
        done = quietly(model, tmp_path / f"{positions}.gguf", text=text, tokens=512)
        with GGUFFile(done.path) as file:
            turned = np.array(file.metadata[f"{KEY}turned"][:])
            found.append(np.array(file.metadata[f"{KEY}center"][:]).reshape(len(turned), -1))
        assert np.flatnonzero(turned == 0).tolist() == fixed
        assert done.turning == len(turned) - len(fixed)
    assert np.abs(found[0] - found[1]).max(-1) == pytest.approx(0, abs=0.02 * np.abs(found[0]).max())


def test_attention_that_cannot_be_measured_is_refused(tmp_path):
    model = checkpoints.gguf(tmp_path, "bloom")
    with pytest.raises(TurboquantError, match="cannot be measured: it uses ALiBi"):
        quietly(model, tmp_path / "none.gguf")


@pytest.mark.parametrize("types", ["turbo4", "turbo3"])
def test_calibrated_keys_lose_the_same_at_all_positions(calibrated, types, environment):
    """Of 200 tokens at the beginning, in the middle and at the end, where fixed centres lost twice as much.

    No first tokens are kept: at later positions there are none.
    """
    environment("TURBO_CACHE_WINDOW", "64")
    environment("TURBO_CACHE_SINKS", "0")
    losses = []
    for position in (0, 4000, 7900):
        found = []
        for cache in (EXACT, CacheTypes.parse(types)):
            with Model(calibrated) as loaded, loaded.open(256, cache) as context:
                found.append(context.read(PROMPT, position, outputs=len(PROMPT)).copy())
        losses.append(compare(*found).kl_mean)
    assert max(losses) < 1.4 * min(losses)


# ---- a better one ----


@pytest.mark.parametrize("types, factor", [("turbo4", 1.15), ("turbo3", 1.3), ("turbo2", 1.6), ("q4_0:f16", 1.15)])
def test_quantized_keys_lose_less(smollm2, calibrated, types, factor, environment):
    environment("TURBO_CACHE_WINDOW", "64")
    cache = CacheTypes.parse(types)
    truth = run_gguf(smollm2, PROMPT, EXACT)
    plain, better = (compare(truth, run_gguf(model, PROMPT, cache)).kl_mean for model in (smollm2, calibrated))
    assert better < plain / factor


def test_channels_with_outliers(smollm2_folder, tmp_path, few_readings):
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
        done = quietly(model, model.with_suffix(".calibrated.gguf"), tokens=1024)
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


@pytest.mark.parametrize("types, changes", [("f32", {}), ("q8_0", {}), ("turbo4", {}), ("q8_0", YARN)], ids=str)
@pytest.mark.parametrize("is_calibrated", [False, True])
@pytest.mark.parametrize("is_divided", [False, True])
def test_keys_are_those_of_the_positions_they_are_moved_to(
    types, changes, is_calibrated, is_divided, tmp_path, environment
):
    """In a model of one layer, where keys depend on their tokens and positions alone; also where YaRN scales them."""
    environment("TURBO_CALIBRATION", "force")
    rope = dict(rope_parameters=changes) if changes else {}
    model = checkpoints.gguf(
        tmp_path, "qwen3", head_dim=64, num_hidden_layers=1, layer_types=["full_attention"], **rope
    )
    if is_calibrated:
        model = random_calibration(model, tmp_path / "calibrated.gguf", scale=np.ones(128, np.float32))
    found = []
    for position in (900, 300):
        with Sequences(model, CacheTypes(types, types), length=512, flash="enabled") as cache:
            cache.read((7, position, 1))
            if position > 300 and is_divided:
                cache.divide(1, 0, 1000, 3)
            elif position > 300:
                cache.add(1, 0, 1000, -600)
            found.append(cache.read((9, 301, 1)))
    assert compare(*found).relative_error < {"f32": 1e-4, "q8_0": 0.02, "turbo4": 0.15}[types]


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


def test_again_it_writes_the_same_file(tmp_path):
    """A calibrated model is measured as if it were not."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog ate the food. " * 40)
    once = quietly(checkpoints.gguf(tmp_path, "gemma3"), tmp_path / "once.gguf", text=text)
    again = quietly(once.path, tmp_path / "again.gguf", text=text)
    assert again.path.read_bytes() == once.path.read_bytes()


def test_seed_and_length_choose_the_text(tmp_path, few_readings):
    model = checkpoints.gguf(tmp_path, "llama")
    text = tmp_path / "long.txt"
    text.write_text("".join(f"Line {number} says {number * number}. " for number in range(600)))
    a, b, c = (
        quietly(model, tmp_path / f"{name}.gguf", text=text, tokens=512, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert a.tokens == 512
    assert a.path.read_bytes() == b.path.read_bytes() != c.path.read_bytes()


SHORT = ("--tokens", "256")


def test_in_place_and_output_names(smollm2, tmp_path, monkeypatch, few_readings):
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
        ({"version": 3}, "of another version than 1 and 2"),
        ({"turned": None}, "does not say of each layer"),
        ({"turned": np.array([32], np.int32)}, "does not say of each layer"),
        ({"turned": np.array([32, 31], np.int32)}, "turns in 31 channels in layer 1"),
        ({"turned": np.array([32, -32], np.int32)}, "in layer 1, in which the model's keys do not"),
        ({"turned": np.array([32, 64], np.int32)}, "turns in 64 channels in layer 1"),
        ({"turned": np.array([32, 32], np.float32)}, "wrong type"),
        ({"center": None}, "turns in 32 channels in layer 0"),
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
        model = checkpoints.gguf(tmp_path, name)
        centred = random_calibration(model, tmp_path / f"{name}-centred.gguf", 1)
        with pytest.raises(TurboquantError) as error:
            Model(centred)
        assert "attention sinks or a cap" in error.value.details
