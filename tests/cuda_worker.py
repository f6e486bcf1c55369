"""What programs do with a cache, once on the CPU and once with the cache on an emulated CUDA device.

    python cuda_worker.py LIBRARY MODEL

prints, as JSON, for each pair of cache types and each operation how far the logits of the two are apart: where the
device stores and the CPU attends, and where the device does both; how far the CPU's are from those with a cache in
float32; how often the device's kernels ran, and the encoders for a prompt and for a token; products with weights of the
types, as parts of the error that they may have. A crash ends this process, not the tests.
"""

import ctypes
import json
import sys
from ctypes import c_int, c_void_p
from pathlib import Path

import numpy as np

import turboquant_gguf
from sequences import Sequences
from turboquant_gguf.llamacpp import ggml
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


def encoders_launched(path: Path, model: Model, emulated: ctypes.CDLL) -> dict[str, list[int]]:
    """How often each encoder is launched: for a prompt of 24 tokens, and then for a token."""
    found = {}
    for types in TYPES:
        names = [*(f"turbo_encode<{k}>" for k in (2, 3, 4)), "turbo_encode_two"]
        counts = [[emulated.simt_launches(name.encode()) for name in names]]
        with Sequences(path, CacheTypes(*types), model=model, window=0, length=128, sequences=4) as cache:
            for do in (lambda cache=cache: cache.prompt(TEXT[:24]), lambda cache=cache: cache.answer(TEXT[24:25], 24)):
                do()
                counts.append([emulated.simt_launches(name.encode()) for name in names])
        found["/".join(types)] = np.diff(counts, axis=0).tolist()
    return found


# ---- products with weights of ours ----

POINTERS = {"ggml_mul_mat": 3, "ggml_mul_mat_id": 4}
ggml._PROTOTYPES["ggml-base"] |= {name: (c_void_p, *[c_void_p] * count) for name, count in POINTERS.items()}
ggml._PROTOTYPES["ggml-base"]["ggml_mul_mat_set_prec"] = (None, c_void_p, c_int)
GGML_PREC_F32 = 10


def product(
    weights: np.ndarray, type: str, x: np.ndarray, experts: np.ndarray | None = None, *, exact: bool = False
) -> float:
    """How far it is from float64, as a part of what the roundings allow: to float32 if it is exact, else to halves.

    weights: blocks (matrices, rows, bytes); x: float32 (matrices, columns, values), or with experts, integers (tokens,
    experts of each), float32 (tokens, experts of each, values).
    """
    values = turboquant_gguf.dequantize(weights, type).reshape(*weights.shape[:2], -1).astype(np.float64)
    if experts is not None:
        values = values[experts]  # a matrix for each token and expert
        x64 = x.astype(np.float64)[..., None]
        wanted, sizes = (values @ x64)[..., 0], (np.abs(values) @ np.abs(x64))[..., 0]
    else:
        transposed = values.transpose(0, 2, 1)
        wanted, sizes = x.astype(np.float64) @ transposed, np.abs(x.astype(np.float64)) @ np.abs(transposed)
    with ggml.Graph(device="CUDA0") as graph:
        matrices = graph.tensor(weights, type, x.shape[2], weights.shape[1], weights.shape[0], 1)
        other = graph.tensor(x, "f32", *x.shape[::-1], 1)
        if experts is not None:
            ids = graph.tensor(experts.astype(np.int32), "i32", *experts.shape[::-1], 1, 1)
            node = graph.operator("ggml_mul_mat_id", matrices, other, ids)
        else:
            node = graph.operator("ggml_mul_mat", matrices, other)
        if exact:
            ggml.function("ggml_mul_mat_set_prec")(node, GGML_PREC_F32)
        graph.finish(node)
        graph.run()
        found = graph.read(node, np.empty(wanted.shape, np.float32))
    allowed = sizes * (2e-6 if exact else 3 * 2.0**-11) + 1e-30
    return float((np.abs(found - wanted) / allowed).max())


def products() -> dict[str, float]:
    """Of each type, a matrix with rows and columns of any number, several matrices, and matrices of experts."""
    found, rng = {}, np.random.default_rng(3)
    for type in ("turbo2", "turbo3", "turbo4"):
        for values, rows, columns, count in ((64, 1, 1, 1), (192, 37, 3, 1), (320, 5, 17, 1), (128, 9, 5, 3)):
            weights = turboquant_gguf.quantize(rng.standard_normal((count, rows, values)).astype(np.float32), type)
            x = rng.standard_normal((count, columns, values)).astype(np.float32)
            for exact in (False, True) if count == 1 else (False,):
                name = f"{type} {values}x{rows}x{columns}x{count}{' exact' * exact}"
                found[name] = product(weights, type, x, exact=exact)
        for tokens, used in ((1, 2), (11, 3)):
            weights = turboquant_gguf.quantize(rng.standard_normal((7, 19, 192)).astype(np.float32), type)
            experts = np.stack([rng.permutation(7)[:used] for _ in range(tokens)])
            x = rng.standard_normal((tokens, used, 192)).astype(np.float32)
            found[f"{type} {used} experts of {tokens} tokens"] = product(weights, type, x, experts)
    return found


def main() -> None:
    library, path = Path(sys.argv[1]), Path(sys.argv[2])
    loader = ctypes.CDLL(str(Path(turboquant_gguf.__file__).parent / "lib" / "libggml.so"))
    loader.ggml_backend_load.restype = c_void_p
    assert loader.ggml_backend_load(str(library).encode()), "the library cannot be loaded"
    emulated = ctypes.CDLL(str(library))
    with Model(path) as model:
        exact = operations(path, EXACT, model)
        on_cpu = [operations(path, CacheTypes(*types), model) for types in TYPES]
    runs = {}
    with Model(path, Placement(gpu_layers=99)) as model:
        for name, takes_attention in (("stored", False), ("attended", True)):
            emulated.simt_take_attention(takes_attention)
            runs[name] = [operations(path, CacheTypes(*types), model) for types in TYPES]
        encoders = encoders_launched(path, model, emulated)
    kernels = [
        *(f"turbo_encode<{k}>" for k in (2, 3, 4)),
        *(f"turbo_decode<{k}, float>" for k in (2, 3, 4)),
        *("turbo_attend<4, 3, 1>", "turbo_attend<2, 2, 1>", "turbo_attend<3, 4, 1>"),
    ]
    said = {
        "buffers": ["CPU KV buffer" in cpu["log"] for cpu in on_cpu]
        + ["CUDA0 KV buffer" in device["log"] for run in runs.values() for device in run],
        "encoders": encoders,
        "products": products(),
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
