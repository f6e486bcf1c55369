"""Processes end with whoever started them, however that ends."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import tiny_model
from turboquant_gguf.core import child

in_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes in /proc")


def descendants(pid: int) -> dict[int, str]:
    """The processes that `pid` and its children started: what they run, by number."""
    found = {}
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            for started in map(int, (task / "children").read_text().split()):
                words = Path(f"/proc/{started}/cmdline").read_bytes().split(b"\0")
                found[started] = Path(words[0].decode()).name
                found |= descendants(started)
    return found


def alive(pids) -> list[int]:
    """Those that run; what has ended and waits to be asked about does not."""

    def state(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "Z"

    return [pid for pid in pids if state(pid) != "Z"]


def until(condition, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


# ---- child.running ----


def test_a_child_is_the_command_itself():
    with child.running(["sh", "-c", "echo $$; cat; exit 7"], stdout=subprocess.PIPE) as process:
        assert process.communicate()[0] == b"%d\n" % process.pid  # and stdin is empty
    assert process.returncode == 7


@in_proc
def test_windows_ends_the_tree(monkeypatch, tmp_path):
    """There are no groups to signal there; its taskkill, here a stand-in, ends a process and all below it."""
    stand_in = tmp_path / "taskkill"
    stand_in.write_text('#!/bin/sh\n[ "$1 $2 $3" = "/T /F /PID" ] && kill -KILL "$4" $(pgrep -P "$4")\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(child, "IS_POSIX", False)
    with child.running(["sh", "-c", "sleep 1000 & wait"], stdout=subprocess.PIPE) as process:
        sleeping = until(lambda: [pid for pid, name in descendants(process.pid).items() if name == "sleep"])
        started = [process.pid, *sleeping]
    until(lambda: not alive(started), 5)
    assert process.returncode


def test_there_is_no_such_program():
    with pytest.raises(FileNotFoundError, match="no such program"), child.running(["no-such-program"]):
        pass


@in_proc
def test_a_child_and_its_children_end_with_the_block(monkeypatch):
    monkeypatch.setattr(child, "GRACE_SECONDS", 0.5)
    before = descendants(os.getpid())  # of other tests, such as what multiprocessing leaves

    def ours() -> dict[int, str]:
        return {pid: name for pid, name in descendants(os.getpid()).items() if pid not in before}

    with child.running(["sh", "-c", "trap '' TERM; sleep 1000 & sleep 1001 & echo; wait"], stdout=-1) as process:
        process.stdout.readline()
        until(lambda: sorted(ours().values()) == ["sh", "sh", "sleep", "sleep"])
        started = ours()
    until(lambda: not alive(started), 5)  # what is killed takes a moment to be gone


@in_proc
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
@pytest.mark.parametrize("thread", [False, True])
def test_a_child_ends_with_its_parent(number, thread):
    """Even if it ignores what it may, and was started by a thread that has ended since."""
    code = (
        "import threading, time; from turboquant_gguf.core import child\n"
        "running = child.running(['sh', '-c', 'trap \"\" TERM HUP INT; sleep 1000 & wait'])\n"
        "thread = threading.Thread(target=running.__enter__)\n"
        f"{'thread.start(); thread.join()' if thread else 'running.__enter__()'}; time.sleep(1000)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        started = until(lambda: "sleep" in (found := descendants(parent.pid)).values() and found)
        time.sleep(0.3)
        assert len(alive(started)) == 3  # the command, what it started, and what waits
        parent.send_signal(number)
        parent.wait()
        until(lambda: not alive(started), 5)
    finally:
        parent.kill()
        for pid in alive(started):
            os.kill(pid, signal.SIGKILL)


# ---- commands that are killed ----


@in_proc
@pytest.mark.parametrize("command", ["niah", "demo", "eval", "bench", "sweep"])
def test_kill_leaves_no_program_of_llama_cpp(tmp_path, command):
    model = tiny_model.write(tmp_path / "llama.gguf")
    tasks = ["--tasks", "sums_and_letters", "--task-folder", Path(__file__).parent / "tasks"]
    arguments = {
        "niah": ["niah", model, "--lengths", "400", "--trials", "1000"],
        "demo": ["demo", "--model", model, "--max-tokens", "100000", "--context", "100000"],
        "eval": ["eval", model, *tasks, "--max-tokens", "100000", "--context", "8192"],
        "bench": ["bench", model, "--depths", "100000", "--types", "f16"],
        "sweep": ["sweep", model, "--measure", "retrieval", "--lengths", "400", "--trials", "1000", "-o", "r.sqlite"],
    }[command]
    if command == "eval":
        pytest.importorskip("lm_eval")
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "turboquant_gguf.cli", *map(str, arguments)],
            stdout=output, stderr=output, cwd=tmp_path,
            env={**os.environ, "TMPDIR": str(tmp_path), "TURBOQUANT_CACHE_DIR": str(tmp_path)},
        )  # fmt: skip
    tools = {"llama-server", "llama-bench"}
    found: dict[int, str] = {}
    try:

        def started() -> bool:
            assert process.poll() is None, log.read_text()
            found.update(descendants(process.pid))
            return bool(tools & set(found.values()))

        until(started)
        time.sleep(0.5)
        found.update(descendants(process.pid))
        process.kill()
        process.wait()
        until(lambda: not alive(found), 5)
    finally:
        process.kill()
        for pid in alive(found):
            os.kill(pid, signal.SIGKILL)
