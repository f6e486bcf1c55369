#!/usr/bin/env python3
"""Speed and error of the attention operator alone, for several types of cache, as multiples of stock llama.cpp's f16.

\b
    python3 tools/bench_attention.py
    python3 tools/bench_attention.py --head-size 64 --heads 9 --kv-heads 3 --keys 4096 --queries 512

f16 is stock code in our build too, so one process compares both. Types take turns, round by round, and each is
compared with the f16 of its own round. Bandwidth is what reading the cache once would need at that speed, beside what
the machine reads from memory when it does nothing else. Error is the root mean square of the difference from float64
arithmetic on the same decoded cache, relative to the result's own; it tells nothing of the types' own error.
"""

import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from turboquant_gguf.codec import BLOCK, attention_numpy
from turboquant_gguf.codec.attention import Attention, Problem
from turboquant_gguf.llamacpp import ggml

BASE = "f16"
CONSOLE = Console(stderr=True)


def memory_bandwidth(threads: int) -> float:
    """Bytes a second that `threads` threads read from an array too large for any cache."""
    parts = [np.ones(1 << 27, np.int8).view(np.int64) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - start))
    return best


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--types", default="f16,q8_0,q4_0,turbo4,turbo3,turbo2", help="types of K and V; K:V for two")
@click.option("--head-size", default=128)
@click.option("--heads", default=32, help="query heads")
@click.option("--kv-heads", default=8)
@click.option("--keys", default=16384)
@click.option("--queries", default=1)
@click.option("--threads", default=os.cpu_count() or 1)
@click.option("--rounds", default=15)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="write everything measured here")
def main(types, head_size, heads, kv_heads, keys, queries, threads, rounds, json_file):
    if head_size % BLOCK or heads % kv_heads:
        raise click.UsageError(f"the head size must be a multiple of {BLOCK}, and the heads one of the KV heads")
    names = [BASE, *(name for name in types.split(",") if name != BASE)]
    try:
        for type in {type for name in names for type in name.split(":")}:
            ggml.type_number(type)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--types") from None
    rng = np.random.default_rng(1)
    q = rng.standard_normal((1, heads, queries, head_size), np.float32)
    query, key = np.arange(queries)[:, None] + keys - queries, np.arange(keys)
    mask = np.where(key <= query, 0, -np.inf).astype(np.float16)[None, None]
    results = {}
    with ExitStack() as stack:
        attentions = {}
        for name in names:
            type_k, _, type_v = name.partition(":")
            type_v = type_v or type_k
            x = rng.standard_normal((2, 1, keys, kv_heads, head_size), np.float32)
            k, v = ggml.quantize(x[0], type_k), ggml.quantize(x[1], type_v)
            problem = Problem(q, k, v, type_k, type_v, head_size, head_size**-0.5, mask)
            attentions[name] = stack.enter_context(Attention(problem, threads))
            attentions[name].run()
            some = slice(0, heads // kv_heads)  # one KV head is enough to tell the error
            few = Problem(q[:, some], k[:, :, :1], v[:, :, :1], type_k, type_v, head_size, head_size**-0.5, mask)
            exact = attention_numpy.attention(few)
            error = np.sqrt(np.square(attentions[name].result()[:, :, some] - exact).mean() / np.square(exact).mean())
            results[name] = {"bytes": k.nbytes + v.nbytes, "error": float(error), "seconds": []}
        for round in track(range(rounds), "measuring", console=CONSOLE, transient=True):
            for name in names if round % 2 else reversed(names):
                start = time.perf_counter()
                attentions[name].run()
                results[name]["seconds"].append(time.perf_counter() - start)

    bandwidth = memory_bandwidth(threads)
    table = Table(caption=f"{threads} threads; memory reads {bandwidth / 1e9:.1f} GB/s")
    for column in ("type", "speed, x f16", "lowest", "highest", "ms", "GB/s of cache", "error"):
        table.add_column(column, justify="left" if column == "type" else "right")
    for name, result in results.items():
        ratios = [base / own for base, own in zip(results[BASE]["seconds"], result["seconds"])]
        middle = statistics.median(result["seconds"])
        result |= {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
        table.add_row(
            name,
            f"{result['ratio']:.2f}",
            f"{result['lowest']:.2f}",
            f"{result['highest']:.2f}",
            f"{middle * 1e3:.2f}",
            f"{result['bytes'] / middle / 1e9:.2f}",
            f"{result['error']:.1e}",
        )
    Console().print(table)
    if json_file:
        sizes = dict(head_size=head_size, heads=heads, kv_heads=kv_heads, keys=keys, queries=queries)
        settings = {**sizes, "threads": threads}
        report = {"settings": settings, "memory_bytes_per_second": bandwidth, "results": results}
        json_file.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
