"""The operators of the turbo types on a device, against the CPU's and against float64. test_vulkan.py and test_metal.py
run this; the variable TEST_DEVICE names the device.

In a process of its own: in one that has a device, everything else would use it, too.
"""

import os
from dataclasses import replace

import numpy as np
import pytest

import turboquant_gguf
from test_attention import TURBO, mask_of, without_window
from test_set_rows import require_bytes_of_the_codec
from turboquant_gguf.codec import attention_numpy
from turboquant_gguf.codec.attention import Attention, Problem, Window
from turboquant_gguf.llamacpp import ggml

DEVICE = os.environ["TEST_DEVICE"]


def hostile(rng: np.random.Generator, count: int) -> np.ndarray:
    """Blocks of 64 values: Gaussian, with tails, of all magnitudes, constant, zero, NaN and infinities, any bits."""
    x = rng.standard_normal((count, 64)).astype(np.float32)
    x[1::9] *= np.exp(rng.standard_normal((len(x[1::9]), 64)) * 3).astype(np.float32)
    x[2::9] *= np.float32(10.0) ** rng.uniform(-18, 12, (len(x[2::9]), 1)).astype(np.float32)
    x[3::9] = np.rint(x[3::9])
    x[4::9] = 0.5
    x[5::9] = rng.integers(0, 2**32, (len(x[5::9]), 64), np.uint32).view(np.float32)
    x[6::9, ::7] = np.nan
    x[7::9, 3::11] = -np.inf
    x[8::9, 8:] = 0
    x[-1] = 0
    return x


@pytest.mark.parametrize("type", TURBO)
def test_set_rows_writes_the_bytes_of_the_reference(type: str):
    rng = np.random.default_rng(1)
    sequences, heads, tokens, blocks = 2, 3, 17, 3
    x = hostile(rng, sequences * heads * tokens * blocks).reshape(sequences, heads, tokens, 64 * blocks)
    for index_type, dtype in (("i64", np.int64), ("i32", np.int32)):
        require_bytes_of_the_codec(x, type, index_type, dtype, rng, device=DEVICE)


def test_set_rows_of_halves_writes_the_bytes_of_the_reference():
    rng = np.random.default_rng(5)
    with np.errstate(over="ignore"):
        x = hostile(rng, 180).reshape(2, 3, 15, 128).astype(np.float16)
    x[0, 0, 0] = np.arange(128).astype(np.uint16).view(np.float16) * rng.choice([-1, 1], 128)  # subnormal
    require_bytes_of_the_codec(x, "turbo4", "i64", np.int64, rng, device=DEVICE)
    blocks = np.zeros_like(turboquant_gguf.quantize(x.astype(np.float32), "turbo4"))
    with ggml.Graph(device=DEVICE) as graph:
        coded = graph.tensor(blocks, "turbo4", 128, 90, 1, 1)
        graph.finish(graph.operator("ggml_cpy", graph.tensor(x, "f16", 128, 90, 1, 1), coded))
        graph.run()
        found = graph.read(coded, blocks)
    assert np.array_equal(found, turboquant_gguf.quantize(x.astype(np.float32), "turbo4"))


@pytest.mark.parametrize("type", TURBO)
def test_rows_are_decoded_to_the_bit_and_copied_both_ways(type: str):
    rng = np.random.default_rng(2)
    blocks, rows = 3, 37
    row_bytes = ggml.quantize(np.zeros((1, 64 * blocks), np.float32), type).size
    stored = rng.integers(0, 256, (2, rows, row_bytes), np.uint8)  # every pattern is a block
    wanted = turboquant_gguf.dequantize(stored, type).reshape(2, rows, 64 * blocks)
    index = rng.integers(0, rows, (2, 11)).astype(np.int32)
    with ggml.Graph(device=DEVICE) as graph:
        source = graph.tensor(stored, type, 64 * blocks, rows, 2, 1)
        some = graph.operator("ggml_get_rows", source, graph.tensor(index, "i32", 11, 2, 1, 1))
        graph.finish(some)
        graph.run()
        found = graph.read(some, np.empty((2, 11, 64 * blocks), np.float32))
    assert np.array_equal(found.view(np.uint32), np.take_along_axis(wanted, index[..., None], 1).view(np.uint32))
    x = hostile(rng, 2 * rows * blocks).reshape(2, rows, 64 * blocks)
    for shape in ((64 * blocks, rows, 2, 1), (64 * blocks * rows * 2, 1, 1, 1)):
        with ggml.Graph(device=DEVICE) as graph:
            floats = graph.tensor(np.zeros_like(x), "f32", *shape)
            graph.finish(graph.operator("ggml_cpy", graph.tensor(stored, type, 64 * blocks, rows, 2, 1), floats))
            graph.run()
            assert np.array_equal(graph.read(floats, np.empty_like(x)).view(np.uint32), wanted.view(np.uint32))
        with ggml.Graph(device=DEVICE) as graph:
            coded = graph.tensor(np.zeros_like(stored), type, 64 * blocks, rows, 2, 1)
            graph.finish(graph.operator("ggml_cpy", graph.tensor(x, "f32", *shape), coded))
            graph.run()
            assert np.array_equal(graph.read(coded, np.empty_like(stored)), turboquant_gguf.quantize(x, type))


# ---- attention ----


def problem(
    type_k: str, type_v: str, sizes: tuple[int, int], queries: int, keys: int, *, heads: int = 6, kv_heads: int = 2,
    sequences: int = 1, mask: str = "causal", seed: int = 0, **other: object,
) -> Problem:  # fmt: skip
    rng = np.random.default_rng(seed)
    q, k, v = (
        rng.standard_normal((sequences, *shape)).astype(np.float32)
        for shape in ((heads, queries, sizes[0]), (keys, kv_heads, sizes[0]), (keys, kv_heads, sizes[1]))
    )
    return Problem(
        q=q, k=ggml.quantize(k, type_k), v=ggml.quantize(v, type_v), type_k=type_k, type_v=type_v, size_v=sizes[1],
        scale=sizes[0] ** -0.5, mask=mask_of(rng, mask, sequences, heads, queries, keys), **other,
    )  # fmt: skip


def with_window(plain: Problem, slots: int, tokens: int, n_tiles: int, seed: int = 3) -> Problem:
    rng = np.random.default_rng(seed)
    sequences, heads, queries, size_k = plain.q.shape
    keys, kv_heads = plain.k.shape[1:3]
    ring_k, ring_v, new_k, new_v = (
        rng.standard_normal((sequences, count, kv_heads, size)).astype(kind)
        for kind, count in ((np.float16, slots), (np.float32, tokens))
        for size in (size_k, plain.size_v)
    )
    mask = np.where(rng.random((sequences, 1, queries, slots + tokens)) < 0.5, 0, -np.inf).astype(np.float16)
    columns = np.where(rng.random((sequences, keys)) < 0.3, rng.integers(0, slots + tokens, (sequences, keys)), -1)
    biases = tiles = None
    if n_tiles:
        biases = rng.normal(0, 10, (sequences, heads, queries, n_tiles)).astype(np.float32)
        tiles = rng.integers(0, n_tiles, (sequences, keys + slots + tokens)).astype(np.int32)
    window = Window(ring_k, ring_v, new_k, new_v, mask, columns.astype(np.int32), biases, tiles)
    cache = plain.mask if plain.mask is not None else np.zeros((1, 1, queries, keys), np.float16)
    return replace(plain, window=window, mask=cache)


def check(asked: Problem) -> None:
    """Within float32's roundings of float64: nothing is rounded to fewer bits, queries and weights neither."""
    with Attention(asked, device=DEVICE) as attention:
        attention.run()
        found = attention.result()
        attention.run()
        assert np.array_equal(found, attention.result())
    plain = without_window(asked, asked.q) if asked.window else asked
    k, v = (attention_numpy.decode(rows, type) for rows, type in ((plain.k, plain.type_k), (plain.v, plain.type_v)))
    group = plain.q.shape[1] // k.shape[2]
    k, v = (np.repeat(x, group, axis=2).astype(np.float64) for x in (k, v))
    weights = attention_numpy.weights(plain)
    exact = np.einsum("shqk,skhd->sqhd", weights, v, optimize=True)
    extent = np.einsum("shqd,skhd->shqk", np.abs(plain.q), np.abs(k), optimize=True) * plain.scale
    allowed = 4e-6 * (1 + extent.max(axis=-1, keepdims=True)) * weights
    allowed = np.einsum("shqk,skhd->sqhd", allowed, np.abs(v), optimize=True) + 1e-12
    assert np.isfinite(found).all()
    worst = (np.abs(found - exact) / allowed).max()
    assert worst <= 1, f"{worst} of what is allowed"


@pytest.mark.parametrize(
    "type_k, type_v", [("turbo4", "turbo4"), ("turbo3", "turbo2"), ("q8_0", "turbo3"), ("turbo2", "f16")]
)
def test_attention(type_k: str, type_v: str):
    for queries, keys in ((1, 700), (2, 64), (8, 257), (35, 200)):
        check(problem(type_k, type_v, (64, 64), queries, keys, seed=queries))
    check(problem(type_k, type_v, (64, 64), 3, 130, sequences=2, mask="scattered", softcap=15.0))
    check(problem(type_k, type_v, (64, 64), 3, 130, mask="blind", max_bias=8.0,
                  sinks=np.linspace(-3, 3, 6).astype(np.float32)))  # fmt: skip


@pytest.mark.parametrize("sizes", [(128, 128), (192, 128), (576, 512)])
def test_attention_at_other_head_sizes(sizes: tuple[int, int]):
    check(problem("turbo4", "turbo3", sizes, 5, 100, heads=4, kv_heads=1))


@pytest.mark.parametrize("type_k, type_v", [("turbo4", "turbo4"), ("turbo2", "turbo3"), ("q4_0", "q8_0")])
def test_attention_with_a_recent_window(type_k: str, type_v: str):
    for queries, keys, n_tiles in ((1, 700, 0), (1, 300, 9), (8, 257, 3), (35, 200, 1)):
        check(with_window(problem(type_k, type_v, (64, 64), queries, keys), 37, queries, n_tiles))
    check(with_window(problem(type_k, type_v, (64, 64), 3, 130, sequences=2, mask="scattered", heads=4, kv_heads=4,
                              sinks=np.linspace(-3, 3, 4).astype(np.float32)), 64, 6, 5))  # fmt: skip


def test_attention_that_is_not_computed_is_refused():
    asked = problem("turbo4", "q6_K", (256, 256), 1, 64)
    with pytest.raises(ValueError, match="does not compute"):
        Attention(asked, device=DEVICE)
