"""Pairs of cache types as users write them: "turbo4", or "turbo4:turbo3" for keys and values apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from ..core.messages import nearest
from ..errors import TurboquantError
from . import ggml


class UnknownTypeError(TurboquantError, ValueError):
    """A cache type that llama-server does not know."""

    exit_code = 2


@dataclass(frozen=True)
class CacheTypes:
    """The types of a KV cache: `k` for keys, `v` for values."""

    k: str
    v: str

    @classmethod
    def parse(cls, text: str) -> CacheTypes:
        """Read "TYPE" or "K:V". Raises UnknownTypeError, with the nearest known name."""
        k, colon, v = text.strip().partition(":")
        return cls(_known(k), _known(v if colon else k))

    def __str__(self) -> str:
        return self.k if self.k == self.v else f"{self.k}:{self.v}"

    @property
    def is_turbo(self) -> bool:
        """Whether keys or values are in one of our types."""
        return ggml.is_turbo(self.k) or ggml.is_turbo(self.v)

    @property
    def bits(self) -> float:
        """Bits a value, scales included: the mean of keys and values, of which there are as many in most models."""
        return (ggml.bits(self.k) + ggml.bits(self.v)) / 2


F16 = CacheTypes("f16", "f16")
"""What llama.cpp uses unless told otherwise, and what all others are compared with."""

STOCK = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
"""The types of its own that llama.cpp takes for caches."""


@cache
def supported() -> tuple[str, ...]:
    """The cache types that the programs of this package take."""
    return (*STOCK, *ggml.turbo_types())


def complete(_context: object, _parameter: object, text: str) -> list[str]:
    """What a shell may make of the beginning of cache types, separated by commas or colons; click calls it."""
    begin = max(text.rfind(","), text.rfind(":")) + 1
    return [text[:begin] + name for name in supported() if name.startswith(text[begin:])]


def _known(name: str) -> str:
    if name in supported():
        return name
    hint = nearest(name.lower(), supported(), f"choose from {', '.join(supported())}.")
    raise UnknownTypeError(f"There is no cache type {name!r}: {hint}")
