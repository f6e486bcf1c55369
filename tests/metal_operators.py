"""What the Metal back end does beside device_operators.py: products, copies, all its types and sizes; what it refuses.

test_metal.py runs this, in a process that has the device.
"""

import ctypes
import os
from collections.abc import Callable
from ctypes import c_int, c_int64, c_size_t, c_void_p
from dataclasses import replace

import numpy as np
import pytest

import turboquant_gguf
from device_operators import DEVICE, check, problem, with_window
from test_attention import TURBO
from turboquant_gguf.codec.attention import Attention
from turboquant_gguf.llamacpp import ggml

POINTERS = {
    "mul_mat": 2,
    "add": 2,
    "cont": 1,
    "dup": 1,
    "repeat": 2,
    "soft_max": 1,
    "get_rows": 2,
    "sqr": 1,
    "mul_mat_id": 3,
}
ggml._PROTOTYPES["ggml-base"] |= {f"ggml_{name}": (c_void_p, *[c_void_p] * (1 + n)) for name, n in POINTERS.items()}
ggml._PROTOTYPES["ggml-base"] |= {
    "ggml_concat": (c_void_p, c_void_p, c_void_p, c_void_p, c_int),
    "ggml_view_2d": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_size_t, c_size_t),
}

EMULATOR = ctypes.CDLL(os.environ["GGML_BACKEND_PATH"])
EMULATOR.simt_threadgroup_bytes.restype = c_size_t


def require_threadgroup_memory(kernel: str) -> None:
    """A kernel that was used asked for no more than two threadgroups have beside each other on a device."""
    assert EMULATOR.simt_dispatches(kernel.encode()) > 0, kernel
    assert 0 < EMULATOR.simt_threadgroup_bytes(kernel.encode()) <= 16 * 1024, kernel


def computed(make: Callable[[ggml.Graph], int], like: np.ndarray) -> np.ndarray:
    with ggml.Graph(device=DEVICE) as graph:
        out = make(graph)
        graph.finish(out)
        graph.run()
        return graph.read(out, np.empty_like(like))


# ---- products and copies ----


@pytest.mark.parametrize("type", TURBO)
@pytest.mark.parametrize("rows, columns", [(1, 1), (37, 3), (64, 33)])
def test_products_with_weights_of_ours(type: str, rows: int, columns: int):
    """Two slices of weights, each for two of the other factor; rows and columns that fill no tile."""
    rng = np.random.default_rng(rows)
    weights = turboquant_gguf.quantize(rng.standard_normal((2, rows, 192)).astype(np.float32), type)
    x = rng.standard_normal((4, columns, 192)).astype(np.float32)

    def product(graph: ggml.Graph) -> int:
        factors = graph.tensor(weights, type, 192, rows, 2, 1), graph.tensor(x, "f32", 192, columns, 4, 1)
        return graph.operator("ggml_mul_mat", *factors)

    found = computed(product, np.empty((4, columns, rows), np.float32))
    decoded = turboquant_gguf.dequantize(weights, type).reshape(2, rows, 192).repeat(2, 0).astype(np.float64)
    exact, allowed = x @ decoded.transpose(0, 2, 1), np.abs(x) @ np.abs(decoded).transpose(0, 2, 1)
    assert (np.abs(found - exact) <= 2e-6 * allowed).all()
    require_threadgroup_memory("turbo_mul_mat")


@pytest.mark.parametrize("type, tokens, distinct", [("turbo2", 1, 1), ("turbo3", 40, 3), ("turbo4", 101, 1)])
def test_products_with_experts(type: str, tokens: int, distinct: int):
    """An expert that no token names, and one that all name, some twice: its columns fill several tiles.

    distinct: columns of a token, one for all of its experts or one for each.
    """
    rng = np.random.default_rng(tokens)
    experts, rows, used = 5, 37, 3
    weights = turboquant_gguf.quantize(rng.standard_normal((experts, rows, 192)).astype(np.float32), type)
    x = rng.standard_normal((tokens, distinct, 192)).astype(np.float32)
    named = np.argsort(rng.random((tokens, experts)), axis=1).astype(np.int32)  # of these the first ones are used
    named[named == 4] = 2
    named[:, 1] = 0

    def product(graph: ggml.Graph) -> int:
        whole = graph.tensor(named, "i32", experts, tokens, 1, 1)
        ids = graph.operator("ggml_view_2d", whole, used, tokens, 4 * experts, 0)
        factors = graph.tensor(weights, type, 192, rows, experts, 1), graph.tensor(x, "f32", 192, distinct, tokens, 1)
        return graph.operator("ggml_mul_mat_id", *factors, ids)

    found = computed(product, np.empty((tokens, used, rows), np.float32))
    of_token = turboquant_gguf.dequantize(weights, type).reshape(experts, rows, 192)[named[:, :used]].astype(np.float64)
    x = np.broadcast_to(x, (tokens, used, 192))
    exact, allowed = (np.einsum("turc,tuc->tur", w, c) for w, c in ((of_token, x), (np.abs(of_token), np.abs(x))))
    assert (np.abs(found - exact) <= 2e-6 * allowed).all()


@pytest.mark.parametrize("type", TURBO)
def test_copies(type: str):
    rng = np.random.default_rng(7)
    x = rng.standard_normal((3, 128)).astype(np.float32)
    blocks = turboquant_gguf.quantize(x, type)
    for name in ("ggml_cont", "ggml_dup"):
        assert np.array_equal(
            computed(lambda g: g.operator(name, g.tensor(blocks, type, 128, 3, 1, 1)), blocks), blocks
        )
    to_f16 = computed(
        lambda g: g.operator(
            "ggml_cpy", g.tensor(blocks, type, 128, 3, 1, 1), g.tensor(x.astype(np.float16), "f16", 128, 3, 1, 1)
        ),
        x.astype(np.float16),
    )
    assert np.array_equal(to_f16, turboquant_gguf.dequantize(blocks, type).reshape(3, 128).astype(np.float16))
    half = x.astype(np.float16)
    of_f16 = computed(
        lambda g: g.operator("ggml_cpy", g.tensor(half, "f16", 128, 3, 1, 1), g.tensor(blocks, type, 128, 3, 1, 1)),
        blocks,
    )
    assert np.array_equal(of_f16, turboquant_gguf.quantize(half.astype(np.float32), type))
    require_threadgroup_memory("turbo_encode")
    require_threadgroup_memory("turbo_decode")


# ---- attention ----


@pytest.mark.parametrize("type_k", TURBO)
@pytest.mark.parametrize("type_v", [*TURBO, "f16", "q8_0"])
def test_pairs_of_types(type_k: str, type_v: str):
    check(problem(type_k, type_v, (64, 64), 3, 70, seed=1))
    if type_v not in TURBO:
        check(problem(type_v, type_k, (64, 64), 1, 70, seed=2))


@pytest.mark.parametrize("size_v, rows", [(64, 32), (128, 32), (192, 32), (256, 32), (320, 16), (512, 16), (576, 16)])
@pytest.mark.parametrize("queries", [1, 7])
def test_head_sizes(size_v: int, rows: int, queries: int):
    """All sizes of values, with keys as large and others; for 3 rows, and for more than a threadgroup has."""
    rows = 8 if queries == 1 else rows
    kernel = f"turbo_attention_m{rows // 8}_c{size_v // 64}"
    for size_k in {size_v} if queries > 1 else {64, size_v, 320}:
        check(problem("turbo3", "turbo4", (size_k, size_v), queries, 65, heads=6, kv_heads=2, seed=3))
    require_threadgroup_memory(kernel)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (5, 5), (12, 1), (20, 2)])
def test_groups(heads: int, kv_heads: int):
    check(problem("turbo4", "turbo4", (64, 64), 3, 41, heads=heads, kv_heads=kv_heads, seed=4, max_bias=4.0))


def test_many_keys_are_split():
    """Of a cache that is mostly hidden: some parts see nothing."""
    asked = problem("turbo4", "turbo2", (64, 64), 1, 4001, heads=4, kv_heads=1, seed=5)
    mask = np.full((1, 1, 1, 4001), -np.inf, np.float16)
    mask[..., [3, 1500, 1501, 4000]] = [0, -1, 0.5, 0]
    check(replace(asked, mask=mask))


def test_what_no_query_sees_may_be_no_number():
    asked = problem("turbo4", "f16", (64, 64), 2, 70, mask="causal", seed=6)
    values = asked.v.copy()
    mask = np.zeros((1, 1, 2, 70), np.float16)
    mask[..., 33:40] = -np.inf
    values[:, 33:40] = 255  # NaN
    hidden = replace(asked, v=values, mask=mask)
    with Attention(hidden, device=DEVICE) as attention:
        attention.run()
        found = attention.result()
    with Attention(replace(hidden, v=asked.v), device=DEVICE) as attention:
        attention.run()
        assert np.array_equal(found, attention.result())


def test_a_window_with_several_heads_of_512():
    check(with_window(problem("turbo2", "turbo4", (512, 512), 9, 40, heads=4, kv_heads=2), 5, 9, 2))


# ---- what is refused ----


def refused(make: Callable[[ggml.Graph], int]) -> bool:
    with ggml.Graph(device=DEVICE) as graph:
        try:
            graph.finish(make(graph))
        except ValueError:
            return True
    return False


NODES = {
    "CPY to a stock type": lambda g, turbo, x: g.operator(
        "ggml_cpy", turbo, g.tensor(np.zeros(2 * 2 * 68, np.uint8), "q8_0", 128, 2, 1, 1)
    ),
    "CPY from one type of ours to another": lambda g, turbo, x: g.operator(
        "ggml_cpy", turbo, g.tensor(np.zeros((2, 2 * 18), np.uint8), "turbo2", 128, 2, 1, 1)
    ),
    "CONCAT": lambda g, turbo, x: g.operator("ggml_concat", turbo, turbo, 1),
    "REPEAT": lambda g, turbo, x: g.operator("ggml_repeat", turbo, turbo),
    "ADD": lambda g, turbo, x: g.operator("ggml_add", turbo, x),
    "MUL_MAT with columns in f16": lambda g, turbo, x: g.operator(
        "ggml_mul_mat", turbo, g.tensor(np.zeros((2, 128), np.float16), "f16", 128, 2, 1, 1)
    ),
    "MUL_MAT_ID with columns in f16": lambda g, turbo, x: g.operator(
        "ggml_mul_mat_id",
        turbo,
        g.tensor(np.zeros((2, 128), np.float16), "f16", 128, 1, 2, 1),
        g.tensor(np.zeros(2, np.int32), "i32", 1, 2, 1, 1),
    ),
}


@pytest.mark.parametrize("name", NODES)
def test_what_has_no_kernel_is_refused(name: str):
    """llama.cpp's own code says yes to some of these, whatever their types, and then finds no kernel."""
    zeros = np.zeros((2, 2 * 34), np.uint8)

    def node(graph: ggml.Graph) -> int:
        turbo = graph.tensor(zeros, "turbo4", 128, 2, 1, 1)
        return NODES[name](graph, turbo, graph.tensor(np.zeros((2, 128), np.float32), "f32", 128, 2, 1, 1))

    assert refused(node)


@pytest.mark.parametrize("type_v, sizes", [("q5_1", (64, 64)), ("f16", (64, 80)), ("turbo4", (384, 384))])
def test_attention_without_a_kernel_is_refused(type_v: str, sizes: tuple[int, int]):
    with pytest.raises(ValueError, match="does not compute"):
        Attention(problem("turbo4", type_v, sizes, 1, 64), device=DEVICE)
