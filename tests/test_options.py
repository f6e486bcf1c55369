"""Options mean the same in all commands, and what cannot work is refused before the work."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import tiny_architectures
import tiny_model
from turboquant_gguf import cli
from turboquant_gguf.errors import TurboquantError

TEXT = "The quick brown fox jumps over the lazy dog. " * 60


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("llama") / "llama.gguf")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TURBOQUANT_CACHE_DIR", str(tmp_path / "cache"))
    Path("text.txt").write_text(TEXT)
    return tmp_path


def invoke(*arguments: object, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(cli.cli, list(map(str, arguments)))


def options_of(command: str) -> dict:
    return {name: option for option in cli.cli.commands[command].params for name in option.opts}


@pytest.mark.parametrize(
    "option, commands",
    [
        ("--json", set(cli.cli.commands) - {"convert"}),
        ("--threads", {"bench", "calibrate", "demo", "eval", "niah", "ppl", "sweep", "verify"}),
        ("--no-kv-offload", {"bench", "calibrate", "demo", "eval", "niah", "ppl", "sweep", "verify"}),
        ("--gpu-layers", {"bench", "calibrate", "demo", "eval", "niah", "ppl", "sweep", "verify"}),
        ("--cache-window", {"bench", "demo", "eval", "inspect", "niah", "ppl", "recommend", "sweep", "verify"}),
        ("--cache-sinks", {"bench", "demo", "eval", "inspect", "niah", "ppl", "recommend", "sweep", "verify"}),
        ("--force", {"bench", "calibrate", "eval", "niah", "ppl", "report"}),
        ("--cluster", {"bench", "eval", "niah", "ppl", "sweep"}),
        ("-o", {"bench", "calibrate", "eval", "niah", "ppl", "report", "sweep"}),
    ],
)
def test_options_of_several_commands_are_alike(option, commands):
    found = {name: options_of(name).get(option) for name in cli.cli.commands if name != "convert"}
    assert {name for name, one in found.items() if one} == commands
    if option != "-o":
        assert len({(type(one.type), one.is_flag, str(one.type)) for one in found.values() if one}) == 1


@pytest.mark.parametrize(
    "command",
    [
        ["bench", "MODEL", "--depths", "0", "--repetitions", "1", "--types", "f16", "--prefill", "16", "--decode", "2"],
        ["niah", "MODEL", "--lengths", "300", "--depths", "50", "--types", "f16"],
        ["ppl", "MODEL", "--text", "text.txt", "--context", "256", "--types", "f16"],
        ["calibrate", "MODEL", "-o", "out.gguf"],
        ["verify", "MODEL", "MODEL"],
        ["demo", "--model", "MODEL", "--types", "f16", "--max-tokens", "2"],
        ["sweep", "MODEL", "--measure", "quality", "--text", "text.txt", "--context", "256", "--types", "f16"],
    ],
    ids=lambda command: command[0],
)
def test_json_is_all_there_is_on_stdout(llama, command):
    done = invoke(*(llama if word == "MODEL" else word for word in command), "--threads", "1", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "MODEL", "--plot", "there.png"],
        ["niah", "MODEL", "--plot", "there.png"],
        ["eval", "MODEL", "--tasks", "x", "--samples", "there.png"],
        ["report", "-o", "there.png"],
        ["calibrate", "MODEL", "-o", "there.png"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_exists_is_replaced_by_force_alone(llama, arguments):
    Path("there.png").write_text("mine")
    done = invoke(*(llama if word == "MODEL" else word for word in arguments))
    assert "there.png exists already. Give another name" in f"{done.stderr} {done.exception}"
    assert "with --force" in f"{done.stderr} {done.exception}" and Path("there.png").read_text() == "mine"


def test_force_lets_it_be_replaced(llama):
    Path("r.md").write_text("mine")
    options = ["--text", "text.txt", "--context", "256", "--types", "f16,q8_0", "--chunks", "1"]
    assert invoke("ppl", llama, *options, "-o", "r.sqlite").exit_code == 0
    assert invoke("report", "r.sqlite", "-o", "r.md", "--force").exit_code == 0
    assert "q8_0" in Path("r.md").read_text()


@pytest.mark.parametrize("base, code", [("f16", 0), ("f32", 0), ("q8_0", 2), ("turbo4", 2)])
def test_base_of_ppl(llama, base, code):
    options = ["--text", "text.txt", "--context", "256", "--types", "q8_0", "--chunks", "1"]
    assert invoke("ppl", llama, *options, "--base", base).exit_code == code


@pytest.mark.parametrize(
    "command",
    [
        ["ppl", "MODEL", "--text", "text.txt", "--context", "256"],
        ["calibrate", "MODEL", "-o", "out.gguf"],
        ["demo", "--model", "MODEL"],
        ["verify", "MODEL", "MODEL"],
    ],
    ids=lambda command: command[0],
)
def test_layers_are_on_no_gpu_that_is_not_there(llama, command, monkeypatch):
    monkeypatch.setattr("turboquant_gguf.llamacpp.placement.devices", lambda *_: [])
    done = invoke(*(llama if word == "MODEL" else word for word in command), "--gpu-layers", "1")
    assert "This build of llama.cpp finds no GPU" in f"{done.stderr} {done.exception}" and done.exit_code


@pytest.mark.parametrize("command", ["inspect", "recommend", "ppl", "calibrate", "verify", "bench", "niah", "demo"])
def test_a_folder_is_no_model(llama, command):
    Path("x.gguf").mkdir()
    more = {"recommend": ["--memory", "1GiB", "--context", "9"], "verify": [llama], "ppl": ["--text", "text.txt"]}
    first = ["--model"] if command == "demo" else []
    done = invoke(command, *first, "x.gguf", *more.get(command, ()))
    assert isinstance(done.exception, TurboquantError) and re.search("x.gguf(: it)? is a folder", str(done.exception))


@pytest.mark.parametrize("size", ["8", "0.5", "1023", "-8GiB", "8G"])
@pytest.mark.parametrize("command", [["inspect"], ["recommend", "--context", "9"]])
def test_sizes_without_a_unit(llama, command, size):
    done = invoke(*command, llama, "--memory", size)
    assert done.exit_code == 2 and "Write it like 8GiB" in done.stderr


@pytest.mark.parametrize("where", ["/proc/self/out.gguf", "/proc/out.gguf"])
def test_calibrate_finds_out_first_that_it_cannot_write(llama, monkeypatch, where):
    monkeypatch.setattr("turboquant_gguf.weights.calibration.Model", lambda *_: pytest.fail("it began to read"))
    done = invoke("calibrate", llama, "-o", where)
    assert isinstance(done.exception, TurboquantError)
    assert re.search("out.gguf cannot be written into /proc.*Write it elsewhere", str(done.exception))


@pytest.mark.parametrize("command", ["report", "recommend"])
def test_what_only_reads_needs_no_home_to_write(llama, command):
    """The cache folder cannot be made: it would lie in a file."""
    Path("file").touch()
    home = {"TURBOQUANT_CACHE_DIR": "file/cache"}
    options = ["--text", "text.txt", "--context", "256", "--types", "f16,q8_0", "--chunks", "1"]
    assert invoke("ppl", llama, *options, "-o", "r.sqlite", **home).exit_code == 0
    arguments = {"report": ["r.sqlite"], "recommend": [llama, "--memory", "1GiB", "--context", "256"]}[command]
    done = invoke(command, *arguments, *(["--results", "r.sqlite"] if command == "recommend" else []), **home)
    assert done.exit_code == 0 and "q8_0" in done.stdout
    done = invoke("ppl", llama, *options, **home)  # which has to write
    assert "cannot be opened as a file of measurements" in str(done.exception)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_recommend_is_readable(tmp_path, width):
    model = tiny_architectures.write(tmp_path / "llama.gguf", "llama")
    done = invoke("recommend", model, "--memory", "1GiB", "--context", "4096", COLUMNS=str(width))
    table = done.stdout.partition("llama-server")[0].splitlines()
    assert max(map(len, table)) <= width and "…" not in done.stdout
    row = next(line for line in table if line.startswith("turbo4:turbo3"))
    assert "yes" in row and row.split()[-1].startswith("~")


def test_the_recommended_command_has_the_window(tmp_path):
    model = tiny_architectures.write(tmp_path / "llama.gguf", "llama")
    done = invoke("recommend", model, "--memory", "1GiB", "--context", "4096", "--cache-window", "0")
    assert "--cache-window 0" in done.stdout


# ---- verify ----


def test_models_of_different_vocabularies_are_not_compared(llama, tmp_path):
    other = tmp_path / "other.gguf"
    content = llama.read_bytes()
    for number in range(0, 128, 2):  # tokens change places
        one, two = b"<0x%02X>" % number, b"<0x%02X>" % (number + 1)
        content = content.replace(one, b"<swap>").replace(two, one).replace(b"<swap>", two)
    other.write_bytes(content)
    done = invoke("verify", llama, other)
    assert "have different vocabularies: 128 of 260 tokens stand for something else" in str(done.exception)
    assert invoke("verify", llama, llama).exit_code == 0


def test_a_checkpoint_of_another_vocabulary_is_not_compared(llama, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    vocabulary = {f"word{number}": number for number in range(260)}
    (checkpoint / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary}}))
    done = invoke("verify", checkpoint, llama)
    assert "have different vocabularies: 260 of 260" in str(done.exception)
