"""The registry of kinds: a kind is one class, which the store, sweeps, reports and commands take up by themselves."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

import tiny_model
from turboquant_gguf.cli import cli
from turboquant_gguf.commands import sweep as sweep_module
from turboquant_gguf.commands.measure import command
from turboquant_gguf.commands.report import report as report_command
from turboquant_gguf.core.tables import TYPE, Column, Table
from turboquant_gguf.kinds import KINDS, Finding, Kind
from turboquant_gguf.kinds.base import Failure, Row, Step, Work, option, register
from turboquant_gguf.llamacpp import provenance
from turboquant_gguf.measure import workers
from turboquant_gguf.measure.sweep import Outcome, measure, sweep


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
        yield cls(work.model, work.facts, work.placement, {0: work.types, 1: work.types}, more)

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


def kind_like_letters(**changes) -> type[Kind]:
    """Letters of another name, with other members; None takes one away, as far as Kind does not have it."""
    own = {name: member for name, member in vars(Letters).items() if not name.startswith("__")}
    members = own | {"name": "other", "command": "other", "__annotations__": {"more": int}} | changes
    made = type(Kind)("Other", (Kind,), {name: member for name, member in members.items() if member is not None})
    return made if changes.get("__module__") else dataclass(frozen=True)(made)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"__module__": "a.file"}, "a.file: the kind Other is no dataclass: @register stands above"),
        ({"table": None, "numbers": None}, "does not define numbers, table"),
        ({"title": None, "examples": None}, "does not say title, examples"),
        ({"name": "speed"}, "has the name of turboquant_gguf.kinds.speed, 'speed'"),
        ({"command": "bench"}, "has the command of turboquant_gguf.kinds.speed, 'bench'"),
        (
            {"options": (option("--most-letters"),)},
            "has the option --most-letters, and no argument most_letters of plan",
        ),
        (
            {"plan": classmethod(lambda cls, work, *, more: iter(())), "options": (option("--more"),)},
            "must have a default for more in plan, as `sweep` does not have --more",
        ),
    ],
)
def test_what_is_no_complete_kind_is_refused_by_name(changes, problem):
    before = dict(KINDS)
    with pytest.raises(TypeError, match=re.escape(problem)):
        register(kind_like_letters(**changes))
    assert before == KINDS
    assert issubclass(register(kind_like_letters()), Kind)
    del KINDS["other"]


def test_options_of_the_same_name_are_refused(letters, monkeypatch):
    monkeypatch.setattr(Letters, "options", (option("--types", help="T."),))
    with pytest.raises(TypeError, match="letters: two options are called --types"):
        command(letters)
    monkeypatch.setattr(Letters, "options", (option("--repetitions", sweep=True, help="R."),))
    with pytest.raises(TypeError, match="sweep: two options are called --repetitions"):
        sweep_module.command()


@pytest.mark.parametrize(
    "required, asked, measured", [(False, [], False), (True, [], False), (True, ["--more", "2"], True)]
)
def test_a_kind_out_of_sweep_is_measured_only_if_asked_for(letters, monkeypatch, required, asked, measured):
    monkeypatch.setattr(Letters, "in_sweep", False)
    monkeypatch.setattr(Letters, "options", (option("--more", type=int, sweep=True, required=required, help="M."),))
    seen = {}

    def record(models, kinds, **more):
        seen.update(kinds)
        return Outcome(Path("r.sqlite"))

    monkeypatch.setattr(sweep_module.library, "sweep", record)
    done = CliRunner().invoke(sweep_module.command(), ["any.gguf", "--measure", "speed", *asked])
    assert done.exit_code == 0, done.output
    assert ("letters" in seen) == measured and "speed" in seen


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"more": 1}, 'test_kinds: settings of Letters have no "build", which is provenance.build()'),
        ({"more": Path("x"), "build": {}}, "test_kinds: settings of Letters are no plain values: .*Path"),
    ],
)
def test_settings_that_no_file_can_keep_are_refused(tiny, letters, tmp_path, monkeypatch, settings, problem):
    monkeypatch.setattr(Letters, "settings", property(lambda self: settings))
    with pytest.raises(TypeError, match=problem):
        measure("letters", tiny, types=["turbo4"], results=tmp_path / "r.sqlite", console=Console(quiet=True))


def test_a_fault_of_a_kind_is_shown_with_its_line(tiny):
    piece = Letters(tiny, provenance.model(tiny), None, {0: ("no types",), 1: None}, 1)
    *_, last = workers._measured(piece, lambda *_: None)
    assert isinstance(last, Failure) and "(TypeError: 'NoneType' object is not iterable)" in last.message
    assert "in measure\n    for pair in types" in last.details


def test_help_and_pages_name_every_kind(tiny, letters, tmp_path, monkeypatch):
    monkeypatch.setattr(Letters, "reading", (("Letters", "are what <names> are made of."),))
    results, page = tmp_path / "r.sqlite", tmp_path / "r.html"
    measure("letters", tiny, types=["turbo4"], results=results, console=Console(quiet=True))
    done = CliRunner().invoke(report_command, [str(results), "-o", str(page)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "<strong>Letters</strong> are what &lt;names&gt; are made of." in page.read_text("utf-8")
    assert "<strong>Speed</strong>" not in page.read_text("utf-8")
    text = " ".join(CliRunner().invoke(cli, ["sweep", "--help"]).output.split())
    assert "Measure quality (as ppl does), retrieval (as niah does) and speed (as bench does) of cache types" in text


def test_commands_share_options_and_the_shape_of_json(tiny, tmp_path):
    shared = {"--types", "--threads", "--gpu-layers", "--no-kv-offload", "--results", "--cluster", "--plot", "--force"}
    shared |= {"--json", "--cache-window"}
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
