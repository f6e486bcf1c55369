#!/usr/bin/env python3
"""What the rotation costs in a conversion: time and peak memory, against llama.cpp's own converter.

    python tools/bench_convert.py [--parameters 1e9] [--outtype f16] [--rounds 3]

Writes a random Llama checkpoint in bfloat16 (2 bytes a parameter) into a temporary folder, and converts it, in turns,
by llama.cpp's converter as it is, by `turboquant-gguf convert --rotate none`, and by `turboquant-gguf convert`. Each
conversion is a process of its own: its time counts from start to end, its memory is the peak of what it held apart from
files mapped into it (the checkpoint's pages count for nobody). Disk needed: four times the checkpoint.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

# A process of its own, which knows the tokenizer below, runs what is named on its command line.
RUN = """
import sys
from pathlib import Path
from rich.console import Console
from turboquant_gguf.weights import converter
from turboquant_gguf.weights.convert import OUTTYPES, convert
conversion, gguf = converter.load()
conversion.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
how, folder, output, outtype = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
if how == "llama.cpp":
    conversion.get_model_class("LlamaForCausalLM")(folder, gguf.LlamaFileType[OUTTYPES[outtype]], output).write()
else:
    convert(folder, output, outtype=outtype, rotate=how, console=Console())
"""
SUBJECTS = {"llama.cpp's converter": "llama.cpp", "convert --rotate none": "none", "convert": "values"}


def write_checkpoint(folder: Path, parameters: float) -> None:
    """A Llama of heads of 64 on 2048 channels, as many layers as make up the parameters, in shards of 1 GB."""
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(**shape, vocab_size=32000, num_hidden_layers=1, tie_word_embeddings=True)
    by_layer = 2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192
    config.num_hidden_layers = max(1, round((parameters - 32000 * 2048) / by_layer))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="1GB")
    tokens = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "th"])}
    tokenizer = Tokenizer(models.BPE(tokens, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def measure(how: str, folder: Path, output: Path, outtype: str) -> tuple[float, float]:
    """Seconds and peak bytes of anonymous memory of one conversion."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, how, folder, output, outtype], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            for line in status.splitlines():
                if line.startswith("RssAnon:"):
                    peak = max(peak, int(line.split()[1]) * 1024)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    error = process.communicate()[1]
    watcher.join()
    if process.returncode:
        sys.exit(error.decode())
    seconds = time.monotonic() - start
    output.unlink()
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--outtype", default="f16", choices=["f32", "f16", "bf16", "q8_0"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    console = Console()
    folder = Path(tempfile.mkdtemp(prefix="bench-convert-"))
    try:
        with console.status("writing the checkpoint"):
            write_checkpoint(folder / "checkpoint", arguments.parameters)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in SUBJECTS}
        for number in range(arguments.rounds):
            for name, how in SUBJECTS.items():
                with console.status(f"round {number + 1} of {arguments.rounds}: {name}"):
                    found[name].append(measure(how, folder / "checkpoint", folder / "out.gguf", arguments.outtype))
    finally:
        shutil.rmtree(folder)
    table = Table(
        title=f"{arguments.parameters:.2g} parameters, bf16 to {arguments.outtype}, {arguments.rounds} rounds"
    )
    for heading in ("converter", "seconds, median", "times llama.cpp's", "peak MB", "times llama.cpp's"):
        table.add_column(heading, justify="left" if heading == "converter" else "right")
    base = found[next(iter(SUBJECTS))]
    for name, samples in found.items():
        pairs = list(zip(samples, base, strict=True))
        table.add_row(
            name,
            f"{statistics.median(s for s, _ in samples):.1f}",
            f"{statistics.median(s[0] / b[0] for s, b in pairs):.2f}",
            f"{statistics.median(m for _, m in samples) / 1e6:.0f}",
            f"{statistics.median(s[1] / b[1] for s, b in pairs):.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
