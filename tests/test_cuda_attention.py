"""The attention kernels of CUDA and HIP, in the emulator of tests/simt, against attention in float64."""

import itertools
import re
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest

import gpu_compilers
from test_attention import as_input, mask_of, values, without_window
from turboquant_gguf.codec import attention_numpy
from turboquant_gguf.codec.attention import Problem, Window
from turboquant_gguf.llamacpp import ggml

PROGRAM = gpu_compilers.ROOT / "tests" / "simt" / "attention.cpp"
TURBO = ("turbo2", "turbo3", "turbo4")
STOCK = ("f16", "bf16", "q8_0", "q4_0", "f32")
PAIRS = [pair for pair in itertools.product(TURBO + STOCK, repeat=2) if set(pair) & set(TURBO)]

# ---- what is expected ----

HALF = 2.0**-11  # relative error of a value that was rounded to half precision, with room
LEAST = 2.0**-25  # and its absolute error, next to a power of two that halves were divided by


def expected(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """The result in float64, and how far the kernels may be from it."""
    rounds_k = rounds_v = HALF  # stock types are rounded, but f16, and codebook entries are not
    if problem.window:
        problem = without_window(problem, problem.q)
    else:
        rounds_k, rounds_v = (0 if type in (*TURBO, "f16") else HALF for type in (problem.type_k, problem.type_v))
    group = problem.q.shape[1] // problem.k.shape[2]
    k, v = (
        np.repeat(attention_numpy.decode(rows, type), group, axis=2).astype(np.float64)
        for rows, type in ((problem.k, problem.type_k), (problem.v, problem.type_v))
    )
    weights = attention_numpy.weights(problem)
    result = np.einsum("shqk,skhd->sqhd", weights, v, optimize=True)

    q = np.abs(problem.q).astype(np.float64)
    extent = np.einsum("shqd,skhd->shqk", q, np.abs(k), optimize=True)
    score = extent * (HALF + rounds_k)
    score += LEAST * q.max(-1)[..., None] * np.abs(k).sum(-1).transpose(0, 2, 1)[:, :, None]
    score += LEAST * q.sum(-1)[..., None] * np.abs(k).max(-1).transpose(0, 2, 1)[:, :, None]
    score = problem.scale * (score + 2e-6 * extent) + 2e-6
    if problem.mask is not None:
        score = score + 1e-6 * np.abs(np.where(np.isfinite(problem.mask), problem.mask, 0))
    score = score * np.where(weights > 0, 1, 0)
    off = weights * score * np.exp(2 * score.max(-1, keepdims=True))
    far = np.abs(v).transpose(0, 2, 1, 3)[:, :, None] + np.abs(result).transpose(0, 2, 1, 3)[:, :, :, None]
    tolerance = np.einsum("shqk,shqkd->sqhd", off, np.broadcast_to(far, (*off.shape, far.shape[-1])), optimize=True)
    tolerance += np.einsum("shqk,skhd->sqhd", weights * (HALF + rounds_v + 2e-6), np.abs(v), optimize=True)
    seen = (weights > 0).sum(-1).transpose(0, 2, 1)[..., None]
    largest = np.where(weights.max(2)[..., None] > 0, np.abs(v).transpose(0, 2, 1, 3), 0).max((2, 3))
    return result, tolerance + seen * LEAST * largest[:, None, :, None] + 1e-30


# ---- problems ----


@dataclass(frozen=True)
class Case:
    """A problem by what it is made of, and how the emulator runs it."""

    types: tuple[str, str]
    sizes: tuple[int, int] = (64, 64)
    queries: int = 1
    group: int = 4
    kv_heads: int = 1
    sequences: int = 1
    keys: int = 100
    mask: str = "causal"
    max_bias: float = 0.0
    softcap: float = 0.0
    sinks: bool = False
    kind: str = "gaussian"
    hostile: bool = False  # what no query sees is NaN, or as large as can be
    any_values: bool = False  # blocks of values are any bits
    window: tuple[int, int, int] | None = None  # slots, tokens of the batch, tiles
    schedule: int = 0
    device: tuple[int, int, int] = (860, 4, 101376)  # compute capability, multiprocessors, bytes of shared memory
    late: int = 0  # bytes by which keys and values begin after a word

    @property
    def name(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)[2:]
            if getattr(self, field.name) != field.default
        ]
        return (
            " ".join([":".join(self.types), "x".join(map(str, self.sizes)), *changed]).replace("(", "").replace(")", "")
        )

    def problem(self) -> tuple[Problem, Problem]:
        """As the kernels get it, and as they must take it: the same without what no query sees."""
        rng = np.random.default_rng([*self.name.encode()])
        (size_k, size_v), heads = self.sizes, self.kv_heads * self.group
        mask = mask_of(rng, self.mask, self.sequences, heads, self.queries, self.keys)
        kind_k = self.kind if self.kind != "large token" else "gaussian"  # all would look at it, and nothing else count
        k, v = (
            ggml.quantize(values(rng, kind, self.sequences, self.keys, self.kv_heads, size), type)
            for kind, size, type in zip((kind_k, self.kind), self.sizes, self.types, strict=True)
        )
        if self.any_values:
            v = rng.integers(0, 256, v.shape).astype(np.uint8)
        problem = Problem(
            q=values(rng, "gaussian", self.sequences, heads, self.queries, size_k),
            k=k,
            v=v,
            type_k=self.types[0],
            type_v=self.types[1],
            size_v=size_v,
            scale=1 / size_k**0.5,
            mask=mask,
            sinks=rng.normal(0, 3, heads).astype(np.float32) if self.sinks else None,
            max_bias=self.max_bias,
            softcap=self.softcap,
        )
        if self.window:
            problem = self._with_window(problem, rng)
        return (self._spoilt(problem) if self.hostile else problem), problem

    def _with_window(self, problem: Problem, rng: np.random.Generator) -> Problem:
        slots, tokens, n_tiles = self.window
        visible = rng.random((self.sequences, 1, self.queries, slots + tokens)) < 0.4
        visible[..., rng.random(slots + tokens) < 0.3] = False
        arrays = [
            values(rng, "gaussian", self.sequences, count, self.kv_heads, size).astype(kind)
            for kind, count in ((np.float16, slots), (np.float32, tokens))
            for size in self.sizes
        ]
        shape = (self.sequences, self.keys)
        columns = np.where(rng.random(shape) < 0.2, rng.integers(0, slots + tokens, shape), -1)
        biases = tiles = None
        if n_tiles:
            biases = rng.normal(0, 10, (*problem.q.shape[:3], n_tiles)).astype(np.float32)
            tiles = rng.integers(0, n_tiles, (self.sequences, self.keys + slots + tokens)).astype(np.int32)
            tiles = tiles[:, np.arange(tiles.shape[1]) // 40 * 40]  # so that tiles of 16 keys have one, or two
        mask = np.where(visible, 0, -np.inf).astype(np.float16)
        return replace(problem, window=Window(*arrays, mask, columns.astype(np.int32), biases, tiles))

    def _spoilt(self, problem: Problem) -> Problem:
        """All bits set, NaN or the largest scale, where no query sees."""

        def spoil(rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
            rows, unseen = rows.copy(), np.isneginf(mask).all(axis=(1, 2))
            rows.view(np.uint8).reshape(*rows.shape[:2], -1)[np.broadcast_to(unseen, rows.shape[:2])] = 255
            return rows

        assert np.isneginf(problem.mask).all(axis=(1, 2)).any()
        window = problem.window
        if window:
            ring, new = np.split(window.mask, [window.ring_k.shape[1]], axis=-1)
            window = replace(
                window,
                ring_k=spoil(window.ring_k, ring),
                ring_v=spoil(window.ring_v, ring),
                new_k=spoil(window.new_k, new),
                new_v=spoil(window.new_v, new),
            )
        return replace(problem, k=spoil(problem.k, problem.mask), v=spoil(problem.v, problem.mask), window=window)


def cycle(step: int, *choices):
    """Choices one after the other, not in step with others that cycle."""
    return lambda i: choices[i * step % len(choices)]


SIZES = [(64, 64), (192, 192), (128, 128), (576, 512), (256, 256), (320, 320), (192, 128), (512, 512), (576, 576)]
QUERIES, GROUPS = cycle(1, 1, 2, 3, 1, 8, 16, 33), cycle(1, 4, 1, 3, 8, 7, 16, 20, 4, 1, 3, 5)
KEYS, MASKS = (
    cycle(5, 100, 1, 15, 16, 17, 256, 65, 333),
    cycle(3, "causal", "none", "window", "blind", "scattered", "distance"),
)
DEVICES = cycle(1, (860, 4, 101376), (900, 7, 232448), (750, 2, 65536), (860, 1, 101376), (1200, 64, 101376))


def cases() -> list[Case]:
    found = []
    pairs = PAIRS + [pair for pair in PAIRS if set(pair) <= set(TURBO)] * 2
    for i, types in enumerate(pairs):
        sizes = SIZES[i % len(SIZES)] if i < len(PAIRS) else (128, 128) if i % 3 else (64, 64)
        queries = QUERIES(i) if sizes[0] < 512 or i % 2 else 1
        mask = MASKS(i)
        found.append(
            Case(
                types,
                sizes,
                queries,
                min(GROUPS(i), 7) if queries > 16 else GROUPS(i),
                kv_heads=1 + i % 3 % 2,
                sequences=1 + (i % 5 == 0),
                keys=KEYS(i),
                mask=mask,
                max_bias=8.0 if mask == "distance" else 0.0,
                softcap=15.0 * (i % 7 == 3),
                sinks=i % 4 == 2,
                kind=("gaussian", "large channel", "large token", "small", "zeros")[i % 11 % 5],
                schedule=i % 3,
                device=DEVICES(i),
                late=2 * (i % 4 == 1),
            )
        )
    for i, types in enumerate(
        [*itertools.product(TURBO, TURBO), ("q8_0", "q8_0"), ("f16", "turbo4"), ("q4_0", "q8_0")]
    ):
        sizes = ((128, 128), (64, 64), (192, 128), (256, 256))[i % 4]
        found.append(
            Case(
                types,
                sizes,
                (1, 2, 8, 5)[i % 4],
                (4, 3, 8, 1, 16)[i % 5],
                kv_heads=1 + i % 2,
                sequences=1 + i % 3 % 2,
                keys=(120, 256, 40)[i % 3],
                mask=("window", "blind", "scattered")[i % 3],
                sinks=i % 2 == 0,
                softcap=20.0 * (i % 5 == 4),
                hostile=i % 3 == 0,
                window=((37, 8, 3), (64, 1, 0), (150, 20, 9), (1, 2, 1))[i % 4],
                schedule=i % 3,
                device=DEVICES(i),
            )
        )
    for i, types in enumerate([("turbo4", "turbo4"), *(pair for pair in PAIRS if "turbo3" in pair)]):
        found.append(Case(types, SIZES[i % 3], 2, 4, keys=200, mask="window", hostile=True, schedule=i % 3))
    for i, types in enumerate(
        [*itertools.product(TURBO, TURBO), *(pair for pair in PAIRS if "turbo4" in pair and set(pair) & set(STOCK))]
    ):
        found.append(
            Case(
                types,
                ((128, 128), (64, 64))[i % 2],
                (33, 16, 20)[i % 3],
                (4, 8, 5)[i % 3],
                kv_heads=1 + i % 2,
                sequences=1 + (i % 4 == 1),
                keys=(200, 97, 300, 77)[i % 4],
                mask=("window", "blind", "scattered", "distance")[i % 4],
                max_bias=8.0 * (i % 4 == 3),
                softcap=20.0 * (i % 5 == 4),
                sinks=i % 2 == 0,
                kind=("gaussian", "large token")[i % 3 % 2],
                hostile=i % 4 == 0,
                window=(37, 8, 3) if i % 8 in (2, 4) else None,
                schedule=i % 3,
                late=2 * (i % 2),
            )
        )
    # As many rows as slabs are for, of heads that slabs do not serve.
    for i, (types, sizes) in enumerate(
        [
            (("turbo4", "turbo4"), (192, 192)),
            (("turbo3", "turbo4"), (256, 256)),
            (("turbo2", "q8_0"), (320, 256)),
            (("turbo4", "turbo2"), (512, 512)),
            (("turbo4", "turbo3"), (576, 512)),
        ]
    ):
        found.append(
            Case(
                types,
                sizes,
                (33, 9)[i % 2],
                (2, 8)[i % 2],
                keys=(97, 40)[i % 2],
                mask=("window", "scattered")[i % 2],
                sinks=i == 1,
                window=(37, 8, 3) if i in (0, 3) else None,
                schedule=i % 3,
                device=DEVICES(i),
                late=2 * (i % 2),
            )
        )
    for i, type in enumerate(TURBO):
        found.append(Case((type, type), (128, 128), group=8, keys=150, any_values=True, schedule=i))
        found.append(
            Case((type, type), (64, 64), kv_heads=3, group=3, keys=700, queries=2, schedule=i, device=(860, 30, 101376))
        )
    return found


CASES = {case.name: case for case in cases()}


def run(program: Path, many: list[Case]) -> tuple[list[np.ndarray], str]:
    """Results (sequences, queries, heads, head size) in order, and what is said if the program fails."""
    problems = [case.problem()[0] for case in many]
    text = b"".join(
        struct.pack("6i", case.schedule, seed, *case.device, case.late) + as_input(problem)
        for seed, (case, problem) in enumerate(zip(many, problems, strict=True))
    )
    done = subprocess.run([program], input=text, capture_output=True, check=False)
    results, values = [], np.frombuffer(done.stdout, np.float32)
    for problem in problems:
        shape = (problem.q.shape[0], problem.q.shape[2], problem.q.shape[1], problem.size_v)
        if len(values) < np.prod(shape):
            break
        results.append(values[: np.prod(shape)].reshape(shape))
        values = values[np.prod(shape) :]
    return results, done.stderr.decode() if done.returncode else ""


def is_right(case: Case, result: np.ndarray) -> bool:
    """Whether it is within what the arithmetic allows everywhere, and far within it on the whole."""
    exact, tolerance = expected(case.problem()[1])
    error = np.abs(result - exact)
    return bool(np.all(error <= tolerance)) and np.square(error).mean() <= np.square(tolerance).mean() / 16


# ---- tests ----

SMALL_SLABS = "-DTURBO_SLAB_KEYS=96"


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> Path:
    """A folder with the emulator's objects."""
    folder = tmp_path_factory.mktemp("emulator")
    gpu_compilers.build_emulator(folder)
    return folder


@pytest.fixture(scope="module")
def results(emulator) -> dict[str, np.ndarray | str]:
    """Of all cases, or what was said instead, with every access of memory checked."""
    program = gpu_compilers.emulate(emulator, "attention", PROGRAM, SMALL_SLABS, checked=True)

    def shard(many: list[Case]) -> dict[str, np.ndarray | str]:
        found: dict[str, np.ndarray | str] = {}
        while many:
            done, said = run(program, many)
            found |= {case.name: result for case, result in zip(many, done, strict=False)}
            if said:
                found[many[len(done)].name] = said
            many = many[len(done) + bool(said) :]
        return found

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(shard, ([*CASES.values()][::2], [*CASES.values()][1::2]))
    return first | second


@pytest.mark.parametrize("name", CASES)
def test_attention(results, name: str):
    result = results[name]
    assert not isinstance(result, str), result
    assert is_right(CASES[name], result)


# What is changed in which file, and what is said; nothing: results are wrong. Of a few cases, so that few kernels are
# compiled.
PLANTED = {
    "a removed barrier before a stage is read": (
        "turbo-attention.cuh",
        "            turbo_wait_for_copies();\n            turbo_sync_warp();",
        "            turbo_wait_for_copies();",
        "race",
    ),
    "a removed barrier before a stage is written": (
        "turbo-attention.cuh",
        "            turbo_sync_warp(); // the stage is read\n",
        "",
        "race",
    ),
    "a removed barrier between slices": (
        "turbo-attention.cuh",
        "        __syncthreads(); // all have read those of the tile before\n",
        "",
        "race",
    ),
    "a removed barrier behind the table": (
        "turbo-attention.cuh",
        "        load_queries(rows);\n        __syncthreads();",
        "        load_queries(rows);",
        "race|nothing has written",
    ),
    "copies that are not waited for": (
        "turbo-attention.cuh",
        "            turbo_wait_for_copies();\n",
        "",
        "nothing has written",
    ),
    "a wrong lane": (
        "turbo-attention.cuh",
        "top[r], __shfl_xor_sync(TURBO_FULL_WARP, top[r], 2, 32)",
        "top[r], __shfl_xor_sync(TURBO_FULL_WARP, top[r], 4, 32)",
        "",
    ),
    "a wrong lane's sum": (
        "turbo-attention.cuh",
        "total[r] += __shfl_xor_sync(TURBO_FULL_WARP, total[r], 2, 32)",
        "total[r] += __shfl_xor_sync(TURBO_FULL_WARP, total[r], 1, 32)",
        "",
    ),
    "swapped halves": (
        "turbo-attention.cuh",
        "__byte_perm(u[2*i], u[2*i + 1], 0x5410)",
        "__byte_perm(u[2*i + 1], u[2*i], 0x5410)",
        "",
    ),
    "a wrong weight where ranges meet": (
        "turbo-attention.cuh",
        "total += sums[range].y*exp2f(sums[range].x - reference);",
        "total += sums[range].y;",
        "",
    ),
    "a wrong weight where warps meet": (
        "turbo-attention.cuh",
        "factor[r]    = exp2f(other - top);",
        "factor[r]    = 1.0f;",
        "",
    ),
    "the scale of another key": (
        "turbo-attention.cuh",
        "rows + (2*t + i)*keys::words, odd[i])",
        "rows + (2*t + 1 - i)*keys::words, odd[i])",
        "",
    ),
    "the bias of another tile": (
        "turbo-attention.cuh",
        "differs ? biases[tile[i]]*factor : one",
        "differs ? one : one",
        "",
    ),
    "a window that hides nothing": ("turbo-attention.cuh", "(TURBO_MASKED & ~keep);", "0;", ""),
    "a mask of another head": ("turbo-attention.cuh", "head % m.heads*m.head", "0", ""),
    "no unit for large values": ("turbo-attention.cuh", "        fit_unit(scale);\n", "", ""),
    "a row late by no half": (
        "turbo-attention.cuh",
        "odd_values[i] = (uintptr_t) (v + i*part.v.key) >> 1 & 1;",
        "odd_values[i] = 0;",
        "",
    ),
    "cells that nobody sees": ("turbo-attention.cuh", "sees >> n & 1 ? halves[c][n][j] : 0", "halves[c][n][j]", ""),
    "a slab that begins anew": ("turbo-prefill.cuh", "if (!slab.is_first) {", "if (false) {", ""),
    "the mask of another slab": (
        "turbo-attention.cu",
        "part.mask.data ? part.mask.data + first : nullptr",
        "part.mask.data",
        "",
    ),
    "a removed barrier before a slab's stage is written": (
        "turbo-prefill.cuh",
        "            __syncthreads(); // the stage is read\n",
        "",
        "race",
    ),
    "a removed barrier before a slab's stage is read": (
        "turbo-prefill.cuh",
        "            turbo_wait_for_copies();\n            __syncthreads();",
        "            turbo_wait_for_copies();",
        "race|nothing has written",
    ),
    "keys behind the end": (
        "turbo-attention.cuh",
        "there < 1 ? TURBO_MASKED",
        "there < 0 ? TURBO_MASKED",
        "of an input of|",
    ),
}

SOME = [  # copies are early in the second and the fourth
    Case(("turbo4", "turbo4"), (128, 128), queries=3, group=8, kv_heads=2, keys=333, mask="scattered", any_values=True),
    Case(("turbo4", "turbo4"), (128, 128), queries=17, keys=200, mask="distance", max_bias=8.0),
    Case(("turbo4", "turbo4"), (192, 192), queries=2, group=5, keys=300, schedule=2, device=(860, 1, 101376)),
    Case(("turbo4", "turbo4"), (64, 64), group=3, keys=651, schedule=1, mask="none", device=(900, 1, 232448)),
    Case(
        ("turbo4", "turbo4"),
        (128, 128),
        keys=120,
        mask="window",
        sinks=True,
        hostile=True,
        window=(37, 8, 3),
        schedule=1,
    ),
]
SOME_KERNELS = "-DTURBO_ATTENTION_KERNELS(X)=X(4, 4, 2) X(4, 4, 1) X(0, 0, 1)"


@pytest.fixture(scope="module")
def planted(emulator, tmp_path_factory) -> dict[str, tuple[list[np.ndarray], str]]:
    """Results of SOME with each of the faults, and what was said; the first has none."""

    def plant(fault: str) -> tuple[list[np.ndarray], str]:
        folder = tmp_path_factory.mktemp("planted")
        shutil.copytree(gpu_compilers.SOURCE / "cuda", folder / "cuda")
        if fault:
            name, right, wrong, _ = PLANTED[fault]
            text = (folder / "cuda" / name).read_text()
            assert text.count(right) == 1, fault
            (folder / "cuda" / name).write_text(text.replace(right, wrong))
        for stem in ("core", "accesses"):
            (folder / f"{stem}.o").symlink_to(emulator / f"{stem}.o")
        return run(
            gpu_compilers.emulate(folder, "planted", PROGRAM, f"-I{folder}", SOME_KERNELS, SMALL_SLABS, checked=True),
            SOME,
        )

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(["", *PLANTED], pool.map(plant, ["", *PLANTED]), strict=True))


@pytest.mark.parametrize("fault", ["", *PLANTED])
def test_planted_faults_are_seen(planted, fault: str):
    done, said = planted[fault]
    right = not said and all(map(is_right, SOME, done))
    if not fault:
        assert right, said
    elif PLANTED[fault][3]:
        assert re.search(PLANTED[fault][3], said), said or right
    else:
        assert not said and not right, said


# ---- the compilers ----

COMPILED = "#define TURBO_ATTENTION_KERNELS(X) X(2, 2, 2) X(3, 3, 2) X(4, 4, 2) X(4, 4, 1)"
# The most registers of a thread. With 168, a multiprocessor has room for 12 warps.
REGISTERS = {"turbo_attend_slab": 208, "turbo_attend": 168, "turbo_unpack": 64, "turbo_combine": 64}


def names(found: list) -> list[str]:
    return [next(name for name in REGISTERS if name in resources.kernel) for resources in found]


@pytest.fixture(scope="module")
def unit(tmp_path_factory) -> Path:
    """turbo-attention.cu with a few of its kernels."""
    path = tmp_path_factory.mktemp("unit") / "attention.cu"
    path.write_text(f'{COMPILED}\n#include "cuda/turbo-attention.cu"\n')
    return path


def test_nvidia_compiles_it_within_bounds(grafted, unit):
    architectures = ("sm_75", "sm_86", "sm_90", "sm_120")
    found = gpu_compilers.compile_nvidia(grafted, unit, unit.with_suffix(".o"), architectures)
    for name, resources in zip(names(found), found, strict=True):
        assert resources.registers <= REGISTERS[name] and resources.spilled == 0, resources
    assert set(names(found)) == set(REGISTERS)


# The most bytes of memory that a lane of AMD's spills to. The products' shuffles take registers there.
SCRATCH = {"turbo_attend_slab": 192, "turbo_attend": 144, "turbo_unpack": 0, "turbo_combine": 0}


@pytest.mark.parametrize("architecture", gpu_compilers.AMD)
def test_amd_compiles_it_within_bounds(grafted, unit, architecture: str):
    found = gpu_compilers.compile_amd(grafted, unit, unit.with_suffix(".s"), architecture)
    for name, resources in zip(names(found), found, strict=True):
        assert resources.scratch <= SCRATCH[name], resources
    assert set(names(found)) == set(REGISTERS)


def test_the_products_of_amd_are_right(emulator):
    """AMD's GPUs have no such instruction: lanes hand halves around, without asynchronous copies."""
    program = gpu_compilers.emulate(
        emulator,
        "amd",
        PROGRAM,
        *gpu_compilers.AS_HIP,
        "-DSIMT_AMD",
        "-D__ballot(p)=__ballot_sync(~0u, p)",
        SOME_KERNELS,
        SMALL_SLABS,
    )
    done, said = run(program, SOME)
    assert not said and all(map(is_right, SOME, done)), said
