"""The turbo types from Python, through the C library that llama.cpp itself uses."""

from __future__ import annotations

import ctypes
import itertools
import sys
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from . import native

BLOCK = 64
"""Values in a block."""


@dataclass(frozen=True)
class TurboType:
    """What there is to know of a type.

    ggml_type: its number in ggml, as llama-cpp-python's type_k and type_v take it. bits_per_value: everything
    counted. block: values in a block. bytes_per_block: its size. mse: mean squared error on normally distributed values of variance 1, measured on held-out data when the
    codebooks were trained.
    """

    name: str
    ggml_type: int
    bits_per_value: float
    block: int
    bytes_per_block: int
    mse: float


class _Codec(ctypes.Structure):
    """turbo_codec of ggml-turbo.h, as far as it is read here."""

    _fields_ = [
        ("bits", ctypes.c_int),
        ("rms_to_scale", ctypes.c_float),
        ("max_to_scale", ctypes.c_float),
        ("mse", ctypes.c_float),
    ]


@cache
def _library(name: str) -> ctypes.CDLL:
    file = {"win32": f"{name}.dll", "darwin": f"lib{name}.dylib"}.get(sys.platform, f"lib{name}.so")
    return ctypes.CDLL(str(native.library_dir() / file))


@cache
def types() -> tuple[TurboType, ...]:
    """The turbo types, from the smallest to the most exact."""
    get_codec = _library("ggml-base").turbo_get_codec
    get_codec.restype = ctypes.POINTER(_Codec)
    found = []
    for bits in (2, 3, 4):
        size = 2 + bits * BLOCK // 8
        mse = float(f"{get_codec(bits).contents.mse:.4g}")  # a C float, printed as the tables write it
        name = f"turbo{bits}"
        found.append(TurboType(name, _ggml_type(name), 8 * size / BLOCK, BLOCK, size, mse))
    return tuple(found)


def _ggml_type(name: str) -> int:
    type_name = _library("ggml-base").ggml_type_name
    type_name.restype = ctypes.c_char_p
    return next(number for number in itertools.count() if type_name(number) == name.encode())


def simd() -> str:
    """The instruction set the codec was compiled for: "avx512", "avx2", "neon" or "scalar"."""
    name = _library("ggml-cpu").turbo_cpu_simd
    name.restype = ctypes.c_char_p
    return name().decode()


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
    x = np.ascontiguousarray(x)
    blocks = np.empty((*x.shape[:-1], x.shape[-1] // BLOCK * kind.bytes_per_block), np.uint8)
    _library("ggml-cpu")[f"quantize_row_{kind.name}"](_pointer(x), _pointer(blocks), ctypes.c_int64(x.size))
    return blocks


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
    _library("ggml-cpu")[f"dequantize_row_{kind.name}_cpu"](_pointer(blocks), _pointer(y), ctypes.c_int64(y.size))
    return y


def _type(name: str) -> TurboType:
    for kind in types():
        if kind.name == name:
            return kind
    raise ValueError(f"there is no type {name!r}: choose from {', '.join(kind.name for kind in types())}")


def _pointer(array: NDArray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)
