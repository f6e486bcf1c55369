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
from sequences import Sequences
from turboquant_gguf import cli
from turboquant_gguf.cachetypes import CacheTypes
from turboquant_gguf.calibration import KEY, Calibration, Layer, Moments, calibrate
from turboquant_gguf.convert import convert
from turboquant_gguf.errors import TurboquantError
from turboquant_gguf.ggufile import GGUFFile, rewrite
from turboquant_gguf.logits import Context, Model
from turboquant_gguf.modelmemory import ModelMemory
from turboquant_gguf.verify import EXACT, compare, run_gguf

PROMPT = list(range(1000, 1200))


def quietly(model: Path, output: Path | None = None, **options) -> Calibration:
    return calibrate(model, output, console=Console(quiet=True), **options)


@pytest.fixture(autouse=True)
def no_recent_window(monkeypatch):
    """What it covers is not quantized."""
    monkeypatch.setenv("LLAMA_ARG_CACHE_WINDOW", "0")


@pytest.fixture
def environment(monkeypatch):
    """Sets an environment variable for llama.cpp; undone after the test."""
    return monkeypatch.setenv


def random_calibration(model: Path, output: Path, **changes) -> Path:
    """The model with a calibration that fits it and means nothing."""
    rng = np.random.default_rng(0)
    with ModelMemory(model) as memory:
        sizes = [0 if layer.shares else layer.kv_heads * layer.head_size_k for layer in memory.layers]
    metadata = {
        f"{KEY}version": 1,
        f"{KEY}sizes": np.array(sizes, np.int32),
        f"{KEY}scale": np.exp(rng.standard_normal(sum(sizes))).astype(np.float32),
        f"{KEY}center": rng.standard_normal(sum(sizes)).astype(np.float32),
    }
    rewrite(model, output, KEY, metadata | {KEY + name: value for name, value in changes.items()})
    return output


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
    environment("LLAMA_TURBO_CALIBRATION", "force")
    forced = run_gguf(other, prompt, EXACT)
    assert not np.array_equal(plain, forced)
    # scales up to exp(3) on either side of a product of float32
    assert compare(plain, forced).relative_error < 2e-5


def test_turned_off_it_is_the_old_model(smollm2, calibrated, environment):
    cache = CacheTypes("turbo3", "turbo3")
    plain = run_gguf(smollm2, PROMPT, cache)
    assert not np.array_equal(plain, run_gguf(calibrated, PROMPT, cache))
    environment("LLAMA_TURBO_CALIBRATION", "0")
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
        patch.setenv("LLAMA_TURBO_CALIBRATION", "force")
        assert compare(plain, run_gguf(done.path, prompt, EXACT)).relative_error < 2e-5


# ---- a better one ----


@pytest.mark.parametrize("types, factor", [("turbo4", 1.3), ("turbo3", 1.5), ("turbo2", 1.5), ("q4_0:f16", 1.3)])
def test_quantized_keys_lose_less(smollm2, calibrated, types, factor):
    cache = CacheTypes.parse(types)
    truth = run_gguf(smollm2, PROMPT, EXACT)
    plain, better = (compare(truth, run_gguf(model, PROMPT, cache)).kl_mean for model in (smollm2, calibrated))
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
        done = quietly(model, model.with_suffix(".calibrated.gguf"), tokens=1024)
        losses.append(compare(truth, run_gguf(done.path, PROMPT, cache)).kl_mean)
    assert losses[1] < 1.2 * losses[0]


# ---- wherever keys move ----


@contextmanager
def opened(path: Path, types: CacheTypes) -> Iterator[Context]:
    with Model(path) as model, model.open(512, types) as context:
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
        # the same keys and values; a batch of two multiplies in another order than one of one
        assert compare(expected[None], found[None]).relative_error < 1e-2


def saved(path: Path, types: CacheTypes) -> bytes:
    with opened(path, types) as context:
        context.read(PROMPT, 0)
        size = context.bindings.llama_state_seq_get_size(context.handle, 0)
        data = (ctypes.c_uint8 * size)()
        assert context.bindings.llama_state_seq_get_data(context.handle, data, size, 0) == size
        return bytes(data)


def restored(path: Path, types: CacheTypes, state: bytes) -> np.ndarray | None:
    with opened(path, types) as context:
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


def test_again_it_writes_the_same_file(calibrated, tmp_path):
    again = quietly(calibrated, tmp_path / "again.gguf")  # a calibrated model is measured as if it were not
    assert again.path.read_bytes() == calibrated.read_bytes()


def test_seed_and_length_choose_the_text(smollm2, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("".join(f"Line {number} says {number * number}. " for number in range(600)))
    a, b, c = (
        quietly(smollm2, tmp_path / f"{name}.gguf", text=text, tokens=512, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert a.tokens == 512
    assert a.path.read_bytes() == b.path.read_bytes() != c.path.read_bytes()


def test_in_place_and_output_names(smollm2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model.gguf"
    model.write_bytes(smollm2.read_bytes())
    done = CliRunner().invoke(cli.cli, ["calibrate", "model.gguf", "--tokens", "256", "--json"], catch_exceptions=False)
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
    assert CliRunner().invoke(cli.cli, ["calibrate", "model.gguf", "--tokens", "256", "--in-place"]).exit_code == 0
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
    ],
)
def test_damaged_calibration_is_refused(tmp_path, changes, because):
    model = checkpoints.gguf(tmp_path, "llama")
    damaged = random_calibration(model, tmp_path / "damaged.gguf", **changes)
    with pytest.raises(TurboquantError) as error:
        Model(damaged)
    assert any(part in error.value.details for part in because.split("|")), error.value.details
    assert "calibrate the model again" in error.value.details


def test_centre_is_refused_where_it_would_change_the_model(tmp_path):
    for name in ("gpt-oss", "gemma2"):
        centred = random_calibration(checkpoints.gguf(tmp_path, name), tmp_path / f"{name}-centred.gguf")
        with pytest.raises(TurboquantError) as error:
            Model(centred)
        assert "attention sinks or a cap" in error.value.details
