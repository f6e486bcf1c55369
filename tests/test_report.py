"""`turboquant-gguf report`: invented measurements whose numbers are known, and real ones of SmolLM2."""

import csv
import json
import re
import sys
import xml.etree.ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from turboquant_gguf.commands.report import report as command
from turboquant_gguf.errors import TurboquantError
from turboquant_gguf.kinds import Finding, quality, retrieval
from turboquant_gguf.llamacpp import provenance
from turboquant_gguf.llamacpp.cachetypes import CacheTypes
from turboquant_gguf.measure.store import Store
from turboquant_gguf.measure.sweep import measure
from turboquant_gguf.report import contents, page, plots, tables

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

MODEL = {
    "name": "Test-1B.Q8_0",
    "architecture": "llama",
    "trained_length": 4096,
    "parameters": 1_234_000_000,
    "bytes": 2**30,
    "calibrated": False,
    "fingerprint": "0123456789abcdef",
}
OTHER = MODEL | {"name": "Other-2B", "calibrated": True, "fingerprint": "fedcba9876543210"}
OLD = {"turboquant_gguf": "0.0.9", "llama_cpp": "aaaaaaaaaaaa"}
NEW = {"turboquant_gguf": "0.1.0", "llama_cpp": "bbbbbbbbbbbb"}
MACHINE = {"devices": ["A Processor"], "logical_cpus": 4, "system": "Linux-1"}
SAME_NAME = MACHINE | {"system": "Linux-2"}
BLOCK = np.repeat([-1, 1], quality.NEIGHBOURS)
"""The standard error of its mean is 1: two means of neighbours, -1 and 1."""


@pytest.fixture
def results(tmp_path) -> Path:
    return tmp_path / "results.sqlite"


@pytest.fixture
def full(results) -> Path:
    """One model, and something of every kind."""
    with Store(results) as store:
        add_quality(store, {"f16": 0, "q4_0": 0.06, "turbo4": 0.04, "turbo4:turbo2": 0.06, "turbo2": 0.5})
        add_speed(store, {"f16": 1, "turbo4": 2, "q4_0": 1.5})
        for length in (512, 1024):
            add_retrieval(store, length, {"f16": 6, "turbo4": 5, "turbo2": 0})
        add_task(store, "arc_easy", {"f16": None, "turbo4": (-0.01, True), "turbo2": (-0.2, False)})
        add_task(store, "wiki", {"f16": None, "turbo2": (0.5, False)}, metric="word_perplexity", higher_is_better=False)
    return results


def add(store: Store, kind: str, types: str, settings: dict, value: bytes | list, **where) -> None:
    where = {"model": MODEL, "machine": MACHINE, "build": NEW, "part": 0} | where
    value = value if isinstance(value, bytes) else json.dumps(value).encode()
    settings = {**settings, "build": where["build"]}
    parsed = CacheTypes.parse(types)
    store.add(kind, where["model"], parsed, settings, value, part=where["part"], machine=where["machine"])


def add_quality(store: Store, klds: dict[str, float], *, base: str = "f16", context: int = 256, **where) -> None:
    """Divergence: the given mean, a fifth of it the standard error; log perplexity 1, and that much more."""
    settings = {
        "text": "a_text.txt", "text_sha256": "0", "base": base, "context": context, "decode": False, "gpu_layers": 0
    }  # fmt: skip
    for types, kld in klds.items():
        scores = np.zeros(len(BLOCK), quality.SCORES)
        scores["kld"] = kld * (1 + BLOCK / 5)
        scores["nll"] = 1 + scores["kld"]
        scores["same"][kld > 0 :] = True  # of 128 tokens, the first is another
        add(store, "quality", types, settings, scores.tobytes(), **where)


def add_speed(store: Store, times: dict[str, float], *, kinds: Sequence[str] = ("decode", "prefill"), **where) -> None:
    settings = {"depths": [0, 4096], "repetitions": 3, "threads": 2}
    settings |= {"decode": 32 * ("decode" in kinds), "prefill": 512 * ("prefill" in kinds)}
    for types, ratio in times.items():
        cells = []
        for depth, factor in ((0, 1), (4096, ratio)):
            ratios = {"median": factor, "low": factor * 0.9, "high": factor * 1.1}
            values = dict.fromkeys((f"{kind}_ratio" for kind in kinds), ratios)
            values |= {f"{kind}_speed": {"median": 100 * factor, "low": 90, "high": 400} for kind in kinds}
            empty = dict.fromkeys(("prefill_speed", "prefill_ratio", "decode_speed", "decode_ratio", "cache_traffic"))
            cells.append({"name": types, "depth": depth, **empty, **values})
        add(store, "speed", types, settings, cells, **where)


def add_retrieval(store: Store, length: int, found: dict[str, int], **where) -> None:
    """Six needles, of which each type finds the first few."""
    for types, number in found.items():
        pair = CacheTypes.parse(types)
        prompts = [(depth, trial) for depth in (0, 50, 100) for trial in (1, 2)]
        cells = [
            retrieval.Answer(types, pair.k, pair.v, length, depth, trial, length - 3, "needle", "1", "1", i < number)
            for i, (depth, trial) in enumerate(prompts)
        ]
        settings = {"length": length, "depths": [0, 50, 100], "trials": 2}
        add(store, "retrieval", types, settings, list(map(asdict, cells)), **where)


def add_task(
    store: Store, task: str, found: dict, *, metric: str = "acc", higher_is_better: bool = True, **where
) -> None:  # fmt: skip
    for types, difference in found.items():
        change, within = difference or (0, True)
        cell = {
            "type": types, "task": task, "metric": metric, "filter": "none", "higher_is_better": higher_is_better,
            "documents": 200, "value": 0.6 + change, "stderr": 0.02,
            "difference": difference and {"value": change, "stderr": 0.01, "within_noise": within},
        }  # fmt: skip
        add(store, "task", types, {"task": task, "limit": 200}, [cell], **where)


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", " =1", "-"])
def test_names_are_no_formulas_in_csv(results, name):
    with Store(results) as store:
        add_quality(store, {"f16": 0, "q4_0": 0.05}, model=MODEL | {"name": name})
        add_speed(store, {"f16": 1, "turbo4": 2}, model=MODEL | {"name": name})
        add_task(store, "arc", {"f16": None, "turbo4": (-0.01, True)}, model=MODEL | {"name": name})
    with write(results, "r.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {f"'{name}"}
    assert not any(cell.lstrip(" ").startswith(tuple("=+@\t\r")) for row in rows for cell in row.values())
    negative = [row["value"] for row in rows if row["value"].startswith("-")]
    assert negative == ["-0.01"]  # a number is one


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numbers that are absurd
@pytest.mark.parametrize("seed", range(8))
def test_damaged_files_are_sentences(full, seed):
    """Bytes of a file of measurements are overwritten: it is shown as far as it makes sense, or refused by name."""
    rng = np.random.default_rng(seed)
    whole = full.read_bytes()
    refused = 0
    for _ in range(40):
        content = bytearray(whole)
        for at in rng.integers(100, len(content), 4 ** rng.integers(1, 5)):
            content[at] = rng.integers(256)
        full.write_bytes(content)
        for options in (["--json"], [], ["--force", "-o", full.with_name("r.csv"), "-o", full.with_name("r.md")]):
            done = CliRunner().invoke(command, [str(full), *map(str, options)])
            if isinstance(done.exception, TurboquantError):
                refused += str(full) in str(done.exception)
            elif done.exception:
                raise done.exception
    assert 5 < refused < 120


def write(results: Path, name: str, **options) -> Path:
    path = results.with_name(name)
    page.report(results, outputs=[path], console=Console(quiet=True), **options)
    return path


def sections(results: Path) -> list[contents.Section]:
    return page.report(results, console=Console(quiet=True))


def shown(results: Path, *arguments: str) -> str:
    """On a terminal of 80 columns."""
    done = CliRunner(env={"COLUMNS": "80"}).invoke(command, [str(results), *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


class Page(HTMLParser):
    """What is in a page: its tags with their attributes, and the rows of its tables by caption."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: list[tuple[str, list[list[str]]]] = []
        self.text = ""
        self._cell = ""
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append(("", []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("th", "td", "caption"):
            self._cell = ""

    def handle_data(self, data):
        self.text += data
        self._cell += data

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self.tables[-1][1][-1].append(self._cell)
        elif tag == "caption":
            self.tables[-1] = (self._cell, self.tables[-1][1])

    def table(self, caption: str) -> list[list[str]]:
        (rows,) = (rows for name, rows in self.tables if name.startswith(caption))
        return rows

    def attributes(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


# ---- contents of each form ----

TURBO4 = [
    "turbo4",
    "4.25",
    "2.8292 ± 0.0020",
    "1.0408 ± 0.0083",
    "0.0400 ± 0.0080",
    "0.0400",
    "0.0480",
    "0.0480",
    "99.2",
]
"""exp(1.04); exp(0.04), and 0.008 of it; the standard error of the perplexity is its 0.008 / sqrt(127)."""


def test_page(full):
    page = Page(write(full, "report.html"))
    table = page.table("Quality against f16, over 128 predicted tokens")
    assert table[0] == [
        "cache type", "bits", "perplexity", "times f16", "KL mean", "KL median", "KL 99 %", "KL max", "same top, %",
    ]  # fmt: skip
    assert [row[0] for row in table[1:]] == ["f16", "q4_0", "turbo4", "turbo4:turbo2", "turbo2"]
    assert table[1] == ["f16", "16", "2.718", "1", "0", "0", "0", "0", "100.0"]
    assert table[3] == TURBO4
    assert page.table("Speed by depth")[5:7] == [
        ["depth 4096"],
        ["f16", "100.0", "1.00", "0.90..1.10", "–", "100.0", "1.00", "0.90..1.10"],
    ]
    assert page.table("Speed by depth")[-1][:4] == ["turbo4", "200.0", "2.00", "1.80..2.20"]
    assert page.table("Needles found")[1:] == [
        ["f16", "16", "12/12", "100 %", "0", "0", "1", "reference"],
        ["turbo4", "4.25", "10/12", "83 %", "2", "0", "0.5", "within noise"],
        ["turbo2", "2.25", "0/12", "0 %", "12", "0", "0.00049", "worse"],
    ]
    assert page.table("turbo4") == [
        ["depth", "512", "1024"], ["0 %", "100 %", "100 %"], ["50 %", "100 %", "100 %"], ["100 %", "50 %", "50 %"],
    ]  # fmt: skip
    tasks = page.table("Results of the tasks")
    assert ["arc_easy: acc (higher is better), 200 documents"] in tasks
    assert ["turbo4", "4.25", "0.590 ± 0.020", "-0.010 ± 0.010", "within noise"] in tasks
    assert ["turbo2", "2.25", "0.400 ± 0.020", "-0.200 ± 0.010", "worse"] in tasks
    assert ["turbo2", "2.25", "1.100 ± 0.020", "+0.500 ± 0.010", "worse"] in tasks  # more perplexity is worse
    assert page.table("Machines")[1:] == [["A Processor (4 CPUs)", "–", "Linux-1"]]  # an older measurement
    assert page.table("Builds")[1:] == [["0.1.0", "bbbbbbbbbbbb", "–"]]
    for fact in ("Test-1B.Q8_0", "llama", "1.234 B", "1 GiB", "4096 tokens", "not calibrated", "0123456789abcdef"):
        assert fact in page.text
    for text in ("a_text.txt, 1 chunk of 256 tokens, in batches", "prompts of 512, 1024 tokens"):
        assert text in page.text
    assert "KL divergence within noise of each other: turbo4:turbo2 and q4_0." in page.text


def test_markdown(full):
    lines = write(full, "report.md").read_text("utf-8").splitlines()
    assert lines[0] == "## Test-1B.Q8_0"
    assert (
        "| cache type | bits | perplexity | times f16 | KL mean | KL median | KL 99 % | KL max | same top, % |" in lines
    )
    assert "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |" in lines
    assert f"| {' | '.join(TURBO4)} |" in lines
    assert "| turbo4 | 200.0 | 2.00 | 1.80..2.20 | – | 200.0 | 2.00 | 1.80..2.20 |" in lines
    assert "| turbo2 | 2.25 | 0/12 | 0 % | 12 | 0 | 0.00049 | worse |" in lines
    assert lines[lines.index("| **turbo4** |  |  |") + 3] == "| 100 % | 50 % | 50 % |"
    assert "| **arc_easy: acc (higher is better), 200 documents** |  |  |  |  |" in lines
    for number, line in enumerate(lines):
        if line.startswith("| ---"):
            columns = line.count("|")
            assert all(row.count("|") == columns for row in _rows(lines, number)), line


def _rows(lines: list[str], number: int) -> Iterator[str]:
    yield lines[number - 1]
    while number < len(lines) and lines[number]:
        yield lines[number]
        number += 1


def test_csv(full):
    with write(full, "report.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["model"] == "Test-1B.Q8_0" and row["calibrated"] == "False" for row in rows)

    def numbers(**wanted: str) -> list[tuple[str, ...]]:
        found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
        return [tuple(row[name] for name in ("value", "stderr", "low", "high")) for row in found]

    def number(**wanted: str) -> tuple[str, ...]:
        (found,) = numbers(**wanted)
        return found

    mixed = {"kind": "quality", "type_k": "turbo4", "type_v": "turbo2", "bits": "3.25"}
    kld = number(**mixed, metric="kld_mean")
    assert (float(kld[0]), float(kld[1])) == (pytest.approx(0.06), pytest.approx(0.012))
    assert float(number(**mixed, metric="top1")[0]) == 127 / 128
    assert number(**mixed, metric="tokens") == ("128", "", "", "")
    speed = {"kind": "speed", "type_k": "turbo4", "depth": "4096"}
    assert number(**speed, metric="decode_ratio") == ("2", "", "1.8", "2.2")
    assert number(**speed, metric="prefill_speed") == ("200", "", "90", "400")
    assert numbers(**speed, metric="cache_traffic") == []  # not measured
    found = {"kind": "retrieval", "type_k": "turbo4"}
    assert number(**found, length="1024", depth="100", metric="share") == ("0.5", "", "", "")
    assert number(**found, metric="lost") == ("2", "", "", "")
    task = {"kind": "task", "task": "arc_easy", "type_k": "turbo2"}
    assert number(**task, metric="acc") == (str(0.6 - 0.2), "0.02", "", "")
    assert number(**task, metric="acc, difference from f16") == ("-0.2", "0.01", "", "")


def test_json(full):
    written = json.loads(write(full, "report.json").read_text("utf-8"))
    assert written == json.loads(shown(full, "--json"))
    (model,) = written["models"]
    assert model["model"] == MODEL
    (measured,) = model["quality"]
    assert measured["chunks"] == 1 and measured["machines"] == [MACHINE]
    turbo4 = next(result for result in measured["results"] if result["types"] == "turbo4")
    assert turbo4["bits"] == 4.25 and turbo4["kld_mean"] == pytest.approx(0.04)
    speeds = [one for one in model["speed"][0]["results"] if one["types"] == "turbo4"]
    assert speeds[1]["decode_ratio"] == {"median": 2, "low": 1.8, "high": 2.2}
    assert model["retrieval"][0]["settings"]["length"] == [512, 1024]
    (needles,) = [one for one in model["retrieval"][0]["results"] if one["types"] == "turbo4"]
    assert sum(answer["found"] for answer in needles["answers"]) == 10 and needles["score"]["lost"] == 2
    (task,) = [one for one in model["task"][0]["results"] if one["types"] == "turbo4"]
    assert task["difference"]["within_noise"] is True


def test_terminal(full):
    printed = shown(full)
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in printed
    row = next(line for line in lines if line.startswith("turbo4  ") and "2.8292" in line)
    assert row.split() == ["turbo4", "4.25", "2.8292±0.0020", "1.0408±0.0083", "0.0400±0.0080", "0.0480", "99.2"]
    assert lines[lines.index("depth 4096") + 3].split() == "turbo4 200.0 2.00 1.80..2.20 200.0 2.00 1.80..2.20".split()


@pytest.mark.parametrize("panels", [1, 3])
def test_image(results, panels):
    from PIL import Image

    with Store(results) as store:
        add_quality(store, {"f16": 0, "turbo4": 0.04})
        add_quality(store, {"f16": 0, "turbo3": 0.1}, model=OTHER)
        if panels == 3:
            add_speed(store, {"f16": 1, "turbo4": 2})
    with Image.open(write(results, "report.png")) as image:
        width, height = image.size
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 24)}
    assert width == pytest.approx(150 * plots.WIDTH * panels, abs=2)
    assert height == pytest.approx(150 * 2 * (plots.HEIGHT + 0.4), abs=2)
    assert (255, 255, 255) in colors and tuple(bytes.fromhex(plots.PRINT.turbo[1:])) in colors
    assert xml.etree.ElementTree.parse(write(results, "report.svg")).getroot().tag.endswith("svg")


# ---- what is in a report ----


def test_latest_build_counts(results):
    with Store(results) as store:
        add_quality(store, {"f16": 0, "turbo4": 0.4, "turbo3": 0.1}, build=NEW)
        add_speed(store, {"f16": 1, "turbo4": 2}, build=OLD)
        add_speed(store, {"f16": 1, "turbo4": 3}, build=NEW)
        add_quality(store, {"f16": 0, "turbo4": 0.04}, build=OLD)  # the last that was measured
        add_retrieval(store, 512, {"f16": 6, "turbo2": 1}, build=OLD)
        add_retrieval(store, 512, {"f16": 6, "turbo2": 2}, build=NEW)
    page = Page(write(results, "report.html"))
    assert [row[0] for row in page.table("Quality against f16")[1:]] == ["f16", "turbo4"]
    assert page.table("Quality against f16")[2] == TURBO4
    assert page.table("Speed by depth")[-1][2] == "3.00"
    assert page.table("Needles found")[2][2] == "2/6"
    assert "Quality: only an earlier build measured turbo3, so it is not shown." in page.text
    (section,) = sections(results)
    builds = {kind: [one.settings["build"] for one in found] for kind, found in section.findings.items()}
    assert builds == {"quality": [OLD], "speed": [NEW], "retrieval": [NEW], "task": []}
    sources = [part.source for part in tables.parts(section, [MACHINE])]
    assert "turboquant-gguf 0.0.9 (llama.cpp aaaaaaaaaaaa)" in sources[0]
    assert "turboquant-gguf 0.1.0 (llama.cpp bbbbbbbbbbbb)" in sources[1]


def test_switches_of_the_environment_are_settings(results):
    """A measurement with LLAMA_ATTN_ROT_DISABLE does not replace the one without."""
    with Store(results) as store:
        add_quality(store, {"f16": 0, "turbo4": 0.04}, build=OLD)
        add_quality(store, {"f16": 0, "turbo4": 0.4}, build=NEW | {"LLAMA_ATTN_ROT_DISABLE": "1"})
    (section,) = sections(results)
    plain, switched = tables.parts(section, [MACHINE])
    assert "LLAMA" not in plain.conditions and switched.conditions.endswith(", LLAMA_ATTN_ROT_DISABLE=1")
    assert plain.table.rows[""][1] == TURBO4


def test_models_and_machines(results):
    renamed = {name: value for name, value in MODEL.items() if name != "trained_length"} | {"name": "Renamed-1B"}
    with Store(results) as store:
        add_quality(store, {"f16": 0, "turbo4": 0.04})
        add_quality(store, {"f16": 0, "turbo2": 0.5}, model=OTHER, machine=SAME_NAME)
        add_speed(store, {"f16": 1, "turbo4": 2})
        add_speed(store, {"f16": 1, "turbo4": 3}, machine=SAME_NAME)
        add_quality(store, {"f16": 0, "turbo3": 0.1}, model=renamed, context=512)
    page = Page(write(results, "report.html"))
    names = [section.model["name"] for section in sections(results)]
    assert len(names) == 2 and "Other-2B" in names  # the renamed file is the same model
    anchors = {attributes["href"] for attributes in page.attributes("a")}
    assert anchors == {"#model-1", "#model-2"} <= {f"#{a['id']}" for a in page.attributes("section") if "id" in a}
    speeds = [rows for caption, rows in page.tables if caption.startswith("Speed")]
    assert sorted(rows[-1][2] for rows in speeds) == ["2.00", "3.00"]
    assert [row[0] for row in page.table("Machines")[1:]] == [
        "A Processor (4 CPUs), no. 1",
        "A Processor (4 CPUs), no. 2",
    ]
    assert "A Processor (4 CPUs), no. 2; turboquant-gguf 0.1.0" in page.text
    chosen = write(results, "other.md", models=["OTHER"]).read_text("utf-8")
    assert "## Other-2B" in chosen and "-1B" not in chosen


def test_same_settings_on_other_chunks(results):
    """Interrupted in the second chunk, after f16 and q4_0: these two have more, and all are shown over the first."""
    with Store(results) as store:
        add_quality(store, {"f16": 0, "q4_0": 0.06, "turbo4": 0.04})
        add_quality(store, {"f16": 0, "q4_0": 0.08}, part=1)
    first, both = sorted(sections(results)[0].findings["quality"], key=lambda one: one.parts)
    assert [(r.type_k, round(r.kld_mean, 6)) for r in first.values.values()] == [("f16", 0), ("turbo4", 0.04)]
    assert [(r.type_k, round(r.kld_mean, 6)) for r in both.values.values()] == [("f16", 0), ("q4_0", 0.07)]
    with Store(results) as store:
        add_quality(store, {"f16": 0}, part=2)  # alone it says nothing
    assert len(sections(results)[0].findings["quality"]) == 2


def partial(store: Store, what: str) -> None:
    if what == "only speed, of decoding":
        add_speed(store, {"f16": 1, "turbo4": 2}, kinds=["decode"])
    elif what == "speed without f16":
        add_speed(store, {"turbo4": 2})
    elif what == "only f16":
        add_quality(store, {"f16": 0})
        add_speed(store, {"f16": 1})
    elif what == "f32 is the base":
        add_quality(store, {"f32": 0, "turbo4": 0.04}, base="f32")
    elif what == "retrieval without f16":
        add_retrieval(store, 512, {"turbo4": 5})
    elif what == "f16 was asked less":
        add_retrieval(store, 512, {"f16": 6, "turbo4": 5})
        add_retrieval(store, 1024, {"turbo4": 3})
    elif what == "f16 found nothing":
        add_retrieval(store, 512, {"f16": 0, "turbo4": 1})
    elif what == "task without f16":
        add_task(store, "arc_easy", {"turbo4": None})


PARTIAL = {  # the caption of a table, and its last row
    "only speed, of decoding": ("Speed", ["turbo4", "200.0", "2.00", "1.80..2.20", "–"]),
    "speed without f16": ("Speed", ["turbo4", "200.0", "2.00", "1.80..2.20", "–", "200.0", "2.00", "1.80..2.20"]),
    "only f16": ("Quality", ["f16", "16", "2.718", "1", "0", "0", "0", "0", "100.0"]),
    "f32 is the base": ("Quality against f32", TURBO4),
    "retrieval without f16": ("Needles", ["turbo4", "4.25", "5/6", "83 %"]),
    "f16 was asked less": ("Needles", ["turbo4", "4.25", "8/12", "67 %", "1", "0", "1", "within noise"]),
    "f16 found nothing": ("Needles", ["turbo4", "4.25", "1/6", "17 %", "0", "1", "1", "f16 found none"]),
    "task without f16": ("Results of the tasks", ["turbo4", "4.25", "0.600 ± 0.020", "–", "–"]),
}


@pytest.mark.parametrize("what", PARTIAL)
def test_partial_data(results, what):
    with Store(results) as store:
        partial(store, what)
    caption, row = PARTIAL[what]
    page = Page(write(results, "report.html"))
    assert page.table(caption)[-1] == row
    assert ("Retrieval hides" in page.text) == ("KL divergence says" not in page.text and "Retrieval" in page.text)
    for suffix in (".md", ".csv", ".json"):
        assert write(results, f"report{suffix}").stat().st_size
    assert shown(results)
    if what in ("only speed, of decoding", "speed without f16", "f32 is the base") or "needles" in caption.lower():
        assert write(results, "report.png").read_bytes().startswith(b"\x89PNG")
        assert bool(page.attributes("img")) == (caption != "Needles")
    else:
        with pytest.raises(TurboquantError, match="There is nothing to draw"):
            write(results, "report.png")
        assert not results.with_name("report.png").exists() and not page.attributes("img")


def test_real_measurements(smollm2, results):
    """What ppl measures is what the report says."""
    text = results.with_name("text.txt")
    text.write_text(files("turboquant_gguf").joinpath("data/calibration.txt").read_text("utf-8")[:1500])
    options = {"types": ["f16", "turbo4"], "context": 64, "chunks": 2, "results": results}
    (measured,) = measure("quality", smollm2, text=str(text), console=Console(quiet=True), **options).findings
    (model,) = json.loads(write(results, "report.json").read_text())["models"]
    assert model["model"] == provenance.model(smollm2)
    (found,) = model["quality"]
    assert found["chunks"] == 2 and found["machines"] == [provenance.machine()]
    assert [
        quality.Loss(**{k: v for k, v in one.items() if k not in ("types", "bits", "like")}) for one in found["results"]
    ] == [replace(one, like=()) for one in measured.values.values()]
    page = Page(write(results, "report.html"))
    shown = float(page.table("Quality against f16")[2][4].split()[0])
    assert shown == pytest.approx(list(measured.values.values())[1].kld_mean, rel=0.01)


# ---- the page ----


def test_page_stands_alone(full):
    page = Page(write(full, "report.html"))
    references = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "srcset", "href", "data", "action", "poster", "background")
    ]
    assert len(references) == 6  # three figures, for light and dark
    assert all(re.match(r"data:image/svg\+xml;base64,[\w+/=]+$", value) for value in references)
    assert not re.search(r"@import|url\(|<script|<link|<iframe", page.source)
    assert "default-src 'none'" in page.source


def test_page_is_accessible(full):
    page = Page(write(full, "report.html"))
    images, sources = page.attributes("img"), page.attributes("source")
    assert len(images) == len(sources) == 3
    assert "On the Pareto frontier, from the fewest bits: turbo2, turbo4:turbo2, turbo4." in images[0]["alt"]
    assert all("for q4_0, turbo4." in image["alt"] for image in images[1:])
    assert {source["media"] for source in sources} == {"screen and (prefers-color-scheme: dark)"}
    assert all(caption for caption, _ in page.tables)
    assert all(attributes.get("scope") in ("col", "row", "rowgroup") for attributes in page.attributes("th"))
    assert page.attributes("html") == [{"lang": "en"}]
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    for theme in (r":root \{([^}]*)\}", r"dark\) \{\s*:root \{([^}]*)\}"):
        colors = dict(re.findall(r"--(\w+): (#\w+)", re.search(theme, page.source)[1]))
        for text in ("ink", "soft", "link"):
            assert _contrast(colors[text], colors["paper"]) >= 4.5
    for background, text in re.findall(r"share\d \{ background: (#\w+); color: (#\w+)", page.source):
        assert _contrast(background, text) >= 4.5


def _contrast(a: str, b: str) -> float:
    """As WCAG defines it."""
    light, dark = sorted(map(_luminance, (a, b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(color: str) -> float:
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [part / 255 for part in bytes.fromhex(digits)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_same_data_same_bytes(full):
    """So that a page under version control changes only when measurements do."""
    for suffix in page.FORMATS:
        assert write(full, f"a{suffix}").read_bytes() == write(full, f"b{suffix}").read_bytes()


def test_names_mean_only_themselves(results):
    name = "<script>alert(1)</script> $x_1$ [bold]|_b_ `c`"
    with Store(results) as store:
        add_quality(store, {"f16": 0, "turbo4": 0.04}, model=MODEL | {"name": name})
    page = Page(write(results, "report.html"))
    assert not page.attributes("script") and page.text.count(name) == 2  # title and heading
    assert write(results, "report.md").read_text("utf-8").splitlines()[0] == (
        r"## \<script\>alert(1)\</script\> $x_1$ \[bold\]\|\_b\_ \`c\`"
    )
    assert shown(results).splitlines()[0] == name
    assert write(results, "report.png").stat().st_size  # $x_1$ is no formula


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(browser, results, width, scheme):
    many = {"f16": 0, "q8_0": 0.001, "q8_0:turbo3": 0.01, "turbo4:turbo3": 0.04}
    with Store(results) as store:
        add_quality(store, many, model=MODEL | {"name": "A-" + "very-" * 30 + "long-" + "x" * 60})
        add_speed(store, dict.fromkeys(many, 2), model=OTHER)
        for length in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536):
            add_retrieval(store, length, {"f16": 6, "turbo4:turbo3": 3})
    path = write(results, "report.html")
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
    page = context.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(request.url))
    page.goto(path.as_uri())
    assert not said
    assert page.evaluate("document.documentElement.scrollWidth") == width
    scrolling = page.evaluate(
        "[...document.querySelectorAll('.scroll')].some(one => one.scrollWidth > one.clientWidth)"
    )
    assert scrolling == (width == 390)  # tables do in their own boxes, where they must
    images = page.evaluate("[...document.images].map(one => [one.currentSrc, one.naturalWidth])")
    assert len(images) == 3 and all(pixels > 300 for _, pixels in images)
    attributes = {"light": ("img", "src"), "dark": ("source", "srcset")}[scheme]
    assert [source for source, _ in images] == [tag[attributes[1]] for tag in Page(path).attributes(attributes[0])]
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (min(brightness) > 200) == (scheme == "light")
    context.close()


# ---- figures ----


def finding(klds: dict[str, float], results: Path) -> Finding:
    with Store(results) as store:
        add_quality(store, klds)
    return sections(results)[0].findings["quality"][0]


def test_frontier(results):
    klds = {
        "f16": 0,
        "q8_0": 0.01,
        "q5_0": 0.05,
        "q4_0": 0.06,
        "turbo4": 0.04,
        "turbo4:turbo2": 0.2,
        "turbo3": 0.1,
        "turbo2": 0.1,
    }
    frontier = quality.frontier(finding(klds, results))
    # As exact with fewer bits: turbo2 beats turbo3. Of equal bits: turbo3 beats turbo4:turbo2.
    assert list(map(str, frontier)) == ["turbo2", "turbo4", "q8_0"]


def test_labels_of_points_do_not_overlap(results):
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation, Text

    near = {"q5_0": 0.034, "q4_1": 0.033, "q4_0": 0.032, "iq4_nl": 0.031, "turbo4": 0.03, "turbo4:turbo3": 0.035}
    measured = finding({"f16": 0, "q8_0": 0.01, "turbo2": 0.2} | near, results)
    (panel,) = measured.kind.panels(measured)
    figure = Figure(figsize=(plots.WIDTH, plots.HEIGHT), dpi=72, layout="constrained")
    axes = figure.subplots()
    panel.draw(axes, plots.LIGHT)
    plots.save(figure, results.with_name("labels.svg"), "svg")
    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    assert {label.get_text() for label in labels} == {"q8_0", "turbo2", *near}
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(label) for label in labels]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 for box in boxes)


def test_themes_differ_in_color_alone(full):
    (measured,) = sections(full)[0].findings["quality"]
    (panel,) = measured.kind.panels(measured)
    images = [plots.svg(panel, theme).decode() for theme in (plots.LIGHT, plots.DARK)]
    for image, theme in zip(images, (plots.LIGHT, plots.DARK), strict=True):
        assert all(color in image for color in (theme.ink, theme.turbo, theme.stock))
    light, dark = (re.sub(r"#\w+", "", re.sub(r'id="\w+"', "", image)) for image in images)  # identifiers are hashes
    assert light == dark


# ---- files and input ----


def test_the_file_of_measurements_stays_as_it_is(full):
    before = full.read_bytes()
    written = write(full, "report.md")
    assert full.read_bytes() == before
    written.write_text("old")
    assert "turbo4" in write(full, "report.md").read_text("utf-8")  # replaced without asking
    link = full.with_name("link.csv")
    link.symlink_to(full)
    with pytest.raises(TurboquantError, match="link.csv is the file of measurements itself"):
        write(full, "link.csv")
    assert full.read_bytes() == before


@pytest.mark.parametrize(
    ("output", "because"),
    [
        ("report.pdf", r"report.pdf does not end in .html, .md, .csv, .json, .png, .svg"),
        ("report", "does not end in"),
        ("no/report.md", "There is no folder"),
        ("folder.md", "folder.md is a folder"),
    ],
)
def test_bad_outputs(full, output, because):
    full.with_name("folder.md").mkdir()
    good = full.with_name("good.md")
    with pytest.raises(TurboquantError, match=because):
        page.report(full, outputs=[good, full.parent / output], console=Console(quiet=True))
    assert not good.exists()


def test_bad_results(full, tmp_path):
    with pytest.raises(TurboquantError, match="There is no file of measurements .*missing"):
        sections(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    for name, content in (("text", b"hello" * 100), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TurboquantError, match="a file of measurements"):
            sections(tmp_path / name)
        assert (tmp_path / name).read_bytes() == content
    with Store(tmp_path / "new"):
        pass
    with pytest.raises(TurboquantError, match="Nothing is measured yet in .*turboquant-gguf sweep"):
        sections(tmp_path / "new")
    with pytest.raises(TurboquantError, match=r"No model in .* is called llama-7b. There are: Test-1B.Q8_0"):
        write(full, "report.md", models=["llama-7b"])


@pytest.mark.parametrize(("package", "output"), [("jinja2", "report.html"), ("matplotlib", "report.png")])
def test_missing_package(full, monkeypatch, package, output):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TurboquantError, match=rf"{output} needs {package}.*turboquant-gguf\[report\]"):
        write(full, output)
    write(full, "report.md")


def test_failed_output_leaves_the_old_one(full, monkeypatch):
    old = write(full, "report.md").read_text("utf-8")
    monkeypatch.setitem(page._WRITERS, ".md", lambda sections, path: path.write_text("half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(full, "report.md")
    assert full.with_name("report.md").read_text("utf-8") == old
    assert not list(full.parent.glob("*.partial"))


def test_command(full, tmp_path):
    said = shown(full, "-o", str(tmp_path / "a.md"), "-o", str(tmp_path / "a.csv"), "--model", "test")
    assert "a.md written" in " ".join(said.split()) and (tmp_path / "a.csv").is_file()
    printed = CliRunner(env={"COLUMNS": "80"}).invoke(command, ["--help"]).output
    assert "Usage" in printed and max(map(len, printed.splitlines())) <= 80
