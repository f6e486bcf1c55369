"""llama.cpp's own Metal kernels in the emulator, against NumPy: if these are right, it is. test_metal.py runs this."""

import ctypes
import os

import numpy as np
import pytest

from device_operators import DEVICE, problem
from turboquant_gguf.codec import attention_numpy
from turboquant_gguf.codec.attention import Attention
from turboquant_gguf.llamacpp import ggml


@pytest.mark.parametrize("type", ["f16", "q8_0"])
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_attention(type: str, queries: int):
    """Decoding, and with 40 queries the kernel that multiplies matrices; keys that fill no tile."""
    asked = problem(type, type, (64, 64), queries, 113, seed=queries)
    with Attention(asked, device=DEVICE) as attention:
        attention.run()
        found = attention.result()
    exact = attention_numpy.attention(asked)
    assert np.square(found - exact).sum() < 1e-6 * np.square(exact).sum()  # of roundings to half


@pytest.mark.parametrize("type", ["f32", "f16", "q8_0"])
def test_rows(type: str):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((16, 192)).astype(np.float32)
    to = rng.permutation(16)
    stored = ggml.quantize(x, type)
    with ggml.Graph(device=DEVICE) as graph:
        cache = graph.tensor(np.zeros_like(stored), type, 192, 16, 1, 1)
        rows = graph.tensor(to, "i64", 16, 1, 1, 1)
        graph.finish(graph.operator("ggml_set_rows", cache, graph.tensor(x, "f32", 192, 16, 1, 1), rows))
        graph.run()
        written = graph.read(cache, np.empty_like(stored))
    expected = np.empty_like(stored)
    expected[to] = stored
    assert np.array_equal(written, expected)
    with ggml.Graph(device=DEVICE) as graph:
        rows = graph.tensor(to.astype(np.int32), "i32", 16, 1, 1, 1)
        found = graph.operator("ggml_get_rows", graph.tensor(stored, type, 192, 16, 1, 1), rows)
        graph.finish(found)
        graph.run()
        read = graph.read(found, np.empty_like(x))
    assert np.array_equal(read, attention_numpy.decode(stored, type)[to])


def test_the_device_ran_the_kernels_that_are_meant():
    dispatches = ctypes.CDLL(os.environ["GGML_BACKEND_PATH"]).simt_dispatches
    for kernel in ("vec_f16_dk64_dv64", "vec_q8_0_dk64_dv64", "f16_dk64_dv64", "kv_q8_0_f16"):
        assert dispatches(f"kernel_flash_attn_ext_{kernel}".encode()) > 0, kernel
