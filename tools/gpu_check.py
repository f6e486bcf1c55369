#!/usr/bin/env python3
"""All checks that want a GPU, in one command; prints a report to paste into an issue.

    python3 tools/gpu_check.py                               # builds into build/gpu first: minutes to an hour
    python3 tools/gpu_check.py --model model.gguf            # with KL divergence against the CPU, and speed by depth
    python3 tools/gpu_check.py --build FOLDER --no-build     # with programs that are there

It needs what docs/gpu.md says for a build; a GPU of NVIDIA's or AMD's, or a Mac; and, where they are installed, it uses
compute-sanitizer, nvidia-smi and Xcode's metal. A part that fails is reported, and the next ones run all the same. What was not
measured is not in the report.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TYPES = ("turbo4", "turbo3", "turbo2")
BESIDE = ("f16", "q8_0", "q4_0")
IS_MAC = sys.platform == "darwin"
PROGRAMS = ("test-backend-ops", "llama-perplexity", "llama-bench")


class Failed(Exception):
    """A program ended with an error; the text is its last lines. output: everything that it printed."""

    def __init__(self, text: str, output: str = "") -> None:
        super().__init__(text)
        self.output = output


def run(*command: object, **environment: str) -> str:
    """Everything a program prints. Raises Failed."""
    words = [str(word) for word in command]
    print("$", *words, file=sys.stderr)
    done = subprocess.run(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **environment},
        check=False,
    )
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    if done.returncode:
        last = "\n".join(text.splitlines()[-15:])
        raise Failed(f"{' '.join(words)} ended with {done.returncode}:\n{last}", text)
    return text


def first_line(*command: str) -> str | None:
    """Of a program's output; None if it is not installed or fails."""
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 and done.stdout.strip() else None


def machine() -> str:
    """What is built and where."""
    facts = {
        "commit": first_line("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "GPU": first_line("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "CUDA": first_line("nvcc", "--version"),
        "ROCm": first_line("hipconfig", "--version"),
        "Mac": IS_MAC and first_line("sysctl", "-n", "machdep.cpu.brand_string"),
        "macOS": IS_MAC and first_line("sw_vers", "-productVersion"),
    }
    return "\n".join(f"{name}: {value}" for name, value in facts.items() if value)


def build(folder: Path) -> str:
    """Configures and builds the programs for the GPU whose toolkit is here."""
    backend = "GGML_METAL" if IS_MAC else "GGML_CUDA" if shutil.which("nvcc") else "GGML_HIP"
    run("cmake", "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", f"-D{backend}=ON")
    run("cmake", "--build", folder, "--parallel", os.cpu_count(), "--target", *PROGRAMS)
    return f"built with {backend}"


def check_compiler(folder: Path) -> str:
    """Our Metal kernels by Apple's compiler, which a program would only meet at run time.

    Warnings are errors: llama.cpp takes them for some in a library that is compiled at run time.
    """
    if not first_line("xcrun", "-sdk", "macosx", "metal", "--version"):
        return "not here: it comes with Xcode, not with the Command Line Tools. The system compiles our kernels below."
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "turbo.metal"
    run(sys.executable, ROOT / "ggml_turbo" / "metal" / "flatten.py", source)
    for standard in ("metal3.0", "metal3.1"):
        run("xcrun", "-sdk", "macosx", "metal", f"-std={standard}", "-Werror", "-c", source, "-o", folder / "turbo.air")
    return "compiled"


def operators(text: str) -> str:
    """A table of what test-backend-ops says."""
    counts: dict[str, Counter] = {}
    for operator, result in re.findall(r"^  ([A-Z_]+)\(.*(OK|FAIL|not supported)", text, re.MULTILINE):
        counts.setdefault(operator, Counter())[result] += 1
    rows = [
        f"| {name} | {found['OK']} | {found['FAIL']} | {found['not supported']} |"
        for name, found in sorted(counts.items())
    ]
    return "\n".join(["| operator | right | wrong | left to the CPU |", "|---|---|---|---|", *rows])


def check_operators(programs: Path, device: str) -> str:
    """llama.cpp's own test of operators, for those with our types, against its CPU back end."""
    try:
        return operators(run(programs / "test-backend-ops", "test", "-b", device, "-p", "turbo"))
    except Failed as failure:
        wrong = [line for line in failure.output.splitlines() if "FAIL" in line][:30]
        raise Failed("\n".join([operators(failure.output), "", *wrong, "", str(failure)])) from None


def check_accesses(programs: Path, device: str) -> str:
    """The same under compute-sanitizer: accesses outside of memory, and races in shared memory."""
    lines = []
    for tool in ("memcheck", "racecheck"):
        text = run(
            "compute-sanitizer",
            "--tool",
            tool,
            programs / "test-backend-ops",
            "test",
            "-b",
            device,
            "-p",
            "turbo",
            "-o",
            "SET_ROWS",
        )
        lines += re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY.*)", text)
    return "\n".join(lines)


def check_divergence(programs: Path, model: Path) -> str:
    """KL divergence of the GPU's logits from those that the CPU computes with the same types: rounding, no more."""
    text = ROOT / "python" / "turboquant_gguf" / "data" / "demo.txt"
    rows = ["| type | mean KL divergence from the CPU |", "|---|---|"]
    base = model.with_suffix(".logits")
    for kind in TYPES:
        common = (
            programs / "llama-perplexity",
            "--model",
            model,
            "--file",
            text,
            "--ctx-size",
            512,
            "--chunks",
            4,
            "--kl-divergence-base",
            base,
            "--cache-type-k",
            kind,
            "--cache-type-v",
            kind,
        )
        try:
            run(*common, "--n-gpu-layers", 0, "--no-kv-offload")
            found = run(*common, "--kl-divergence", "--n-gpu-layers", 99)
        finally:
            base.unlink(missing_ok=True)
        rows.append(f"| {kind} | {re.search(r'Mean +KLD: +(.*)', found)[1]} |")
    return "\n".join(rows)


def check_speed(programs: Path, model: Path, depths: str) -> str:
    """Tokens a second by depth, as multiples of f16 in the same run."""
    speeds: dict[tuple, float] = {}
    for kind in (*BESIDE, *TYPES):
        text = run(
            programs / "llama-bench",
            "--model",
            model,
            "--n-gpu-layers",
            99,
            "--flash-attn",
            1,
            "--cache-type-k",
            kind,
            "--cache-type-v",
            kind,
            "--n-depth",
            depths,
            "--n-prompt",
            512,
            "--n-gen",
            64,
            "--output",
            "json",
        )
        found = json.loads(re.search(r"^\[.*^\]", text, re.DOTALL | re.MULTILINE)[0])  # the log is beside it
        speeds |= {(kind, one["n_depth"], "prefill" if one["n_prompt"] else "decode"): one["avg_ts"] for one in found}
    rows = [
        "| | depth | f16, tokens/s | " + " | ".join((*BESIDE[1:], *TYPES)) + " |",
        "|---" * (3 + len(BESIDE[1:]) + len(TYPES)) + "|",
    ]
    for depth, what in sorted({(depth, what) for _, depth, what in speeds}, key=lambda pair: (pair[1], pair[0])):
        f16 = speeds["f16", depth, what]
        ratios = (f"{speeds[kind, depth, what] / f16:.2f}" for kind in (*BESIDE[1:], *TYPES))
        rows.append(f"| {what} | {depth} | {f16:.1f} | " + " | ".join(ratios) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu", metavar="FOLDER")
    parser.add_argument("--no-build", action="store_true", help="use the programs in FOLDER/bin as they are")
    parser.add_argument("--device", default=None, help="as llama.cpp calls it; default: MTL0, CUDA0 or ROCm0")
    parser.add_argument("--model", type=Path, help="a GGUF, for KL divergence and speed")
    parser.add_argument("--depths", default="0,8192,32768", help="tokens in the cache before speed is measured")
    options = parser.parse_args()
    has_nvidia = shutil.which("nvcc") or shutil.which("nvidia-smi")
    device = options.device or ("MTL0" if IS_MAC else "CUDA0" if has_nvidia else "ROCm0")
    programs = options.build / "bin"
    parts: dict[str, Callable[[], str]] = {"machine": machine}
    if IS_MAC:
        parts["Apple's compiler"] = lambda: check_compiler(options.build)
    if not options.no_build:
        parts["build"] = lambda: build(options.build)
    parts["operators"] = lambda: check_operators(programs, device)
    if shutil.which("compute-sanitizer"):
        parts["memory accesses of SET_ROWS"] = lambda: check_accesses(programs, device)
    if options.model:
        parts["the same logits as the CPU"] = lambda: check_divergence(programs, options.model)
        parts["speed, as a multiple of f16"] = lambda: check_speed(programs, options.model, options.depths)
    failed = False
    for title, part in parts.items():
        try:
            said = part()
        except Failed as failure:
            said, failed = f"```\n{failure}\n```", True
        print(f"## {title}\n\n{said}\n", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
