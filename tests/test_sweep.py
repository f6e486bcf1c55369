"""Sweeps: what is measured is kept, whatever happens to the processes that measure it; clusters give the same."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

import checkpoints
from turboquant_gguf import cli
from turboquant_gguf.errors import TurboquantError
from turboquant_gguf.llamacpp.placement import Placement
from turboquant_gguf.measure.store import Store
from turboquant_gguf.measure.sweep import Outcome, measure, sweep

LEAST = {
    "quality": {"context": 32, "chunks": 3},
    "retrieval": {"lengths": (200,)},
    "speed": {"depths": (0,), "repetitions": 1},
}


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "random.txt"
    path.write_bytes(bytes(np.random.default_rng(0).integers(97, 123, 40000, np.uint8)))
    return path


def swept(
    model: Path, text: Path, results: Path, *, measure=("quality",), chunks: int = 3, types=("turbo4",), **common
) -> Outcome:
    kinds = {name: LEAST[name] for name in measure}
    if "quality" in kinds:
        kinds["quality"] = kinds["quality"] | {"text": str(text), "chunks": chunks}
    common |= {"placement": Placement(threads=1), "results": results, "console": Console(quiet=True)}
    return sweep([model], kinds, types=types, **common)


def rows(path: Path) -> list[tuple]:
    with sqlite3.connect(path) as database:
        return database.execute("SELECT kind, type_k, type_v, part, value FROM measurement ORDER BY id").fetchall()


def command(model: Path, text: Path, results: Path, *options: str) -> list:
    return [
        sys.executable, "-m", "turboquant_gguf.cli", "sweep", model, "--text", text, "-o", results, "--types", "turbo4",
        "--context", "32", "--measure", "quality", "--threads", "1", *options,
    ]  # fmt: skip


def started(*arguments, rows_first: int) -> subprocess.Popen:
    """The command, once it has measured something; it leads a process group."""
    results = arguments[2]
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None:
        try:
            if len(rows(results)) >= rows_first:
                return process
        except sqlite3.OperationalError:  # not made yet
            pass
    raise AssertionError(process.communicate())


def children_of(process: subprocess.Popen) -> list[int]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [pid for pid in map(int, listed) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def goes_on(model: Path, text: Path, results: Path) -> None:
    """Requires that a sweep takes what the file has, and adds what a few more chunks lack."""
    kept = rows(results)
    chunks = max(part for _, _, _, part, _ in kept) + 3
    report = swept(model, text, results, chunks=chunks)
    assert (report.known, report.known + report.added) == (len(kept), 2 * chunks)
    assert rows(results)[: len(kept)] == kept


# ---- what is measured ----


def test_all_kinds(tiny, text, tmp_path):
    results = tmp_path / "results.sqlite"
    report = swept(tiny, text, results, measure=("quality", "retrieval", "speed"))
    assert (report.failures, report.known, report.added) == ([], 0, 10)
    counted = Counter((kind, k) for kind, k, _, _, _ in rows(results))
    assert counted == {
        (kind, k): n for kind, n in (("quality", 3), ("retrieval", 1), ("speed", 1)) for k in ("f16", "turbo4")
    }
    with Store(results) as store:
        speed = {row.types.k: json.loads(row.value) for row in store.all("speed")}
        needles = {row.types.k: json.loads(row.value) for row in store.all("retrieval")}
    assert all(found["decode_speed"] > 0 and found["depth"] == 0 for (found,) in speed.values())
    assert [needle["depth"] for needle in needles["turbo4"]] == [0, 25, 50, 75, 100]
    # the same as the command of that name
    how = {"types": ["turbo4"], "placement": Placement(threads=1), "results": results, "console": Console(quiet=True)}
    alone = measure("quality", tiny, text=str(text), context=32, chunks=3, **how)
    assert len(rows(results)) == 10 and alone.findings[0].parts == 3


def test_only_what_is_missing_is_measured(tiny, text, tmp_path):
    results = tmp_path / "results.sqlite"
    assert swept(tiny, text, results).added == 6
    before = rows(results)
    again = swept(tiny, text, results)
    assert (again.known, again.asked, again.added) == (6, 0, 0) and rows(results) == before
    more = swept(tiny, text, results, types=("turbo4", "q8_0"), chunks=4)
    assert (more.known, more.added) == (6, 6)
    assert rows(results)[:6] == before


def test_speed_is_measured_on_every_machine(tiny, text, tmp_path):
    results = tmp_path / "results.sqlite"
    both = {"measure": ("quality", "speed"), "chunks": 1}
    assert swept(tiny, text, results, **both).added == 4
    with sqlite3.connect(results) as database:  # as if another machine had measured all of it
        database.execute("UPDATE measurement SET machine = '{}'")
    assert swept(tiny, text, results, **both).added == 2
    assert [row[0] for row in rows(results)[4:]] == ["speed", "speed"]


def test_types_that_do_not_fit_one_of_the_models(tiny, text, tmp_path):
    narrow = checkpoints.gguf(tmp_path, "llama, head size 80")
    options = ["sweep", narrow, tiny, "--text", text, "-o", tmp_path / "results.sqlite", "--types", "turbo4"]
    options += ["--context", "32", "--chunks", "2", "--measure", "quality", "--json"]
    done = CliRunner().invoke(cli.cli, list(map(str, options)))
    assert done.exit_code == 1
    assert "llama, head size 80.gguf, turbo4: This model's heads hold 80 values" in done.stderr
    assert json.loads(done.stdout)["added"] == 2 + 4


@pytest.mark.parametrize(
    "change, because",
    [
        ({"types": ("turb4",)}, "did you mean turbo4"),
        ({"text": "no such file"}, "There is no text file"),
        ({"cluster": "tcp://127.0.0.1:1"}, "There is no Dask scheduler at tcp://127.0.0.1:1"),
    ],
)
def test_bad_input(tiny, text, tmp_path, change, because):
    if "cluster" in change:
        pytest.importorskip("distributed")
    with pytest.raises(TurboquantError, match=because):
        swept(tiny, change.pop("text", text), tmp_path / "results.sqlite", **change)


def test_a_text_that_is_too_short_is_an_error_before_anything(tiny, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(TurboquantError, match="less than one chunk"):
        swept(tiny, tmp_path / "short.txt", tmp_path / "results.sqlite")


# ---- what happens to processes ----


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes in /proc")
def test_a_killed_process_loses_what_it_was_measuring_only(tiny, text, tmp_path):
    results = tmp_path / "results.sqlite"
    process = started(tiny, text, results, "--chunks", "1000", rows_first=5)
    (child,) = children_of(process)
    os.kill(child, signal.SIGKILL)
    output, errors = process.communicate()
    assert process.returncode == 1
    assert "tiny.gguf, quality: The process that measured it was ended by SIGKILL" in " ".join(errors.split())
    kept = rows(results)
    assert 5 <= len(kept) < 2000
    goes_on(tiny, text, results)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_ends_its_processes(tiny, text, tmp_path, number):
    results = tmp_path / "results.sqlite"
    process = started(tiny, text, results, "--chunks", "1000", rows_first=5)
    (child,) = children_of(process)
    os.killpg(process.pid, number)  # as a terminal does
    output, errors = process.communicate()
    assert process.returncode == 128 + number
    assert not Path(f"/proc/{child}").exists()
    assert "Traceback" not in errors
    assert 5 <= len(rows(results)) < 2000
    if number == signal.SIGINT:
        assert "The same command goes on from there." in errors


def test_two_sweeps_into_one_file_measure_everything_once(tiny, text, tmp_path):
    results = tmp_path / "results.sqlite"
    options = ("--chunks", "40", "--json")
    both = [
        subprocess.Popen(command(tiny, text, results, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    done = [json.loads(process.communicate()[0]) for process in both]
    assert [report["failures"] for report in done] == [[], []]
    assert sum(report["added"] for report in done) == 80 == len(rows(results))
    assert [report["known"] + report["added"] for report in done] == [80, 80]


def test_a_killed_sweep_leaves_its_work_to_others(tiny, text, tmp_path):
    results = tmp_path / "results.sqlite"
    process = started(tiny, text, results, "--chunks", "1000", rows_first=5)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    goes_on(tiny, text, results)


# ---- clusters ----


@pytest.fixture
def cluster():
    """Two workers, a process each, and the address of their scheduler."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as made:
        yield made


def test_a_cluster_gives_the_same(tiny, text, tmp_path, cluster, monkeypatch):
    monkeypatch.setenv("TURBO_CACHE_WINDOW", "0")  # where the workers do not see it
    here, there = tmp_path / "here.sqlite", tmp_path / "there.sqlite"
    kinds = {"measure": ("quality", "retrieval", "speed"), "chunks": 12}
    assert not swept(tiny, text, here, **kinds).failures
    report = swept(tiny, text, there, **kinds, cluster=cluster.scheduler_address)
    assert (report.failures, report.added) == ([], 28)
    scores = [{row[:4]: row[4] for row in rows(path) if row[0] == "quality"} for path in (here, there)]
    assert scores[0] == scores[1]
    assert Counter(row[0] for row in rows(there)) == {"quality": 24, "retrieval": 2, "speed": 2}
    with cluster.get_client() as client:  # both had something to do
        assert all(client.run(lambda dask_worker: dask_worker.state.transition_counter).values())


def test_a_worker_that_dies_loses_nothing_but_its_cells(tiny, text, tmp_path, cluster):
    pids = {worker.process.pid for worker in cluster.workers.values()}
    results = tmp_path / "results.sqlite"
    process = started(tiny, text, results, "--chunks", "400", "--cluster", cluster.scheduler_address, rows_first=8)
    os.kill(min(pids), signal.SIGKILL)
    output, errors = process.communicate()
    if process.returncode == 0:  # the other worker did what it left
        assert len(rows(results)) == 800 and "Error" not in errors
    else:
        assert process.returncode == 1 and "The cluster could not measure it" in " ".join(errors.split())
    goes_on(tiny, text, results)
