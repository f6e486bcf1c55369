"""Quality of caches: the numbers against llama-perplexity and against their definitions; stopping and going on."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

import checkpoints
from turboquant_gguf import cli
from turboquant_gguf.core import texts
from turboquant_gguf.core.texts import Text
from turboquant_gguf.errors import TurboquantError
from turboquant_gguf.kinds import Finding, quality
from turboquant_gguf.kinds.quality import Quality
from turboquant_gguf.llamacpp import native, provenance
from turboquant_gguf.llamacpp.cachetypes import CacheTypes
from turboquant_gguf.llamacpp.logits import Model
from turboquant_gguf.measure.store import Store
from turboquant_gguf.measure.sweep import measure

F16, F32, TURBO4, Q4_0 = map(CacheTypes.parse, ("f16", "f32", "turbo4", "q4_0"))


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """About 900 tokens of SmolLM2's, with the ends of lines that Windows writes."""
    content = files("turboquant_gguf").joinpath("data/calibration.txt").read_text("utf-8")[:4000]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(content.replace("\n", "\r\n").encode())
    return path


@pytest.fixture
def random_text(tmp_path) -> Path:
    path = tmp_path / "random.txt"
    path.write_bytes(bytes(np.random.default_rng(0).integers(97, 123, 400, np.uint8)))
    return path


def measured(model: Path, text: Path, folder: Path, **options) -> Finding:
    options = {"context": 32, "types": ("f16", "q4_0"), "results": folder / "results.sqlite"} | options
    outcome = measure("quality", model, text=str(text), console=Console(quiet=True), **options)
    assert not outcome.failures
    (found,) = outcome.findings
    return found


def work(text: Text, base: CacheTypes, context: int, decode: bool = False) -> Quality:
    """A piece of work of which only the text and how it is read matter."""
    return Quality(Path(), {}, None, {}, text, base, context, decode)


def scores(one: Quality, path: Path, types: list[CacheTypes]) -> dict[CacheTypes, np.ndarray]:
    """The scores in the first chunk."""
    with Model(path) as model:
        return dict(one.scores(model, one.cut(model)[0], types))


# ---- the numbers ----


def llama_perplexity(model: Path, text: Path, *options: str) -> str:
    command = [native.tool_path("llama-perplexity"), "-m", model, "-f", text, "-c", "256", "--chunks", "2", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def test_agrees_with_llama_perplexity(smollm2, text, tmp_path):
    """Perplexity to the printed digits; divergence as far as the 16 bits go in which llama-perplexity keeps logits."""
    found = measured(smollm2, text, tmp_path, context=256, chunks=2, types=("f16", "turbo4"))
    f16, turbo4 = found.values.values()
    base = tmp_path / "base.logits"
    final = re.search(
        r"Final estimate: PPL = (\S+) \+/- (\S+)", llama_perplexity(smollm2, text, "--save-all-logits", base)
    )
    assert (f"{f16.ppl:.4f}", f"{f16.ppl_stderr:.5f}") == final.groups()
    log = llama_perplexity(
        smollm2, text, "--kl-divergence-base", base, "--kl-divergence", "-ctk", "turbo4", "-ctv", "turbo4"
    )
    for name, value in (("Mean    KLD", turbo4.kld_mean), ("Maximum KLD", turbo4.kld_max)):
        assert value == pytest.approx(float(re.search(rf"{name}: +(\S+)", log)[1]), rel=0.01)
    assert turbo4.top1 == pytest.approx(float(re.search(r"Same top p: +(\S+)", log)[1]) / 100, abs=0.01)
    assert turbo4.ppl == pytest.approx(float(re.search(r"Mean PPL\(Q\) +: +(\S+)", log)[1]), rel=1e-3)


def test_the_base_against_itself_is_exactly_zero(tiny, random_text):
    """Also when it is run a second time, here as the base of another experiment."""
    one = work(texts.load(str(random_text)), F16, 32)
    found = scores(one, tiny, [F16, F32, Q4_0])
    assert not found[F16]["kld"].any() and found[F16]["same"].all()
    assert found[F32]["kld"].any() and (found[Q4_0]["kld"] > 0).all()
    with Model(tiny) as model:
        chunk = one.cut(model)[0]
        first, second = ([piece.copy() for piece in one.read(model, F16, chunk)] for _ in range(2))
    assert not quality.compare(first[0], second[0], chunk[17:]).view()["kld"].any()


@pytest.mark.parametrize("size", [1, 30, 1e4])
def test_scores_against_their_definitions(size):
    rng = np.random.default_rng(0)
    p, q = (rng.standard_normal((70, 200)) * size).astype(np.float32), None
    q = p + rng.standard_normal(p.shape).astype(np.float32)
    targets = rng.integers(0, 200, 70).tolist()
    found = quality.compare(p, q, targets)
    log_p, log_q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (p.astype(np.float64), q.astype(np.float64)))
    tolerance = 1e-6 * size  # float32 holds logits no better
    np.testing.assert_allclose(found["kld"], (np.exp(log_p) * (log_p - log_q)).sum(-1), rtol=1e-5, atol=tolerance)
    np.testing.assert_allclose(found["nll"], -log_q[np.arange(70), targets], rtol=1e-5, atol=tolerance)
    assert np.array_equal(found["same"], p.argmax(-1) == q.argmax(-1))


def test_summary():
    """Two caches on eight tokens, with sums that can be done by hand."""
    nll, more = np.array([1, 2, 3, 4, 1, 2, 3, 4.0]), np.array([0, 0.5, 0, 0.5, 0, 0.5, 0, 0.5])
    kld, same = np.array([0, 0, 0, 0, 0, 0, 0.5, 0.25]), np.array([1, 1, 1, 1, 1, 1, 0, 1], bool)
    base, other = np.zeros(8, quality.SCORES), np.zeros(8, quality.SCORES)
    base["nll"], base["same"] = nll, True
    other["nll"], other["kld"], other["same"] = nll + more, kld, same
    f16, q4_0 = quality.summarize({F16: base, Q4_0: other}, F16).values()
    assert (f16.ppl_ratio, f16.ppl_ratio_stderr, f16.kld_mean, f16.top1, f16.like) == (1, 0, 0, 1, ())
    assert f16.ppl == pytest.approx(np.exp(2.5))
    assert f16.ppl_stderr == pytest.approx(np.exp(2.5) * (1.25 / 7) ** 0.5)
    assert q4_0.ppl == pytest.approx(np.exp(2.75))
    assert q4_0.ppl_ratio == pytest.approx(np.exp(0.25))
    assert q4_0.ppl_ratio_stderr == pytest.approx(np.exp(0.25) * 0.25 / 7**0.5)
    assert (q4_0.kld_mean, q4_0.kld_median, q4_0.kld_max, q4_0.top1) == (0.09375, 0, 0.5, 0.875)


def test_noise_is_judged_over_neighbours():
    """Errors that repeat for as long as NEIGHBOURS are as many observations as there are blocks, not tokens."""
    rng = np.random.default_rng(0)
    blocks = np.repeat(rng.standard_normal(16), quality.NEIGHBOURS)
    assert quality._stderr(blocks) == pytest.approx(blocks[:: quality.NEIGHBOURS].std(ddof=1) / 4)
    apart, alike = (np.zeros(blocks.size, quality.SCORES) for _ in range(2))
    truth = np.zeros(blocks.size, quality.SCORES)
    apart["kld"], alike["kld"] = 1 + abs(blocks), 1 + abs(blocks[::-1])
    much = apart.copy()
    much["kld"] += 10
    found = quality.summarize({F16: truth, Q4_0: apart, TURBO4: alike, F32: much}, F16)
    assert [loss.like for loss in found.values()] == [(), ("turbo4",), ("q4_0",), ()]


def test_token_by_token(smollm2, text):
    """The same distributions, but for the order of sums; and the single-token kernel is what reads the cache."""
    content = texts.load(str(text))
    batches, tokens = (scores(work(content, F16, 128, decode), smollm2, [F16, TURBO4]) for decode in (False, True))
    assert len(batches[F16]) == len(tokens[F16]) == 63
    for pair, tolerance in ((F16, 0.02), (TURBO4, 0.05)):
        assert batches[pair]["nll"].mean() == pytest.approx(tokens[pair]["nll"].mean(), abs=tolerance)
    assert not np.array_equal(batches[TURBO4], tokens[TURBO4])


def test_later_positions(tiny, random_text, tmp_path):
    """The same predictions where attention depends on distances alone, and its own rows; refused where it does not."""
    near, far = (measured(tiny, random_text, tmp_path, positions=positions) for positions in (0, 5000))
    for types in near.values:
        assert far.values[types].ppl == pytest.approx(near.values[types].ppl, rel=0.05)
    assert far.settings["positions"] == 5000 and "positions" not in near.settings
    assert "at positions from 5000 on" in Quality.conditions(far)
    learned = checkpoints.gguf(tmp_path, "gpt2")
    with pytest.raises(TurboquantError, match="knows 512 positions, and this would read up to 532"):
        measured(learned, random_text, tmp_path, positions=500)
    assert measured(learned, random_text, tmp_path, positions=480).values


def test_long_chunks_are_read_in_pieces(tiny, tmp_path):
    """Of 1,100 tokens, three batches: the same as in one."""
    path = tmp_path / "long.txt"
    path.write_bytes(bytes(np.random.default_rng(0).integers(97, 123, 1200, np.uint8)))
    one = work(texts.load(str(path)), F32, 1100)
    with Model(tiny) as model, model.open(1100, F32) as context:
        chunk = one.cut(model)[0]
        pieces = np.concatenate([piece.copy() for piece in one.read(model, F32, chunk)])
        whole = context.read(chunk, 0, outputs=550)[:-1].copy()
    np.testing.assert_allclose(pieces, whole, atol=1e-4)


# ---- stopping and going on ----


def rows(path: Path) -> list[tuple]:
    with sqlite3.connect(path) as database:
        return database.execute("SELECT id, type_k, part, value FROM measurement ORDER BY id").fetchall()


def test_what_was_measured_is_not_measured_again(tiny, random_text, tmp_path):
    first = measured(tiny, random_text, tmp_path, chunks=2)
    before = rows(tmp_path / "results.sqlite")
    assert [(row[1], row[2]) for row in before] == [("f16", 0), ("q4_0", 0), ("f16", 1), ("q4_0", 1)]
    again = measured(tiny, random_text, tmp_path, chunks=2)
    assert again.values == first.values and rows(tmp_path / "results.sqlite") == before
    more = measured(tiny, random_text, tmp_path, chunks=3, types=("f16", "q4_0", "turbo4"))
    after = rows(tmp_path / "results.sqlite")
    assert after[:4] == before
    assert [(row[1], row[2]) for row in after[4:]] == [
        ("turbo4", 0),
        ("turbo4", 1),
        ("f16", 2),
        ("q4_0", 2),
        ("turbo4", 2),
    ]
    assert more.parts == 3 and len(more.values) == 3
    for changed in ({"context": 16}, {"base": "f32", "types": ("q4_0",)}, {"decode": True}):
        measured(tiny, random_text, tmp_path, chunks=1, **changed)
    assert len(rows(tmp_path / "results.sqlite")) > len(after) + 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_continued(smollm2, text, tmp_path, number):
    command = [
        sys.executable, "-m", "turboquant_gguf.cli", "ppl", smollm2, "--text", text, "--context", "64",
        "--types", "f16,q4_0", "--results", tmp_path / "results.sqlite",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "results.sqlite").exists() or len(rows_or_none(tmp_path / "results.sqlite")) < 3:
        assert process.poll() is None
    process.send_signal(number)
    output, errors = process.communicate()
    assert process.returncode == 128 + number
    kept = rows(tmp_path / "results.sqlite")
    if number == signal.SIGINT:
        assert "The same command goes on from there" in errors and "q4_0" in output
    found = measured(smollm2, text, tmp_path, context=64, chunks=4)
    assert rows(tmp_path / "results.sqlite")[: len(kept)] == kept
    assert found.values == measured(smollm2, text, tmp_path, context=64, chunks=4, results=tmp_path / "new").values


def rows_or_none(path: Path) -> list[tuple]:
    try:
        return rows(path)
    except sqlite3.OperationalError:  # not made yet
        return []


def test_later_rows_count(tmp_path):
    model, settings = {"name": "m", "fingerprint": "1"}, {"b": 1, "a": [2]}
    with Store(tmp_path / "store") as store:
        for value in (b"1", b"2"):
            store.add("kind", model, F16, settings, value, machine={"devices": ["x"]})
        store.add("kind", model, F16, settings, b"3", part=1)
        store.add("kind", model, F16, {"a": [2]}, b"4")
        store.add("kind", model, F16, settings, b"6", machine={"devices": ["y"]})
    with Store(tmp_path / "store") as store:
        store.add("kind", {"name": "m", "fingerprint": "2"}, F16, settings, b"5")
        renamed = {"name": "another", "fingerprint": "1"}
        assert store.find("kind", renamed, {"a": [2], "b": 1}) == {(F16, 0): b"6", (F16, 1): b"3"}
        assert [row.value for row in store.all("kind")] == [b"2", b"3", b"4", b"6", b"5"]  # 2 took the place of 1
        assert store.all("kind")[0].machine == {"devices": ["x"]}
        assert store.all("kind")[2].machine == provenance.machine()
        assert store.all("other") == []


def test_other_files_are_no_store(tmp_path):
    (tmp_path / "text").write_text("hello" * 100)
    with sqlite3.connect(tmp_path / "another") as database:
        database.execute("CREATE TABLE mine (x)")
    with Store(tmp_path / "newer"):
        pass
    with sqlite3.connect(tmp_path / "newer") as database:
        database.execute("PRAGMA user_version = 99")
    for name in ("text", "another", "newer", "no/folder"):
        with pytest.raises(TurboquantError, match="measurements"):
            Store(tmp_path / name)


# ---- input ----


def results_of(output: str) -> list[dict]:
    (found,) = json.loads(output)["findings"]
    return found["results"]


def test_types_that_do_not_fit_the_model_are_listed(tmp_path, random_text):
    model = checkpoints.gguf(tmp_path, "llama, head size 80")
    done = CliRunner().invoke(
        cli.cli,
        ["ppl", str(model), "--text", str(random_text), "--context", "32", "--types", "f16,turbo4,f32", "--json"]
        + ["--results", str(tmp_path / "results.sqlite")],
    )
    assert done.exit_code == 1
    assert [one["type_k"] for one in results_of(done.stdout)] == ["f16", "f32"]
    assert "turbo4: This model's heads hold 80 values" in done.stderr


def test_recent_window_is_an_option_and_part_of_what_is_known(tiny, random_text, tmp_path):
    """With a window that is longer than the context nothing is lost; without one it is; both are kept apart."""
    arguments = ["ppl", str(tiny), "--text", str(random_text), "--context", "32", "--types", "turbo2", "--json"]
    arguments += ["--results", str(tmp_path / "results.sqlite")]
    losses = []
    for option in (["--cache-window", "0"], ["--cache-window", "40"], []):
        done = CliRunner().invoke(cli.cli, [*arguments, *option])
        assert done.exit_code == 0, done.output
        losses.append(results_of(done.stdout)[-1]["kld_mean"])
        assert "TURBO_CACHE_WINDOW" not in os.environ
    assert losses[1] < losses[0] / 100
    assert losses[2] == pytest.approx(losses[1])  # the default


def test_json(tiny, random_text, tmp_path):
    arguments = ["ppl", str(tiny), "--text", str(random_text), "--context", "32", "--types", "q8_0,turbo4:turbo3"]
    done = CliRunner().invoke(cli.cli, [*arguments, "--json", "--results", str(tmp_path / "results.sqlite")])
    assert done.exit_code == 0, done.output
    lines = results_of(done.stdout)[1:]  # f16 is the first
    wanted = "type_k type_v ppl ppl_stderr kld_mean kld_median kld_p99 kld_max top1 tokens".split()
    assert all(set(wanted) <= set(line) for line in lines)
    assert [(line["type_k"], line["type_v"]) for line in lines] == [("q8_0", "q8_0"), ("turbo4", "turbo3")]
    with Model(tiny) as model:
        chunks = len(model.tokenize(random_text.read_text())) // 32
    assert all(line["tokens"] == 15 * chunks for line in lines)
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(
        cli.cli, [*arguments, "--results", str(tmp_path / "results.sqlite")]
    )
    assert "turbo4:turbo3" in shown.stdout and all(len(line) <= 80 for line in shown.stdout.splitlines())


@pytest.mark.parametrize(
    "change, because",
    [
        ({"text": "no such file"}, "There is no text file no such file"),
        ({"context": 4096}, "less than one chunk of 4096"),
        ({"types": ("turb4",)}, "did you mean turbo4"),
        ({"base": "f64"}, "There is no cache type 'f64'"),
    ],
)
def test_bad_input(tiny, random_text, tmp_path, change, because):
    with pytest.raises(TurboquantError, match=because):
        measured(tiny, change.pop("text", random_text), tmp_path, **change)


def test_texts(tmp_path, monkeypatch):
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(TurboquantError, match="not UTF-8 text .byte 3."):
        texts.load(str(tmp_path / "latin1.txt"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wikitext-2").write_text("mine")
    assert texts.load("wikitext-2").content == "mine"  # a file goes first
