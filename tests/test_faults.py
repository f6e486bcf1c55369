"""Whatever goes wrong is a sentence: bad texts, full disks, terminals that lack characters, faults of ours."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import tiny_model
from turboquant_gguf import cli
from turboquant_gguf.errors import TurboquantError

COMMAND = (sys.executable, "-m", "turboquant_gguf.cli")


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A model with a vocabulary, made in no time."""
    return tiny_model.write(tmp_path_factory.mktemp("llama") / "llama.gguf")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TURBOQUANT_CACHE_DIR", str(tmp_path / "cache"))


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        env={**os.environ, **environment},
        timeout=300,
        check=False,
    )


# ---- texts ----

READERS = {
    "ppl": ["ppl", "MODEL", "--text"],
    "sweep": ["sweep", "MODEL", "--measure", "quality", "-o", "results.sqlite", "--text"],
    "niah": ["niah", "MODEL", "--lengths", "256", "--text"],
    "calibrate": ["calibrate", "MODEL", "--text"],
    "verify": ["verify", "MODEL", "MODEL", "--text"],
}
TEXTS = {
    "empty": (b"", "is empty"),
    "blank": (b" \n\t\r\n", "is empty"),
    "latin 1": (b"caf\xe9 " * 1000, "is not UTF-8 text (byte 3)"),
    "UTF-16": ("text ".encode("utf-16") * 1000, "is not UTF-8 text"),
    "short": (b"x", ""),
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("command", READERS)
def test_texts_that_cannot_be_used(llama, tmp_path, monkeypatch, command, text):
    monkeypatch.chdir(tmp_path)
    content, because = TEXTS[text]
    Path("text.txt").write_bytes(content)
    arguments = [str(llama) if word == "MODEL" else word for word in READERS[command]]
    done = CliRunner().invoke(cli.cli, [*arguments, "text.txt"])
    if command == "verify" and text == "short":  # a token is enough
        assert done.exit_code == 0
        return
    if (command, text) == ("niah", "short"):  # one of its lengths fails, others may not
        assert done.exit_code == 1 and "Give a longer text" in done.output
        return
    assert isinstance(done.exception, TurboquantError), done.output
    assert because in str(done.exception)
    assert not because or "text.txt" in str(done.exception)
    assert not list(tmp_path.glob("*.gguf"))


# ---- output ----


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
@pytest.mark.parametrize("command", ["ppl", "calibrate", "inspect", "recommend"])
def test_terminals_that_lack_characters(llama, tmp_path, encoding, command):
    model = tmp_path / "größer→.gguf"
    model.symlink_to(llama)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    options = {
        "ppl": ["--text", text, "--context", "32", "--chunks", "1", "--types", "f16,q8_0"],
        "calibrate": ["-o", tmp_path / "größer.gguf"],
        "inspect": ["--memory", "1GiB"],
        "recommend": ["--memory", "1GiB", "--context", "512"],
    }
    done = run(command, model, *options[command], PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr.decode(encoding)
    assert b"gr" in done.stdout
    assert re.fullmatch(rb"(\S+ 2 of 2 measurements added\.\n)?", done.stderr.replace(b":\n", b": "))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("arguments", [["types"], ["types", "--json"], ["--help"], ["inspect", "MODEL"]])
def test_output_that_cannot_be_written(llama, arguments):
    arguments = [str(llama) if word == "MODEL" else word for word in arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "Error: No space left on device.\n")


def test_a_reader_that_has_seen_enough():
    process = subprocess.Popen([*COMMAND, "types"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1
    process.stderr.close()


# ---- faults of ours ----


@pytest.mark.parametrize("debug", [False, True])
def test_what_nobody_expects_is_a_sentence(capsys, monkeypatch, debug):
    def fail() -> None:
        return {}["missing"]

    monkeypatch.setattr("turboquant_gguf.types", fail)
    monkeypatch.setenv("TURBOQUANT_DEBUG", "1" if debug else "")
    assert cli.main(["types"]) == 1
    said = capsys.readouterr().err
    assert "(KeyError: 'missing'). That is a fault of ours: please report it" in said
    assert ("Traceback" in said) == debug and (said.count("\n") == 1) != debug
