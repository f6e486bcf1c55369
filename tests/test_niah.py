"""`turboquant-gguf niah`: real answers of SmolLM2 and of a small random model, and made-up ones for the arithmetic."""

import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import httpx
import pytest
from rich.console import Console

import tiny_model
from turboquant_gguf.errors import TurboquantError
from turboquant_gguf.kinds import haystack, niah
from turboquant_gguf.kinds.haystack import Needle
from turboquant_gguf.llamacpp import server
from turboquant_gguf.llamacpp.cachetypes import CacheTypes
from turboquant_gguf.report import benchplot, niahplot

COMMAND = (sys.executable, "-m", "turboquant_gguf.cli", "niah")
NARROW = {"COLUMNS": "80", "NO_COLOR": "1"}
NEEDLE = Needle("Lisbon", "48213")
TINY_LENGTH = 480  # of the 512 tokens, a byte each, that the small model was trained for


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("niah") / "tiny.gguf")


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, **NARROW}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=environment, check=False)


def sentences(text: str) -> str:
    """Text as one line, for output that is wrapped to the width of a terminal."""
    return " ".join(text.split())


def ask(model: Path, **options) -> niah.Report:
    least = {"types": ["f16"], "lengths": [TINY_LENGTH], "depths": [50], "threads": 1}
    return niah.niah(model=model, console=Console(quiet=True), **least | options)


def words(text: str) -> int:
    """Tokens, to tests that need no model."""
    return len(text.split())


# --- prompts ---


@pytest.mark.parametrize("length", [128, 256, 1000, 4096])
@pytest.mark.parametrize("depth", [0, 10, 50, 100])
def test_prompt_has_its_length_and_the_needle_at_its_depth(length, depth):
    text, tokens = haystack.fill(list(islice(haystack.generated(0), length)), NEEDLE, depth, length, words)
    assert tokens == words(text)
    assert 0.97 * length <= tokens <= length
    hay, question = text.split("\n\n")
    assert question == NEEDLE.question
    before, after = hay.split(NEEDLE.sentence)
    longest = max(map(len, haystack.sentences_of(before + after)))
    assert len(before) == pytest.approx(depth / 100 * len(before + after), abs=longest)


def test_all_of_the_text_stays_whole_but_for_the_end():
    text = [f"Sentence number {number} is here." for number in range(100)]
    made, _ = haystack.fill(text, NEEDLE, 50, 300, words)
    kept = haystack.sentences_of(made.split("\n\n")[0])
    kept.remove(NEEDLE.sentence)
    assert kept == text[: len(kept)]


def test_room_that_is_left_is_filled_with_a_shorter_sentence():
    long = " ".join(["word"] * 40) + "."
    room = words(haystack.prompt([long], NEEDLE, 0)) + 2
    made, tokens = haystack.fill([long, long, "Short one.", long], NEEDLE, 0, room, words)
    assert made.count(long) == 1 and "Short one." in made
    assert tokens == words(made) == room


@pytest.mark.parametrize("text", [["Too short."], [" ".join(["word"] * 1000)]])
def test_text_that_cannot_fill_a_prompt(text):
    with pytest.raises(TurboquantError, match="fills only .* of the 500 tokens"):
        haystack.fill(text, NEEDLE, 50, 500, words)


def test_length_without_room_for_the_question():
    with pytest.raises(TurboquantError, match=r"A prompt of 10 tokens is too short: the question alone takes 19"):
        haystack.fill(["A sentence."] * 10, NEEDLE, 50, 10, words)


def test_generated_text_is_steady_and_varied():
    first = list(islice(haystack.generated(1), 20_000))
    assert first == list(islice(haystack.generated(1), 20_000))
    assert first != list(islice(haystack.generated(2), 20_000))
    assert all(a != b for a, b in pairwise(first))
    assert len(set(first)) > 10_000
    text = " ".join(first)
    assert haystack.sentences_of(text) == first
    assert not re.search(r"\d|[{}]|magic|number", text)


def test_sentences_of_a_text():
    text = "One is here.  Two,\nis it?\n\nThree! 四です。五です。 Six"
    assert haystack.sentences_of(text) == ["One is here.", "Two, is it?", "Three!", "四です。", "五です。", "Six"]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("48213", True),
        ("The code of Lisbon is **48213**.", True),
        ("code48213x", True),
        ("148213", False),
        ("482130", False),
        ("48 213", False),
        ("4821", False),
        ("", False),
    ],
)
def test_only_whole_numbers_count(answer, found):
    assert NEEDLE.is_in(answer) is found


def test_needles_are_of_five_digits_and_differ():
    rng = random.Random(0)
    drawn = [Needle.draw(rng) for _ in range(1000)]
    assert all(re.fullmatch(r"[1-9]\d{4}", needle.number) for needle in drawn)
    assert len({needle.number for needle in drawn}) > 950
    assert len({needle.city for needle in drawn}) > 30


@pytest.mark.parametrize("name", ["smollm2", "tiny"])
def test_tokens_are_counted_as_the_server_counts_them(name, request):
    prompt = haystack.prompt(list(islice(haystack.generated(0), 3)), NEEDLE, 50)
    with server.running(request.getfixturevalue(name), CacheTypes("f16", "f16"), context=512) as running:
        with running.token_counter() as count:
            counted = count(prompt)
        asked = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 1}
        answer = httpx.post(f"{running.url}/v1/chat/completions", json=asked, timeout=60, trust_env=False)
    assert counted == answer.json()["usage"]["prompt_tokens"]


# --- asking ---


def test_smollm2_finds_needles(smollm2, tmp_path):
    plot = tmp_path / "found.png"
    pytest.importorskip("matplotlib")
    options = ("--types", "turbo4", "--lengths", "512,256", "--depths", "0,100", "--threads", "1")
    done = run(smollm2, *options, "--plot", plot, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["settings"]["types"] == ["f16", "turbo4"]
    assert report["settings"]["trained_length"] == 8192
    assert report["machine"]["threads"] == 1 and report["machine"]["devices"]
    places = [(length, depth) for length in (256, 512) for depth in (0, 100)]
    f16, turbo = ([cell for cell in report["cells"] if cell["types"] == types] for types in ("f16", "turbo4"))
    for cells, types in ((f16, "f16"), (turbo, "turbo4")):
        assert [(cell["length"], cell["depth"]) for cell in cells] == places
        assert {(cell["type_k"], cell["type_v"]) for cell in cells} == {(types, types)}
    for one, other in zip(f16, turbo, strict=True):  # the identical prompts
        assert all(one[key] == other[key] for key in ("needle", "expected", "prompt_tokens"))
        assert 0.97 * one["length"] <= one["prompt_tokens"] <= one["length"]
    for cell in f16 + turbo:
        assert cell["found"] == bool(re.search(rf"\b{cell['expected']}\b", cell["answer"]))
    reference, score = report["scores"]
    assert reference["verdict"] == "reference" and reference["found"] >= 3
    assert score["found"] == sum(cell["found"] for cell in turbo) >= 2
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "within noise" in done.stderr and "of those" in done.stderr
    assert max(map(len, done.stderr.splitlines())) <= 80


def test_an_answer_does_not_depend_on_what_else_is_asked(tiny):
    alone = ask(tiny, types=["turbo4"], depths=[50], trials=2).cells
    among = ask(tiny, types=["q8_0", "turbo4"], lengths=[400, TINY_LENGTH], depths=[0, 50, 60], trials=2).cells
    assert [cell.types for cell in alone] == ["f16", "f16", "turbo4", "turbo4"]
    assert len({cell.expected for cell in alone}) == 2
    assert all(cell in among for cell in alone)


def test_every_prompt_is_read_from_its_beginning(tiny):
    prompt = haystack.prompt(list(islice(haystack.generated(0), 3)), NEEDLE, 50)
    arguments = {"context": 512, "extra_args": niah.SERVER_ARGUMENTS}
    with server.running(tiny, CacheTypes("f16", "f16"), **arguments) as running, running.token_counter() as count:
        for _ in range(2):
            running.ask(prompt, max_tokens=2)
        read = re.findall(r"prompt eval time = .*?/ +(\d+) tokens", running.log())
        assert read == [str(count(prompt))] * 2


def test_seed_changes_text_and_needles(tiny):
    one, other = (ask(tiny, seed=seed).cells[0] for seed in (1, 2))
    assert one.expected != other.expected and one.answer != other.answer


def test_default_lengths_are_those_the_model_was_trained_for(tiny, smollm2):
    report = ask(tiny, lengths=None)
    assert report.settings["lengths"] == [512]
    assert report.cells[0].prompt_tokens <= 512 - niah.ANSWER_TOKENS
    assert niah._lengths(None, niah._trained_length(smollm2), smollm2) == [1024, 2048, 4096, 8192]


def test_text_of_the_user(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The sea was calm. A gull cried. " * 100)
    report = ask(tiny, text=text)
    assert report.settings["text"] == str(text)
    assert len(report.cells) == 1
    text.write_text("Far too short.")
    with pytest.raises(TurboquantError, match="Give a longer text"):
        ask(tiny, text=text)
    text.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TurboquantError, match="is not UTF-8 text"):
        ask(tiny, text=text)


def test_a_type_that_fails_does_not_stop_the_others(tmp_path):
    model = tiny_model.write(tmp_path / "odd.gguf", head_size=80)
    done = run(model, "--types", "turbo4,bf16", "--lengths", str(TINY_LENGTH), "--depths", "0", "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    (failure,) = report["failures"]
    assert failure["types"] == "turbo4" and "heads hold 80 values" in failure["message"]
    assert [score["types"] for score in report["scores"]] == ["f16", "bf16"]
    assert "Error: turbo4: llama-server stopped" in sentences(done.stderr)
    # The model is random, so it finds nothing:
    assert [score["kept"] for score in report["scores"]] == [None, None]
    assert "f16 found none of the needles" in sentences(done.stderr)


def test_without_f16_there_is_nothing_to_compare_with(tiny, tmp_path):
    unknown = tmp_path / "unknown.gguf"
    unknown.write_bytes(tiny.read_bytes().replace(b"llama", b"lmama"))
    with pytest.raises(TurboquantError, match="older than the model's architecture"):
        ask(unknown)


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--lengths", "256,1024"], 1, "tiny.gguf was trained for 512 tokens, so it cannot be asked about 1024."),
        (["--lengths", "4k"], 2, "'4k' is not a number of tokens."),
        (["--lengths", "0"], 2, "'0' is not a number of tokens."),
        (["--depths", "0,101"], 2, "'101' is not a percentage from 0 to 100."),
        (["--depths", "half"], 2, "'half' is not a percentage from 0 to 100."),
        (["--depths", "nan"], 2, "'nan' is not a percentage from 0 to 100."),
        (["--types", "trubo4"], 2, "There is no cache type 'trubo4': did you mean turbo4?"),
        (["--trials", "0"], 2, "0 is not in the range"),
        (["--text", "absent.txt"], 2, "absent.txt"),
        (["--plot", "found.jpg"], 2, "'found.jpg' does not end in .png"),
        (["--plot", "absent/found.png"], 2, "absent to write found.png into."),
    ],
)
def test_errors_are_sentences(tiny, options, code, sentence):
    failed = run(tiny, *options)
    assert failed.returncode == code
    assert sentence in sentences(failed.stderr)
    assert "Traceback" not in failed.stderr
    assert failed.stdout == ""


def test_no_model_file():
    with pytest.raises(TurboquantError, match="There is no model file"):
        ask(Path("absent.gguf"))


def read(terminal: int) -> bytes:
    """What was printed since, and nothing once the program is gone."""
    try:
        return os.read(terminal, 65536)
    except OSError:  # how Linux says it
        return b""


def test_ctrl_c_keeps_what_was_found(tiny, tmp_path):
    written, temporary = tmp_path / "found.json", tmp_path / "temporary"
    temporary.mkdir()
    trials = 40
    reader, writer = pty.openpty()  # the bar, which says when turbo4 is asked, is shown to terminals alone
    with written.open("w") as output:
        process = subprocess.Popen(
            [*COMMAND, tiny, "--types", "turbo4,turbo3,turbo2", "--lengths", str(TINY_LENGTH), "--depths", "50",
             "--trials", str(trials), "--threads", "1", "--json"],
            env={**os.environ, **NARROW, "TERM": "xterm", "TMPDIR": str(temporary)}, stdout=output, stderr=writer,
        )  # fmt: skip
    os.close(writer)
    seen = b""
    while b"turbo4  480 tokens" not in seen:
        seen += (piece := read(reader))
        assert piece, seen
    process.send_signal(signal.SIGINT)
    while piece := read(reader):
        seen += piece
    assert process.wait() == 130
    assert b"Traceback" not in seen
    report = json.loads(written.read_text())
    assert report["interrupted"]
    asked = [cell["types"] for cell in report["cells"]]
    assert asked[:trials] == ["f16"] * trials
    assert set(asked[trials:]) <= {"turbo4"} and len(asked) < 2 * trials
    assert report["scores"][0]["asked"] == trials
    assert list(temporary.iterdir()) == []
    processes = subprocess.run(["ps", "-A", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tiny) not in processes


# --- arithmetic and print ---


@pytest.mark.parametrize(
    ("lost", "gained", "p_value"),
    [(0, 0, 1), (1, 0, 1), (1, 1, 1), (5, 0, 0.0625), (6, 0, 0.03125), (10, 2, 2 * (1 + 12 + 66) / 2**12)],
)
def test_mcnemar(lost, gained, p_value):
    assert niah.mcnemar(lost, gained) == niah.mcnemar(gained, lost) == pytest.approx(p_value, rel=1e-12)


def outcomes(text: str) -> dict:
    """Prompts by number: + where the needle was found."""
    return {number: mark == "+" for number, mark in enumerate(text)}


@pytest.mark.parametrize(
    ("own", "reference", "found", "kept", "lost", "gained", "verdict"),
    [
        ("++++----", "++++++--", 4, 4 / 6, 2, 0, "within noise"),
        ("+------+", "+++++++-", 2, 1 / 7, 6, 1, "within noise"),  # p = 0.125
        ("--------", "++++++--", 0, 0, 6, 0, "worse"),
        ("++++++++", "++------", 8, 1, 0, 6, "better"),
        ("++", "++------", 2, 1, 0, 0, "within noise"),  # interrupted: only what both were asked counts
        ("++--", "----", 2, None, 0, 2, None),
    ],
)
def test_score(own, reference, found, kept, lost, gained, verdict):
    score = niah.score("turbo4", outcomes(own), outcomes(reference))
    assert (score.asked, score.found, score.share) == (len(own), found, found / len(own))
    assert (score.kept, score.lost, score.gained, score.verdict) == (kept, lost, gained, verdict)


CELL = niah.Cell("f16", "f16", "f16", 1024, 0, 1, 1024, NEEDLE.sentence, NEEDLE.number, "", True)


def report_of(types: list[str], lengths: list[int], depths: list[float], trials: int = 3) -> niah.Report:
    """A report of random answers, as niah() would make it; the last type was interrupted."""
    rng = random.Random(0)
    settings = {"model": "tiny.gguf", "types": types, "lengths": lengths, "depths": depths, "trials": trials}
    cells = [
        replace(CELL, types=name, length=length, depth=depth, trial=trial, found=rng.random() < 0.7)
        for name in types
        for trial in range(trials)
        for length in lengths
        for depth in depths
    ]
    report = niah.Report(settings, machine={"threads": 2, "devices": ["a processor"]}, cells=cells[:-2])
    report.scores = list(niah._scores(report))
    return report


def wide_report() -> niah.Report:
    lengths = [1024 * number for number in (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)]
    return report_of(["f16", "turbo4:turbo3", "turbo2"], lengths, [0, 12.5, 50, 100])


@pytest.mark.parametrize("part", [niah.table, niah.maps])
def test_print_fits_80_columns(part):
    console = Console(width=80)
    with console.capture() as captured:
        console.print(part(wide_report()))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines), "a cell was cut"


def test_maps_can_be_read_without_color():
    report = report_of(["f16"], [1024, 2048], [0, 100], trials=1)
    report.cells[0] = replace(report.cells[0], found=True)
    report.cells[1] = replace(report.cells[1], found=False)
    console = Console(width=80)
    with console.capture() as captured:
        console.print(niah.maps(report))
    rows = [line.split() for line in captured.get().splitlines() if line.strip()]
    assert rows == [["f16"], ["depth", "1024", "2048"], ["0", "%", "100%", "-"], ["100", "%", "0%", "-"]]


@pytest.mark.parametrize("suffix", benchplot.FORMATS)
def test_plot(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"found{suffix}"
    niahplot.write(wide_report(), path)
    assert path.read_bytes()[:4] in (b"\x89PNG", b"<?xm", b"%PDF")
