"""Where llama.cpp computes: on how many threads of the CPU, and what of a model and its cache is on a GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core import tables
from ..errors import TurboquantError
from . import ggml

CPUS, GPUS = (0,), (1, 2)
"""Of ggml_backend_dev_type: CPU; GPU and IGPU."""


@dataclass(frozen=True)
class Placement:
    """A place to compute.

    threads: of the CPU; None: llama.cpp's choice. gpu_layers: how many layers of the model are on a GPU, the last ones
    first; with 0 no GPU does anything, even if this build of llama.cpp knows one. kv_offload: the caches of these
    layers are there with them, else they are the CPU's.
    """

    threads: int | None = None
    gpu_layers: int = 0
    kv_offload: bool = True

    def arguments(self) -> list[str]:
        """The options of llama-server and llama-perplexity for it. Raises what `require` does."""
        # They look for the back end that this variable names only where a device of it is named first.
        named = ["--device", ",".join(_names())] if self.gpu_layers and "GGML_BACKEND_PATH" in os.environ else []
        return [*named, *self._common("--threads", "--gpu-layers"), *(["--no-kv-offload"] if self._cache_apart else [])]

    def bench_arguments(self) -> list[str]:
        """The options of llama-bench for it. Raises what `require` does."""
        return [*self._common("-t", "-ngl"), *(["-nkvo", "1"] if self._cache_apart else [])]

    def _common(self, threads: str, gpu_layers: str) -> list[str]:
        self.require()
        # llama.cpp's programs would else take what GPUs there are.
        where = [gpu_layers, str(self.gpu_layers)] if self.gpu_layers else ["--device", "none"]
        return [*([threads, str(self.threads)] if self.threads else []), *where]

    @property
    def _cache_apart(self) -> bool:
        return bool(self.gpu_layers) and not self.kv_offload

    def settings(self) -> dict[str, Any]:
        """What results depend on, as they record it: nothing for the CPU, whose threads change nothing."""
        return {"gpu_layers": self.gpu_layers, "kv_offload": self.kv_offload} if self.gpu_layers else {}

    @property
    def device(self) -> str:
        """What computes on this machine, in words. Raises what `require` does."""
        self.require()
        return ", ".join(words(self.settings(), devices(GPUS)) or devices(CPUS))

    def require(self) -> None:
        """Raise TurboquantError if layers are to be on a GPU and there is none: llama.cpp would take the CPU."""
        if self.gpu_layers and not devices(GPUS):
            raise TurboquantError(
                "This build of llama.cpp finds no GPU, so no layers of the model can be on one. Leave out --gpu-layers, or "
                "build the package for your GPU: docs/gpu.md says how."
            )


CPU = Placement()
"""The default."""


def devices(types: Sequence[int] = (*CPUS, *GPUS)) -> list[str]:
    """The devices of these types (ggml_backend_dev_type) that llama.cpp computes on, as they describe themselves."""
    return [ggml.function("ggml_backend_dev_description")(device).decode() for device in _handles(types)]


def _names() -> list[str]:
    """The names of all GPUs, as llama.cpp's options take them."""
    return [ggml.function("ggml_backend_dev_name")(device).decode() for device in _handles(GPUS)]


def _handles(types: Sequence[int]) -> list[int]:
    ggml.load_backends()
    count = ggml.function("ggml_backend_dev_count")()
    found = [ggml.function("ggml_backend_dev_get")(number) for number in range(count)]
    return [device for device in found if ggml.function("ggml_backend_dev_type")(device) in types]


def words(settings: Mapping[str, Any], gpus: Sequence[str]) -> list[str]:
    """Where something was computed, in phrases: none for the CPU.

    settings: those of a Placement, among others. gpus: names of GPUs; none where they are not known.
    """
    if not settings.get("gpu_layers"):
        return []
    layers = f"{tables.count(settings['gpu_layers'], 'layer')} on {' and '.join(gpus) or 'a GPU'}"
    return [layers, *([] if settings.get("kv_offload", True) else ["caches with the CPU"])]
