"""The attention operator of llama.cpp's CPU back end, FLASH_ATTN_EXT, on NumPy arrays: what a model's graph runs."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from . import ggml


@dataclass(frozen=True)
class Problem:
    """softmax(scale q k^T + slope mask) v for every query head (arXiv 2205.14135).

    q: float32 (sequences, query heads, queries, head size of K). k, v: what the cache holds, uint8 (sequences, keys,
    KV heads, bytes of a head's row), of the ggml types type_k and type_v; size_v: head size of V. mask: float16
    (1 or sequences, 1 or query heads, queries, keys), added to the scores; None: every query sees every key. sinks:
    float32 (query heads,), scores of one more key without a value. max_bias: ALiBi's largest exponent of a slope
    (arXiv 2108.12409), 0 for none. softcap: scores become softcap * tanh(score / softcap), 0 for none.
    """

    q: NDArray[np.float32]
    k: NDArray[np.uint8]
    v: NDArray[np.uint8]
    type_k: str
    type_v: str
    size_v: int
    scale: float
    mask: NDArray[np.float16] | None = None
    sinks: NDArray[np.float32] | None = None
    max_bias: float = 0.0
    softcap: float = 0.0


class Attention:
    """A graph of that one operator, ready to run as often as wanted. A context manager: it owns memory and threads.

    threads: how many work on it. reference: llama.cpp's own scalar path, for comparison, instead of fast kernels.
    Raises ValueError for a type that ggml does not have.
    """

    def __init__(self, problem: Problem, threads: int = 1, *, reference: bool = False) -> None:
        call = ggml.function
        with ExitStack() as stack:
            backend = call("ggml_backend_cpu_init")()
            stack.callback(call("ggml_backend_free"), backend)
            call("ggml_backend_cpu_set_n_threads")(backend, threads)
            call("ggml_backend_cpu_set_use_ref")(backend, reference)
            size = 16 * call("ggml_tensor_overhead")() + call("ggml_graph_overhead")()
            context = call("ggml_init")(ggml.InitParams(size, None, True))
            stack.callback(call("ggml_free"), context)

            contents: list[tuple[int, NDArray]] = []

            def tensor(data: NDArray, type: str, *shape: int) -> int:
                made = call("ggml_new_tensor_4d")(context, ggml.type_number(type), *shape)
                contents.append((made, np.ascontiguousarray(data)))
                return made

            def cache(rows: NDArray, type: str, head_size: int) -> int:
                sequences, keys, heads, _ = rows.shape
                # heads of a token side by side in memory; the operator wants the keys of a head as its rows
                return call("ggml_permute")(context, tensor(rows, type, head_size, heads, keys, sequences), 0, 2, 1, 3)

            sequences, heads, queries, size_k = problem.q.shape
            q = tensor(problem.q, "f32", size_k, queries, heads, sequences)
            k = cache(problem.k, problem.type_k, size_k)
            v = cache(problem.v, problem.type_v, problem.size_v)
            mask = None
            if problem.mask is not None:
                mask = tensor(problem.mask.astype(np.float16), "f16", *problem.mask.shape[::-1])
            out = call("ggml_flash_attn_ext")(
                context, q, k, v, mask, problem.scale, problem.max_bias, problem.softcap
            )
            if problem.sinks is not None:
                call("ggml_flash_attn_ext_add_sinks")(out, tensor(problem.sinks, "f32", heads, 1, 1, 1))
            graph = call("ggml_new_graph")(context)
            call("ggml_build_forward_expand")(graph, out)
            buffer = call("ggml_backend_alloc_ctx_tensors")(context, backend)
            stack.callback(call("ggml_backend_buffer_free"), buffer)
            for made, data in contents:
                call("ggml_backend_tensor_set")(made, ggml.pointer(data), 0, data.nbytes)
            self._backend, self._graph, self._out = backend, graph, out
            self._shape = (sequences, queries, heads, problem.size_v)
            self._owned = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._owned.close()

    def run(self) -> None:
        """Computes; RuntimeError if ggml reports a failure."""
        status = ggml.function("ggml_backend_graph_compute")(self._backend, self._graph)
        if status != 0:
            raise RuntimeError(f"ggml could not compute the attention: status {status}")

    def result(self) -> NDArray[np.float32]:
        """What the last run computed: float32 (sequences, queries, query heads, head size of V)."""
        result = np.empty(self._shape, np.float32)
        ggml.function("ggml_backend_tensor_get")(self._out, ggml.pointer(result), 0, result.nbytes)
        return result
