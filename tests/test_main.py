"""`python -m turboquant_gguf`: a crash of llama.cpp is a sentence, and signals mean what they mean without it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny_model
from test_child import alive, descendants, in_proc, until

COMMAND = (sys.executable, "-m", "turboquant_gguf")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there is one process elsewhere")


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("llama") / "llama.gguf")


@pytest.fixture(scope="session", params=["a token twice", "a byte without a token"])
def damaged(request, llama) -> Path:
    """A vocabulary over which llama.cpp aborts: as it loads, or as it meets the letter."""
    content = llama.read_bytes()
    letter, instead = (b"<0x61>", b"<0x62>") if request.param == "a token twice" else (b"<0x61>", b"<0y61>")
    assert content.count(letter) == 1
    path = llama.with_name("damaged.gguf")
    path.write_bytes(content.replace(letter, instead))
    return path


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("abc " * 500)
    return path


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "NO_COLOR": "1", **environment}
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.mark.parametrize("command", ["inspect", "recommend", "ppl", "calibrate", "verify", "sweep", "niah", "demo"])
def test_a_damaged_vocabulary_is_a_sentence(damaged, llama, text, tmp_path, command):
    arguments = {
        "inspect": ["--memory", "1GiB"],
        "recommend": ["--memory", "1GiB", "--context", "512"],
        "ppl": ["--text", text, "--context", "64", "--results", tmp_path / "r.sqlite"],
        "calibrate": ["--text", text, "-o", tmp_path / "out.gguf"],
        "verify": [llama, "--text", text],
        "sweep": ["--text", text, "--measure", "quality", "--context", "64", "-o", tmp_path / "r.sqlite"],
        "niah": ["--lengths", "256", "--text", text],
        "demo": ["--prompt", "abc", "--types", "f16"],
    }[command]
    done = run(command, *(["--model"] if command == "demo" else []), damaged, *arguments)
    if done.returncode == 0:  # it needs no tokens
        assert command in ("inspect", "recommend") and not done.stderr
        return
    assert done.returncode in (1, 128 + signal.SIGABRT), done.stderr
    said, *details = done.stderr.splitlines()
    assert "Traceback" not in done.stderr and "The model file is probably damaged" in said
    if command in ("demo", "niah") and "llama-server" in said:  # which refuses the question, and lives
        assert "unordered_map" in said or command == "demo"
    else:
        assert re.search(r"damaged\.gguf.* \(SIGABRT\)", said)
        assert any("GGML_ASSERT" in line or "unordered_map" in line for line in details), done.stderr
    assert not (tmp_path / "out.gguf").exists()


def test_the_name_of_the_command():
    assert (
        run("types").stdout
        == subprocess.run(["turboquant-gguf", "types"], capture_output=True, text=True, check=True).stdout
    )
    assert "Usage: turboquant-gguf types" in run("types", "--help").stdout


@pytest.mark.parametrize(
    "arguments, code, said",
    [(["types"], 0, ""), (["tpyes"], 2, "Did you mean 'types'?"), (["inspect", "absent.gguf"], 1, "no model file")],
)
def test_exit_codes_and_output_pass_through(arguments, code, said):
    done = run(*arguments)
    assert done.returncode == code and said in done.stderr and bool(done.stdout) == (code == 0)


def test_what_fails_before_anything_is_shown(tmp_path):
    (tmp_path / "click.py").write_text("raise ImportError('this click is broken')")
    done = run("types", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "this click is broken" in done.stderr


@pytest.fixture
def started(llama, tmp_path):
    """Starts a command that would take long; gives it, and its processes once llama-server is among them."""
    processes = []

    def start(**options) -> tuple[subprocess.Popen, dict[int, str]]:
        process = subprocess.Popen(
            [*COMMAND, "niah", llama, "--lengths", "400", "--trials", "1000"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}, **options,
        )  # fmt: skip
        processes.append(process)
        until(lambda: process.poll() is not None or "llama-server" in descendants(process.pid).values())
        time.sleep(0.5)
        return process, descendants(process.pid)

    yield start
    for process in processes:  # where a test failed: the others would run for hours and slow down what follows
        process.kill()
        process.communicate()


@in_proc
@pytest.mark.parametrize("whom", ["us", "all"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_passed_on(started, tmp_path, number, whom):
    """From a terminal they come to the whole process group."""
    process, others = started(start_new_session=True)
    (os.killpg if whom == "all" else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors.decode().splitlines()[-1:] == (["Interrupted."] if number == signal.SIGINT else [])
    assert not alive(others) and not list(tmp_path.iterdir())


@in_proc
@pytest.mark.parametrize("which", ["turboquant_gguf", "turboquant_gguf.cli", "llama-server"])
def test_killing_any_of_them_ends_all(started, which):
    process, others = started()
    pids = {process.pid: "turboquant_gguf"}
    for pid, name in others.items():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        pids[pid] = name if name != Path(sys.executable).name else words[2].decode()
    os.kill(next(pid for pid, name in pids.items() if name == which), signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    until(lambda: not alive(others), 5)
    assert b"Traceback" not in errors
    if which != "turboquant_gguf":
        assert b"was ended by SIGKILL" in errors


@in_proc
def test_ctrl_z_stops_all_that_computes(started):
    def states() -> set[str]:
        python = [pid for pid, name in others.items() if name == Path(sys.executable).name]
        return {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in [process.pid, *python]}

    process, others = started()
    process.send_signal(signal.SIGTSTP)
    until(lambda: states() == {"T"}, 5)
    process.send_signal(signal.SIGCONT)
    until(lambda: "T" not in states(), 5)


def test_a_hangup_that_is_ignored_stays_so():
    """As nohup does."""
    process = subprocess.Popen(
        [*COMMAND, "types"],
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        start_new_session=True,
    )
    for _ in range(20):
        time.sleep(0.02)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGHUP)
    assert b"turbo4" in process.communicate()[0] and process.returncode == 0
