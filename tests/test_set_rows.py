"""SET_ROWS, which writes keys and values into the cache: the codec's bytes, in the right rows, by any threads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import turboquant_gguf
from turboquant_gguf.llamacpp import ggml

ROWS = 23


def require_bytes_of_the_codec(
    x: np.ndarray, type: str, index_type: str, dtype: type, rng: np.random.Generator, **graph_options: object
) -> None:
    """Writes x, float32 or float16 (sequences, heads, tokens, values), into rows that are drawn, of a cache with ROWS."""
    sequences, heads, tokens, values = x.shape
    exact = x.astype(np.float32)
    rows = np.stack([rng.permutation(ROWS)[:tokens] for _ in range(sequences)]).astype(dtype)
    before = rng.integers(
        0, 256, (sequences, heads, ROWS, turboquant_gguf.quantize(exact[0, 0, 0], type).size), np.uint8
    )
    with ggml.Graph(**graph_options) as graph:
        cache = graph.tensor(before, type, values, ROWS, heads, sequences)
        new = graph.tensor(x, "f16" if x.dtype == np.float16 else "f32", *x.shape[::-1])
        # indices: one row of them for each sequence, the same for all heads
        to = graph.tensor(rows, index_type, tokens, 1, sequences, 1)
        graph.finish(graph.operator("ggml_set_rows", cache, new, to))
        graph.run()
        after = graph.read(cache, np.empty_like(before))
    expected = before.copy()
    for sequence in range(sequences):
        expected[sequence][:, rows[sequence]] = turboquant_gguf.quantize(exact[sequence], type)
    assert np.array_equal(after, expected)


@pytest.mark.parametrize("type", ["turbo2", "turbo3", "turbo4"])
@settings(max_examples=30)
@given(data=st.data())
def test_rows_hold_what_the_codec_writes(type: str, data: st.DataObject):
    blocks, sequences, heads, tokens = (data.draw(st.integers(1, most)) for most in (7, 3, 2, ROWS))
    index_type, dtype = data.draw(st.sampled_from([("i64", np.int64), ("i32", np.int32)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    x = rng.standard_normal((sequences, heads, tokens, 64 * blocks)).astype(np.float32)
    require_bytes_of_the_codec(x, type, index_type, dtype, rng, threads=data.draw(st.integers(1, 6)))
