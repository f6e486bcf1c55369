"""llama-bench: one run of it, and the cache that it measured."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...core import child
from ...errors import TurboquantError
from ...llamacpp import cachefacts, native
from ...llamacpp.cachefacts import CacheFacts
from ...llamacpp.cachetypes import CacheTypes
from ...llamacpp.toolerrors import tool_error


@dataclass(frozen=True)
class Sample:
    """One run. Speeds in tokens a second, None where not measured. cache: the cache in effect."""

    prefill_speed: float | None
    decode_speed: float | None
    cache: CacheFacts


def tool(folder: Path | None) -> Path:
    """The llama-bench of this package, or of another llama.cpp in `folder`. Raises TurboquantError if none is there."""
    own = native.tool_path("llama-bench")
    if not folder:
        return own
    if not (other := (folder / own.name).absolute()).is_file():
        raise TurboquantError(f"There is no {own.name} in {folder}. Give the folder of a llama.cpp build's programs.")
    return other


def run(tool: Path, types: CacheTypes, options: Sequence[str | Path]) -> Sample:
    """Run llama-bench with a cache of `types`. Raises TurboquantError if it fails, or if its cache is another."""
    # The verbose log is written while a context is made, none of it while the clock runs.
    command = [tool, "-ctk", types.k, "-ctv", types.v, "-fa", "1", "-r", "1", "-o", "json", "-v", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
    with child.running(command, **pipes) as process:
        output, log = process.communicate()
    if process.returncode != 0:
        raise tool_error("llama-bench", process.returncode, log)
    contexts = log.split("llama_context: constructing llama_context")[1:]
    cache = [cachefacts.require(context, types) for context in contexts or [log]][-1]  # decoding comes after prefill
    tests = json.loads(output)
    return Sample(_speed(tests, "n_prompt"), _speed(tests, "n_gen"), cache)


def _speed(tests: Sequence[dict], kind: str) -> float | None:
    return next((test["avg_ts"] for test in tests if test[kind]), None)
