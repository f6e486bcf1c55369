#!/usr/bin/env python3
"""Whether a wheel runs where others will install it; prints what each environment says of itself.

    python3 tools/check_wheel.py dist/turboquant_gguf-*.whl
    python3 tools/check_wheel.py WHEEL --python python3.13 --python /opt/python/bin/python3
    python3 tools/check_wheel.py WHEEL --programs FOLDER        # also the programs of another architecture there

Makes a fresh environment for each Python (this one by default), and one by uv without pip if uv is on PATH; installs
the wheel there as users do; runs `turboquant-gguf types`, the demo, codec and attention on random data, and a model.
Then the same under qemu-user (if it is installed) as processors of other instruction sets. What the codec makes must be
the same bits everywhere; attention must be near its definition, and the model's answer must be the same. Exit code 0:
all of that holds. Minutes; the demo fetches 93 MB once.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Emulated processors of x86-64: their names in qemu, and the instruction set that the codec should choose.
PROCESSORS = {"Nehalem": "scalar", "IvyBridge": "scalar", "Haswell": "avx2"}
PROMPT = "Write the days of the week, from Monday on."  # where no two words are about as likely
ATTENTION_ERROR = 0.02  # relative, of attention with keys and queries in 8 bits against float64

ANSWERS = """
import hashlib, json, sys
import numpy as np
import turboquant_gguf
from turboquant_gguf.codec.attention import Attention, Problem
from turboquant_gguf.llamacpp import ggml

random = np.random.default_rng(2026)
x = random.standard_normal((64, 256), np.float32) * np.exp2(random.integers(-20, 20, (64, 1))).astype(np.float32)
bits, errors = hashlib.sha256(), {}
q = random.standard_normal((1, 4, 3, 64), np.float32)
k, v = random.standard_normal((2, 1, 300, 2, 64), np.float32)
for name in ("turbo2", "turbo3", "turbo4"):
    blocks = turboquant_gguf.quantize(x, name)
    bits.update(blocks.tobytes() + turboquant_gguf.dequantize(blocks, name).tobytes())
    stored = [turboquant_gguf.quantize(part, name) for part in (k, v)]
    keys, values = (turboquant_gguf.dequantize(part, name).astype(np.float64).repeat(2, 2) for part in stored)
    weights = np.exp(np.einsum("bhqd,bkhd->bhqk", q, keys) / 8)
    wanted = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), values)
    problem = Problem(q, *stored, name, name, 64, 0.125)
    with Attention(problem, 2) as attention:
        attention.run()
        found = attention.result()
    errors[name] = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
print(json.dumps({"simd": turboquant_gguf.simd(), "codec": bits.hexdigest()[:16], "attention": errors,
                  "library": ggml.library_path("ggml-cpu").name}))
"""


class Failed(Exception):
    """A program failed, or an answer is not the one that was expected."""


def run(*command: object, **environment: str) -> str:
    """What a program prints to stdout. Raises Failed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace",
                          env={**os.environ, **environment}, check=False)  # fmt: skip
    if done.returncode:
        said = done.stdout[-2000:] + done.stderr[-2000:]
        raise Failed(f"{' '.join(words)[:300]} ended with {done.returncode}:\n{said}")
    return done.stdout


def environments(wheel: Path, pythons: list[str], folder: Path) -> dict[str, Path]:
    """Fresh environments with the wheel, as their Pythons, by what made them."""
    made = {}
    for number, python in enumerate(pythons):
        place = folder / f"venv-{number}"
        run(python, "-m", "venv", place)
        run(place / "bin" / "pip", "install", "--quiet", "--only-binary", ":all:", wheel)
        made[f"{python} -m venv"] = place / "bin" / "python"
    if uv := shutil.which("uv"):
        place = folder / "uv"
        run(uv, "venv", "--quiet", "--python", pythons[-1], place)
        run(uv, "pip", "install", "--quiet", "--python", place / "bin" / "python", wheel)
        made["uv venv"] = place / "bin" / "python"
    return made


def used(python: Path, cache: Path) -> str:
    """The commands of an environment, as users type them; what they say in a line."""
    command = python.parent / "turboquant-gguf"
    known = json.loads(run(command, "version", "--json"))
    run(command, "types")
    results = json.loads(run(command, "demo", "--json", "--max-tokens", "16", TURBOQUANT_CACHE_DIR=str(cache)))
    sizes = ", ".join(f"{one['types']} {one['cache_bytes'] / 2**20:.1f} MiB" for one in results)
    return f"{known['instruction_set']}; back ends {', '.join(known['backends'])}; demo: {sizes}"


def answer(programs: Path, model: Path, *emulator: object) -> str:
    """What a model says, one token after the other, with a turbo cache."""
    printed = run(
        *emulator, programs / "llama-cli", "--model", model, "--cache-type-k", "turbo4", "--cache-type-v", "turbo4",
        "--ctx-size", "256", "--predict", "12", "--temp", "0", "--threads", "2", "--single-turn", "--simple-io",
        "--no-display-prompt", "--no-warmup", "--log-disable", "--prompt", PROMPT, OMP_WAIT_POLICY="passive",
    )  # fmt: skip
    _, asked, said = printed.partition(f"> {PROMPT}\n")
    said, _, speed = said.partition("\n[ Prompt: ")
    if not asked or not speed:
        raise Failed(f"llama-cli prints no answer to {PROMPT!r}: {printed}")
    return said.strip()


def check(wheel: Path, pythons: list[str], programs: Path | None, cache: Path, folder: Path) -> None:
    """All of it. Raises Failed."""
    made = environments(wheel, pythons, folder)
    answers = {}
    for name, python in made.items():
        print(f"{name}: {used(python, cache)}", flush=True)
        answers[name] = json.loads(run(python, "-c", ANSWERS))
    python = next(iter(made.values()))
    package = Path(run(python, "-c", "import turboquant_gguf as t; print(t.__path__[0])").strip())
    (model,) = (cache / "models").glob("*.gguf")
    said = {"here": answer(package / "bin", model)}
    for processor, simd in PROCESSORS.items() if shutil.which("qemu-x86_64") else ():
        emulator = ("qemu-x86_64", "-cpu", processor)
        answers[processor] = json.loads(run(*emulator, python, "-c", ANSWERS, OPENBLAS_NUM_THREADS="1"))
        if answers[processor]["simd"] != simd:
            raise Failed(f"{processor} has {answers[processor]}, and should have {simd}.")
        said[processor] = answer(package / "bin", model, *emulator)
    if programs:
        said["AArch64"] = answer(programs, model, "qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")
    for name, found in answers.items():
        print(f"{name}: {found}")
        same = found["codec"] == next(iter(answers.values()))["codec"]
        if not same or max(found["attention"].values()) > ATTENTION_ERROR:
            raise Failed(f"{name} computes something else.")
    for name, text in said.items():
        print(f"{name}: {text!r}")
        if text != said["here"]:
            raise Failed(f"{name} answers something else than {said['here']!r}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", action="append", metavar="PYTHON", help="an interpreter to try it with")
    parser.add_argument("--programs", type=Path, metavar="FOLDER", help="the bin folder of a build for AArch64")
    arguments = parser.parse_args()
    cache = Path(os.environ.get("TURBOQUANT_CACHE_DIR") or Path.home() / ".cache" / "turboquant-gguf" / "wheel")
    with tempfile.TemporaryDirectory() as folder:
        try:
            pythons = arguments.python or [sys.executable]
            check(arguments.wheel.absolute(), pythons, arguments.programs, cache, Path(folder))
        except Failed as failed:
            sys.exit(f"Failed: {failed}")
    print("All of it holds.")


if __name__ == "__main__":
    main()
