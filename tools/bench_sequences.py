#!/usr/bin/env python3
"""Processor time of many short conversations at once, with several types of cache, as multiples of f16's.

\b
    python3 tools/bench_sequences.py model.gguf
    python3 tools/bench_sequences.py model.gguf --sequences 60 --prompt 20 --answer 40 --types turbo4,q8_0

Each conversation is a sequence of one cache, as llama-server has them by default: prompts are read one after the other,
and all answers grow by a token in each batch. One thread, whose processor time other work on the machine disturbs
least. Types take turns, round by round, and each is compared with the f16 of its own round. The recent window is what
the types have by default (TURBO_CACHE_WINDOW changes it).
"""

import json
import statistics
import time
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.progress import track

from turboquant_gguf.llamacpp import ggml
from turboquant_gguf.llamacpp.cachetypes import CacheTypes
from turboquant_gguf.llamacpp.logits import Model

BASE = CacheTypes("f16", "f16")
CONSOLE = Console(stderr=True)


class Conversations:
    """A context for `sequences` conversations of `length` tokens. A context manager: it owns memory."""

    def __init__(self, model: Model, types: CacheTypes, sequences: int, length: int) -> None:
        self._llama = llama = model.bindings
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = sequences * length, sequences, True
        params.n_threads = params.n_threads_batch = 1
        params.type_k, params.type_v = ggml.type_number(types.k), ggml.type_number(types.v)
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama.llama_init_from_model(model.handle, params)
        if not self._context:
            raise click.ClickException(f"No cache of {types} could be made: {''.join(model.log[-3:]).strip()}")

    def __enter__(self) -> "Conversations":
        return self

    def __exit__(self, *_: object) -> None:
        self._llama.llama_free(self._context)

    def seconds(self, tokens: np.ndarray, prompt: int) -> tuple[float, float]:
        """Processor time of the prompts and of the answers. tokens: of shape (sequences, length)."""
        begin = time.process_time()
        for sequence, text in enumerate(tokens):
            self._read([(token, i, sequence) for i, token in enumerate(text[:prompt])])
        middle = time.process_time()
        for i in range(prompt, tokens.shape[1]):
            self._read([(token, i, sequence) for sequence, token in enumerate(tokens[:, i])])
        return middle - begin, time.process_time() - middle

    def _read(self, entries: list[tuple[int, int, int]]) -> None:
        batch = self._llama.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for i, (token, position, sequence) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = int(token), position, 1, sequence
            batch.logits[i] = i + 1 == len(entries) or entries[i + 1][2] != sequence
        status = self._llama.llama_decode(self._context, batch)
        self._llama.llama_synchronize(self._context)
        self._llama.llama_batch_free(batch)
        if status:
            raise click.ClickException(f"llama.cpp could not run the model (llama_decode returned {status}).")


@click.command(help=__doc__)
@click.argument("model", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--types", default="turbo4", show_default=True, help="Cache types, such as turbo4:turbo3,q8_0.")
@click.option("--sequences", type=click.IntRange(1, 256), default=16, show_default=True)
@click.option("--prompt", type=click.IntRange(min=1), default=40, show_default=True, help="Tokens of each prompt.")
@click.option("--answer", type=click.IntRange(min=1), default=32, show_default=True, help="Tokens of each answer.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(model: Path, types: str, sequences: int, prompt: int, answer: int, rounds: int, as_json: bool) -> None:
    pairs = [BASE, *map(CacheTypes.parse, types.split(","))]
    seconds: dict[str, list[tuple[float, float]]] = {str(pair): [] for pair in pairs}
    with Model(model) as opened:
        tokens = np.random.default_rng(0).integers(0, opened.vocabulary_size, (sequences, prompt + answer))
        length = -(-(prompt + answer) // 64) * 64
        for _ in track(range(rounds), "rounds", console=CONSOLE, disable=not CONSOLE.is_terminal):
            for pair in pairs:
                with Conversations(opened, pair, sequences, length) as conversations:
                    seconds[str(pair)].append(conversations.seconds(tokens, prompt))
    base = seconds[str(BASE)]
    ratios = {
        name: {
            part: statistics.median(own[i] / other[i] for own, other in zip(found, base, strict=True))
            for i, part in enumerate(("prompts", "answers"))
        }
        for name, found in seconds.items()
    }
    if as_json:
        click.echo(json.dumps({"ratios": ratios, "seconds": seconds}, indent=2))
        return
    for name, found in ratios.items():
        click.echo(
            f"{name:16} prompts {found['prompts']:.2f}, answers {found['answers']:.2f} times f16's processor time"
        )


if __name__ == "__main__":
    main()
