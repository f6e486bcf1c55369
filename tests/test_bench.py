"""`turboquant-gguf bench`: real runs of llama-bench with a small random model, and made-up samples for the rest."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

import tiny_model
from sequences import window_slots
from turboquant_gguf.core import tables
from turboquant_gguf.errors import TurboquantError
from turboquant_gguf.kinds import Failure, Finding, speed
from turboquant_gguf.kinds.base import Row
from turboquant_gguf.kinds.runners import llamabench
from turboquant_gguf.kinds.speed import Speed
from turboquant_gguf.llamacpp import cachefacts, native
from turboquant_gguf.llamacpp.cachetypes import F16, CacheTypes
from turboquant_gguf.llamacpp.placement import CPU, Placement
from turboquant_gguf.measure import sweep
from turboquant_gguf.measure.store import Measurement
from turboquant_gguf.measure.sweep import Outcome
from turboquant_gguf.report import plots
from turboquant_gguf.report.contents import Section

COMMAND = (sys.executable, "-m", "turboquant_gguf.cli", "bench")
SMALL = ("--prefill", "16", "--decode", "4", "--threads", "1")
NARROW = {"COLUMNS": "80", "NO_COLOR": "1"}
F16_BYTES_PER_TOKEN = 2 * tiny_model.LAYERS * tiny_model.HEADS * 64 * 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("bench") / "tiny.gguf")


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, **NARROW}
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=environment, timeout=300, check=False
    )


def measure(model: Path, folder: Path, **options) -> Outcome:
    # one thread, which does not wait for others on a busy machine
    least = {"types": ["turbo4"], "depths": [0], "prefill": 16, "decode": 4, "repetitions": 1}
    least["placement"] = Placement(threads=1)
    return sweep.measure("speed", model, results=folder / "r.sqlite", console=Console(quiet=True), **least | options)


def values(outcome: Outcome) -> dict[str, list[dict]]:
    (finding,) = outcome.findings
    return {str(types): cells for types, cells in finding.values.items()}


def wrapper(folder: Path, *, before: str) -> Path:
    """A llama-bench in `folder` that does a line of shell before it becomes the real one."""
    tool = native.tool_path("llama-bench")
    path = folder / tool.name
    path.write_text(f'#!/bin/sh\n{before}\nexec {tool} "$@"\n')
    path.chmod(0o755)
    return path


# --- measuring ---


def test_everything_is_measured_in_every_round(tiny, tmp_path):
    types = ["turbo4", "turbo4:turbo2", "f16", "turbo4"]
    outcome = measure(tiny, tmp_path, types=types, depths=[64, 0], repetitions=2)
    assert (outcome.added, outcome.failures, outcome.interrupted) == (6, [], False)
    found = values(outcome)
    assert list(found) == ["f16", "turbo4", "turbo4:turbo2"]
    for cells in found.values():
        assert [cell["depth"] for cell in cells] == [0, 64]
        assert all(cell["prefill_speed"]["low"] > 0 and cell["decode_speed"]["low"] > 0 for cell in cells)
        assert all(cell["decode_ratio"]["low"] <= cell["decode_ratio"]["high"] for cell in cells)
    assert outcome.findings[0].parts == 2 and outcome.findings[0].settings["threads"] == 1


def test_the_order_turns_around(tiny, monkeypatch):
    asked = []

    def run(tool, types, options):
        asked.append((options[-1], str(types)))
        return llamabench.Sample(1.0, 1.0, cachefacts.CacheFacts(types, ((64, 64.0),)))

    monkeypatch.setattr(llamabench, "run", run)
    types = tuple(map(CacheTypes.parse, ("f16", "turbo4")))
    list(Speed(tiny, {}, CPU, {0: types, 1: types}, (0, 64), 16, 4, None).measure(lambda *_: None))
    first = [("0", "f16"), ("0", "turbo4"), ("64", "f16"), ("64", "turbo4")]
    assert asked == [*first, *[first[i] for i in (1, 0, 3, 2)]]


def test_rounds_that_were_measured_are_not_measured_again(tiny, tmp_path):
    assert measure(tiny, tmp_path).added == 2
    more = measure(tiny, tmp_path, repetitions=3, types=["turbo4", "turbo2"])
    assert (more.known, more.added) == (2, 7)
    assert values(more)["f16"][0]["decode_ratio"] == {"median": 1, "low": 1, "high": 1}


def test_cache_that_a_token_reads(tiny):
    options = ("-m", tiny, "-p", "0", "-n", "4", "-d", "1024", "-t", "1")
    f16, turbo = (
        llamabench.run(llamabench.tool(None), CacheTypes.parse(name), options).cache.size_of(1024 + 2)
        for name in ("f16", "turbo4")
    )
    assert f16 == pytest.approx(F16_BYTES_PER_TOKEN * (1024 + 2), rel=0.02)  # the log has two decimals
    window = F16_BYTES_PER_TOKEN * window_slots()  # the tokens that are kept in f16 as well
    assert turbo == pytest.approx(f16 * 4.25 / 16 + window, rel=0.05)


def test_window_of_attention_is_full_at_its_length():
    facts = cachefacts.CacheFacts(CacheTypes("f16", "f16"), ((8192, 8000.0), (1024, 500.0)))
    assert facts.size_of(512) == 500 + 250
    assert facts.size_of(4096) == 4000 + 500


@pytest.mark.parametrize("left_out", ["prefill", "decode"])
def test_one_way_may_be_left_out(tiny, tmp_path, left_out):
    outcome = measure(tiny, tmp_path, **{left_out: 0})
    kept = {"prefill": "decode", "decode": "prefill"}[left_out]
    for (cell,) in values(outcome).values():
        assert cell[f"{left_out}_speed"] is cell[f"{left_out}_ratio"] is None
        assert cell[f"{kept}_ratio"]["median"] > 0
    titles = " ".join(column.title for column in Speed.table(outcome.findings[0]).columns)
    assert kept in titles and left_out not in titles


def test_baseline_is_only_asked_for_f16(tiny, tmp_path):
    asked = tmp_path / "asked.txt"
    wrapper(tmp_path, before=f'echo "$@" >> {asked}')
    outcome = measure(tiny, tmp_path, types=["f16", "turbo4"], baseline=tmp_path)
    assert list(values(outcome)) == ["f16", "turbo4"]
    assert f"f16 of {tmp_path}" in Speed.conditions(outcome.findings[0])
    (line,) = asked.read_text().splitlines()
    assert "-ctk f16 -ctv f16" in line


def test_a_type_that_does_not_fit_does_not_stop_the_others(tmp_path):
    model = tiny_model.write(tmp_path / "odd.gguf", head_size=80)
    options = ("--types", "turbo4,bf16", "--depths", "0,64", "--repetitions", "2", "-o", tmp_path / "r.sqlite")
    done = run(model, *SMALL, *options, "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    (failure,) = found["failures"]
    assert failure["what"] == "odd.gguf, turbo4" and "heads hold 80 values" in failure["message"]
    assert [(one["types"], one["depth"]) for one in found["findings"][0]["results"]] == [
        (name, depth) for name in ("f16", "bf16") for depth in (0, 64)
    ]


def test_a_type_that_fails_is_tried_once(tiny, monkeypatch):
    """Neither in the next round, nor deeper; and what it gave at smaller depths counts."""
    asked = []

    def run(tool, types, options):
        asked.append((str(types), options[-1]))
        if asked[-1] == ("turbo4", "64"):
            raise TurboquantError("too deep")
        return llamabench.Sample(1.0, 1.0, cachefacts.CacheFacts(types, ((64, 64.0),)))

    monkeypatch.setattr(llamabench, "run", run)
    types = tuple(map(CacheTypes.parse, ("f16", "turbo4")))
    found = list(Speed(tiny, {}, CPU, {0: types, 1: types}, (0, 64, 128), 16, 4, None).measure(lambda *_: None))
    assert [one.what for one in found if isinstance(one, Failure)] == ["tiny.gguf, speed, turbo4 at depth 64"]
    assert Counter(asked)["turbo4", "64"] == 1 and not Counter(asked)["turbo4", "128"]
    rows = [json.loads(one.value) for one in found if isinstance(one, Row) and str(one.types) == "turbo4"]
    assert [[cell["depth"] for cell in row] for row in rows] == [[0], [0]]


def test_without_f16_there_is_no_benchmark(tiny, monkeypatch):
    def run(*_):
        raise TurboquantError("it is damaged")

    monkeypatch.setattr(llamabench, "run", run)
    with pytest.raises(TurboquantError, match="it is damaged"):
        list(Speed(tiny, {}, CPU, {0: (F16,)}, (0,), 16, 4, None).measure(lambda *_: None))


def test_another_cache_than_asked_for_is_an_error(tiny, tmp_path):
    liar = wrapper(tmp_path, before='set -- "$@" -ctk q8_0 -ctv q8_0')
    with pytest.raises(TurboquantError, match="asked to be f16 and is"):
        llamabench.run(liar, F16, ("-m", tiny, "-p", "16", "-n", "0"))


def test_ctrl_c_keeps_what_was_measured(tiny, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    wrapper(tmp_path, before=f"if [ -e {once} ]; then touch {twice}; exec sleep 60; fi; touch {once}")
    process = subprocess.Popen(
        [
            *COMMAND,
            tiny,
            *SMALL,
            "--types",
            "turbo4",
            "--depths",
            "0",
            "--baseline",
            tmp_path,
            "--json",
            "-o",
            tmp_path / "r.sqlite",
        ],
        env={**os.environ, **NARROW},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not twice.exists():
        assert time.monotonic() < deadline and process.poll() is None, "the second round did not start"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "turbo4" in errors
    found = json.loads(output)
    assert found["interrupted"] and found["added"] == 2
    assert [(one["types"], one["depth"]) for one in found["findings"][0]["results"]] == [("f16", 0), ("turbo4", 0)]


# --- arithmetic and print ---


def rows_of(rounds: list[dict[str, dict]]) -> dict:
    """Made-up rows of a store: for each round the cells of each type."""
    return {
        (CacheTypes.parse(name), number): Measurement(
            "speed", {}, CacheTypes.parse(name), {}, number, json.dumps(cells).encode(), {}, ""
        )
        for number, types in enumerate(rounds)
        for name, cells in types.items()
    }


def test_ratios_are_formed_within_a_round():
    drift = (1.0, 0.5, 0.1)  # the machine slows down; the type is twice as fast all the time
    cache = cachefacts.CacheFacts(F16, ((100, 1e8),))
    rounds = []
    for factor in drift:
        base, own = (llamabench.Sample(200 * factor, tokens * factor, cache) for tokens in (40.0, 80.0))
        rounds.append({"turbo4": [{"depth": 96, **speed.metrics_of(own, base, 100)}]})
    ((found, _),) = Speed.summarize(rows_of(rounds))
    ((cell,),) = found.values()
    assert cell["decode_ratio"] == {"median": 2, "low": 2, "high": 2}
    assert cell["prefill_ratio"]["median"] == 1
    assert cell["decode_speed"] == {"median": 40, "low": 8, "high": 80}
    assert cell["cache_traffic"]["high"] == 80 * 1e8


def test_a_round_without_f16_gives_speeds_but_no_ratio():
    sample = llamabench.Sample(200.0, 40.0, cachefacts.CacheFacts(F16, ((100, 1e8),)))
    ((found, _),) = Speed.summarize(rows_of([{"turbo4": [{"depth": 0, **speed.metrics_of(sample, None, 16)}]}]))
    ((cell,),) = found.values()
    assert cell["decode_ratio"] is None and cell["decode_speed"]["median"] == 40


def test_rows_of_earlier_versions_are_read():
    """Of all rounds at once, with the median and the range."""
    old = {"name": "turbo4", "depth": 0} | dict.fromkeys(speed.METRICS)
    old["decode_ratio"] = {"median": 2, "low": 1, "high": 3}
    ((found, _),) = Speed.summarize(rows_of([{"turbo4": [old]}]))
    ((cell,),) = found.values()
    assert cell["decode_ratio"] == {"median": 2, "low": 1, "high": 3} and cell["decode_speed"] is None


def wide() -> Finding:
    rng = random.Random(0)
    metrics = ("prefill_speed", "prefill_ratio", "decode_speed", "decode_ratio", "cache_traffic")
    found = {
        CacheTypes.parse(name): [
            {"depth": depth}
            | {metric: speed.spread([1234 * rng.uniform(0.5, 2) for _ in range(3)]) for metric in metrics}
            for depth in (0, 4096, 131072)
        ]
        for name in Speed.default_types
    }
    settings = {"decode": 32, "prefill": 512, "threads": 2, "build": {"turboquant_gguf": "1", "llama_cpp": "2"}}
    return Finding(Speed, {"name": "tiny"}, settings, [], "2026-01-01", found, 3)


def test_table_fits_80_columns():
    console = Console(width=80)
    with console.capture() as captured:
        console.print(tables.Shown(Speed.table(wide()), gap=1))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines), "a cell was cut"
    assert len(lines) == 2 + 3 + 3 * len(Speed.default_types), "a row was wrapped"


@pytest.mark.parametrize("suffix", plots.FORMATS)
@pytest.mark.parametrize("decode", [0, 32])
def test_plot(tmp_path, suffix, decode):
    pytest.importorskip("matplotlib")
    finding = wide()
    finding.settings["decode"] = decode
    path = tmp_path / f"speed{suffix}"
    plots.write([Section({"name": "tiny"}, {"speed": [finding]})], path, suffix[1:])
    assert path.read_bytes()[:4] in (b"\x89PNG", b"<?xm", b"%PDF")


def test_plot_without_matplotlib_is_refused_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(TurboquantError, match="pip install matplotlib"):
        plots.check()
