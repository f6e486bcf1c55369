"""KVarN as tools/compare_kvarn.py has it: the quantizer by its properties, and the whole tool on a tiny model."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import tiny_model
from checkpoints import random_calibration
from turboquant_gguf.weights.calibration import Layer, Rotary

TOOLS = Path(__file__).parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import compare_kvarn
from compare_kvarn import CHANNELS, TOKENS, Cache, Simulation, balance, encode, kvarn, kvarn_bits

AXES = pytest.mark.parametrize("group", [TOKENS, CHANNELS], ids=["keys", "values"])


@pytest.fixture
def x() -> np.ndarray:
    """Heads of 64 channels, of which some are large, over 300 tokens, of which some are, with means."""
    rng = np.random.default_rng(0)
    noise, means, channels, tokens = (
        rng.standard_normal((2, *shape)) for shape in ((300, 64), (1, 64), (1, 64), (300, 1))
    )
    return ((noise + means) * np.exp(channels + tokens)).astype(np.float32)


def error(x: np.ndarray, got: np.ndarray) -> float:
    return float(np.square(x - got).sum() / np.square(x).sum())


@AXES
def test_error_falls_with_bits(x, group):
    """A bit more is half the step, and so a quarter of the error; the f16 of the rest is far below."""
    errors = [error(x, kvarn(x, bits, group)) for bits in range(2, 9)]
    assert errors[0] < 0.3
    assert all(3 < more / less < 6 for more, less in pairwise(errors))


@AXES
@pytest.mark.parametrize("tile", [64, 128])
def test_bits_are_those_of_what_is_stored(x, group, tile):
    stored = encode(x[:, :tile], 3, group)
    assert stored.codes.max() == 7 and stored.size / stored.codes.size == kvarn_bits(3, group, tile, 64)


def test_bits_of_the_published_tile():
    assert Cache("kvarn4", "kvarn2").stored_bits(128) == (4.375, 2.375)  # as published for k4v2_g128
    assert Cache("kvarn4", "kvarn2").stored_bits(64) == (4.5, 2.625)
    assert Cache("kvarn4", "kvarn2").stored_bits(256) == (4.3125, 2.25)
    assert Cache("turbo4", "turbo2").stored_bits(64) == (4.25, 2.25)


def test_balanced_tiles_are_even_along_both_axes(x):
    tile = x[:, :128]
    factors = balance(tile)
    balanced = tile / factors[TOKENS] / factors[CHANNELS]
    for axis in (TOKENS, CHANNELS):
        before, after = tile.std(axis), balanced.std(axis)
        assert (before.max(-1) > 10 * before.min(-1)).all()
        assert (after.max(-1) < 1.01 * after.min(-1)).all()


def test_balancing_helps_tokens_of_different_size(x, monkeypatch):
    balanced = error(x, kvarn(x, 3, TOKENS))
    monkeypatch.setattr(compare_kvarn, "ROUNDS", 0)
    assert balanced < 0.5 * error(x, kvarn(x, 3, TOKENS))


@AXES
@pytest.mark.parametrize("value", [0, 1, -3e-5, 200])
def test_constant_tiles_come_back(group, value):
    constant = np.full((1, 128, 64), value, np.float32)
    assert encode(constant, 2, group).decoded() == pytest.approx(constant, rel=2**-10)


@AXES
def test_constant_channels_and_tokens_do_not_spoil_the_others(x, group):
    tile = x[:, :128].copy()
    tile[:, :, 5], tile[:, 7] = 0, 0
    got = encode(tile, 8, group).decoded()
    assert np.isfinite(got).all() and error(tile, got) < 1e-3


@AXES
def test_tiles_know_nothing_of_each_other(x, group):
    changed = x.copy()
    changed[:, 128:] *= 100
    assert (kvarn(x, 3, group)[:, :128] == kvarn(changed, 3, group)[:, :128]).all()


def test_channels_are_those_that_transformers_turns():
    """A vector in llama.cpp's order, turned there, is the reordered one turned by halves."""
    rng = np.random.default_rng(0)
    pairs, positions = np.arange(3), np.array([0, 5, 400])
    neighbours = Rotary(2 * pairs, 2 * pairs + 1, 0.1**pairs, 128)
    layer = Layer(rng.standard_normal((2, 8)), rng.random((2, 8)), neighbours)
    halves = compare_kvarn.in_halves(layer, turns=True)
    order = [0, 2, 4, 1, 3, 5, 6, 7]
    assert (halves.scale == layer.scale[:, order]).all()
    assert halves.centers(positions) == pytest.approx(layer.centers(positions)[..., order])
    assert compare_kvarn.in_halves(layer, turns=False).rotary is None


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, TOOLS / "compare_kvarn.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_whole_tool(tmp_path):
    model, text, report = tiny_model.write(tmp_path / "tiny.gguf"), tmp_path / "text.txt", tmp_path / "report.json"
    text.write_text("The cat sat on the mat, and the dog ate the food. " * 10)
    types = ("--types", "turbo4,turbo4:turbo2,q4_0", "--calibrated", random_calibration(model, tmp_path / "new.gguf"))
    small = ("--context", 64, "--chunks", 2, "--tile", 16, "--window", 8)
    done = run("--model", model, "--text", text, *small, *types, "--json", report)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert found["identity_kld_max"] < 1e-5 and "chunk 2 of 2" in done.stderr
    results = {result["types"]: result for result in found["results"]}
    assert list(results) == [
        "kvarn4", "turbo4", "turbo4, calibrated", "kvarn4:kvarn2", "turbo4:turbo2", "turbo4:turbo2, calibrated", "q4_0",
        "q4_0, calibrated",
    ]  # fmt: skip
    for name, result in results.items():
        assert f"| {name} |" in done.stdout
        assert result["tokens"] == 2 * 31 and 0 < result["kld_median"] < result["kld_p99"] < 1
        assert (result["times_kvarn"] is None) == name.startswith("kvarn")
    assert results["turbo4:turbo2"]["times_kvarn"]["to"] == "kvarn4:kvarn2"
    assert results["kvarn4:kvarn2"]["kld_mean"] > results["kvarn4"]["kld_mean"]


def test_the_window_is_exact(tmp_path):
    """It changes nothing if it is as long as the chunk; a little shorter, the last query alone misses a key."""
    import torch

    model, chunk = tiny_model.write(tmp_path / "tiny.gguf"), list(range(3, 67))
    differing = []
    for window in (64, 58):
        simulation = Simulation(model, window, torch.get_num_threads())
        kept, lossy = (simulation.logits(chunk, cache) for cache in (None, Cache("kvarn2", "turbo2", tile=16)))
        differing.append((np.abs(kept - lossy).max(-1) > 1e-3).tolist())
    # A query at position p sees p - 57 to p and 0 to 3: from position 62 on it misses 4. Logits are of 32 to 62.
    assert differing == [[False] * 31, [False] * 30 + [True]]


def test_what_has_no_counterpart_is_refused():
    refused = run("--types", "f16")
    assert refused.returncode == 1 and "KVarN has nothing to put beside f16" in refused.stderr
