"""`turboquant-gguf bench`: real runs of llama-bench with a small random model, and made-up samples for the rest."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import tiny_model
from sequences import window_slots
from turboquant_gguf.errors import TurboquantError
from turboquant_gguf.kinds import bench
from turboquant_gguf.llamacpp import cachefacts, native
from turboquant_gguf.llamacpp.cachetypes import CacheTypes
from turboquant_gguf.report import benchplot

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


def measure(model: Path, **options) -> bench.Report:
    # one thread, which does not wait for others on a busy machine
    least = {"types": ["turbo4"], "depths": [0], "prefill": 16, "decode": 4, "threads": 1, "repetitions": 1}
    return bench.bench(model=model, console=Console(quiet=True), **least | options)


def wrapper(folder: Path, *, before: str) -> Path:
    """A llama-bench in `folder` that does a line of shell before it becomes the real one."""
    tool = native.tool_path("llama-bench")
    path = folder / tool.name
    path.write_text(f'#!/bin/sh\n{before}\nexec {tool} "$@"\n')
    path.chmod(0o755)
    return path


def report_of(samples: list[bench.Sample]) -> bench.Report:
    """The report of made-up samples, as bench() would make it."""
    names, depths = list(dict.fromkeys(s.name for s in samples)), sorted({s.depth for s in samples})
    settings = {"model": "tiny.gguf", "types": names, "depths": depths, "prefill": 512, "decode": 32}
    report = bench.Report("f16", settings, machine={"cpu": "a processor", "threads": 2}, samples=samples)
    report.results = [bench._result(report, name, depth) for depth in depths for name in names]
    return report


def printed(report: bench.Report) -> str:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(bench.table(report))
    return captured.get()


# --- measuring ---


def test_everything_is_measured_in_every_round(tiny):
    report = measure(tiny, types=["turbo4", "turbo4:turbo2", "f16", "turbo4"], depths=[64, 0], repetitions=2)
    names = ["f16", "turbo4", "turbo4:turbo2"]
    assert report.settings["types"] == names
    assert [(s.round, s.depth, s.name) for s in report.samples] == [
        (number, depth, name)
        for number in (1, 2)
        for depth in (0, 64)
        for name in (names[::-1] if number == 2 else names)
    ]
    assert [(r.depth, r.name) for r in report.results] == [(depth, name) for depth in (0, 64) for name in names]
    assert all(s.prefill_speed > 0 and s.decode_speed > 0 for s in report.samples)
    assert not report.failures and not report.interrupted
    assert report.machine["threads"] == 1


def test_cache_that_a_token_reads(tiny):
    f16, turbo = measure(tiny, depths=[1024], prefill=0).samples
    assert f16.cache_read == pytest.approx(F16_BYTES_PER_TOKEN * (1024 + 2), rel=0.02)  # the log has two decimals
    window = F16_BYTES_PER_TOKEN * window_slots()  # the tokens that are kept in f16 as well
    assert turbo.cache_read == pytest.approx(f16.cache_read * 4.25 / 16 + window, rel=0.05)


def test_window_of_attention_is_full_at_its_length():
    facts = cachefacts.CacheFacts(CacheTypes("f16", "f16"), ((8192, 8000.0), (1024, 500.0)))
    assert facts.size_of(512) == 500 + 250
    assert facts.size_of(4096) == 4000 + 500


@pytest.mark.parametrize("left_out", ["prefill", "decode"])
def test_one_kind_may_be_left_out(tiny, left_out):
    report = measure(tiny, **{left_out: 0})
    kept = {"prefill": "decode", "decode": "prefill"}[left_out]
    for result in report.results:
        assert getattr(result, f"{left_out}_speed") is getattr(result, f"{left_out}_ratio") is None
        assert getattr(result, f"{kept}_ratio").median > 0
    shown = printed(report)
    assert kept in shown and left_out not in shown


def test_baseline_is_only_asked_for_f16(tiny, tmp_path):
    asked = tmp_path / "asked.txt"
    wrapper(tmp_path, before=f'echo "$@" >> {asked}')
    report = measure(tiny, types=["f16", "turbo4"], baseline=tmp_path)
    assert [result.name for result in report.results] == ["f16 baseline", "f16", "turbo4"]
    assert report.results[0].decode_ratio.median == 1
    (line,) = asked.read_text().splitlines()
    assert "-ctk f16 -ctv f16" in line


def test_a_type_that_fails_does_not_stop_the_others(tmp_path):
    model = tiny_model.write(tmp_path / "odd.gguf", head_size=80)
    done = run(model, *SMALL, "--types", "turbo4,bf16", "--depths", "0,64", "--repetitions", "2", "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    (failure,) = report["failures"]  # tried once: neither in the next round, nor deeper
    assert (failure["name"], failure["depth"]) == ("turbo4", 0)
    assert "heads hold 80 values" in failure["message"]
    assert {sample["name"] for sample in report["samples"]} == {"f16", "bf16"}
    assert len(report["samples"]) == 8
    assert "Error: turbo4 at depth 0: llama-bench stopped with exit code 1." in " ".join(done.stderr.split())


def test_without_f16_there_is_no_benchmark(tiny, tmp_path):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(tiny.read_bytes()[:100_000])
    with pytest.raises(TurboquantError, match="The model file is damaged or incomplete"):
        measure(damaged)


def test_another_cache_than_asked_for_is_an_error(tiny, tmp_path):
    liar = wrapper(tmp_path, before='set -- "$@" -ctk q8_0 -ctv q8_0')
    subject = bench.Subject("f16", CacheTypes("f16", "f16"), liar)
    with pytest.raises(TurboquantError, match="asked to be f16 and is"):
        bench._run(subject, ("-m", tiny, "-p", "16", "-n", "0"))


def test_ctrl_c_keeps_what_was_measured(tiny, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    wrapper(tmp_path, before=f"if [ -e {once} ]; then touch {twice}; exec sleep 60; fi; touch {once}")
    process = subprocess.Popen(
        [*COMMAND, tiny, *SMALL, "--types", "turbo4", "--depths", "0", "--baseline", tmp_path, "--json"],
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
    report = json.loads(output)
    assert report["interrupted"]
    assert [(sample["round"], sample["name"]) for sample in report["samples"]] == [
        (1, "f16 baseline"), (1, "turbo4"), (2, "turbo4"),
    ]  # fmt: skip


# --- arithmetic and print ---

BASE = bench.Sample("f16", 4096, 1, 200.0, 40.0, 1e8, "build")


def test_ratios_are_formed_within_a_round():
    drift = (1.0, 0.5, 0.1)  # the machine slows down; the type is twice as fast all the time
    report = report_of(
        [
            sample
            for i, factor in enumerate(drift)
            for sample in (
                replace(BASE, round=i, prefill_speed=200 * factor, decode_speed=40 * factor),
                replace(BASE, round=i, name="turbo4", prefill_speed=300 * factor, decode_speed=80 * factor),
            )
        ]
    )
    _, turbo = report.results
    assert turbo.decode_ratio == bench.Spread(2.0, 2.0, 2.0)
    assert turbo.prefill_ratio.median == pytest.approx(1.5)
    assert turbo.decode_speed == bench.Spread(40.0, 8.0, 80.0)
    assert turbo.cache_traffic.high == 80 * 1e8


def test_a_round_without_f16_gives_speeds_but_no_ratio():
    report = report_of([BASE, replace(BASE, round=2, name="turbo4")])
    assert report.results[1].decode_ratio is None
    assert report.results[1].decode_speed.median == 40
    assert printed(report).splitlines()[-1].split() == ["turbo4", "40.0", "-", "-", "4.00", "200.0", "-", "-"]


def wide_report() -> bench.Report:
    rng = random.Random(0)
    return report_of(
        [
            bench.Sample(name, depth, number, 12345 * rng.uniform(0.5, 2), 1234 * rng.uniform(0.5, 2), 9e7, "build")
            for number in (1, 2, 3)
            for depth in (0, 4096, 131072)
            for name in ("f16", *bench.DEFAULT_TYPES[1:])
        ]
    )


def test_table_fits_80_columns():
    report = wide_report()
    lines = printed(report).splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines), "a cell was cut"
    assert len(lines) == 2 + 3 + len(report.results), "a row was wrapped"


@pytest.mark.parametrize("suffix", benchplot.FORMATS)
@pytest.mark.parametrize("decode", [0, 32])
def test_plot(tmp_path, suffix, decode):
    pytest.importorskip("matplotlib")
    report = wide_report()
    report.settings["decode"] = decode
    path = tmp_path / f"speed{suffix}"
    benchplot.write(report, path)
    assert path.read_bytes()[:4] in (b"\x89PNG", b"<?xm", b"%PDF")


def test_plot_without_matplotlib_is_refused_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(TurboquantError, match="pip install matplotlib"):
        benchplot.check()
