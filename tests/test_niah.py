"""`turboquant-gguf niah`: real answers of SmolLM2 and of a small random model, and made-up ones for the arithmetic."""

import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import islice, pairwise
from pathlib import Path

import httpx
import pytest
from rich.console import Console

import tiny_model
from turboquant_gguf.core import tables
from turboquant_gguf.errors import TurboquantError
from turboquant_gguf.kinds import Finding, retrieval
from turboquant_gguf.kinds.base import Work
from turboquant_gguf.kinds.retrieval import Retrieval
from turboquant_gguf.kinds.runners import needles
from turboquant_gguf.kinds.runners.needles import Needle
from turboquant_gguf.llamacpp import server
from turboquant_gguf.llamacpp.cachetypes import CacheTypes
from turboquant_gguf.llamacpp.placement import Placement
from turboquant_gguf.measure.sweep import measure
from turboquant_gguf.report import plots
from turboquant_gguf.report.contents import Section
from turboquant_gguf.report.tables import table_of_maps

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


def ask(model: Path, folder: Path, **options) -> list[dict]:
    """The answers, of all types."""
    least = {"types": ["f16"], "lengths": [TINY_LENGTH], "depths": [50], "placement": Placement(threads=1)}
    outcome = measure("retrieval", model, results=folder / "r.sqlite", console=Console(quiet=True), **least | options)
    if outcome.failures:
        raise TurboquantError(outcome.failures[0].message)
    (finding,) = outcome.findings
    return [answer for own in finding.values.values() for answer in own]


def words(text: str) -> int:
    """Tokens, to tests that need no model."""
    return len(text.split())


# --- prompts ---


@pytest.mark.parametrize("length", [128, 256, 1000, 4096])
@pytest.mark.parametrize("depth", [0, 10, 50, 100])
def test_prompt_has_its_length_and_the_needle_at_its_depth(length, depth):
    text, tokens = needles.fill(list(islice(needles.generated(0), length)), NEEDLE, depth, length, words)
    assert tokens == words(text)
    assert 0.97 * length <= tokens <= length
    hay, question = text.split("\n\n")
    assert question == NEEDLE.question
    before, after = hay.split(NEEDLE.sentence)
    longest = max(map(len, needles.sentences_of(before + after)))
    assert len(before) == pytest.approx(depth / 100 * len(before + after), abs=longest)


def test_all_of_the_text_stays_whole_but_for_the_end():
    text = [f"Sentence number {number} is here." for number in range(100)]
    made, _ = needles.fill(text, NEEDLE, 50, 300, words)
    kept = needles.sentences_of(made.split("\n\n")[0])
    kept.remove(NEEDLE.sentence)
    assert kept == text[: len(kept)]


def test_room_that_is_left_is_filled_with_a_shorter_sentence():
    long = " ".join(["word"] * 40) + "."
    room = words(needles.prompt([long], NEEDLE, 0)) + 2
    made, tokens = needles.fill([long, long, "Short one.", long], NEEDLE, 0, room, words)
    assert made.count(long) == 1 and "Short one." in made
    assert tokens == words(made) == room


@pytest.mark.parametrize("text", [["Too short."], [" ".join(["word"] * 1000)]])
def test_text_that_cannot_fill_a_prompt(text):
    with pytest.raises(TurboquantError, match="fills only .* of the 500 tokens"):
        needles.fill(text, NEEDLE, 50, 500, words)


def test_length_without_room_for_the_question():
    with pytest.raises(TurboquantError, match=r"A prompt of 10 tokens is too short: the question alone takes 19"):
        needles.fill(["A sentence."] * 10, NEEDLE, 50, 10, words)


def test_generated_text_is_steady_and_varied():
    first = list(islice(needles.generated(1), 20_000))
    assert first == list(islice(needles.generated(1), 20_000))
    assert first != list(islice(needles.generated(2), 20_000))
    assert all(a != b for a, b in pairwise(first))
    assert len(set(first)) > 10_000
    text = " ".join(first)
    assert needles.sentences_of(text) == first
    assert not re.search(r"\d|[{}]|magic|number", text)


def test_sentences_of_a_text():
    text = "One is here.  Two,\nis it?\n\nThree! 四です。五です。 Six"
    assert needles.sentences_of(text) == ["One is here.", "Two, is it?", "Three!", "四です。", "五です。", "Six"]


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
    prompt = needles.prompt(list(islice(needles.generated(0), 3)), NEEDLE, 50)
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
    done = run(smollm2, *options, "-o", tmp_path / "r.sqlite", "--plot", plot, "--json")
    assert done.returncode == 0, done.stderr
    (finding,) = json.loads(done.stdout)["findings"]
    assert finding["settings"]["length"] == [256, 512] and finding["machines"][0]["devices"]
    results = {one["types"]: one for one in finding["results"]}
    assert list(results) == ["f16", "turbo4"]
    places = [(length, depth) for length in (256, 512) for depth in (0, 100)]
    f16, turbo = (results[types]["answers"] for types in ("f16", "turbo4"))
    for cells, types in ((f16, "f16"), (turbo, "turbo4")):
        assert [(cell["length"], cell["depth"]) for cell in cells] == places
        assert {(cell["type_k"], cell["type_v"]) for cell in cells} == {(types, types)}
    for one, other in zip(f16, turbo, strict=True):  # the identical prompts
        assert all(one[key] == other[key] for key in ("needle", "expected", "prompt_tokens"))
        assert 0.97 * one["length"] <= one["prompt_tokens"] <= one["length"]
    for cell in f16 + turbo:
        assert cell["found"] == bool(re.search(rf"\b{cell['expected']}\b", cell["answer"]))
    reference, score = (results[types]["score"] for types in ("f16", "turbo4"))
    assert reference["verdict"] == "reference" and reference["found"] >= 3
    assert score["found"] == sum(cell["found"] for cell in turbo) >= 2
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "within noise" in done.stderr and "Lost, gained" in done.stderr
    assert max(len(line) for line in done.stderr.splitlines() if str(tmp_path) not in line) <= 80


def test_an_answer_does_not_depend_on_what_else_is_asked(tiny, tmp_path):
    alone = ask(tiny, tmp_path, types=["turbo4"], depths=[50], trials=2)
    others = {"types": ["q8_0", "turbo4"], "lengths": [400, TINY_LENGTH], "depths": [0, 50, 60]}
    among = ask(tiny, tmp_path, **others, trials=2)
    assert [answer["types"] for answer in alone] == ["f16", "f16", "turbo4", "turbo4"]
    assert len({answer["expected"] for answer in alone}) == 2
    assert all(answer in among for answer in alone)


def test_further_trials_are_added(tiny, tmp_path):
    how = {"types": ["turbo4"], "lengths": [300], "depths": [50], "results": tmp_path / "r.sqlite"}
    how["placement"] = Placement(threads=1)
    assert measure("retrieval", tiny, **how, console=Console(quiet=True)).added == 2
    more = measure("retrieval", tiny, **how, trials=3, console=Console(quiet=True))
    assert (more.known, more.added) == (2, 4) and len(more.findings[0].values[retrieval.F16]) == 3


def reported(running, pattern: str, times: int) -> list[str]:
    """What a server's log says by `pattern`: it may write its last line after the client has its answer."""
    deadline = time.monotonic() + 60
    while len(found := re.findall(pattern, running.log())) < times and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def test_every_prompt_is_read_from_its_beginning(tiny):
    prompt = needles.prompt(list(islice(needles.generated(0), 3)), NEEDLE, 50)
    arguments = {"context": 512, "extra_args": retrieval.SERVER_ARGUMENTS}
    with server.running(tiny, CacheTypes("f16", "f16"), **arguments) as running, running.token_counter() as count:
        for _ in range(2):
            running.ask(prompt, max_tokens=2)
        assert reported(running, r"prompt eval time = .*?/ +(\d+) tokens", times=2) == [str(count(prompt))] * 2


def test_seed_changes_text_and_needles(tiny, tmp_path):
    one, other = (ask(tiny, tmp_path, seed=seed)[0] for seed in (1, 2))
    assert one["expected"] != other["expected"] and one["answer"] != other["answer"]


def test_default_lengths_are_those_the_model_was_trained_for(tiny, tmp_path):
    (answer,) = ask(tiny, tmp_path, lengths=None)
    assert answer["length"] == 512 and answer["prompt_tokens"] <= 512 - retrieval.ANSWER_TOKENS
    work = Work(tiny, {"trained_length": 8192}, (), None, sweep=False)
    assert [one.length for one in Retrieval.plan(work)] == [1024, 2048, 4096, 8192]


def test_text_of_the_user(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The sea was calm. A gull cried. " * 100)
    assert len(ask(tiny, tmp_path, text=text)) == 1
    text.write_text("Far too short.")
    with pytest.raises(TurboquantError, match="Give a longer text"):
        ask(tiny, tmp_path, text=text)
    text.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TurboquantError, match="is not UTF-8 text"):
        ask(tiny, tmp_path, text=text)


def test_a_type_that_does_not_fit_does_not_stop_the_others(tmp_path):
    model = tiny_model.write(tmp_path / "odd.gguf", head_size=80)
    options = ("--types", "turbo4,bf16", "--lengths", str(TINY_LENGTH), "--depths", "0", "-o", tmp_path / "r.sqlite")
    done = run(model, *options, "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    (failure,) = found["failures"]
    assert failure["what"] == "odd.gguf, turbo4" and "heads hold 80 values" in failure["message"]
    results = found["findings"][0]["results"]
    assert [one["types"] for one in results] == ["f16", "bf16"]
    # The model is random, so it finds nothing:
    assert [one["score"]["kept"] for one in results] == [None, None]
    assert "f16 found none of the needles" in sentences(done.stderr)


def test_without_f16_there_is_nothing_to_compare_with(tiny, tmp_path):
    unknown = tmp_path / "unknown.gguf"
    unknown.write_bytes(tiny.read_bytes().replace(b"llama", b"lmama"))
    with pytest.raises(TurboquantError, match="older than the model's architecture"):
        ask(unknown, tmp_path)


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


def test_no_model_file(tmp_path):
    with pytest.raises(TurboquantError, match="There is no model file"):
        ask(Path("absent.gguf"), tmp_path)


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
             "--trials", str(trials), "--threads", "1", "--json", "-o", tmp_path / "r.sqlite"],
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
    found = json.loads(written.read_text())
    assert found["interrupted"]
    results = {one["types"]: one for one in found["findings"][0]["results"]}
    assert len(results["f16"]["answers"]) == trials and set(results) <= {"f16", "turbo4"}
    assert found["added"] < 2 * trials
    assert list(temporary.iterdir()) == []
    processes = subprocess.run(["ps", "-A", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tiny) not in processes


# --- arithmetic and print ---


@pytest.mark.parametrize(
    ("lost", "gained", "p_value"),
    [(0, 0, 1), (1, 0, 1), (1, 1, 1), (5, 0, 0.0625), (6, 0, 0.03125), (10, 2, 2 * (1 + 12 + 66) / 2**12)],
)
def test_mcnemar(lost, gained, p_value):
    assert retrieval.mcnemar(lost, gained) == retrieval.mcnemar(gained, lost) == pytest.approx(p_value, rel=1e-12)


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
    score = retrieval.score(CacheTypes.parse("turbo4"), outcomes(own), outcomes(reference))
    assert (score.asked, score.found, score.share) == (len(own), found, found / len(own))
    assert (score.kept, score.lost, score.gained, score.verdict) == (kept, lost, gained, verdict)


ANSWER = retrieval.Answer("f16", "f16", "f16", 1024, 0, 1, 1024, NEEDLE.sentence, NEEDLE.number, "", True)


def finding_of(types: list[str], lengths: list[int], depths: list[float], trials: int = 3) -> Finding:
    """Random answers; the last type was interrupted."""
    rng = random.Random(0)
    values = {
        CacheTypes.parse(name): [
            asdict(replace(ANSWER, types=name, length=length, depth=depth, trial=trial, found=rng.random() < 0.7))
            for trial in range(1, trials + 1)
            for length in lengths
            for depth in depths
        ]
        for name in types
    }
    del values[CacheTypes.parse(types[-1])][-2:]
    build = {"turboquant_gguf": "1", "llama_cpp": "2"}
    return Finding(Retrieval, {"name": "tiny"}, {"build": build}, [], "2026-01-01", values, trials)


def wide() -> Finding:
    lengths = [1024 * number for number in (1, 2, 4, 8, 16, 32, 64, 128)]
    return finding_of(["f16", "turbo4:turbo3", "turbo2"], lengths, [0, 12.5, 50, 100])


def shown(table: tables.Table) -> list[str]:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(tables.Shown(table, gap=1))
    return captured.get().splitlines()


@pytest.mark.parametrize("part", [Retrieval.table, lambda finding: table_of_maps(Retrieval.maps(finding))])
def test_print_fits_80_columns(part):
    table = part(wide())
    lines = shown(table)
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines), "a cell was cut"
    first = table.columns[0].heading.split("\n")[0]
    assert sum(line.startswith(first) for line in lines) == 1, "columns did not fit side by side"


def test_maps_can_be_read_without_color():
    finding = finding_of(["turbo4", "f16"], [1024, 2048], [0, 100], trials=1)
    (answers,) = (own for types, own in finding.values.items() if str(types) == "f16")
    answers[0]["found"], answers[1]["found"] = True, False
    (one,) = (one for one in Retrieval.maps(finding) if one.types == "f16")
    assert one.shares == {0: [1, None], 100: [0, None]}


@pytest.mark.parametrize("suffix", plots.FORMATS)
def test_plot(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"found{suffix}"
    plots.write([Section({"name": "tiny"}, {"retrieval": [wide()]})], path, suffix[1:])
    assert path.read_bytes()[:4] in (b"\x89PNG", b"<?xm", b"%PDF")
