"""Perplexity of a model with a given KV cache, by llama-perplexity."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..core import child
from . import cachefacts, native
from .cachetypes import CacheTypes
from .placement import CPU, Placement
from .toolerrors import check_model_file, tool_error

CHUNK_TOKENS = 512


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood per token; `error` is its standard error over the text."""

    value: float
    error: float


def measure(
    model: Path,
    types: CacheTypes,
    text: Path,
    *,
    placement: Placement = CPU,
    on_chunk: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """The perplexity of `text` (a UTF-8 file of at least 1,024 tokens), read in chunks of 512 tokens.

    placement: where it computes. on_chunk: called with (chunks done, chunks in all). Raises TurboquantError if the tool
    fails, or if its cache has other types than `types`.
    """
    check_model_file(model)
    command = [
        native.tool_path("llama-perplexity"), "--model", model, "--file", text, "--ctx-size", str(CHUNK_TOKENS),
        "--batch-size", str(CHUNK_TOKENS), "--cache-type-k", types.k, "--cache-type-v", types.v,
        *placement.arguments(), *cachefacts.LOG_ARGUMENTS,
    ]  # fmt: skip
    log = ""
    with child.running(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        # Each result comes without an end of line, so we read what there is rather than lines.
        while piece := process.stdout.read1():
            log += piece.decode("utf-8", "replace")
            if on_chunk and (chunks := re.search(r"over (\d+) chunks", log)):
                on_chunk(len(re.findall(r"\[\d+\]\d", log[chunks.end() :])), int(chunks[1]))
        process.wait()
    final = re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", log)
    if process.returncode != 0 or not final:
        raise tool_error("llama-perplexity", process.returncode, log)
    cachefacts.require(log, types)
    return Perplexity(float(final[1]), float(final[2]))
