"""The turbo types from Python, through the C library that llama.cpp itself uses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ..llamacpp import ggml
from ..turbo_tables import TABLES

BLOCK = 64
"""Values in a block."""


@dataclass(frozen=True)
class TurboType:
    """What there is to know of a type.

    ggml_type: its number in ggml, as llama-cpp-python's type_k and type_v take it. bits_per_value: everything
    counted. block: values in a block. bytes_per_block: its size. mse: mean squared error on normally distributed
    values of variance 1, measured on held-out data when the codebooks were trained.
    """

    name: str
    ggml_type: int
    bits_per_value: float
    block: int
    bytes_per_block: int
    mse: float


@cache
def types() -> tuple[TurboType, ...]:
    """The turbo types, from the smallest to the most exact."""
    found = []
    for table in TABLES:
        size = 2 + table.bits * BLOCK // 8
        found.append(TurboType(table.name, table.ggml_type, 8 * size / BLOCK, BLOCK, size, table.mse))
    return tuple(found)


def simd() -> str:
    """The instruction set the codec was compiled for: "avx512", "avx2", "neon" or "scalar"."""
    return ggml.function("turbo_cpu_simd")().decode()


def quantize(x: NDArray[np.float32], type: str) -> NDArray[np.uint8]:
    """Blocks of `x`.

    x: float32 of shape (..., n), n a multiple of 64. type: "turbo2", "turbo3" or "turbo4".
    Returns uint8 of shape (..., n/64 * bytes per block).
    NaN is stored as 0, an infinity as the largest finite magnitude of its block, and magnitudes above 2^29
    as 2^29. Raises ValueError for another dtype, shape or type.
    """
    kind = _type(type)
    x = np.asarray(x)
    if x.dtype != np.float32:
        raise ValueError(f"quantize takes float32, not {x.dtype}: use x.astype(numpy.float32)")
    if x.ndim == 0 or x.shape[-1] % BLOCK:
        raise ValueError(f"the last dimension must be a multiple of {BLOCK} (a block), but the shape is {x.shape}")
    return ggml.quantize(x, kind.name)


def dequantize(blocks: NDArray[np.uint8], type: str) -> NDArray[np.float32]:
    """Values of `blocks`.

    blocks: uint8 of shape (..., m), m a multiple of the type's bytes per block, as `quantize` returns them.
    Returns float32 of shape (..., m / bytes per block * 64). Raises ValueError for another dtype, shape or type.
    """
    kind = _type(type)
    blocks = np.asarray(blocks)
    if blocks.dtype != np.uint8:
        raise ValueError(f"dequantize takes uint8, not {blocks.dtype}")
    if blocks.ndim == 0 or blocks.shape[-1] % kind.bytes_per_block:
        raise ValueError(
            f"the last dimension must be a multiple of {kind.bytes_per_block} (a {kind.name} block), "
            f"but the shape is {blocks.shape}"
        )
    blocks = np.ascontiguousarray(blocks)
    y = np.empty((*blocks.shape[:-1], blocks.shape[-1] // kind.bytes_per_block * BLOCK), np.float32)
    ggml.function(f"dequantize_row_{kind.name}_cpu")(ggml.pointer(blocks), ggml.pointer(y), y.size)
    return y


def _type(name: str) -> TurboType:
    for kind in types():
        if kind.name == name:
            return kind
    raise ValueError(f"there is no type {name!r}: choose from {', '.join(kind.name for kind in types())}")
