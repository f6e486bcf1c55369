"""What programs do with a cache, once on the CPU and once with the cache on an emulated CUDA device.

    python cuda_worker.py LIBRARY MODEL

prints, as JSON, for each pair of cache types and each operation how far the logits of the two are apart: where the
device stores and the CPU attends, and where the device does both; how far the CPU's are from those with a cache in
float32; and how often the device's kernels ran. A crash ends this process, not the tests.
"""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np

import turboquant_gguf
from sequences import Sequences
from turboquant_gguf.llamacpp.cachetypes import CacheTypes
from turboquant_gguf.llamacpp.logits import EXACT, Model
from turboquant_gguf.llamacpp.placement import Placement

TYPES = (("turbo4", "turbo3"), ("turbo2", "turbo2"), ("turbo3", "turbo4"))
TEXT = [int(token) for token in np.random.default_rng(1).integers(3, 250, 60)]


def operations(path: Path, types: CacheTypes, model: Model) -> dict[str, np.ndarray]:
    """The logits after each thing that happens to a cache; the name of the buffer it is in, as text."""
    found = {}
    with Sequences(path, types, model=model, window=0, length=128, sequences=4) as cache:
        found["prompt"] = cache.prompt(TEXT[:24])
        found["answer"] = cache.answer(TEXT[24:30], 24)
        cache.copy(0, 1)
        found["copy"] = cache.read((TEXT[30], 30, 0), (TEXT[31], 30, 1))
        saved = cache.saved(1)
        cache.remove(0, 5, 9)
        cache.add(0, 9, -1, -4)
        found["shift"] = cache.answer(TEXT[32:34], 27)
        cache.restore(saved, 2)
        found["restored sequence"] = cache.answer(TEXT[34:36], 31, 2)
        whole = cache.saved_whole()
        cache.clear()
        cache.restore_whole(whole)
        found["restored context"] = cache.answer(TEXT[36:38], 33, 2)
        found["log"] = cache.log
    return found


def main() -> None:
    library, path = Path(sys.argv[1]), Path(sys.argv[2])
    ggml = ctypes.CDLL(str(Path(turboquant_gguf.__file__).parent / "lib" / "libggml.so"))
    ggml.ggml_backend_load.restype = ctypes.c_void_p
    assert ggml.ggml_backend_load(str(library).encode()), "the library cannot be loaded"
    emulated = ctypes.CDLL(str(library))
    with Model(path) as model:
        exact = operations(path, EXACT, model)
        on_cpu = [operations(path, CacheTypes(*types), model) for types in TYPES]
    runs = {}
    with Model(path, Placement(gpu_layers=99)) as model:
        for name, takes_attention in (("stored", False), ("attended", True)):
            emulated.simt_take_attention(takes_attention)
            runs[name] = [operations(path, CacheTypes(*types), model) for types in TYPES]
    kernels = [
        *(f"turbo_encode<{k}>" for k in (2, 3, 4)),
        *(f"turbo_decode<{k}, float>" for k in (2, 3, 4)),
        *("turbo_attend<4, 3, 1>", "turbo_attend<2, 2, 1>", "turbo_attend<3, 4, 1>"),
    ]
    said = {
        "buffers": ["CPU KV buffer" in cpu["log"] for cpu in on_cpu]
        + ["CUDA0 KV buffer" in device["log"] for run in runs.values() for device in run],
        "launches": {name: emulated.simt_launches(name.encode()) for name in kernels},
    }
    for name, run in (("lost", on_cpu), *runs.items()):
        base = [exact] * len(TYPES) if name == "lost" else on_cpu
        said[name] = {
            "/".join(types): {what: apart(expected[what], found[what]) for what in found if what != "log"}
            for types, expected, found in zip(TYPES, base, run, strict=True)
        }
    print(json.dumps(said))


def apart(expected: np.ndarray, found: np.ndarray) -> float:
    """The root mean square of the difference, relative to that of what is expected."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


if __name__ == "__main__":
    main()
