"""Pairs of cache types as users write them: "turbo4", or "turbo4:turbo3" for keys and values apart."""

from __future__ import annotations

import difflib
import re
import subprocess
from dataclasses import dataclass
from functools import cache

from ..errors import TurboquantError
from . import ggml, native


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
    def bits(self) -> float:
        """Bits a value, scales included: the mean of keys and values, of which there are as many in most models."""
        return (ggml.bits(self.k) + ggml.bits(self.v)) / 2


@cache
def supported() -> tuple[str, ...]:
    """The cache types that the installed llama-server accepts, asked of itself."""
    command = [native.tool_path("llama-server"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    listed = re.search(r"--cache-type-k TYPE.*?allowed values:([^()]*)", text, re.DOTALL)
    if not listed:
        raise TurboquantError(f"{command[0]} does not list its cache types. Is it a llama-server of this package?")
    return tuple(name.strip() for name in listed[1].split(","))


def _known(name: str) -> str:
    if name in supported():
        return name
    near = difflib.get_close_matches(name.lower(), supported(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(supported())}."
    raise UnknownTypeError(f"There is no cache type {name!r}: {hint}")
