"""The attention kernels of CUDA and HIP, in the emulator of tests/simt, against attention in float64."""

import itertools
import shutil
import struct
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from test_attention import as_input, grafted, mask_of, values, without_window  # noqa: F401 (grafted is a fixture)
from turboquant_gguf.codec import attention_numpy
from turboquant_gguf.codec.attention import Problem, Window
from turboquant_gguf.llamacpp import ggml

ROOT = Path(__file__).parent.parent
SIMT = ROOT / "tests" / "simt"
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
    k, v = (np.repeat(attention_numpy.decode(rows, type), group, axis=2).astype(np.float64)
            for rows, type in ((problem.k, problem.type_k), (problem.v, problem.type_v)))
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
    window: tuple[int, int, int] | None = None  # slots, tokens of the batch, tiles
    schedule: int = 0
    device: tuple[int, int, int] = (860, 4, 101376)  # compute capability, multiprocessors, bytes of shared memory
    late: int = 0

    @property
    def name(self) -> str:
        changed = [f"{field}={getattr(self, field)}" for field in self.__dataclass_fields__
                   if field not in ("types", "sizes") and getattr(self, field) != getattr(Case, field, None)]
        return " ".join([":".join(self.types), "x".join(map(str, self.sizes)), *changed])

    def problem(self) -> Problem:
        rng = np.random.default_rng([*self.name.encode()])
        (size_k, size_v), heads = self.sizes, self.kv_heads * self.group
        mask = mask_of(rng, self.mask, self.sequences, heads, self.queries, self.keys)
        k, v = (ggml.quantize(values(rng, self.kind, self.sequences, self.keys, self.kv_heads, size), type)
                for size, type in zip(self.sizes, self.types, strict=True))
        problem = Problem(
            q=values(rng, self.kind, self.sequences, heads, self.queries, size_k),
            k=k, v=v, type_k=self.types[0], type_v=self.types[1], size_v=size_v, scale=1 / size_k**0.5, mask=mask,
            sinks=rng.normal(0, 3, heads).astype(np.float32) if self.sinks else None,
            max_bias=self.max_bias, softcap=self.softcap,
        )  # fmt: skip
        return self._with_window(problem, rng) if self.window else problem

    def _with_window(self, problem: Problem, rng: np.random.Generator) -> Problem:
        slots, tokens, n_tiles = self.window
        mask = np.where(rng.random((self.sequences, 1, self.queries, slots + tokens)) < 0.4, 0, -np.inf)
        arrays = [values(rng, "gaussian", self.sequences, count, self.kv_heads, size).astype(kind)
                  for kind, count in ((np.float16, slots), (np.float32, tokens)) for size in self.sizes]
        shape = (self.sequences, self.keys)
        columns = np.where(rng.random(shape) < 0.2, rng.integers(0, slots + tokens, shape), -1)
        biases = tiles = None
        if n_tiles:
            biases = rng.normal(0, 10, (*problem.q.shape[:3], n_tiles)).astype(np.float32)
            tiles = rng.integers(0, n_tiles, (self.sequences, self.keys + slots + tokens)).astype(np.int32)
            tiles = tiles[:, np.arange(tiles.shape[1]) // 40 * 40]  # neither one a tile of the kernel nor many
        window = Window(*arrays, mask=mask.astype(np.float16), columns=columns.astype(np.int32), biases=biases, tiles=tiles)
        return replace(problem, window=window)


def run(program: Path, problems: list[tuple[Case, Problem]]) -> list[np.ndarray]:
    """Results (sequences, queries, heads, head size), in order."""
    text = b"".join(
        struct.pack("6i", case.schedule, seed, *case.device, case.late) + as_input(problem)
        for seed, (case, problem) in enumerate(problems)
    )
    done = subprocess.run(program, input=text, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    shapes = [(p.q.shape[0], p.q.shape[2], p.q.shape[1], p.size_v) for _, p in problems]
    parts = np.split(np.frombuffer(done.stdout, np.float32), np.cumsum([np.prod(shape) for shape in shapes])[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
