"""What attention does for a tile of 32 keys, counted in the emulator where every access is checked. test_metal.py runs
this; docs/gpu.md has the numbers.
"""

import ctypes
import os
from dataclasses import dataclass, replace

import pytest

from device_operators import DEVICE, problem
from turboquant_gguf.codec.attention import Attention

EMULATOR = ctypes.CDLL(os.environ["GGML_BACKEND_PATH"])
COUNTED = {
    "words of blocks": ("array_reads", 2),
    "queries": ("array_reads", 4),
    "codebook": ("shared_reads", 2),
    "shared reads": ("shared_reads", 4),
    "shared writes": ("shared_writes", 4),
}
for _name in (*{name for name, _ in COUNTED.values()}, "matrix_products"):
    getattr(EMULATOR, f"simt_{_name}").restype = ctypes.c_uint64


def counts() -> dict[str, int]:
    """Since the process began."""
    found = {what: getattr(EMULATOR, f"simt_{name}")(size) for what, (name, size) in COUNTED.items()}
    return found | {"products": EMULATOR.simt_matrix_products()}


@dataclass(frozen=True)
class Case:
    heads: int  # of one head of keys
    queries: int = 1
    size: int = 128

    def run(self, keys: int) -> dict[str, int]:
        """Without a mask: what is read in words of 16 bits is blocks."""
        asked = problem("turbo4", "turbo3", (self.size, self.size), self.queries, keys, heads=self.heads, kv_heads=1)
        with Attention(replace(asked, mask=None), device=DEVICE) as attention:
            before = counts()
            attention.run()
            return {what: count - before[what] for what, count in counts().items()}

    def per_tile(self) -> dict[str, int]:
        """Of each tile but the first."""
        two, three = self.run(64), self.run(96)
        return {what: three[what] - two[what] for what in two}


VALUES = 2 * 32 * 128  # of keys and of values in a tile


@pytest.mark.parametrize("case", [Case(1), Case(8), Case(4, queries=8)], ids=str)
def test_a_block_is_decoded_once_for_all_rows(case: Case):
    """For one query head, for the eight of a group, and for the 32 rows of a prompt.

    Three words for four values, an entry of the codebook for each.
    """
    found = case.per_tile()
    assert found["words of blocks"] == 3 * VALUES // 4 and found["codebook"] == VALUES


@pytest.mark.parametrize("case, rows", [(Case(8), 8), (Case(4, queries=8), 32)], ids=str)
def test_what_a_tile_takes(case: Case, rows: int):
    matrices = 32 * 128 * rows // 8**3  # of queries and keys
    found = case.per_tile()
    assert found["products"] == 2 * matrices + 128 * rows // 64  # and of values and weights, and of the result so far
    assert found["queries"] == 128 * rows
    # tiles, queries, scores, weights, factors, and which keys are seen
    assert found["shared writes"] == VALUES + 128 * rows + 2 * 32 * rows + rows + 4
    # One operand of the products is read for all rows; the other by each simdgroup, for its eight keys or 16 channels.
    of_keys = 32 * 128 + 4 * 128 * rows
    of_values = 32 * 128 + 2 * 4 * 32 * rows
    of_factors = 4 * 8 * rows
    assert found["shared reads"] == of_keys + of_values + of_factors + 32 * rows + 4 * 128
