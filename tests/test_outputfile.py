"""Output files: whole or not at all, two at once, after kill -9, and with somebody else's files in the way."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import checkpoints
from turboquant_gguf import cli
from turboquant_gguf.core import outputfile
from turboquant_gguf.errors import TurboquantError

HOLD = """
import sys
from pathlib import Path
from turboquant_gguf.core import outputfile
with outputfile.beside(Path(sys.argv[1])) as unfinished:
    unfinished.write_text(sys.argv[2])
    print(unfinished, flush=True)
    sys.stdin.readline()
"""


class Writer:
    """Another process that has written `text` for `output` and not finished. unfinished: its file."""

    def __init__(self, output: Path, text: str = "theirs") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, output, text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.unfinished = Path(self.process.stdout.readline().strip())

    def finish(self) -> int:
        self.process.communicate("\n")
        return self.process.returncode

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "out [1].gguf"  # a name that is a pattern, too


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(output: Path, text: str) -> None:
    with outputfile.beside(output) as unfinished:
        unfinished.write_text(text)


def test_takes_its_name_at_the_end_with_the_usual_permissions(output):
    before = os.umask(0o027)
    try:
        with outputfile.beside(output) as unfinished:
            unfinished.write_text("ours")
            assert unfinished.name == output.name and not output.exists()
            assert stat.S_IMODE(unfinished.parent.stat().st_mode) == 0o700
    finally:
        os.umask(before)
    assert output.read_text() == "ours" and stat.S_IMODE(output.stat().st_mode) == 0o640
    assert names(output.parent) == [output.name]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_what_was_there(output, error):
    output.write_text("precious")
    with pytest.raises(error), outputfile.beside(output) as unfinished:
        unfinished.write_text("half")
        raise error
    assert output.read_text() == "precious" and names(output.parent) == [output.name]


def test_two_at_once_never_mix(output):
    theirs = Writer(output)
    with outputfile.beside(output) as unfinished:
        unfinished.write_text("ours, longer than theirs")
        assert unfinished != theirs.unfinished
        assert theirs.finish() == 0
        assert output.read_text() == "theirs"
    assert output.read_text() == "ours, longer than theirs" and names(output.parent) == [output.name]


def test_a_living_run_is_left_alone_and_a_killed_one_cleared_away(output):
    living, killed, of_another = Writer(output), Writer(output), Writer(output.with_name("other.gguf"))
    killed.kill()
    of_another.kill()
    assert killed.unfinished.read_text() == "theirs"
    write(output, "ours")
    assert living.unfinished.exists() and not killed.unfinished.parent.exists()
    assert of_another.unfinished.exists()
    assert living.finish() == 0 and output.read_text() == "theirs"
    write(output.with_name("other.gguf"), "ours")
    assert names(output.parent) == sorted([output.name, "other.gguf"])


def test_one_inside_the_other(output):
    """As convert does when it calibrates the file it has not finished."""
    with outputfile.beside(output) as unfinished:
        unfinished.write_text("plain")
        write(unfinished, "calibrated")
        write(output.with_name("other"), "")
        assert unfinished.read_text() == "calibrated"
        write(output, "another run's")
        assert unfinished.read_text() == "calibrated"  # it was not taken for a leftover
    assert output.read_text() == "calibrated" and names(output.parent) == sorted(["other", output.name])


@pytest.mark.parametrize("suffix", [".partial", ".tmp", ".mine.partial"])
def test_what_others_put_there_is_neither_followed_nor_removed(output, tmp_path, suffix):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    file, link = (tmp_path / f"{output.name}{name}{suffix}" for name in ("", ".link"))
    file.symlink_to(precious / "thesis.txt")
    link.symlink_to(precious)
    before = names(tmp_path)
    write(output, "ours")
    assert names(tmp_path) == sorted([*before, output.name])
    assert (precious / "thesis.txt").read_text() == "mine" and names(precious) == ["thesis.txt"]


def test_a_link_with_the_name_of_the_output_is_replaced_not_followed(output, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    output.symlink_to(tmp_path / "thesis.txt")
    write(output, "ours")
    assert (tmp_path / "thesis.txt").read_text() == "mine" and output.read_text() == "ours"


def test_file_and_folder_are_synced_around_the_rename(output, monkeypatch):
    done = []
    replace = Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(Path, "replace", lambda self, target: (done.append("rename"), replace(self, target)))
    with outputfile.beside(output) as unfinished:
        unfinished.write_text("ours")
    assert done == [output.stat().st_ino, "rename", output.parent.stat().st_ino]


def test_a_pipe_is_written_to_as_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    with outputfile.beside(tmp_path / "pipe") as unfinished:
        unfinished.write_text("as it is\n")
    assert reader.communicate()[0] == "as it is\n"
    with pytest.raises(TurboquantError, match="is a device or a pipe"):
        outputfile.check(tmp_path / "pipe", force=True)


@pytest.mark.parametrize("command", [["bench", "--plot"], ["niah", "m.gguf", "--plot"], ["report", "m.sqlite", "-o"]])
def test_a_folder_that_cannot_be_written_is_found_out_first(command):
    done = CliRunner().invoke(cli.cli, [*command, "/proc/self/out.png"])
    assert done.exit_code == 2 and "out.png cannot be written into /proc/self" in " ".join(done.output.split())


CONVERT = """
import sys
from pathlib import Path
from rich.console import Console
import checkpoints
from turboquant_gguf.weights.convert import convert
with checkpoints.any_pre_tokenizer():
    convert(Path(sys.argv[1]), Path(sys.argv[2]), outtype="f32", force=True, calibrate=True, console=Console())
"""


def test_two_conversions_to_one_name(tmp_path):
    folder = checkpoints.write(tmp_path / "llama", "llama")
    command = [sys.executable, "-c", CONVERT, folder]
    here = Path(__file__).parent
    subprocess.run([*command, tmp_path / "alone.gguf"], cwd=here, check=True, capture_output=True)
    both = [subprocess.Popen([*command, tmp_path / "both.gguf"], cwd=here, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    assert (tmp_path / "both.gguf").stat().st_size == (tmp_path / "alone.gguf").stat().st_size
    assert names(tmp_path) == ["alone.gguf", "both.gguf", "llama"]
