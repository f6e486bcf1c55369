"""The turbo types and their tables. Emitted by ggml_turbo/format/emit.py from codebooks.toml; do not edit."""

from typing import NamedTuple


class TurboTable(NamedTuple):
    """One type: ggml's number, bits of a code, the encoder's scale factors, mean squared error, three tables of 16.

    codebook[s] = a[s & 15] + b[(s >> 4) ^ p[s & 15]]
    """

    name: str
    ggml_type: int
    bits: int
    rms_to_scale: float
    max_to_scale: float
    mse: float
    a: tuple[int, ...]
    b: tuple[int, ...]
    p: tuple[int, ...]


TABLES = (
    TurboTable(
        name="turbo2",
        ggml_type=120,
        bits=2,
        rms_to_scale=0.0206852276,
        max_to_scale=0.00769841252,
        mse=0.068221,
        a=(2, 0, -1, -3, 1, 26, 26, -13, 20, -21, 18, -25, -8, -7, -8, -7),
        b=(-49, 97, -64, -101, -12, 37, 52, 2, 60, 0, 11, 36, 18, -36, -22, -34),
        p=(4, 8, 0, 12, 11, 9, 13, 3, 15, 7, 7, 15, 13, 9, 5, 1),
    ),
    TurboTable(
        name="turbo3",
        ggml_type=121,
        bits=3,
        rms_to_scale=0.0227396414,
        max_to_scale=0.00769841252,
        mse=0.018448,
        a=(21, 14, 6, 12, 23, -1, -8, 31, -3, -23, 11, -16, -1, -34, -17, -13),
        b=(-54, -92, -14, 34, 55, 17, 15, -58, -31, -35, 93, 0, 1, 56, 34, -18),
        p=(5, 15, 9, 1, 11, 3, 7, 3, 10, 13, 6, 8, 7, 7, 6, 2),
    ),
    TurboTable(
        name="turbo4",
        ggml_type=122,
        bits=4,
        rms_to_scale=0.0246716477,
        max_to_scale=0.00769841252,
        mse=0.0050501,
        a=(15, 12, -27, 38, 9, -15, 21, -10, -7, -32, 2, 14, -20, 1, -10, 7),
        b=(-59, 58, 19, -19, -27, 27, -36, -47, 46, -12, -6, 10, 36, -89, 88, 2),
        p=(15, 2, 11, 4, 1, 7, 12, 10, 11, 15, 5, 14, 4, 13, 9, 3),
    ),
)
"""From the smallest type to the most exact."""

NAMES = tuple(table.name for table in TABLES)
"""Names of the turbo types: a type is one of ours if its name is here."""
