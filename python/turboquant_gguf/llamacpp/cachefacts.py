"""What a KV cache really is, read from the lines llama.cpp prints while it loads.

A tool that accepts a cache type and then keeps another one would make every figure about that type a lie.
So whoever measures calls `require` on the log of the very process that was measured.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..core.units import MIB
from ..errors import TurboquantError
from .cachetypes import CacheTypes

LOG_ARGUMENTS = ("--log-verbosity", "4", "--log-colors", "off")
"""Arguments that make a llama.cpp tool print the lines read here."""

# One line for each cache of a context: a model with sliding windows has two.
_CACHE_LINE = re.compile(
    r"llama_kv_cache: size = +[\d.]+ MiB \( *(?P<cells>\d+) cells,.*?\), "
    r"K \((?P<k>\w+)\): +(?P<k_mib>[\d.]+) MiB, V \((?P<v>\w+)\): +(?P<v_mib>[\d.]+) MiB"
)
_RECENT_WINDOW_LINE = re.compile(r"llama_kv_cache: recent window: .*? in f16, (?P<mib>[\d.]+) MiB")


@dataclass(frozen=True)
class CacheFacts:
    """A context's KV cache in effect.

    parts: (tokens it can hold, bytes) of each cache; a model with sliding windows has two, and that of the sliding
    windows is shorter and never grows. recent: bytes of the recent window (docs/recent-window.md).
    """

    types: CacheTypes
    parts: tuple[tuple[int, float], ...]
    recent: float = 0

    @property
    def cells(self) -> int:
        """Tokens the cache can hold."""
        return max(cells for cells, _ in self.parts)

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return round(self.recent + sum(size for _, size in self.parts))

    @property
    def size_per_token(self) -> float:
        """Bytes that each further token of context takes; a sliding window's cache takes none."""
        return sum(size for cells, size in self.parts if cells == self.cells) / self.cells

    def size_of(self, tokens: float) -> float:
        """Bytes that hold a context of `tokens`; a sliding window's cache is full at its own length."""
        return self.recent + sum(size * min(1, tokens / cells) for cells, size in self.parts)

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
    recent = sum(float(line["mib"]) for line in _RECENT_WINDOW_LINE.finditer(log)) * MIB
    return CacheFacts(asked, tuple((cells, size) for cells, _, size in parts), recent)
