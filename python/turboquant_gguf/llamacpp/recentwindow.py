"""The recent window of a KV cache: how many tokens llama.cpp keeps at full precision beside quantized ones.

A context of this process takes it as an argument (`set_next`). Programs and workers that this process starts, and
contexts that are given none, find it in the environment (`use`).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from ..core import environment
from . import ggml

VARIABLES = {
    "LLAMA_ARG_CACHE_WINDOW": "TURBO_CACHE_WINDOW",
    "LLAMA_ARG_CACHE_SINKS": "TURBO_CACHE_SINKS",
    "LLAMA_TURBO_CALIBRATION": "TURBO_CALIBRATION",
}
"""Environment variables for contexts, by the names they had at first: results keep those, programs warn of them."""

_UNSAID, _FORCE = -1, 2  # LLAMA_TURBO_UNSAID, LLAMA_TURBO_USE_FORCE


@dataclass(frozen=True)
class RecentWindow:
    """Tokens at the end (recent) and at the beginning (sinks) of each sequence; None: llama.cpp's default.

    Raises ValueError if one is negative.
    """

    recent: int | None = None
    sinks: int | None = None

    def __post_init__(self) -> None:
        if min(self.recent or 0, self.sinks or 0) < 0:
            raise ValueError(f"A recent window of {self.recent} tokens and {self.sinks} first ones cannot be.")

    def arguments(self) -> list[str]:
        """The options of llama.cpp's programs for it; llama-bench has none, and reads the environment."""
        return [word for name, value in self._said("--cache-window", "--cache-sinks") for word in (name, str(value))]

    def environment(self) -> dict[str, str]:
        """The environment variables for it."""
        return {name: str(value) for name, value in self._said("TURBO_CACHE_WINDOW", "TURBO_CACHE_SINKS")}

    def _said(self, recent: str, sinks: str) -> list[tuple[str, int]]:
        return [(name, value) for name, value in ((recent, self.recent), (sinks, self.sinks)) if value is not None]


def variables() -> dict[str, str]:
    """What the environment says of contexts, by the names that results have."""
    found = {old: os.environ.get(name) or os.environ.get(old) for old, name in VARIABLES.items()}
    return {old: value for old, value in found.items() if value}


def set_variables(to: Mapping[str, str]) -> None:
    """Make the environment say of contexts what `variables` said elsewhere, and nothing else."""
    for old, name in VARIABLES.items():
        os.environ.pop(old, None)
        os.environ.pop(name, None)
        if old in to:
            os.environ[name] = to[old]


def in_effect() -> RecentWindow:
    """The window that the environment asks for. What is no number there is left to llama.cpp to refuse."""
    said = variables()
    recent, sinks = (said.get(f"LLAMA_ARG_CACHE_{name}", "") for name in ("WINDOW", "SINKS"))
    return RecentWindow(*(int(text) if text.isdecimal() else None for text in (recent, sinks)))


def use(window: RecentWindow) -> AbstractContextManager[None]:
    """Let this process and those it starts have `window` for the length of a block."""
    return environment.changed(window.environment())


def set_next(window: RecentWindow, *, force_calibration: bool = False) -> None:
    """Give `window` to the next context that this thread makes, whatever the environment says. libllama is loaded.

    force_calibration: keys are calibrated whatever their type, if the file has a calibration.
    """
    recent, sinks = (_UNSAID if value is None else value for value in (window.recent, window.sinks))
    calibration = _FORCE if force_calibration else _UNSAID
    params = ggml.ContextParams(cache_window=recent, cache_sinks=sinks, calibration=calibration)
    if not ggml.function("llama_turbo_set_next")(ctypes.byref(params)):
        raise ValueError(f"libllama takes no recent window of {recent} and {sinks} tokens.")
