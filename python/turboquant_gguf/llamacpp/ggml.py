"""The C libraries of this package (ggml, llama), through ctypes: as many of their functions as this package calls."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..core.owner import Owner
from ..turbo_tables import NAMES, TABLES
from . import native

LAST_TYPE = max(TABLES, key=lambda table: table.ggml_type).name
"""The type with the largest number: ggml's table of types ends there."""


class InitParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class GGUFInitParams(ctypes.Structure):
    """gguf_init_params."""

    _fields_ = [("no_alloc", c_bool), ("ctx", c_void_p)]


class ContextParams(ctypes.Structure):
    """llama_turbo_params: -1 in a field says nothing."""

    _fields_ = [("cache_window", c_int32), ("cache_sinks", c_int32), ("calibration", c_int32)]


class MemorySize(ctypes.Structure):
    """turbo_memory_size: bytes."""

    _fields_ = [("weights", c_uint64), ("cache", c_uint64), ("compute", c_uint64)]


class MemoryLayer(ctypes.Structure):
    """turbo_memory_layer: the attention of a layer."""

    _fields_ = [
        ("heads", c_uint32),
        ("kv_heads", c_uint32),
        ("head_size_k", c_uint32),
        ("head_size_v", c_uint32),
        ("window", c_uint32),
        ("shares", c_bool),
    ]


class Attention(ctypes.Structure):
    """turbo_attention: what attention in one layer got."""

    _fields_ = [
        ("layer", c_int32),
        ("tokens", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_size", c_int32),
        ("scale", c_float),
        ("soft_cap", c_float),
        ("sinks", c_bool),
        ("q", POINTER(c_float)),
        ("k", POINTER(c_float)),
        ("mask", POINTER(c_float)),
    ]


class Rotary(ctypes.Structure):
    """turbo_rotary: how the keys of a layer turn with their position."""

    _fields_ = [
        ("pairs", c_int32),
        ("is_neox", c_bool),
        ("tile", c_int32),
        ("angles", ctypes.c_double * 512),
    ]


attention_callback = ctypes.CFUNCTYPE(c_bool, POINTER(Attention), c_void_p)
"""turbo_attention_callback."""

GGUF_SCALARS = {
    "u8": ctypes.c_uint8,
    "i8": ctypes.c_int8,
    "u16": ctypes.c_uint16,
    "i16": ctypes.c_int16,
    "u32": c_uint32,
    "i32": ctypes.c_int32,
    "f32": c_float,
    "bool": c_bool,
    "u64": c_uint64,
    "i64": c_int64,
    "f64": ctypes.c_double,
}
"""The types of single numbers in a GGUF's metadata, as gguf_type_name calls them."""

_log_callback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_quantize_row = (None, c_void_p, c_void_p, c_int64)

# library -> function -> result, arguments
_PROTOTYPES: dict[str, dict[str, tuple]] = {
    "ggml-base": {
        "ggml_version": (c_char_p,),
        "ggml_type_name": (c_char_p, c_int),
        "ggml_type_size": (c_size_t, c_int),
        "ggml_blck_size": (c_int64, c_int),
        "ggml_is_quantized": (c_bool, c_int),
        "ggml_row_size": (c_size_t, c_int, c_int64),
        "ggml_quantize_chunk": (c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
        "ggml_tensor_overhead": (c_size_t,),
        "ggml_graph_overhead": (c_size_t,),
        "ggml_init": (c_void_p, InitParams),
        "ggml_free": (None, c_void_p),
        "ggml_new_tensor_4d": (c_void_p, c_void_p, c_int, c_int64, c_int64, c_int64, c_int64),
        "ggml_permute": (c_void_p, c_void_p, c_void_p, c_int, c_int, c_int, c_int),
        "ggml_flash_attn_ext": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_float, c_float, c_float),
        "ggml_flash_attn_ext_add_sinks": (None, c_void_p, c_void_p),
        "ggml_get_rows": (c_void_p, c_void_p, c_void_p, c_void_p),
        "ggml_cpy": (c_void_p, c_void_p, c_void_p, c_void_p),
        "ggml_set_rows": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
        "ggml_new_graph": (c_void_p, c_void_p),
        "ggml_build_forward_expand": (None, c_void_p, c_void_p),
        "ggml_backend_alloc_ctx_tensors": (c_void_p, c_void_p, c_void_p),
        "ggml_backend_buffer_free": (None, c_void_p),
        "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
        "ggml_backend_tensor_get": (None, c_void_p, c_void_p, c_size_t, c_size_t),
        "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
        "ggml_backend_free": (None, c_void_p),
        "ggml_backend_dev_description": (c_char_p, c_void_p),
        "ggml_backend_dev_name": (c_char_p, c_void_p),
        "ggml_backend_dev_type": (c_int, c_void_p),
        "ggml_backend_reg_name": (c_char_p, c_void_p),
        "ggml_backend_dev_init": (c_void_p, c_void_p, c_char_p),
        "ggml_backend_dev_supports_op": (c_bool, c_void_p, c_void_p),
        "ggml_log_get": (None, c_void_p, c_void_p),
        "ggml_log_set": (None, c_void_p, c_void_p),
        "gguf_init_from_file": (c_void_p, c_char_p, GGUFInitParams),
        "gguf_free": (None, c_void_p),
        "gguf_type_name": (c_char_p, c_int),
        "gguf_get_data_offset": (c_size_t, c_void_p),
        "gguf_get_n_kv": (c_int64, c_void_p),
        "gguf_get_key": (c_char_p, c_void_p, c_int64),
        "gguf_get_kv_type": (c_int, c_void_p, c_int64),
        **{f"gguf_get_val_{name}": (kind, c_void_p, c_int64) for name, kind in GGUF_SCALARS.items()},
        "gguf_get_val_str": (c_char_p, c_void_p, c_int64),
        "gguf_get_arr_type": (c_int, c_void_p, c_int64),
        "gguf_get_arr_n": (c_size_t, c_void_p, c_int64),
        "gguf_get_arr_data": (c_void_p, c_void_p, c_int64),
        "gguf_get_arr_str": (c_char_p, c_void_p, c_int64, c_size_t),
        "gguf_get_n_tensors": (c_int64, c_void_p),
        "gguf_get_tensor_name": (c_char_p, c_void_p, c_int64),
        "gguf_get_tensor_ne": (POINTER(c_int64), c_void_p, c_int64),
        "gguf_get_tensor_type": (c_int, c_void_p, c_int64),
        "gguf_get_tensor_offset": (c_size_t, c_void_p, c_int64),
        "gguf_get_tensor_size": (c_size_t, c_void_p, c_int64),
        "gguf_remove_key": (c_int64, c_void_p, c_char_p),
        "gguf_set_val_u32": (None, c_void_p, c_char_p, c_uint32),
        "gguf_set_arr_data": (None, c_void_p, c_char_p, c_int, c_void_p, c_size_t),
        "gguf_write_to_file": (c_bool, c_void_p, c_char_p, c_bool),
        "turbo_window_attention": (c_void_p, c_void_p, POINTER(c_void_p), c_float, c_float, c_float),
    },
    "ggml": {
        "ggml_backend_reg_count": (c_size_t,),
        "ggml_backend_reg_get": (c_void_p, c_size_t),
        "ggml_backend_reg_by_name": (c_void_p, c_char_p),
        "ggml_backend_dev_count": (c_size_t,),
        "ggml_backend_dev_get": (c_void_p, c_size_t),
        "ggml_backend_dev_by_name": (c_void_p, c_char_p),
        "ggml_backend_load_all_from_path": (None, c_char_p),
        "turbo_library_path": (c_char_p, c_void_p),
    },
    "ggml-cpu": {
        "ggml_backend_cpu_init": (c_void_p,),
        "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
        "ggml_backend_cpu_set_use_ref": (None, c_void_p, c_bool),
        "turbo_cpu_simd": (c_char_p,),
        **{f"quantize_row_{name}": _quantize_row for name in NAMES},
        **{f"dequantize_row_{name}_cpu": _quantize_row for name in NAMES},
    },
    "llama": {
        "llama_version": (c_char_p,),
        "llama_turbo_set_next": (c_bool, POINTER(ContextParams)),
        "turbo_memory_open": (c_void_p, c_char_p),
        "turbo_memory_close": (None, c_void_p),
        "turbo_memory_n_layer": (c_uint32, c_void_p),
        "turbo_memory_get_layer": (MemoryLayer, c_void_p, c_uint32),
        "turbo_memory_measure": (c_bool, c_void_p, c_int, c_int, c_uint32, c_uint32, POINTER(MemorySize)),
        "turbo_memory_errors": (c_char_p,),
        "turbo_observer_new": (c_void_p, attention_callback, c_void_p),
        "turbo_observer_free": (None, c_void_p),
        "turbo_observer_eval": (c_bool, c_void_p, c_bool, c_void_p),
        "turbo_get_rotary": (None, c_void_p, c_int32, POINTER(Rotary)),
    },
}


def library_path(name: str) -> Path:
    """The file of one of the libraries, such as "ggml-base".

    "ggml-cpu" may be there in several builds, one for each instruction set: this is the one in use.
    """
    if name == "ggml-cpu":
        return _cpu_backend()
    file = {"win32": f"{name}.dll", "darwin": f"lib{name}.dylib"}.get(sys.platform, f"lib{name}.so")
    return native.library_dir() / file


def _cpu_backend() -> Path:
    if not function("ggml_backend_reg_by_name")(b"CPU"):
        load_backends()
    backend = function("ggml_backend_reg_by_name")(b"CPU")
    if not backend:
        raise FileNotFoundError(f"there is no CPU back end in {native.library_dir()}: install this package again")
    return Path(os.fsdecode(function("turbo_library_path")(backend))).resolve()


@cache
def _library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(library_path(name)))


@cache
def function(name: str):
    """The C function called `name`, ready to be called from Python. Raises KeyError if it is not listed above."""
    library = next(library for library, functions in _PROTOTYPES.items() if name in functions)
    found = getattr(_library(library), name)
    found.restype, *found.argtypes = _PROTOTYPES[library][name]
    return found


@cache
def load_backends() -> None:
    """Loads the back ends that are not linked: files of this package, and the one that GGML_BACKEND_PATH names.

    What cannot be loaded is named on stderr; ggml would name what can as well.
    """
    with captured_log() as log:
        function("ggml_backend_load_all_from_path")(os.fsencode(native.library_dir()))
    sys.stderr.writelines(line for line in "".join(log).splitlines(keepends=True) if "failed" in line)


def _device(name: str) -> int:
    load_backends()
    found = function("ggml_backend_dev_by_name")(name.encode())
    if not found:
        raise ValueError(f"ggml has no device called {name!r}")
    return found


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """Collects what ggml logs inside the block, in pieces as they come, instead of printing it."""
    pieces: list[str] = []
    collect = _log_callback(lambda _level, text, _data: pieces.append(text.decode(errors="replace")))
    previous, data = c_void_p(), c_void_p()
    function("ggml_log_get")(ctypes.byref(previous), ctypes.byref(data))
    function("ggml_log_set")(ctypes.cast(collect, c_void_p), None)
    try:
        yield pieces
    finally:
        function("ggml_log_set")(previous, data)


def pointer(array: NDArray) -> c_void_p:
    """The address of the first element of a contiguous array, for C."""
    assert array.flags.c_contiguous
    return array.ctypes.data_as(c_void_p)


@cache
def _type_numbers() -> dict[str, int]:
    numbers: dict[str, int] = {}
    for number in itertools.count():
        name = function("ggml_type_name")(number).decode()
        numbers[name] = number
        if name == LAST_TYPE:
            break
    return numbers


def type_number(name: str) -> int:
    """ggml's number of a type such as "turbo4" or "q8_0". Raises ValueError if there is none of that name."""
    try:
        return _type_numbers()[name]
    except KeyError:
        raise ValueError(f"ggml has no type called {name!r}") from None


def is_turbo(type: str) -> bool:
    """Whether a type is one of ours."""
    return type in NAMES


@cache
def turbo_types() -> tuple[str, ...]:
    """The names of our types, from the fewest bits to the most."""
    return tuple(sorted(filter(is_turbo, _type_numbers())))


@cache
def bits(type: str) -> float:
    """Bits that a value takes in any ggml type, scales included."""
    number = type_number(type)
    return 8 * function("ggml_type_size")(number) / function("ggml_blck_size")(number)


def quantize(x: NDArray[np.float32], type: str) -> NDArray[np.uint8]:
    """Rows of any ggml type that needs no importance matrix: float32 (..., n) -> uint8 (..., bytes of a row)."""
    number = type_number(type)
    x = np.ascontiguousarray(x, np.float32)
    rows = np.empty((*x.shape[:-1], function("ggml_row_size")(number, x.shape[-1])), np.uint8)
    if is_turbo(type):  # in SIMD; what ggml itself would call is the scalar reference
        function(f"quantize_row_{type}")(pointer(x), pointer(rows), x.size)
    elif x.size:
        function("ggml_quantize_chunk")(number, pointer(x), pointer(rows), 0, x.size // x.shape[-1], x.shape[-1], None)
    return rows


class Graph(Owner):
    """Tensors and the operators on them, computed by a device of llama.cpp. A context manager: it owns memory.

    device: its name, such as "Vulkan0"; the CPU if there is none, which can have threads and reference: llama.cpp's
    scalar paths instead of fast kernels. First come the tensors and operators, then `finish`, then `run` and `read` as
    often as wanted. Tensors are the integers that stand for them.
    """

    MAX_TENSORS = 32

    def __init__(self, threads: int = 1, *, reference: bool = False, device: str | None = None) -> None:
        size = self.MAX_TENSORS * function("ggml_tensor_overhead")() + function("ggml_graph_overhead")()
        self._contents: list[tuple[int, NDArray]] = []
        with ExitStack() as owned:
            self._device = _device(device) if device else None
            self._backend = (
                function("ggml_backend_dev_init")(self._device, None) if device else function("ggml_backend_cpu_init")()
            )
            owned.callback(function("ggml_backend_free"), self._backend)
            if not device:
                function("ggml_backend_cpu_set_n_threads")(self._backend, threads)
                function("ggml_backend_cpu_set_use_ref")(self._backend, reference)
            self._context = function("ggml_init")(InitParams(size, None, True))
            owned.callback(function("ggml_free"), self._context)
            self._owned = owned.pop_all()

    def tensor(self, data: NDArray, type: str, *shape: int) -> int:
        """A tensor of that type that holds `data`; shape: its four dimensions, the innermost first, as ggml counts."""
        made = self.operator("ggml_new_tensor_4d", type_number(type), *shape)
        self._contents.append((made, np.ascontiguousarray(data)))
        return made

    def operator(self, name: str, *arguments: object) -> int:
        """The tensor that ggml's function `name` makes of `arguments`."""
        return function(name)(self._context, *arguments)

    def finish(self, out: int) -> None:
        """Makes all that is needed for `out` ready to run. ValueError if the device does not compute it."""
        if self._device and not function("ggml_backend_dev_supports_op")(self._device, out):
            raise ValueError("the device does not compute this operator")
        self._graph = self.operator("ggml_new_graph")
        function("ggml_build_forward_expand")(self._graph, out)
        buffer = function("ggml_backend_alloc_ctx_tensors")(self._context, self._backend)
        self._owned.callback(function("ggml_backend_buffer_free"), buffer)
        for made, data in self._contents:
            function("ggml_backend_tensor_set")(made, pointer(data), 0, data.nbytes)

    def run(self) -> None:
        """Computes. RuntimeError if ggml reports a failure."""
        status = function("ggml_backend_graph_compute")(self._backend, self._graph)
        if status != 0:
            raise RuntimeError(f"ggml could not compute the graph: status {status}")

    def read(self, tensor: int, into: NDArray) -> NDArray:
        """`into`, filled with what the tensor holds."""
        function("ggml_backend_tensor_get")(tensor, pointer(into), 0, into.nbytes)
        return into
