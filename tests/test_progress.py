"""Progress and messages, on a terminal and off it."""

import io
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

import tiny_model
from turboquant_gguf import cli
from turboquant_gguf.core import messages, progress

TASKS = Path(__file__).parent / "tasks"
LONG = "/a folder/" + "/".join(f"with a long name {number}" for number in range(12)) + "/model.gguf"


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("llama") / "llama.gguf")


def work(console: Console) -> None:
    with progress.bar(console) as bar:
        task = bar.add_task("reading", total=4)
        for _ in range(4):
            time.sleep(0.06)
            bar.advance(task)


def test_plain_lines_off_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.1)
    output = io.StringIO()
    work(Console(file=output))
    assert output.getvalue() == ""  # results go there
    first, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("reading, 25 %, 0:00")
    with progress.status(Console(file=output), "running a"):
        time.sleep(0.15)
    assert capsys.readouterr().err == "running a, 0:00\n"
    work(Console(quiet=True))
    assert capsys.readouterr().err == ""


def test_short_work_says_nothing_off_a_terminal(capsys):
    work(Console(file=io.StringIO()))
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(capsys):
    output = io.StringIO()
    work(Console(file=output, force_terminal=True, width=60))
    assert "━" in output.getvalue() and "4/4" in output.getvalue() and capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["ppl", "sweep", "niah", "eval", "bench", "calibrate", "verify", "demo"])
def test_every_command_has_it(llama, tmp_path, monkeypatch, command):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.001)  # verify takes milliseconds
    monkeypatch.setenv("TURBOQUANT_CACHE_DIR", str(tmp_path))
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    if command == "eval":
        pytest.importorskip("lm_eval")
    arguments = {
        "ppl": [llama, "--text", text, "--context", "256", "--types", "f16,q8_0"],
        "sweep": [llama, "--text", text, "--context", "256", "--measure", "quality", "-o", tmp_path / "r.sqlite"],
        "niah": [llama, "--lengths", "300", "--depths", "50", "--types", "f16"],
        "eval": [llama, "--tasks", "sums_and_letters", "--task-folder", TASKS, "--limit", "1"],
        "bench": [llama, "--depths", "0", "--repetitions", "1", "--types", "f16", "--prefill", "32"],
        "calibrate": [llama, "-o", tmp_path / "out.gguf"],
        "verify": [llama, llama],
        "demo": ["--model", llama, "--types", "f16", "--max-tokens", "4"],
    }[command]
    done = CliRunner().invoke(cli.cli, [command, *map(str, arguments)])
    assert done.exit_code == 0, done.output
    assert ", 0:0" in done.stderr and ", 0:0" not in done.stdout


# ---- messages ----


@pytest.mark.parametrize("width", [20, 80])
def test_paths_are_never_broken(capsys, width):
    messages.error(f"There is no model file {LONG}. Give the path of one.", details=f"at {LONG}")
    assert capsys.readouterr().err.splitlines() == [
        f"Error: There is no model file {LONG}. Give the path of one.", f"at {LONG}"
    ]  # fmt: skip
    output = io.StringIO()
    messages.say(f"There is no model file {LONG}. Give one.", Console(file=output, force_terminal=True, width=width))
    assert output.getvalue() == f"There is no model file {LONG}. Give one.\n"


@pytest.mark.parametrize("command", ["inspect", "ppl", "verify", "bench", "niah", "recommend", "calibrate"])
def test_errors_of_commands_keep_paths(tmp_path, command, capsys):
    path = tmp_path / LONG.lstrip("/").replace("model", f"{command} 0123456789")
    path.parent.mkdir(parents=True)
    path.write_text("no GGUF")
    more = {"verify": [path], "recommend": ["--memory", "1GiB", "--context", "99"], "ppl": ["--text", __file__]}
    assert cli.main([command, str(path), *map(str, more.get(command, ()))]) == 1
    said = capsys.readouterr().err
    assert str(path) in said and said.count("\n") == 1
