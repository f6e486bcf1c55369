#!/usr/bin/env python3
"""Train the codebooks of turbo2, turbo3 and turbo4 and write ggml_turbo/format/codebooks.toml and the tables.

A codebook of 256 trellis states is built of three tables of 16 entries (ggml_turbo/format/README.md):

    codebook[s] = a[s & 15] + b[(s >> 4) ^ p[s & 15]]

For a fixed p, training alternates as Lloyd's algorithm does: encode Gaussian blocks with the reference encoder,
but for its scale (training.c), then set a and b to the least-squares fit of what the encoder chose. p is searched:
many random starts, the best of them trained longer, then small changes of p and of the tables, kept where they lower
the error. The error that is written down is the encoder's own.

Every number is drawn from fixed seeds and every sum has a fixed order, so a run regenerates the committed file
bit for bit (about 10 minutes a type on one core; the three types run side by side).

    python3 tools/codebook/train.py            # all types, rewrite codebooks.toml and the tables made from it
    python3 tools/codebook/train.py --check    # the same, but only compare with codebooks.toml
    python3 tools/codebook/train.py --quick    # seconds; worse tables, to try a change of the method
"""

import argparse
import ctypes
import multiprocessing
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "ggml_turbo"
ENCODER = Path(__file__).with_name("training.c")
sys.path.insert(0, str(SOURCE / "format"))
import emit

# The modules alone: the packages' __init__ would want the compiled libraries.
for name, folder in (("turboquant_gguf", "."), ("turboquant_gguf.codec", "codec")):
    sys.modules[name] = package = ModuleType(name)
    package.__path__ = [str(ROOT / "python" / "turboquant_gguf" / folder)]
from turboquant_gguf.codec import codec_numpy

BLOCK = 64
STATES = np.arange(256)
LOW, HIGH = STATES & 15, STATES >> 4
HELD_OUT_SEED = 20261121


class Codec(ctypes.Structure):
    """turbo_codec of ggml-turbo.h."""

    _fields_ = [
        ("bits", ctypes.c_int),
        ("rms_to_scale", ctypes.c_float),
        ("max_to_scale", ctypes.c_float),
        ("mse", ctypes.c_float),
        ("a", ctypes.c_int8 * 16),
        ("b", ctypes.c_int8 * 16),
        ("p", ctypes.c_int8 * 16),
        ("codebook", ctypes.c_int8 * 256),
        ("by_low", ctypes.c_int8 * 256),
    ]


def build_codec(folder: Path) -> ctypes.CDLL:
    """The codec without ggml, with the encoder of training.c; SIMD searches, which are the reference's bit for bit."""
    lib = folder / "libturbo.so"
    subprocess.run(
        [
            os.environ.get("CC", "cc"),
            "-std=gnu11",
            "-O3",
            "-march=native",
            "-ffp-contract=off",
            "-shared",
            "-fPIC",
            "-DGGML_TURBO_STANDALONE",
            f"-I{SOURCE}",
            f"-I{SOURCE}/format",
            "-o",
            lib,
            ENCODER,
            "-lm",
        ],
        check=True,
    )
    return ctypes.CDLL(str(lib))


@dataclass(frozen=True)
class Model:
    """A codebook in training: float tables in units of the data's standard deviation."""

    bits: int
    p: np.ndarray
    a: np.ndarray
    b: np.ndarray
    rms_factor: float = 1.0
    max_factor: float = 0.94

    def codec(self, mse: float = 0.0) -> Codec:
        unit = 126.0 / np.abs(self.a[LOW] + self.b[HIGH ^ self.p[LOW]]).max()
        a, b = np.rint(self.a * unit).astype(np.int8), np.rint(self.b * unit).astype(np.int8)
        codebook = a[LOW] + b[HIGH ^ self.p[LOW]]
        codec = Codec(self.bits, self.rms_factor / unit, self.max_factor / np.abs(codebook).max(), mse)
        codec.a[:], codec.b[:], codec.p[:] = a.tolist(), b.tolist(), self.p.tolist()
        codec.codebook[:] = codebook.tolist()
        codec.by_low[:] = codebook.reshape(-1, 1 << self.bits).T.ravel().tolist()
        return codec


def gaussian(blocks: int, seed: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal((blocks, BLOCK)).astype(np.float32)


class Trainer:
    def __init__(self, lib: ctypes.CDLL, bits: int):
        self.lib, self.bits = lib, bits

    def encode(
        self, codec: Codec, x: np.ndarray, encoder: str = "turbo_train_blocks"
    ) -> tuple[float, np.ndarray, np.ndarray]:
        """Mean squared error, states (n, 64) and scales (n,) that the encoder chooses for x (n, 64)."""
        blocks = np.empty((len(x), 2 + 8 * self.bits), np.uint8)
        getattr(self.lib, encoder)(
            ctypes.byref(codec),
            x.ctypes.data_as(ctypes.c_void_p),
            blocks.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(len(x)),
        )
        numbers = codec.rms_to_scale, codec.max_to_scale, codec.mse
        layout = codec_numpy.Codec(self.bits, *numbers, np.array(codec.codebook))
        states, scales = codec_numpy.states_of(layout, blocks), codec_numpy.scales_of(layout, blocks)
        y = scales[:, None] * layout.codebook[states]
        return float(np.square(x - y).mean()), states, scales

    def fit(self, model: Model, x: np.ndarray, states: np.ndarray, scales: np.ndarray) -> Model:
        """Least squares for a and b under the encoder's choices; alternating, each half in closed form."""
        weight = np.repeat(scales * scales, BLOCK)
        count = np.bincount(states.ravel(), weight, 256)
        total = np.bincount(states.ravel(), np.repeat(scales, BLOCK) * x.ravel(), 256)
        unit = model.codec().rms_to_scale / model.rms_factor  # from codebook units to standard deviations
        count, total = count / unit**2, total / unit
        a, b = model.a, model.b
        low, high = LOW, HIGH ^ model.p[LOW]
        for _ in range(8):
            a = np.bincount(low, total - count * b[high], 16) / np.maximum(np.bincount(low, count, 16), 1e-9)
            b = np.bincount(high, total - count * a[low], 16) / np.maximum(np.bincount(high, count, 16), 1e-9)
        return replace(model, a=a - a.mean(), b=b + a.mean())

    def rounds(self, model: Model, x: np.ndarray, n: int) -> tuple[float, Model]:
        """n rounds of encode and fit; returns the best model seen and its error."""
        best = (np.inf, model)
        for _ in range(n):
            error, states, scales = self.encode(model.codec(), x)
            if error < best[0]:
                best = (error, model)
            model = self.fit(model, x, states, scales)
        error, _, _ = self.encode(model.codec(), x)
        return min(best, (error, model), key=lambda pair: pair[0])

    def start(self, rng: np.random.RandomState) -> Model:
        share = rng.uniform(0.2, 0.8)
        return Model(
            self.bits,
            rng.permutation(16),
            rng.standard_normal(16) * share**0.5,
            rng.standard_normal(16) * (1 - share) ** 0.5,
        )

    def change(self, model: Model, rng: np.random.RandomState) -> Model:
        """Two entries of p exchanged or one replaced, the tables shaken."""
        p = model.p.copy()
        if rng.rand() < 0.5:
            i, j = rng.choice(16, 2, replace=False)
            p[i], p[j] = p[j], p[i]
        elif rng.rand() < 0.7:
            p[rng.randint(16)] = rng.randint(16)
        shake = rng.choice([0.0, 0.03, 0.1])
        return replace(
            model, p=p, a=model.a + shake * rng.standard_normal(16), b=model.b + shake * rng.standard_normal(16)
        )

    def tune_guess(self, model: Model, x: np.ndarray) -> Model:
        """The encoder's first guess of the scale, by grid."""
        grid = [
            replace(model, rms_factor=r, max_factor=m)
            for r in (0.92, 0.94, 0.96, 0.98, 1.0)
            for m in (0.85, 0.88, 0.91, 0.94, 0.97)
        ]
        return min(grid, key=lambda candidate: self.encode(candidate.codec(), x)[0])

    def train(self, effort: float) -> Codec:
        rng = np.random.RandomState(self.bits)
        short, middle, long = gaussian(600, 1), gaussian(2500, 2), gaussian(8000, 3)
        n = lambda count: max(2, round(count * effort))

        pool = [self.rounds(self.start(rng), short, 10) for _ in range(n(2000))]
        pool = sorted(pool, key=lambda pair: pair[0])[: n(32)]
        pool = sorted((self.rounds(model, middle, n(20)) for _, model in pool), key=lambda pair: pair[0])[:8]
        for step in range(n(9600)):
            i = step % len(pool)
            changed = self.rounds(self.change(pool[i][1], rng), middle, 3)
            if changed[0] < pool[i][0]:
                pool[i] = changed
            if step % n(1200) == 0:
                pool.sort(key=lambda pair: pair[0])
                print(
                    f"turbo{self.bits}: step {step}, errors {[round(error, 6) for error, _ in pool]}",
                    file=sys.stderr,
                    flush=True,
                )
                if len(pool) > 2:
                    pool.pop()  # the worst: the steps that are left go to the others
        pool = [(self.rounds(self.tune_guess(model, middle), long, n(20))) for _, model in pool]
        _, model = min(pool, key=lambda pair: pair[0])
        mse, _, _ = self.encode(model.codec(), gaussian(16000, HELD_OUT_SEED), "turbo_quantize_blocks_cpu")
        return model.codec(mse)


def train(arguments: tuple[int, float, str]) -> bytes:
    bits, effort, folder = arguments
    return bytes(Trainer(ctypes.CDLL(f"{folder}/libturbo.so"), bits).train(effort))


def as_toml(codecs: list[Codec], numbers: dict[int, int], comment: str) -> str:
    """codebooks.toml; numbers: ggml's of the types, by bits. comment: what stands before the first section."""
    text = comment
    for c in codecs:
        text += (
            f"\n[turbo{c.bits}]\n"
            f"type         = {numbers[c.bits]}\n"
            f"bits         = {c.bits}\n"
            f"rms_to_scale = {float(c.rms_to_scale):.9g}\n"
            f"max_to_scale = {float(c.max_to_scale):.9g}\n"
            f"mse          = {float(c.mse):.5g}\n"
        )
        text += "".join(f"{name} = [{', '.join(f'{v:4d}' for v in getattr(c, name))}]\n" for name in ("a", "b", "p"))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fortieth of the search")
    parser.add_argument("--check", action="store_true", help="exit 1 if codebooks.toml is not what training gives")
    options = parser.parse_args()
    present = emit.DATA.read_text()
    numbers = {kind.bits: kind.type for kind in emit.load()}
    with tempfile.TemporaryDirectory() as folder:
        build_codec(Path(folder))
        jobs = [(bits, 1 / 40 if options.quick else 1.0, folder) for bits in numbers]
        with multiprocessing.Pool(min(len(jobs), os.cpu_count() or 1)) as pool:
            codecs = [Codec.from_buffer_copy(raw) for raw in pool.map(train, jobs, chunksize=1)]
    for codec in codecs:
        print(f"turbo{codec.bits}: mean squared error {codec.mse:.5f}")
    text = as_toml(codecs, numbers, present[: present.index("\n[")])
    if options.check:
        sys.exit(0 if text == present else f"{emit.DATA} is not what training gives")
    emit.DATA.write_text(text)
    emit.write()


if __name__ == "__main__":
    main()
