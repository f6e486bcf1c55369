"""What the programs of llama.cpp are started with."""

import subprocess
import sys

import pytest

from turboquant_gguf.llamacpp.native import beyond_loopback


@pytest.mark.parametrize(
    "arguments, address",
    [
        ([], None),
        (["--port", "50052"], None),
        (["-H", "127.0.0.1"], None),
        (["--host", "127.8.0.1"], None),
        (["--host", "::1"], None),
        (["--host", "localhost"], None),
        (["--host", "0.0.0.0", "--host", "127.0.0.1"], None),
        (["--host", "0.0.0.0"], "0.0.0.0"),
        (["-p", "1", "-H", "192.168.0.7", "-c"], "192.168.0.7"),
        (["--host", "::"], "::"),
        (["--host", "box.example"], "box.example"),
        (["--host"], None),
    ],
)
def test_addresses_beyond_loopback(arguments, address):
    assert beyond_loopback(arguments) == address


@pytest.mark.parametrize("tool, warned", [("ggml-rpc-server", True), ("llama-bench", False)])
def test_a_server_that_others_can_reach_is_warned_of(tool, warned):
    code = f"import sys; sys.argv[0] = {tool!r}; from turboquant_gguf.llamacpp.native import run_tool; run_tool()"
    command = [sys.executable, "-c", code, "--host", "0.0.0.0", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ("asks nobody who they are. Whoever reaches 0.0.0.0" in done.stderr) == warned
