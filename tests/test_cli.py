"""The command as users run it: a process of its own, its output and its exit code."""

import importlib.metadata
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from importlib.resources import files

import pytest
from rich.console import Console

import turboquant_gguf
from conftest import ROOT
from sequences import window_slots
from turboquant_gguf import cli
from turboquant_gguf.core.tables import Shown
from turboquant_gguf.llamacpp import bindings, provenance
from turboquant_gguf.measure.demo import Measurement, invitation, table

COMMAND = (sys.executable, "-m", "turboquant_gguf.cli")
NARROW = {"COLUMNS": "80", "NO_COLOR": "1"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **NARROW, **environment},
        timeout=300,
        check=False,
    )


def sentences(text: str) -> str:
    """Text as one line, for output that is wrapped to the width of a terminal."""
    return " ".join(text.split())


@pytest.mark.parametrize("arguments", [[], *([name] for name in cli.cli.commands)], ids=" ".join)
def test_help_fits_80_columns(arguments):
    shown = run(*arguments, "--help")
    assert shown.returncode == 0
    assert max(map(len, shown.stdout.splitlines())) <= 80


@pytest.mark.parametrize("example", ["demo --model my.gguf", "bench my.gguf --types", "inspect my.gguf --memory"])
def test_help_has_examples(example):
    assert f"turboquant-gguf {example}" in run(example.split()[0], "--help").stdout


def test_types():
    known = {kind.name: kind for kind in turboquant_gguf.types()}
    listed = {entry["name"]: entry for entry in json.loads(run("types", "--json").stdout)}
    assert listed.keys() == known.keys() == {"turbo2", "turbo3", "turbo4"}
    assert all(listed[name]["bytes_per_block"] == kind.bytes_per_block for name, kind in known.items())
    printed = run("types").stdout
    assert all(name in printed for name in known)
    assert max(map(len, printed.splitlines())) <= 80


def test_version():
    known = json.loads(run("version", "--json").stdout)
    assert known["turboquant_gguf"] == importlib.metadata.version("turboquant-gguf")
    assert known["llama_cpp_source"] in {"llama-cpp-python " + bindings.FITTING_RELEASE, f"ggml {known['ggml']}"}
    assert known["instruction_set"] == turboquant_gguf.simd()
    assert "CPU" in known["backends"]
    first, *others = run("--version").stdout.splitlines()
    assert first == f"turboquant-gguf {known['turboquant_gguf']}"
    shown = dict(zip(["llama.cpp", "ggml", "compiler", "back ends", "instruction set"], others, strict=True))
    assert all(line.startswith(name) for name, line in shown.items())
    assert all(known[name] in shown["llama.cpp"] for name in ("llama_cpp", "llama_cpp_source"))
    assert ", ".join(known["backends"]) in shown["back ends"]


def test_what_is_published_beside_the_code():
    """Type hints, for checkers of types; and the version in CITATION.cff, which nothing else reads."""
    assert files("turboquant_gguf").joinpath("py.typed").is_file()
    version = importlib.metadata.version("turboquant-gguf")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("cali", {"calibrate"}),
        ("bench --types turbo", {"turbo2", "turbo3", "turbo4"}),
        ("ppl --types f16,q8_0:turbo3,q5", {"f16,q8_0:turbo3,q5_0", "f16,q8_0:turbo3,q5_1"}),
        ("verify --types bf", {"bf16"}),
    ],
)
def test_shells_complete(words, completed):
    """As fish asks. bash takes a colon for the end of a word, and does without what is after it."""
    line, begun = f"turboquant-gguf {words}", words.rpartition(" ")[2]
    asked = {"_TURBOQUANT_GGUF_COMPLETE": "fish_complete", "COMP_WORDS": line, "COMP_CWORD": begun}
    done = run(**asked)
    assert {line.partition(",")[2].partition("\t")[0] for line in done.stdout.splitlines()} == completed


def test_demo_as_json(smollm2):
    options = ("--types", "f16,turbo4:turbo3", "--max-tokens", "8", "--context", "512", "--json")
    done = run("demo", "--model", str(smollm2), *options)
    assert done.returncode == 0, done.stderr
    f16, turbo = json.loads(done.stdout)
    assert (turbo["types"], turbo["type_k"], turbo["type_v"]) == ("turbo4:turbo3", "turbo4", "turbo3")
    assert f16["context"] == turbo["context"] == 512
    window = 16 * window_slots()  # bits of a channel, of the tokens that are kept in f16 as well
    assert f16["cache_bytes"] / turbo["cache_bytes"] == pytest.approx(512 * 16 / (512 * 3.75 + window), rel=0.01)
    assert turbo["tokens_per_gib"] > 4 * f16["tokens_per_gib"]
    # of a short text, which a few tokens decide
    assert 0.95 * f16["perplexity"] < turbo["perplexity"] < 1.2 * f16["perplexity"]
    assert f16["decode_speed"] > 0
    assert sentences(f16["answer"]) in sentences(done.stderr)  # streamed there


@pytest.mark.parametrize("page, program", [(True, "llama-server"), (False, "llama-cli")])
def test_demo_ends_by_saying_where_to_chat(page, program, monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "built", lambda: {"web_page": page})
    rows = [Measurement(k, k, k, 512, 1, 1, 1.0, 1.0, 1.0, "A CPU", "") for k in ("f16", "turbo3", "turbo2")]
    said, command = invitation(tmp_path / "my model.gguf", rows).splitlines()
    assert ("http://127.0.0.1:8080" in said) == page
    model = str(tmp_path / "my model.gguf")
    wanted = [program, "--model", model, "--cache-type-k", "turbo3", "--cache-type-v", "turbo3"]
    assert shlex.split(command) == wanted


def test_table_fits_80_columns():
    widest = Measurement("turbo4:turbo3", "turbo4", "turbo3", 131072, 10**11, 1234567, 1234.5, 1234.5, 1.0, "A CPU", "")
    base = Measurement("f16", "f16", "f16", 131072, 10**12, 123, 1234.5, 12.5, 1.0, "A CPU", "")
    console = Console(width=80)
    with console.capture() as captured:
        console.print(Shown(table([base, widest])))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) == 4, "a row was wrapped"
    assert lines[-1].split() == ["turbo4:turbo3", "95367.4", "10.00x", "1.23", "M", "1234.5", "1234.50", "+9776.0%"]


def test_columns_that_do_not_fit_stand_below():
    base = Measurement("f16", "f16", "f16", 131072, 10**12, 123, 1234.5, 12.5, 1.0, "A CPU", "")
    console = Console(width=60)
    with console.capture() as captured:
        console.print(Shown(table([base])))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 60
    assert [line.split() for line in lines if line.startswith("f16")] == [
        ["f16", "953674.3", "1.00x", "0.123", "k", "1234.5"],
        ["f16", "12.50", "+0.0%"],
    ]


def test_table_without_f16_compares_with_nothing():
    one = Measurement("turbo4", "turbo4", "turbo4", 4096, 2**20, 46_600, 9.0, 20.0, 1.0, "A CPU", "")
    console = Console(width=80)
    with console.capture() as captured:
        console.print(Shown(table([one])))
    assert captured.get().splitlines()[-1].split() == ["turbo4", "1.0", "-", "46.6", "k", "9.0", "20.00", "-"]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["demo", "--types", "trubo4"], 2, "There is no cache type 'trubo4': did you mean turbo4?"),
        (["demo", "--model", "absent.gguf"], 1, "There is no model file absent.gguf."),
        (["demo", "--model", os.devnull], 1, "There is no model file"),
        (["demo", "--model", __file__], 1, "is not a GGUF file"),
        (["demo", "--port", "99999"], 2, "99999 is not in the range"),
        (["bench", "--types", "trubo4"], 2, "There is no cache type 'trubo4': did you mean turbo4?"),
        (["bench", "--depths", "0,4k"], 2, "'4k' is not a number of tokens."),
        (["bench", "--basline", "."], 2, "Did you mean '--baseline'?"),
        (["bench", "--prefill", "0", "--decode", "0"], 2, "nothing to measure"),
        (["bench", "--plot", "speed.jpg"], 2, "'speed.jpg' does not end in .png"),
        (["bench", "--plot", "absent/speed.png"], 2, "absent to write speed.png into."),
        (["bench", "absent.gguf"], 1, "There is no model file absent.gguf."),
        (["bench", "--baseline", "absent"], 1, "There is no llama-bench in absent."),
        (["dmo"], 2, "Did you mean 'demo'?"),
    ],
)
def test_errors_are_sentences(arguments, code, sentence):
    failed = run(*arguments)
    assert failed.returncode == code
    assert sentence in sentences(failed.stderr)
    assert "Traceback" not in failed.stderr
    assert failed.stdout == ""


def test_debug_shows_where_an_error_came_from():
    assert "Traceback" in run("demo", "--model", "absent.gguf", TURBOQUANT_DEBUG="1").stderr


def test_port_in_use(smollm2):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        failed = run("demo", "--model", str(smollm2), "--types", "f16", "--port", str(port))
    assert failed.returncode == 1
    assert f"Port {port} cannot be used" in sentences(failed.stderr)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_stops_the_server_and_leaves_nothing(smollm2, tmp_path, number, code):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [*COMMAND, "demo", "--model", str(smollm2), "--types", "f16", "--port", str(port), "--max-tokens", "2000"],
        env={**os.environ, **NARROW, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not _answers(port):
        assert time.monotonic() < deadline and process.poll() is None, "the server did not start"
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert not _answers(port)
    assert list(tmp_path.iterdir()) == []


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
