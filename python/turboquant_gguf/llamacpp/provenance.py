"""What a measurement was made with: the model's file, the build of llama.cpp, the machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from ..core import filehash, texts
from . import ggml, placement, recentwindow
from .ggufile import GGUFModel

_ROTATION = "LLAMA_ATTN_ROT_DISABLE"  # llama.cpp's own

VARIABLES = (*recentwindow.VARIABLES, _ROTATION)
"""What changes results without being an option of every command."""


def model(path: Path, console: Console | None = None) -> dict:
    """Facts of a GGUF, among them a fingerprint that stands for its content, every byte of it.

    trained_length: tokens, None if the file does not say. calibrated: whether it has a calibration of its keys.
    console: where the progress goes, if reading tens of gigabytes takes minutes.
    """
    with GGUFModel(path) as file:
        architecture = file.metadata["general.architecture"]
        facts = {
            "name": path.stem,
            "architecture": architecture,
            "trained_length": file.metadata.get(f"{architecture}.context_length"),
            "parameters": sum(tensor.elements for tensor in file.tensors),
            "bytes": file.size,
            "calibrated": any(key.startswith("turboquant.keys.") for key in file.metadata),
        }
        hashes = filehash.sha256(file.paths, console or Console(quiet=True))
        return facts | {"fingerprint": hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]}


def build() -> dict:
    """The version of this package, a digest of what its libraries were compiled from, and what `switches` returns.

    The same sources and options have the same digest, wherever they were built; `machine` has the instruction set.
    """
    return {"turboquant_gguf": version("turboquant-gguf"), "llama_cpp": _sources()} | switches()


def versions() -> dict:
    """What this package is: its version, the llama.cpp and the ggml in it, their compiler, and what they compute with.

    llama_cpp_source: where its sources are from. backends: those in this build. instruction_set: of the CPU's codec.
    """
    ggml.load_backends()
    count = ggml.function("ggml_backend_reg_count")()
    backends = [ggml.function("ggml_backend_reg_get")(number) for number in range(count)]
    return {
        "turboquant_gguf": version("turboquant-gguf"),
        "llama_cpp": ggml.function("llama_version")().decode(),
        "llama_cpp_source": built()["llama_cpp"],
        "ggml": ggml.function("ggml_version")().decode(),
        "compiler": built()["compiler"],
        "backends": [ggml.function("ggml_backend_reg_name")(backend).decode() for backend in backends],
        "instruction_set": ggml.function("turbo_cpu_simd")().decode(),
    }


def switches() -> dict[str, str]:
    """The environment variables among VARIABLES that are set, by the names that results have."""
    rotation = {_ROTATION: os.environ[_ROTATION]} if _ROTATION in os.environ else {}
    return recentwindow.variables() | rotation


def switch(to: Mapping[str, str]) -> None:
    """Set the environment variables that `switches` returned elsewhere, and no others of VARIABLES."""
    recentwindow.set_variables(to)
    os.environ.pop(_ROTATION, None)
    os.environ |= {name: value for name, value in to.items() if name == _ROTATION}


@cache
def built() -> dict:
    """What CMake knew of this build.

    llama_cpp: where its sources are from. sources: SHA-256 of all that was compiled. options: those of ggml that may
    change results. web_page: whether llama-server has one.
    """
    return json.loads(texts.bundled("build.json"))


def _sources() -> str:
    known = built()
    return hashlib.sha256(f"{known['sources']} {known['options']}".encode()).hexdigest()[:12]


@cache
def machine() -> dict:
    """The devices that llama.cpp computes on, the GPUs among them, the CPU's instruction set and number, the system."""
    return {
        "devices": placement.devices(),
        "gpus": placement.devices(placement.GPUS),
        "instruction_set": ggml.function("turbo_cpu_simd")().decode(),
        "logical_cpus": os.cpu_count(),
        "system": platform.platform(),
    }
