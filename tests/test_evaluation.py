"""`turboquant-gguf eval`: real runs of lm-eval and llama-server, and made-up results for the statistics."""

import gc
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

import tiny_model
from turboquant_gguf.core import tables
from turboquant_gguf.errors import TurboquantError
from turboquant_gguf.kinds import Finding, tasks
from turboquant_gguf.kinds.runners import harness
from turboquant_gguf.kinds.tasks import Difference, Score, Tasks
from turboquant_gguf.llamacpp import server
from turboquant_gguf.llamacpp.cachetypes import CacheTypes, UnknownTypeError
from turboquant_gguf.measure import sweep

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'turboquant-gguf[eval]')")

TASK = "sums_and_letters"
FOLDER = Path(__file__).parent / "tasks"
DOCUMENTS = 20
LOCAL = ("--tasks", TASK, "--task-folder", str(FOLDER))
COMMAND = (sys.executable, "-m", "turboquant_gguf.cli", "eval")
ENVIRONMENT = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A random model without a chat template."""
    return tiny_model.write(tmp_path_factory.mktemp("eval") / "tiny.gguf")


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=ENVIRONMENT | environment, check=False
    )


def measure(model: Path, folder: Path, **options) -> Finding:
    least = {"tasks": [TASK], "task_folder": FOLDER, "types": [], "limit": 2, "context": 512}
    how = {"results": folder / "r.sqlite", "console": Console(quiet=True)}
    outcome = sweep.measure("task", model, **how, **least | options)
    if outcome.failures:
        raise TurboquantError(outcome.failures[0].message)
    (finding,) = outcome.findings
    return finding


def results(output: str) -> list[dict]:
    return json.loads(output)["findings"][0]["results"]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sentences(text: str) -> str:
    return " ".join(text.split())


def task_file(folder: Path, name: str, **settings: object) -> None:
    common = {"task": name, "dataset_path": "absent/data", "test_split": "test"}
    (folder / f"{name}.yaml").write_text(json.dumps(common | settings))  # JSON is YAML


# --- measuring ---


def test_scores_of_a_real_model(smollm2, tmp_path):
    samples = tmp_path / "samples.jsonl"
    done = run(
        smollm2, *LOCAL, "--types", "turbo4", "--completions", "--context", "512", "--samples", samples, "--json",
        "-o", tmp_path / "r.sqlite"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["findings"][0]["settings"]["task"] == [TASK]
    scores = results(done.stdout)
    assert sorted((s["type"], s["filter"], s["documents"]) for s in scores) == [
        (name, filtered, DOCUMENTS) for name in ("f16", "turbo4") for filtered in ("flexible", "strict")
    ]
    base, turbo = (score for score in scores if score["filter"] == "flexible")
    assert base["value"] > 0.3 and turbo["value"] > 0.3
    assert base["difference"] is None

    right: dict[str, list[float]] = {"f16": [], "turbo4": []}
    for line in lines_of(samples):
        if line["filter"] == "flexible":
            right[line["type"]].append(line["exact_match"])
    assert statistics.fmean(right["f16"]) == pytest.approx(base["value"])
    changes = [ours - theirs for ours, theirs in zip(right["turbo4"], right["f16"], strict=True)]
    assert len(changes) == DOCUMENTS
    assert turbo["difference"]["value"] == pytest.approx(turbo["value"] - base["value"])
    assert turbo["difference"]["stderr"] == pytest.approx(statistics.stdev(changes) / math.sqrt(DOCUMENTS))


def test_chat_template_of_the_model_is_used(smollm2, tmp_path):
    samples = tmp_path / "samples.jsonl"
    found = measure(smollm2, tmp_path, limit=1, num_fewshot=1, samples=samples)
    assert found.settings["chat"] is True
    [[messages], _] = lines_of(samples)[0]["arguments"][0]
    assert [message["role"] for message in json.loads(messages)] == ["user", "assistant", "user"]


def test_every_type_gets_the_same_prompts_and_f16_comes_first(tiny, tmp_path):
    samples = tmp_path / "samples.jsonl"
    how = {"limit": 3, "num_fewshot": 1, "max_tokens": 5, "samples": samples}
    found = measure(tiny, tmp_path, types=["turbo4:turbo3", "f16"], **how)
    assert list(map(str, found.values)) == ["f16", "turbo4:turbo3"]
    assert (found.settings["chat"], found.settings["num_fewshot"]) == (False, 1)
    arguments: dict[str, list] = {"f16": [], "turbo4:turbo3": []}
    for line in lines_of(samples):
        arguments[line["type"]].append(line["arguments"])
    assert arguments["f16"] == arguments["turbo4:turbo3"]
    assert len(arguments["f16"]) == 3 * 2  # two filters
    [prompt, options] = arguments["f16"][0][0]
    assert prompt.startswith("Question: What is 2 + 2?\nAnswer: 4\n\nQuestion: What is 6 + 3?")
    assert (options["temperature"], options["max_gen_toks"]) == (0, 5)


@pytest.mark.parametrize("parallel", [1, 2])
def test_proxy_of_the_environment_is_not_asked(tiny, tmp_path, monkeypatch, parallel):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.org")
    found = measure(tiny, tmp_path, parallel=parallel)
    assert {score["documents"] for scores in found.values.values() for score in scores} == {2}
    assert os.environ["no_proxy"] == "example.org" and "NO_PROXY" not in os.environ


def test_a_type_that_fails_does_not_stop_the_others(tmp_path):
    model = tiny_model.write(tmp_path / "odd.gguf", head_size=80)
    done = run(model, *LOCAL, "--types", "turbo4,bf16", "--limit", "2", "--context", "512", "--json",
               "-o", tmp_path / "r.sqlite")  # fmt: skip
    assert done.returncode == 1
    (failure,) = json.loads(done.stdout)["failures"]
    assert failure["what"] == "odd.gguf, turbo4"
    assert "heads hold 80 values" in failure["message"]
    assert {score["type"] for score in results(done.stdout)} == {"f16", "bf16"}


@pytest.mark.parametrize("parallel", [1, 2])
def test_prompt_longer_than_the_context(tiny, tmp_path, parallel, capfd):
    folder = shutil.copytree(FOLDER, tmp_path / "tasks")
    with (folder / f"{TASK}.yaml").open("a") as file:
        file.write(f"description: {'long ' * 200}\n")  # a token a byte
    with pytest.raises(TurboquantError, match=r"llama-server refused a prompt: .*exceeds the available context"):
        measure(tiny, tmp_path, task_folder=folder, parallel=parallel, limit=None)
    gc.collect()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("parallel", [1, 2])
def test_server_that_dies_over_a_document(tiny, parallel):
    loaded = harness.Tasks([TASK], FOLDER)
    with server.running(tiny, CacheTypes("f16", "f16"), context=1024) as running:
        with pytest.raises(ConnectionError):
            loaded.run(
                running.url,
                chat=False,
                parallel=parallel,
                on_answer=lambda: running.process.send_signal(signal.SIGKILL),
            )
        assert "was ended by SIGKILL" in str(running.failure())


def test_ctrl_c_keeps_the_types_that_are_finished(tiny, tmp_path):
    samples = tmp_path / "samples.jsonl"
    process = subprocess.Popen(
        [
            *COMMAND,
            tiny,
            *LOCAL,
            "--types",
            "turbo4,turbo3",
            "--context",
            "512",
            "--samples",
            samples,
            "-o",
            tmp_path / "r.sqlite",
        ],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (samples.exists() and samples.stat().st_size):
        assert process.poll() is None, "it ended before the first type was finished"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert process.returncode == 130
    assert "Interrupted." in errors and "Traceback" not in errors
    assert "f16" in output and "turbo3" not in output
    running = subprocess.run(["ps", "-A", "-ww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tiny) not in running


# --- what is refused before a server starts ---


@pytest.mark.parametrize("output_type", ["multiple_choice", "loglikelihood", "loglikelihood_rolling"])
def test_tasks_that_need_log_probabilities(tmp_path, output_type):
    task_file(tmp_path, "choices", output_type=output_type)
    with pytest.raises(TurboquantError, match=rf"task choices \({output_type}\) needs log-probabilities of prompts"):
        harness.Tasks(["choices"], tmp_path)


def test_group_with_a_task_that_needs_log_probabilities():
    with pytest.raises(TurboquantError, match=r"task mmlu_\w+ \(multiple_choice\) needs log-probabilities"):
        harness.Tasks(["mmlu"])


def test_task_that_runs_what_the_model_writes(tmp_path):
    task_file(tmp_path, "programs", unsafe_code=True)
    with pytest.raises(TurboquantError, match="task programs runs code that the model writes"):
        harness.Tasks(["programs"], tmp_path)


def test_unknown_task_with_near_hits():
    with pytest.raises(harness.UnknownTaskError, match="There is no task 'gsm8': did you mean .*gsm8k"):
        harness.Tasks(["gsm8"])


def test_documents_that_cannot_be_fetched(tiny, tmp_path):
    task_file(tmp_path, "remote")
    failed = run(tiny, "--tasks", "remote", "--task-folder", tmp_path, HF_HUB_OFFLINE="1")
    assert failed.returncode == 1
    assert "Documents of remote are missing: Couldn't reach 'absent/data'" in sentences(failed.stderr)
    assert "HF_DATASETS_OFFLINE=1" in failed.stderr and "--task-folder" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_task_with_an_error(tmp_path):
    task_file(tmp_path, "broken", metric_list=[{"aggregation": "mean"}])
    with pytest.raises(TurboquantError, match="broken cannot be loaded: ValueError: 'metric' key not provided"):
        harness.Tasks(["broken"], tmp_path)


def test_task_without_documents(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    data = {"data_files": str(tmp_path / "empty.jsonl")}
    common = {"output_type": "generate_until", "test_split": "train", "dataset_path": "json"}
    task_file(tmp_path, "mine", **common, dataset_kwargs=data)
    with pytest.raises(TurboquantError, match="The task mine has no documents"):
        harness.Tasks(["mine"], tmp_path)


def test_unknown_type(tiny, tmp_path):
    with pytest.raises(UnknownTypeError, match="did you mean turbo4"):
        measure(tiny, tmp_path, types=["trubo4"])


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["tiny", "--types", "turbo4"], 2, "Missing option '--tasks'"),
        (["tiny", "--tasks", " ,"], 2, "--tasks names no task."),
        (["tiny", *LOCAL, "--limit", "0"], 2, "0 is not in the range x>=1"),
        (["tiny", *LOCAL, "--samples", "absent/samples.jsonl"], 2, "There is no folder"),
        (["tiny", "--tasks", TASK, "--task-folder", "absent"], 2, "'absent' does not exist"),
        (["absent.gguf", *LOCAL], 1, "There is no model file absent.gguf."),
        ([__file__, *LOCAL], 1, "is not a GGUF file"),
    ],
)
def test_errors_are_sentences(tiny, arguments, code, sentence):
    failed = run(*(tiny if word == "tiny" else word for word in arguments))
    assert failed.returncode == code
    assert sentence in sentences(failed.stderr)
    assert "Traceback" not in failed.stderr
    assert failed.stdout == ""


def test_without_lm_eval(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(TurboquantError, match=r"pip install 'turboquant-gguf\[eval\]'"):
        measure(tiny, tmp_path)


# --- statistics and print ---


@pytest.mark.parametrize(
    ("values", "base", "expected"),
    [
        # differences 0, -1, 1, 0: variance 2/3, of the mean 1/6
        ([1, 0, 1, 1], [1, 1, 0, 1], Difference(0, math.sqrt(1 / 6), True)),
        # differences -1 four times and 0: variance 1/5, of the mean 1/25
        ([0, 0, 0, 0, 1], [1, 1, 1, 1, 1], Difference(-0.8, 0.2, False)),
        ([0.5, 0.25], [0.5, 0.25], Difference(0, 0, True)),
        ([1, 1], [0, 0], Difference(1, 0, False)),
        ([1], [0], Difference(1, None, None)),
    ],
)
def test_paired_differences(values, base, expected):
    found = tasks.paired(values, base)
    assert found.value == pytest.approx(expected.value)
    assert found.stderr == (expected.stderr and pytest.approx(expected.stderr))
    assert found.within_noise is expected.within_noise


def results_of(score: float, documents: dict[int, object]) -> dict:
    """What lm-eval returns of a task with one metric."""
    return {
        "results": {"essay": {"alias": "essay", "sample_len": 4, "f1,none": score, "f1_stderr,none": "N/A"}},
        "higher_is_better": {"essay": {"f1": True}},
        "samples": {"essay": [{"doc_id": i, "filter": "none", "f1": value} for i, value in documents.items()]},
    }


def test_documents_are_paired_by_their_number():
    base, ours = results_of(0.75, {0: 1, 1: 1, 2: 1, 3: 0}), results_of(0.5, {3: 0, 1: 1, 2: 1, 0: 0})
    (score,) = tasks.scores("turbo4", ours, base)
    assert (score.value, score.stderr) == (0.5, None)
    assert score.difference == Difference(-0.25, 0.25, True)


@pytest.mark.parametrize("documents", [{0: 1, 1: 1}, {0: (1, 1), 1: (0, 1)}, {}])
def test_score_that_is_no_mean_has_a_difference_without_error(documents):
    (score,) = tasks.scores("turbo4", results_of(0.5, documents), results_of(0.75, documents))
    assert score.difference == Difference(-0.25, None, None)


def test_tables_fit_80_columns():
    name = "a_task_with_a_name_as_long_as_those_of_translation_tasks_between_rare_languages"
    scores = [
        Score(kind, name, "exact_match", "flexible-extract", better, 1319, 100.1234, 1.5, difference)
        for better in (True, False, None)
        for kind, difference in (
            ("f16", None),
            ("turbo4", Difference(-12.3456, 1.5, False)),
            ("q8_0:turbo3", Difference(12.3456, 12.5, True)),
            ("turbo4:turbo3", Difference(12.3456, None, None)),
        )
    ]
    for expected, part in zip(("worse", "better", "different"), (scores[:4], scores[4:8], scores[8:]), strict=True):
        values = {CacheTypes.parse(score.type): [asdict(score)] for score in part}
        finding = Finding(Tasks, {}, {"limit": None}, [], "2026-01-01", values, 1)
        console = Console(width=80)
        with console.capture() as captured:
            console.print(tables.Shown(Tasks.table(finding), gap=1))
        lines = captured.get().splitlines()
        assert max(map(len, lines)) <= 80
        row = {line.split()[0]: line.split() for line in lines if line.strip()}
        assert row["turbo4"][2:] == ["100.1±1.5", "-12.3±1.5", expected]
        assert row["q8_0:turbo3"][-2:] == ["within", "noise"]
        assert row["turbo4:turbo3"][2:] == ["100.1±1.5", "+12.35", "–"]
