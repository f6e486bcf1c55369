"""The attention kernel against attention in float64, for any shape, mask and type, on each instruction set."""

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import instruction_sets
from turboquant_gguf.codec import attention_numpy, codec_numpy
from turboquant_gguf.codec.attention import Attention, Problem, Window
from turboquant_gguf.llamacpp import ggml

ROOT = Path(__file__).parent.parent
TURBO = ("turbo2", "turbo3", "turbo4")
STOCK = ("f16", "q8_0", "q4_0")
TILE = 64  # keys whose weights are rounded together

# ---- problems ----


def values(rng: np.random.Generator, kind: str, *shape: int) -> np.ndarray:
    """Gaussian values, or what models really have: a few channels or tokens that are far larger than the rest."""
    x = rng.standard_normal(shape).astype(np.float32)
    if kind == "large channel":
        x[..., rng.integers(shape[-1])] *= 100
    elif kind == "large token":
        x[:, rng.integers(shape[1])] *= 1000
    elif kind == "small":
        x *= 1e-6
    elif kind == "zeros":
        x[..., :64] = 0
    return x


def mask_of(
    rng: np.random.Generator, kind: str, sequences: int, heads: int, queries: int, keys: int
) -> np.ndarray | None:
    query, key = np.arange(queries)[:, None] + keys - queries, np.arange(keys)
    if kind == "none":
        return None
    visible = key <= query  # causal
    if kind == "window":
        visible = visible & (key > query - 70)
    elif kind == "blind":  # some queries see nothing
        visible = visible & (rng.random((queries, 1)) < 0.5)
    elif kind == "scattered":  # cells of several sequences; another mask for each head
        visible = rng.random((sequences, heads, queries, keys)) < 0.3
    mask = np.where(visible, np.minimum(key - query, 0) if kind == "distance" else 0, -np.inf).astype(np.float16)
    return mask.reshape((1, 1, *mask.shape)[-4:])


KINDS = st.sampled_from(["gaussian", "large channel", "large token", "small", "zeros"])
MASKS = st.sampled_from(["none", "causal", "window", "blind", "distance", "scattered"])
HEAD_SIZES = st.sampled_from([64, 64, 128, 128, 192, 256, 576])


@st.composite
def problems(draw, stock: tuple[str, ...] = STOCK) -> Problem:
    type_k, type_v = draw(
        st.sampled_from([(a, b) for a in TURBO + stock for b in TURBO + stock if a in TURBO or b in TURBO])
    )
    size_k, size_v = draw(HEAD_SIZES), draw(HEAD_SIZES)
    sequences, kv_heads = draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 3, 4, 7, 16, 20]))
    queries = draw(st.sampled_from([1, 1, 2, 3, 8, 35]))
    keys = draw(st.sampled_from([1, 2, 63, 64, 65, 200, 256, 257, *([700, 1500] if heads * queries < 150 else [])]))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    max_bias = draw(st.sampled_from([0.0, 0.0, 8.0]))
    mask = mask_of(rng, draw(MASKS), sequences, heads, queries, keys)
    return Problem(
        q=values(rng, draw(KINDS), sequences, heads, queries, size_k),
        k=ggml.quantize(values(rng, draw(KINDS), sequences, keys, kv_heads, size_k), type_k),
        v=ggml.quantize(values(rng, draw(KINDS), sequences, keys, kv_heads, size_v), type_v),
        type_k=type_k,
        type_v=type_v,
        size_v=size_v,
        scale=draw(st.sampled_from([1.0, 4.0])) / size_k**0.5,
        mask=mask,
        sinks=rng.normal(0, 3, heads).astype(np.float32) if draw(st.booleans()) else None,
        max_bias=max_bias if mask is not None else 0.0,
        softcap=draw(st.sampled_from([0.0, 0.0, 15.0])),
    )


# ---- what is expected ----


def rounded_queries(problem: Problem) -> np.ndarray:
    """What the kernel multiplies turbo keys with: 8 bits, of the largest of each 64 values."""
    if problem.type_k not in TURBO:
        return problem.q
    chunks = problem.q.reshape(*problem.q.shape[:-1], -1, 64)
    largest = np.abs(chunks).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        units = np.where(largest > 0, np.rint(chunks * (np.float32(127) / largest)), 0)
    return (units * (largest.astype(np.float64) / 127)).reshape(problem.q.shape)


def expected(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """The result with rounded queries, and how far the kernel may be from it: its 16-bit weights, and float32."""
    problem = replace(problem, q=rounded_queries(problem))
    group = problem.q.shape[1] // problem.k.shape[2]
    k, v = (
        np.repeat(attention_numpy.decode(rows, type), group, axis=2).astype(np.float64)
        for rows, type in ((problem.k, problem.type_k), (problem.v, problem.type_v))
    )
    weights = attention_numpy.weights(problem)
    result = np.einsum("shqk,skhd->sqhd", weights, v, optimize=True)
    # a score is off by a few roundings of what it is summed of, and a weight, relatively, by as much
    extent = np.einsum("shqd,skhd->shqk", np.abs(problem.q), np.abs(k), optimize=True) * problem.scale
    if problem.mask is not None:
        extent += np.abs(problem.mask, where=np.isfinite(problem.mask), out=np.zeros_like(problem.mask)).max(initial=0)
    float32 = 2e-6 * (1 + extent.max(axis=-1, keepdims=True)) * weights
    tolerance = np.einsum("shqk,skhd->sqhd", float32, np.abs(v), optimize=True) + 1e-12
    if problem.type_v in TURBO:
        codec = codec_numpy.codecs()[problem.type_v]
        scales = codec_numpy.scales_of(codec, problem.v.reshape(-1, codec.block_bytes))
        scales = np.repeat(scales.reshape(*problem.v.shape[:3], -1), group, axis=2).astype(np.float64)
        entries = np.abs(v.reshape(*scales.shape, 64)) / np.where(scales == 0, 1, scales)[..., None]
        for first in range(0, v.shape[1], TILE):
            tile = slice(first, first + TILE)
            products = weights[..., tile, None] * scales[:, tile].transpose(0, 2, 1, 3)[:, :, None]  # s h q k chunk
            half_step = 0.51 * products.max(axis=3) / 32767
            tolerance += np.einsum("shqc,skhcd->sqhcd", half_step, entries[:, tile]).reshape(tolerance.shape)
    return result, tolerance


def check(problem: Problem, result: np.ndarray) -> None:
    exact, tolerance = expected_with_window(problem) if problem.window else expected(problem)
    error = np.abs(result - exact)
    worst = np.unravel_index(np.argmax(error - tolerance), error.shape)
    assert np.all(error <= tolerance), f"{error[worst]} at {worst}, {tolerance[worst]} allowed"


# ---- in llama.cpp ----


def result_of(problem: Problem, threads: int) -> np.ndarray:
    with Attention(problem, threads) as attention:
        attention.run()
        first = attention.result()
        attention.run()
        assert np.array_equal(first, attention.result())
    return first


many = settings(max_examples=120, suppress_health_check=list(HealthCheck))


@many
@given(problems(), st.integers(1, 5))
def test_kernel_in_llama_cpp(problem: Problem, threads: int):
    check(problem, result_of(problem, threads))


@settings(many, max_examples=30)
@given(problems(), st.integers(2, 9))
def test_threads_do_not_change_a_bit(problem: Problem, threads: int):
    assert np.array_equal(result_of(problem, threads), result_of(problem, 1))


# ---- with a recent window ----


@st.composite
def problems_with_window(draw, stock: tuple[str, ...] = ("f16", "q8_0")) -> Problem:
    problem = draw(problems(stock))
    sequences, _, queries, size_k = problem.q.shape
    keys, kv_heads = problem.k.shape[1:3]
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    slots, tokens = draw(st.sampled_from([1, 37, 64, 150])), draw(st.sampled_from([1, 2, 8, 70]))
    share = draw(st.sampled_from([0.0, 0.1, 0.9]))
    mask = np.where(rng.random((sequences, 1, queries, slots + tokens)) < share, 0, -np.inf)
    parts = (
        (kind, count, size)
        for kind, count in ((np.float16, slots), (np.float32, tokens))
        for size in (size_k, problem.size_v)
    )
    shapes = st.sampled_from(["gaussian", "large channel", "zeros"])
    arrays = [values(rng, draw(shapes), sequences, count, kv_heads, size).astype(kind) for kind, count, size in parts]
    columns = np.where(rng.random((sequences, keys)) < 0.2, rng.integers(0, slots + tokens, (sequences, keys)), -1)
    biases = tiles = None
    if n_tiles := draw(st.sampled_from([0, 0, 1, 3, 9])):
        biases = rng.normal(0, draw(st.sampled_from([1, 30])), (*problem.q.shape[:3], n_tiles)).astype(np.float32)
        run = draw(st.sampled_from([1, 64, 100]))  # keys of a tile side by side
        tiles = rng.integers(0, n_tiles, (sequences, keys + slots + tokens)).astype(np.int32)
        tiles = tiles[:, np.arange(tiles.shape[1]) // run * run]
    window = Window(*arrays, mask=mask.astype(np.float16), columns=columns.astype(np.int32), biases=biases, tiles=tiles)
    cache = problem.mask if problem.mask is not None else np.zeros((1, 1, queries, keys), np.float16)
    return replace(problem, window=window, mask=cache)


def without_window(problem: Problem, rounded: np.ndarray) -> Problem:
    """The same in one cache of float32. Keys of the cache meet `rounded` queries, others do not: hence twice the size.

    What a query adds to the products with keys of a tile is one more channel for each tile.
    """
    window = problem.window
    k = attention_numpy.decode(problem.k, problem.type_k)
    more = np.concatenate([window.ring_k.astype(np.float32), window.new_k], axis=1)
    k = np.concatenate([np.concatenate([k, np.zeros_like(k)], -1), np.concatenate([np.zeros_like(more), more], -1)], 1)
    q = [rounded, problem.q]
    if window.tiles is not None:
        q.append(window.biases)
        one_hot = np.eye(window.biases.shape[-1], dtype=np.float32)[window.tiles]  # sequences, keys, tiles
        k = np.concatenate([k, np.repeat(one_hot[:, :, None], k.shape[2], axis=2)], -1)
    v = [attention_numpy.decode(problem.v, problem.type_v), window.ring_v.astype(np.float32), window.new_v]
    seen = np.take_along_axis(window.mask, np.maximum(window.columns, 0)[:, None, None], -1) != -np.inf
    cache = np.where(seen & (window.columns >= 0)[:, None, None], -np.inf, problem.mask)
    sequences, heads = problem.q.shape[0], problem.mask.shape[1]
    masks = [np.broadcast_to(mask, (sequences, heads, *mask.shape[2:])) for mask in (cache, window.mask)]
    return replace(
        problem,
        q=np.concatenate(q, -1).astype(np.float32),
        k=np.ascontiguousarray(k).view(np.uint8),
        v=np.ascontiguousarray(np.concatenate(v, axis=1)).view(np.uint8),
        type_k="f32",
        type_v="f32",
        mask=np.concatenate(masks, axis=-1),
        window=None,
    )


def expected_with_window(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    exact, tolerance = expected(without_window(problem, rounded_queries(problem)))
    if problem.type_v in TURBO:  # weights of 16 bits: half a step of the largest among 64 keys, for each of them
        tolerance = tolerance + 1.1e-3 * np.abs(attention_numpy.decode(problem.v, problem.type_v)).max()
    return exact, tolerance


@many
@given(problems_with_window(), st.integers(1, 5))
def test_kernel_with_a_recent_window(problem: Problem, threads: int):
    check(problem, result_of(problem, threads))


@settings(many, max_examples=40)
@given(problems_with_window(), st.integers(1, 5))
def test_reference_of_the_recent_window(problem: Problem, threads: int):
    alone = without_window(problem, rounded_queries(problem))
    exact, tolerance = expected(replace(alone, q=problem.window.queries(np.concatenate([problem.q, problem.q], -1))))
    with Attention(problem, threads, reference=True) as attention:
        attention.run()
        result = attention.result()
    assert np.all(np.abs(result - exact) <= tolerance + 1e-5 * np.abs(exact).max())


# ---- alone, for each instruction set ----


def as_input(problem: Problem) -> bytes:
    """What attention_simd.cpp reads."""
    window = problem.window
    none = np.zeros((0, 0, problem.q.shape[2], problem.k.shape[1]), np.float16)
    mask = none if problem.mask is None else problem.mask
    sequences, heads, queries, size_k = problem.q.shape
    keys, kv_heads = problem.k.shape[1:3]
    numbers = struct.pack(
        "15i3f",
        *(sequences, heads, queries, size_k, keys, kv_heads, problem.size_v),
        *(ggml.type_number(problem.type_k), ggml.type_number(problem.type_v)),
        *(mask.shape[1], mask.shape[0], problem.sinks is not None),
        *((window.ring_k.shape[1], window.new_k.shape[1]) if window else (0, 0)),
        window.biases.shape[-1] if window and window.biases is not None else 0,
        *(problem.scale, problem.max_bias, problem.softcap),
    )
    q = window.queries(problem.q) if window else problem.q
    arrays = [q, problem.k, problem.v, mask, *([] if problem.sinks is None else [problem.sinks])]
    if window:
        arrays += [window.ring, window.new_k, window.new_v, window.mask, window.numbers]
    return numbers + b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)


@pytest.mark.parametrize("build", [name for name, (_, _, simd) in instruction_sets.BUILDS.items() if simd != "scalar"])
def test_kernel_alone(build: str, grafted: Path, tmp_path: Path):
    include = [f"-isystem{grafted / folder}" for folder in ("ggml/include", "ggml/src", "ggml/src/ggml-cpu")]
    sources = [
        ROOT / "tests" / "attention_simd.cpp",
        ROOT / "ggml_turbo" / "cpu" / "turbo-attention.cpp",
        ROOT / "ggml_turbo" / "format" / "turbo-reference.c",
        ROOT / "ggml_turbo" / "ops" / "turbo-window.c",
    ]
    program = instruction_sets.compile(build, tmp_path / "attention_simd", sources, *include)

    @settings(many, max_examples=40)
    @given(problems(stock=("f16",)) | problems_with_window(stock=("f16",)))
    def holds(problem: Problem) -> None:
        done = subprocess.run(program, input=as_input(problem), capture_output=True, check=True)
        result = np.frombuffer(done.stdout, np.float32)
        sequences, heads, queries, _ = problem.q.shape
        check(problem, result.reshape(sequences, queries, heads, problem.size_v))

    holds()


# ---- from Python ----


def test_a_type_that_ggml_has_not():
    with pytest.raises(ValueError, match="turbo9"):
        ggml.type_number("turbo9")


def test_benchmark_of_the_operator(tmp_path: Path):
    report = tmp_path / "report.json"
    script = [sys.executable, ROOT / "tools" / "bench_attention.py", "--rounds", "1", "--keys", "256"]
    subprocess.run([*script, "--types", "turbo4:f16,q8_0", "--json", report], check=True, capture_output=True)
    results = json.loads(report.read_text())["results"]
    assert list(results) == ["f16", "turbo4:f16", "q8_0"]
    for result in results.values():
        assert result["ratio"] > 0 and result["error"] < 0.02
    wrong = subprocess.run([*script, "--types", "turbo9"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "turbo9" in wrong.stderr
