#!/usr/bin/env python3
"""Test vectors of the turbo types: what the C reference makes of hostile and Gaussian blocks, and of any bytes.

    python3 make_vectors.py            # write vectors.bin, whose layout README.md describes
    python3 make_vectors.py --check    # only compare; exit 1 if the file is not what the reference gives

Needs a C compiler. All input comes from integers and powers of two, so that it is the same on every machine.
"""

import argparse
import ctypes
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import emit

HERE = Path(__file__).resolve().parent
FILE = HERE / "vectors.bin"
BLOCK = 64


def build_reference(folder: Path) -> ctypes.CDLL:
    """The C reference, compiled in `folder`."""
    library = folder / "libreference.so"
    subprocess.run(
        [
            os.environ.get("CC", "cc"),
            "-std=gnu11",
            "-O2",
            "-ffp-contract=off",
            "-shared",
            "-fPIC",
            "-DGGML_TURBO_STANDALONE",
            f"-I{HERE}",
            "-o",
            library,
            HERE / "turbo-reference.c",
            "-lm",
        ],
        check=True,
    )
    reference = ctypes.CDLL(str(library))
    reference.turbo_get_codec.restype = ctypes.c_void_p
    return reference


def inputs() -> np.ndarray:
    """Blocks (n, 64) float32: every kind of value that an encoder has to deal with."""
    rng = np.random.RandomState(20261126)
    # sums of 12 uniform numbers: close to Gaussian, and integers until the last step
    x = (rng.randint(0, 1 << 20, (96, BLOCK, 12)).sum(axis=2) - 6 * (1 << 20)).astype(np.float32) * np.float32(2.0**-20)
    exponents = rng.randint(-20, 21, (24, BLOCK))
    x[24:32] = np.ldexp(x[24:32], exponents[:8] // 4)  # heavy tails
    x[32:40] = np.ldexp(x[32:40], exponents[8:16])  # heavier
    x[40:52] = np.ldexp(x[40:52], np.arange(-46, 38, 7)[:, None])  # from below the smallest scale to above the largest
    x[52:60] = rng.randint(0, 1 << 32, (8, BLOCK), dtype=np.uint64).astype(np.uint32).view(np.float32)  # any bits
    x[60:64] = np.rint(2 * x[60:64])  # ties
    x[64] = 0
    x[65] = -0.0
    x[66] = 3.5
    x[67] = np.where(np.arange(BLOCK) % 2, 1, -1)
    x[68] = np.where(np.arange(BLOCK) == 9, -7, 0)
    x[69] = np.where(np.arange(BLOCK) < 16, 5, 0)
    x[70] = np.arange(BLOCK) - 31.5
    x[71, ::2] = 0
    x[72] = np.nan
    x[73] = np.inf
    x[74] = -np.inf
    x[75, 3:5] = np.inf, np.nan
    x[76] = np.where(np.arange(BLOCK) % 3, np.nan, -np.inf)
    x[77] = -np.inf
    x[77, 0] = 2
    x[78, 17] = 1e30
    x[79] = -1e30
    x[80] = np.finfo(np.float32).max
    x[81] = np.finfo(np.float32).smallest_subnormal
    x[82] = np.ldexp(x[82], -135)  # denormals
    x[83] = 2.0**29
    x[84] = np.nextafter(np.float32(2.0**29), np.float32(np.inf))
    x[85, 0] = np.float32(2.0**29)
    return x


def vectors(reference: ctypes.CDLL, types: list[emit.Type]) -> bytes:
    """The contents of vectors.bin."""
    x = inputs()
    rng = np.random.RandomState(20261127)
    n_bytes = 32
    parts = [b"TURBOVEC", struct.pack("<4I", 1, len(types), len(x), n_bytes), x.astype("<f4").tobytes()]
    for kind in types:
        codec, size = ctypes.c_void_p(reference.turbo_get_codec(kind.bits)), 2 + BLOCK * kind.bits // 8
        blocks = np.zeros((len(x), size), np.uint8)
        for values, block in zip(x, blocks):
            reference.turbo_quantize_block(codec, _pointer(values), _pointer(block))
        any_bytes = rng.randint(0, 256, (n_bytes, size)).astype(np.uint8)
        any_bytes[0], any_bytes[1] = 0, 255
        parts.append(struct.pack("<2I", kind.bits, kind.type))
        for group in (blocks, any_bytes):
            y = np.zeros((len(group), BLOCK), np.float32)
            for block, values in zip(group, y):
                reference.turbo_dequantize_block(codec, _pointer(block), _pointer(values))
            parts += [group.tobytes(), y.astype("<f4").tobytes()]
    return b"".join(parts)


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the file is another")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = vectors(build_reference(Path(folder)), emit.load())
    if options.check:
        sys.exit(0 if made == FILE.read_bytes() else f"{FILE} is not what the reference gives")
    FILE.write_bytes(made)


if __name__ == "__main__":
    main()
