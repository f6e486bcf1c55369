#!/usr/bin/env python3
"""Hostile input under AddressSanitizer and UndefinedBehaviorSanitizer, for all that reads bytes of strangers.

    python3 tools/fuzz.py                                # a million inputs, shared by all three targets
    python3 tools/fuzz.py --inputs 10000 --seed 7 states
    python3 tools/fuzz.py states --seed 7 --first 1234 --inputs 1    # one input again, as a report says

Targets:
    blocks     blocks of any bytes through every CPU path that reads them, any floats through the encoders
    metadata   the calibration of keys in a file's metadata
    states     saved states of a context with turbo caches

Builds llama.cpp with both sanitizers into build/fuzz/sanitized first (about 10 minutes on 2 cores, once). An input
depends on the seed and its number alone. Needs a compiler and cmake, no packages. Exit code 0: nothing was found.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "fuzz" / "sanitized"  # below the folders among which tests look for the ordinary build
TARGETS = {"blocks": 2, "metadata": 5, "states": 3}  # with shares of the inputs
# The first report ends the process. Optimized, since a million inputs take long; with frames, so that reports name
# functions. Without upstream's assert(), as in every release build: several want finite numbers, which a hostile state
# need not have.
FLAGS = "-O1 -g1 -DNDEBUG -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
PLAIN_SECONDS = 20  # between two lines of progress where there is no terminal to redraw a line on


class Progress:
    """One live line on a terminal, a plain line now and then elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.shown_at = 0.0

    def show(self, text: str) -> None:
        if self.live:
            print(f"\r\033[K{text[:79]}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self.shown_at >= PLAIN_SECONDS:
            print(text, file=sys.stderr, flush=True)
            self.shown_at = time.monotonic()

    def clear(self) -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def run(command: list[object], step: str, what: str, progress: Progress) -> tuple[int, list[str]]:
    """Exit code of a command and what it printed, less the lines that match `step`, which are progress."""
    lines = []
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        try:
            for line in process.stdout:
                if found := re.match(step, line):
                    progress.show(f"{what} {found[1]}")
                else:
                    lines.append(line.rstrip())
        except BaseException:
            process.terminate()
            raise
    progress.clear()
    return process.returncode, lines


def build(progress: Progress) -> Path:
    """The program, built if a source has changed. Exits with the compiler's errors if it cannot be."""
    configure = [
        "cmake",
        "-S",
        ROOT,
        "-B",
        BUILD,
        "-DCMAKE_BUILD_TYPE=None",
        f"-DCMAKE_C_FLAGS={FLAGS}",
        f"-DCMAKE_CXX_FLAGS={FLAGS}",
        "-DGGML_RPC=OFF",
        "-DGGML_OPENMP=OFF",
    ]
    compile_ = ["cmake", "--build", BUILD, "--target", "turbo-fuzz", "--parallel", os.cpu_count() or 1]
    for command in (configure, compile_):
        status, lines = run(command, r"\s*\[ *(\d+[%/]\d*)\]?", "building with sanitizers", progress)
        if status:
            sys.exit("\n".join([*lines[-40:], "Error: the fuzz targets could not be built; the reason is above."]))
    return BUILD / "bin" / "turbo-fuzz"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="blocks, metadata, states; all by default")
    parser.add_argument("--inputs", type=int, default=1_000_000, help="in all; default: 1000000")
    parser.add_argument("--seed", type=int, default=1, help="another seed makes other inputs; default: 1")
    parser.add_argument("--first", type=int, default=0, help="number of the first input; default: 0")
    options = parser.parse_args()
    targets = options.targets or list(TARGETS)
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"there is no target {', '.join(sorted(unknown))}: choose from {', '.join(TARGETS)}")
    if options.inputs < 1 or options.seed < 0 or options.first < 0:
        parser.error("--inputs is at least 1, --seed and --first at least 0")

    progress = Progress()
    program = build(progress)
    found = 0
    shares, before = [TARGETS[target] for target in targets], 0
    for i, target in enumerate(targets):
        up_to_here = options.inputs * sum(shares[: i + 1]) // sum(shares)
        inputs, before = up_to_here - before, up_to_here
        start = time.monotonic()
        command = [program, target, "--seed", options.seed, "--first", options.first, "--inputs", inputs]
        status, lines = run(command, rf"({target} \d+/\d+)$", "fuzzing", progress)
        seconds = time.monotonic() - start
        print("\n".join(lines), flush=True)
        print(f"{target}: {'nothing found' if status == 0 else 'FAILED, see above'}, {seconds:.0f} s", flush=True)
        found += status != 0
    return 1 if found else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
