"""Hostile blocks, metadata and states, a few thousand of each; tools/fuzz.py runs a million under sanitizers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from test_llama_cpp import build_folder, build_test  # noqa: F401 (a fixture)

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "ggml_turbo"
INPUTS = {"blocks": 4000, "metadata": 4000, "states": 2000}


@pytest.mark.parametrize("target", INPUTS)
def test_hostile_input(target: str, build_folder: Path):  # noqa: F811
    program = build_test(build_folder, "turbo-fuzz")
    command = [program, target, "--inputs", str(INPUTS[target])]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(int(count) > 0 for count in re.findall(r"(\d+) (?!inputs)\w", done.stdout)), done.stdout


SANITIZED = (
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1", "-ffp-contract=off", "-march=native",
)  # fmt: skip


def sanitized_codec(folder: Path, reference: str) -> subprocess.CompletedProcess:
    """What codec_simd.c says of the codec under sanitizers, with this text as turbo-reference.c."""
    (folder / "turbo-reference.c").write_text(reference)
    program = folder / "codec"
    sources = [folder / "turbo-reference.c", ROOT / "tests" / "codec_simd.c", SOURCE / "cpu" / "turbo-cpu.c"]
    compiler = os.environ.get("CC", "cc").split()
    options = [*SANITIZED, "-DGGML_TURBO_STANDALONE", f"-I{SOURCE}", f"-I{SOURCE}/format"]
    command = [*compiler, *options, *sources, "-lm", "-o", program]
    built = subprocess.run(command, capture_output=True, text=True)
    if "asan" in built.stderr or "unsupported" in built.stderr:
        pytest.skip(f"this compiler has no sanitizers: {built.stderr.splitlines()[-1]}")
    assert built.returncode == 0, built.stderr
    return subprocess.run([program], capture_output=True, text=True, timeout=300)


def test_codec_under_sanitizers(tmp_path: Path):
    """Any bytes and any floats: no report. Without a bound, where a byte past the last block is read, there is one."""
    reference = (SOURCE / "format" / "turbo-reference.c").read_text()
    done = sanitized_codec(tmp_path, reference)
    assert done.returncode == 0, done.stderr[-4000:]

    bounded = "byte + 1 < TURBO_BLOCK_BYTES(bits) ? block[byte + 1] : 0;"
    assert bounded in reference
    done = sanitized_codec(tmp_path, reference.replace(bounded, "block[byte + 1];"))
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


def test_the_tool_says_what_it_takes():
    def tool(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, ROOT / "tools" / "fuzz.py", *arguments], capture_output=True, text=True)

    assert "python3 tools/fuzz.py" in tool("--help").stdout
    assert tool("nothing").returncode == 2 and tool("--inputs", "0").returncode == 2
