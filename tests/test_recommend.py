"""Recommendations: what fits, what loses least, and a command line that runs."""

import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

import tiny_architectures
from turboquant_gguf import cli
from turboquant_gguf.kinds import quality
from turboquant_gguf.kinds.quality import Quality
from turboquant_gguf.llamacpp import native, provenance
from turboquant_gguf.llamacpp.cachetypes import CacheTypes
from turboquant_gguf.llamacpp.modelmemory import ModelMemory
from turboquant_gguf.measure.recommend import recommend, reference
from turboquant_gguf.measure.store import Store
from turboquant_gguf.measure.sweep import measure

CONTEXT = 8192


@pytest.fixture(autouse=True)
def no_measurements(tmp_path, monkeypatch, smollm2):
    """None of the user's own count here; smollm2 is fetched before its cache folder moves."""
    monkeypatch.setenv("TURBOQUANT_CACHE_DIR", str(tmp_path))


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A model that llama.cpp opens in no time."""
    return tiny_architectures.write(tmp_path_factory.mktemp("llama") / "llama.gguf", "llama")


def total(model: Path, types: str) -> int:
    with ModelMemory(model) as memory:
        return memory.size(CacheTypes.parse(types), CONTEXT).total


def measured(model: Path, path: Path, losses: dict[str, float], chunks: int = 1, **settings) -> Path:
    """A file of measurements in which each type has the same loss for every token."""
    settings = {"text": "t", "base": "f16", "context": 512, "decode": False, "build": provenance.build()} | settings
    with Store(path) as store:
        for name, loss in losses.items():
            scores = np.full(15, 0, quality.SCORES)
            scores["kld"] = loss
            for chunk in range(chunks):
                pair = CacheTypes.parse(name)
                store.add(Quality.name, provenance.model(model), pair, settings, scores.tobytes(), part=chunk)
    return path


def test_the_best_that_fits(smollm2):
    everything = recommend(smollm2, memory=1 << 40, context=CONTEXT)
    assert everything.best.types == "f16" and all(one.fits for one in everything.candidates)
    assert {one.types for one in everything.candidates} == set(reference(False).losses)
    memory = total(smollm2, "turbo4")
    found = recommend(smollm2, memory=memory, context=CONTEXT)
    assert {one.types for one in found.candidates if one.fits} == {
        one.types for one in everything.candidates if one.size.total <= memory
    }
    fitting = [one for one in found.candidates if one.fits]
    assert found.best.predicted == min(one.predicted for one in fitting)
    assert not any(one.types in ("f16", "q8_0", "q5_0") for one in fitting)  # q4_0, without a window, is as small here
    assert all((one.longest_context >= CONTEXT) == one.fits for one in found.candidates)


def test_a_calibrated_model_has_predictions_of_its_own(smollm2, calibrated):
    plain, better = (
        recommend(model, memory=1 << 40, context=CONTEXT, types=["turbo3"]) for model in (smollm2, calibrated)
    )
    assert better.best.predicted < plain.best.predicted
    assert plain.reason.count("`turboquant-gguf calibrate`") == 1 and "calibrate`" not in better.reason
    enough = recommend(smollm2, memory=1 << 40, context=CONTEXT)
    assert enough.best.types == "f16" and "calibrate`" not in enough.reason


def test_predictions_follow_what_was_measured_of_the_model(smollm2, tmp_path):
    """A model that loses twice what the reference does, loses twice as much with types that were not measured, too."""
    known = reference(False).losses
    twice = {"f16": 0.0} | {name: 2 * known[name] for name in ("q4_0", "turbo4")}
    mine = measured(smollm2, tmp_path / "mine.sqlite", twice)
    found = recommend(smollm2, memory=total(smollm2, "q8_0"), context=CONTEXT, results=[mine])
    assert (found.best.types, found.best.measured) == ("q8_0", None)  # though others were measured
    assert found.best.predicted == pytest.approx(2 * known["q8_0"], rel=1e-3)


def test_measurements_of_the_model_go_before_predictions(smollm2, calibrated, tmp_path):
    memory = total(smollm2, "turbo4")
    predicted = recommend(smollm2, memory=memory, context=CONTEXT)
    assert predicted.best.measured is None and "should lose least" in predicted.reason
    # against all experience, turbo2 is the best of this model
    mine = measured(smollm2, tmp_path / "mine.sqlite", {"f16": 0, "turbo2": 0.01, "turbo4": 0.5})
    found = recommend(smollm2, memory=memory, context=CONTEXT, results=[mine])
    assert (found.best.types, found.best.measured) == ("turbo2", pytest.approx(0.01))
    assert "0.0100 from f16, measured on this model" in found.reason
    assert recommend(calibrated, memory=memory, context=CONTEXT, results=[mine]).best.measured is None  # another model
    # what ppl keeps by default is found without being named
    measured(smollm2, tmp_path / "measurements.sqlite", {"f16": 0, "turbo4": 0.0001}, chunks=2)
    assert recommend(smollm2, memory=memory, context=CONTEXT, results=[mine]).best.types == "turbo4"


@pytest.mark.parametrize(
    "settings, because",
    [
        ({"base": "q8_0"}, "compared with q8_0"),
        ({"context": 256}, "with a context of 256 tokens, too short to tell"),
        ({"build": {"turboquant_gguf": "0.0.1", "llama_cpp": "1"}}, "by version 0.0.1"),
        ({"build": provenance.build() | {"LLAMA_ARG_CACHE_WINDOW": "0"}}, "with TURBO_CACHE_WINDOW=0"),
    ],
)
def test_measurements_that_do_not_compare_are_left_out(llama, tmp_path, settings, because):
    """They say that turbo2 loses nothing; what remains says that it does, or nothing."""
    losses = {"f16": 0, "q8_0": 0, "turbo2": 0, "turbo4": 0.1}
    wrong = measured(llama, tmp_path / "wrong.sqlite", losses, 9, **settings)
    options = {"memory": 1 << 40, "context": CONTEXT, "types": ["turbo4", "turbo2"]}
    alone = recommend(llama, **options, results=[wrong])
    assert alone == replace(recommend(llama, **options), left_out=[because])
    right = measured(llama, tmp_path / "right.sqlite", {"f16": 0, "turbo2": 0.2, "turbo4": 0.1})
    both = recommend(llama, **options, results=[right, wrong])
    assert (both.best.types, both.best.measured) == ("turbo4", pytest.approx(0.1))
    assert (both.measured.tokens, both.left_out) == (15, [because])


def test_a_window_of_ones_own_needs_measurements_with_it(llama, tmp_path, monkeypatch):
    mine = measured(llama, tmp_path / "mine.sqlite", {"f16": 0, "turbo4": 0.1})
    monkeypatch.setenv("TURBO_CACHE_WINDOW", "200")
    found = recommend(llama, memory=1 << 40, context=CONTEXT, results=[mine])
    assert (found.measured, found.left_out) == (None, ["without TURBO_CACHE_WINDOW"])
    measured(llama, mine, {"f16": 0, "turbo4": 0})  # all of a context of 512 is in the window, but for a little
    found = recommend(llama, memory=1 << 40, context=CONTEXT, results=[mine])
    assert found.measured is None and "with a context of 512 tokens, too short to tell" in found.left_out
    assert recommend(llama, memory=1 << 40, context=400, results=[mine]).measured.context == 512


def test_losses_that_are_compared_come_from_one_text_and_one_build(llama, tmp_path):
    other = {"turboquant_gguf": provenance.build()["turboquant_gguf"], "llama_cpp": "another"}
    files = [
        measured(llama, tmp_path / "1", {"f16": 0, "turbo4": 0.3}, 9, text="easy"),
        measured(llama, tmp_path / "2", {"f16": 0, "turbo4": 0.2, "turbo3": 0.4}, 2, text="hard"),
        measured(llama, tmp_path / "3", {"f16": 0, "turbo4": 0.1, "turbo3": 0.1, "turbo2": 0.1}, 9, build=other),
    ]

    def losses(which: list[Path]) -> dict[str, float]:
        found = recommend(llama, memory=1 << 40, context=CONTEXT, results=which)
        return {one.types: pytest.approx(one.measured) for one in found.candidates if one.measured}, found.measured

    found, used = losses(files)  # most types of this build's
    assert found == {"turbo4": 0.2, "turbo3": 0.4}
    assert str(used).startswith("30 tokens of hard in a context of 512, against f16, 20")
    found, used = losses(files[2:])  # another build's, if there are no others
    assert len(found) == 3 and str(used).endswith(", with another build")


def test_ppl_against_another_base_is_no_loss(tiny, tmp_path):
    """ppl --base q8_0 says that q8_0 loses 0.0000: of itself."""
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(np.random.default_rng(0).integers(97, 123, 3000, np.uint8)))
    common = ["--text", str(text), "--types", "q8_0,turbo4", "--chunks", "1"]

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(cli.cli, list(map(str, arguments)))
        assert done.exit_code == 0, done.output
        return " ".join(done.stdout.split())

    quiet = {"console": Console(quiet=True), "text": str(text), "types": ["q8_0", "turbo4"], "chunks": 1}
    measure("quality", tiny, base="q8_0", context=600, **quiet)
    question = ["recommend", tiny, "--memory", "1GiB", "--context", "1000", "--types", "q8_0,turbo4"]
    shown = run(*question)
    assert "measured on this model" not in shown and "left out: compared with q8_0." in shown
    run("ppl", tiny, *common, "--context", "600")
    shown = run(*question)
    assert "measured on this model" in shown and "Measured on 299 tokens of text.txt in a context of 600" in shown
    assert "left out: compared with q8_0." in shown


def test_nothing_fits(smollm2):
    none = recommend(smollm2, memory=1 << 20, context=CONTEXT)
    assert (none.best, none.command) == (None, None) and "weights and buffers alone" in none.reason
    little = total(smollm2, "turbo2") - 1
    some = recommend(smollm2, memory=little, context=CONTEXT)
    assert some.best is None and "with turbo2" in some.reason
    longest = max(one.longest_context for one in some.candidates)
    assert str(longest) in some.reason and 0 < longest < CONTEXT


def test_command_line_runs(smollm2, tmp_path):
    found = recommend(smollm2, memory=total(smollm2, "turbo4"), context=CONTEXT)
    program, *arguments = shlex.split(found.command)
    log = ""
    with subprocess.Popen(
        [native.tool_path(program), *arguments, "--port", "0", "--log-verbosity", "4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as server:
        for line in server.stdout:
            log += line
            if "listening on http" in line:
                server.kill()  # it forgets a SIGTERM that comes before it waits for questions, and would never end
    types = CacheTypes.parse(found.best.types)
    assert f"K ({types.k})" in log and f"V ({types.v})" in log and f"{CONTEXT} cells" in log


def test_json_and_table(smollm2):
    options = ["recommend", str(smollm2), "--memory", "200MiB", "--context", str(CONTEXT)]
    found = json.loads(CliRunner().invoke(cli.cli, [*options, "--json"]).stdout)
    assert found["best"] == found["candidates"][0] and found["context"] == CONTEXT
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(cli.cli, options)
    assert shown.exit_code == 0 and found["command"] in shown.stdout
    table = shown.stdout.partition("llama-server")[0]
    assert found["best"]["types"] in table and all(len(line) <= 80 for line in table.splitlines())


@pytest.mark.parametrize(
    "options, code, because",
    [
        (["--memory", "8 pounds", "--context", "10"], 2, "is not a size of memory"),
        (["--memory", "1KiB", "--context", "10"], 1, "weights and buffers alone"),
        (["--memory", "8GiB", "--context", "10", "--types", "turb4"], 2, "did you mean turbo4"),
        (
            ["--memory", "8GiB", "--context", "10", "--types", "turbo2:turbo4"],
            1,
            "There is no prediction for turbo2:turbo4",
        ),
        (["--memory", "8GiB", "--context", "100000"], 0, "trained for 8192 tokens"),
    ],
)
def test_odd_input(smollm2, options, code, because):
    command = ["recommend", str(smollm2), *options]
    done = CliRunner().invoke(cli.cli, command)
    said = f"{done.output} {done.exception}"
    assert because in " ".join(said.split())
    assert (getattr(done.exception, "exit_code", done.exit_code) if done.exception else done.exit_code) == code
