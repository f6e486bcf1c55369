"""What a measurement was made with: the model's file, the build of llama.cpp, the machine."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

from . import ggml
from .ggufile import GGUFModel

_LIBRARIES = ("ggml-base", "ggml-cpu", "llama")
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16

VARIABLES = (
    "LLAMA_TURBO_CALIBRATION",
    "LLAMA_ATTN_ROT_DISABLE",
    "LLAMA_ARG_CACHE_WINDOW",
    "LLAMA_ARG_CACHE_SINKS",
)
"""What changes results without being an option of every command."""


def model(path: Path) -> dict:
    """Facts of a GGUF, among them a fingerprint that stands for its content.

    trained_length: tokens, None if the file does not say. calibrated: whether it has a calibration of its keys. The
    fingerprint is made of the metadata, and of samples of the tensors: hashing tens of gigabytes takes minutes.
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
        return facts | {"fingerprint": _fingerprint(file)}


def _fingerprint(file: GGUFModel) -> str:
    digest = hashlib.sha256()
    for path, data in zip(file.paths, file.data_offsets, strict=True):
        size = path.stat().st_size
        with path.open("rb") as stream:
            digest.update(b"%d\n" % size)
            digest.update(stream.read(data))
            for number in range(_SAMPLES):
                stream.seek(data + (size - data) * number // _SAMPLES)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def build() -> dict:
    """The versions of this package and of the libraries that compute, and the environment's switches for them."""
    return {"turboquant_gguf": version("turboquant-gguf"), "llama_cpp": _libraries()} | switches()


def switches() -> dict[str, str]:
    """The environment's switches."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def switch(to: Mapping[str, str]) -> None:
    """Make the environment's switches those that `switches` said elsewhere."""
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(to)


@cache
def _libraries() -> str:
    digest = hashlib.sha256()
    for name in _LIBRARIES:
        digest.update(ggml.library_path(name).read_bytes())
    return digest.hexdigest()[:12]


@cache
def machine() -> dict:
    """The devices that llama.cpp computes on, the number of logical CPUs, and the operating system."""
    count = ggml.function("ggml_backend_dev_count")()
    devices = [ggml.function("ggml_backend_dev_get")(number) for number in range(count)]
    names = [ggml.function("ggml_backend_dev_description")(device).decode() for device in devices]
    return {"devices": names, "logical_cpus": os.cpu_count(), "system": platform.platform()}
