"""What a KV cache really is, read from the lines llama.cpp prints while it loads.

A tool that accepts a cache type and then keeps another one would make every figure about that type a lie.
So whoever measures calls `require` on the log of the very process that was measured.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .cachetypes import CacheTypes
from .errors import TurboquantError

MIB = 1 << 20

LOG_ARGUMENTS = ("--log-verbosity", "4", "--log-colors", "off")
"""Arguments that make a llama.cpp tool print the lines read here."""

# One line for each cache of a context: a model with sliding windows has two.
_CACHE_LINE = re.compile(
    r"llama_kv_cache: size = +[\d.]+ MiB \( *(?P<cells>\d+) cells,.*?\), "
    r"K \((?P<k>\w+)\): +(?P<k_mib>[\d.]+) MiB, V \((?P<v>\w+)\): +(?P<v_mib>[\d.]+) MiB"
)


@dataclass(frozen=True)
class CacheFacts:
    """A context's KV cache in effect.

    cells: tokens it can hold. size: bytes of all of it. size_per_token: bytes that each further token of
    context takes (caches of fixed length, such as a sliding window's, take none).
    """

    types: CacheTypes
    cells: int
    size: int
    size_per_token: float

    def tokens_in(self, memory: int) -> int:
        """How many tokens of context fit in `memory` bytes."""
        fixed = self.size - self.size_per_token * self.cells
        return max(0, int((memory - fixed) / self.size_per_token))


def require(log: str, asked: CacheTypes) -> CacheFacts:
    """The facts of the cache in `log`. Raises TurboquantError if any part of it has other types than `asked`."""
    parts = [
        (int(line["cells"]), CacheTypes(line["k"], line["v"]), (float(line["k_mib"]) + float(line["v_mib"])) * MIB)
        for line in _CACHE_LINE.finditer(log)
    ]
    if not parts:
        raise TurboquantError(
            "llama.cpp did not say what its KV cache holds, so nothing measured with it could be trusted. "
            "Does this model have a KV cache, and is this the llama.cpp of this package?"
        )
    for _, types, _ in parts:
        if types != asked:
            raise TurboquantError(
                f"The KV cache was asked to be {asked} and is {types}. This is a fault of the build: please report it."
            )
    cells = max(part_cells for part_cells, _, _ in parts)
    return CacheFacts(
        types=asked,
        cells=cells,
        size=round(sum(size for _, _, size in parts)),
        size_per_token=sum(size for part_cells, _, size in parts if part_cells == cells) / cells,
    )
