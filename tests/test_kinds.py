"""The registry of kinds: a kind is one class, which the store, sweeps, reports and commands take up by themselves."""

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

import tiny_model
from turboquant_gguf.commands.measure import command
from turboquant_gguf.commands.report import report as report_command
from turboquant_gguf.core.tables import TYPE, Column, Table
from turboquant_gguf.kinds import KINDS, Finding, Kind
from turboquant_gguf.kinds.base import Failure, Row, Step, Work, option, register
from turboquant_gguf.llamacpp import provenance
from turboquant_gguf.measure.sweep import measure, sweep


@dataclass(frozen=True)
class Letters(Kind):
    """A kind that measures how long the names of types are, in `parts` of as many letters more."""

    name = "letters"
    title = "Letters"
    command = "letters"
    summary = "Count letters."
    help = "Count the letters of cache types with MODEL."
    examples = "  turboquant-gguf letters my.gguf --more 2"
    part = "count"
    columns = ("more",)
    options = (option("--more", type=int, default=1, sweep=True, help="Letters more."),)

    more: int

    @classmethod
    def plan(cls, work: Work, *, more: int = 1) -> Iterator["Letters"]:
        yield cls(work.model, work.facts, work.threads, {0: work.types, 1: work.types}, more)

    @property
    def settings(self) -> dict:
        return {"more": self.more, "build": provenance.build()}

    def measure(self, step: Step) -> Iterator[Row | Failure]:
        step("counting", 0)
        for number, types in self.parts.items():
            for pair in types:
                if str(pair) == "q4_1":
                    yield Failure(f"{self.label}, {pair}", "it is odd")
                else:
                    yield Row(pair, json.dumps([{"letters": len(str(pair)) + number * self.more}]).encode(), number)

    @classmethod
    def conditions(cls, finding: Finding) -> list[str]:
        return [f"{finding.settings['more']} more"]

    @classmethod
    def table(cls, finding: Finding) -> Table:
        rows = [[str(types), *(str(one["letters"]) for one in own)] for types, own in finding.values.items()]
        return Table("Letters of types", [TYPE, Column("first"), Column("second")], {"": rows})

    @classmethod
    def numbers(cls, finding: Finding) -> Iterator:
        for types, own in finding.values.items():
            for one in own:
                yield types, {"metric": "letters", "value": one["letters"], "more": finding.settings["more"]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("kinds") / "tiny.gguf")


@pytest.fixture
def letters() -> type[Kind]:
    register(Letters)
    yield Letters
    del KINDS["letters"]


def test_a_new_kind_goes_through_everything(tiny, letters, tmp_path):
    results = tmp_path / "r.sqlite"
    done = CliRunner(env={"COLUMNS": "80"}).invoke(
        command(letters), [str(tiny), "--types", "turbo4,q4_1", "-o", str(results), "--more", "3", "--json"]
    )
    assert done.exit_code == 1 and "tiny.gguf, letters, q4_1: it is odd" in done.stderr
    found = json.loads(done.stdout)
    assert (found["kind"], found["added"], len(found["failures"])) == ("letters", 4, 2)
    (finding,) = found["findings"]
    assert finding["counts"] == 2 and finding["settings"]["more"] == 3
    assert [(one["types"], one["letters"]) for one in finding["results"]] == [
        ("f16", 3), ("f16", 6), ("turbo4", 6), ("turbo4", 9),
    ]  # fmt: skip
    again = measure("letters", tiny, types=["turbo4"], results=results, more=3, console=Console(quiet=True))
    assert (again.known, again.asked) == (4, 0)
    both = sweep([tiny, tiny], {"letters": {"more": 4}}, types=["turbo2"], results=results, console=Console(quiet=True))
    assert both.added == 4 and not both.failures
    for suffix in ("html", "md", "csv", "json"):
        pytest.importorskip("jinja2")
        outputs = ["-o", str(tmp_path / f"r.{suffix}")]
        assert CliRunner().invoke(report_command, [str(results), *outputs], catch_exceptions=False).exit_code == 0
    assert "Letters of types" in (tmp_path / "r.html").read_text("utf-8")
    assert "| turbo4 | 6 | 9 |" in (tmp_path / "r.md").read_text("utf-8")
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = {(row["type_k"], row["more"], row["value"]) for row in csv.DictReader(file)}
    assert ("turbo2", "4", "10") in rows and ("turbo4", "3", "9") in rows
    assert json.loads((tmp_path / "r.json").read_text())["models"][0]["letters"][0]["counts"] == 2


def test_commands_share_options_and_the_shape_of_json(tiny, tmp_path):
    shared = {"--types", "--threads", "--results", "--cluster", "--plot", "--force", "--json", "--cache-window"}
    for kind in KINDS.values():
        assert shared <= {name for one in command(kind).params for name in one.opts}, kind.name
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    options = {
        "quality": ["--text", text, "--context", "256", "--chunks", "1"],
        "speed": ["--depths", "0", "--prefill", "16", "--decode", "2", "--repetitions", "1"],
        "retrieval": ["--lengths", "300", "--depths", "50"],
    }
    shapes = set()
    for name, more in options.items():
        arguments = [tiny, *more, "--types", "f16", "-o", tmp_path / "r.sqlite", "--threads", "1", "--json"]
        for added in (1, 0):  # measured, then known
            done = CliRunner().invoke(command(KINDS[name]), list(map(str, arguments)))
            assert done.exit_code == 0, done.output
            found = json.loads(done.stdout)
            assert found["added"] == added
            (finding,) = found["findings"]
            shapes.add((*found, *(key for key in finding if key != f"{KINDS[name].part}s")))
            assert {"types", "type_k", "type_v", "bits"} <= set(finding["results"][0])
    assert len(shapes) == 1


def test_windows_are_called_chunks_now(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    arguments = [tiny, "--text", text, "--context", "64", "--types", "f16", "-o", tmp_path / "r.sqlite", "--json"]
    done = CliRunner().invoke(command(KINDS["quality"]), [*map(str, arguments), "--windows", "3"])
    assert done.exit_code == 0 and "--windows is now called --chunks" in done.stderr
    assert json.loads(done.stdout)["findings"][0]["chunks"] == 3


def test_a_report_loads_nothing_that_runs_a_model():
    code = "import sys, turboquant_gguf.commands.report; print('\\n'.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "turboquant_gguf.report.page" in loaded and "turboquant_gguf.kinds.tasks" in loaded
    runners = ("kinds.runners", "llamacpp.logits", "llamacpp.server", "llamacpp.perplexity", "llamacpp.modelmemory",
               "measure.sweep", "measure.workers", "measure.demo", "core.child", "weights.verify")  # fmt: skip
    forbidden = ["torch", "llama_cpp", "lm_eval", "transformers", *(f"turboquant_gguf.{name}" for name in runners)]
    assert not [name for name in loaded if name.startswith(tuple(forbidden))]
