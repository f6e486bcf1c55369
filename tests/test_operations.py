"""Every operation on every kind of memory, with turbo caches: right, or refused by name before anything runs.

Right: as near to an f16 cache that the same was done to as the type can be (operations.py), and as near to the same
cache without the operation where that loses nothing. What f16 cannot do, turbo cannot either, and says so alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from memory_kinds import KINDS, UNFIT, write
from operations import DAMAGES, OPERATIONS, ROUNDING

SECONDS = 120
"""A question that takes longer is given up."""

PAIRS = ("turbo4", "turbo4:turbo3", "turbo3", "turbo4:f16", "turbo2", "q8_0:turbo3", "f16:turbo4")
ONE_TYPE = ("turbo4", "turbo3", "turbo2")
"""Where values are a part of the keys."""

LIKE = {"MLA, large channels": "MLA"}
"""Models that compute the same as another, whose cache has an easier task."""


class Worker:
    """operations.py in a process of its own, which is started again when it has died."""

    def __init__(self, kind: str, models: Callable[[str], Path]) -> None:
        like = [models(LIKE[kind])] if kind in LIKE else []
        self._command = [sys.executable, Path(__file__).with_name("operations.py"), kind, models(kind), *like]
        self._process: subprocess.Popen | None = None

    def ask(self, question: dict) -> dict:
        """The answer; or how the worker died over it: the signal, what it did, and its last words."""
        if not self._process:
            self._errors = tempfile.TemporaryFile()
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
                env=os.environ | {"GGML_NO_BACKTRACE": "1"},
            )  # fmt: skip
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(question), file=self._process.stdin, flush=True)
        during = "the start"
        deadline = threading.Timer(SECONDS, self._process.kill)
        deadline.start()
        for line in self._process.stdout:
            said = json.loads(line)
            if "answer" in said:
                deadline.cancel()
                return said["answer"]
            during = said["during"]
        code = self._process.wait()
        why = (
            f"{SECONDS} seconds"
            if deadline.finished.is_set()
            else signal.Signals(-code).name
            if code < 0
            else f"exit {code}"
        )
        deadline.cancel()
        self._errors.seek(0)
        last = self._errors.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
        self.close()
        return dict(died=f"{why} during {during}: {last}")

    def close(self) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._errors.close()
            self._process = None


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], Path]:
    """The file of a kind, written when it is first asked for."""
    folder = tmp_path_factory.mktemp("kinds")

    def model(kind: str) -> Path:
        path, kinds = folder / f"{kind}.gguf", KINDS | UNFIT
        return path if path.exists() else write(path, kinds[kind])

    return model


@pytest.fixture(scope="module")
def answers(request, models) -> Callable[[str, dict], dict]:
    """What workers say to the questions of all tests that were selected: a process for each kind, some at a time."""
    questions: dict[str, list[dict]] = {}
    for item in request.session.items:
        if item.path == request.path and "question" in item.callspec.params:
            questions.setdefault(item.callspec.params["kind"], []).append(item.callspec.params["question"])
    paths = {kind: models(kind) for kind in {*questions, *(LIKE[kind] for kind in LIKE if kind in questions)}}

    def ask(kind: str) -> list[dict]:
        with contextlib.closing(Worker(kind, paths.get)) as worker:
            return [worker.ask(question) for question in questions[kind]]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(questions, pool.map(ask, questions), strict=True))
    return lambda kind, question: found[kind][questions[kind].index(question)]


def cells() -> list:
    """Each operation on each kind with two pairs of types: one in a unified cache, one in streams; one has a window."""
    made = []
    for k, (kind, memory) in enumerate(KINDS.items()):
        pairs = ONE_TYPE if memory.is_mla else PAIRS
        for o, (operation, what) in enumerate(OPERATIONS.items()):
            if (memory.reads == "whole" and not what.without_cache) or (memory.alone and not what.alone):
                continue
            for unified in (True,) if kind in NO_STREAMS else (True, False):
                types = pairs[(k + o + len(pairs) // 2 * unified) % len(pairs)]
                window = None if (o + unified) % 2 else 0
                question = dict(do="cell", operation=operation, types=types, window=window, unified=unified)
                layout, ring = "unified" if unified else "streams", "no window" if window == 0 else "default window"
                made.append(pytest.param(kind, question, id=f"{kind}-{operation}-{types}-{ring}-{layout}"))
    return made


NO_STREAMS = ("encoder and decoder",)
"""Stock llama.cpp aborts when it makes a context: the bias of positions is for one stream."""

STOCK_ABORTS = {
    ("hybrid, sliding window", "streams"): (  # no layer is in the cache of those without a window, whose graph is empty
        "context shift", "self-extend", "chunks used again", "full",
    ),
    ("encoder and decoder", "unified"): ("saved into the other layout",),  # which is streams
    ("hybrid, indexed", "unified"): ("full", "far position"),  # positions are no farther than cells
    ("hybrid, indexed", "streams"): ("full", "far position"),
    ("compressed", "unified"): ("far position",),
    ("compressed", "streams"): ("far position",),
}  # fmt: skip
"""What stock llama.cpp aborts over with f16."""


@dataclass(frozen=True)
class Refusal:
    """A pattern of what llama_init_from_model says when it refuses; must: it has to."""

    pattern: str
    must: bool


def refusal(kind: str, question: dict) -> Refusal | None:
    """Whether a context may be refused."""
    memory, v = KINDS[kind], question["types"].rpartition(":")[2]
    if question["operation"] == "flash attention off" and v != "f16":
        has_cache = memory.reads != "whole" and not memory.architecture.startswith("mamba")
        return Refusal("flash", must=has_cache)
    if memory.reads == "texts":
        return Refusal("encoder|bias", must=False)
    return None


@pytest.mark.parametrize(("kind", "question"), cells())
def test_operation(answers, kind, question):
    answer = answers(kind, question)
    layout = "unified" if question["unified"] else "streams"
    if question["operation"] in STOCK_ABORTS.get((kind, layout), ()):
        assert "SIGABRT during f16" in answer["died"]
    elif fault := wrong(answer, refusal(kind, question)):
        pytest.fail(fault, pytrace=False)


def wrong(answer: dict, refusal: Refusal | None) -> str:
    """What is wrong with the answer of a cell; empty if nothing is."""
    if "died" in answer:
        return answer["died"]
    if "refused" in answer:
        right = refusal and re.search(refusal.pattern, answer["refused"])
        return "" if right else f"refused: {answer['refused']}"
    if refusal and refusal.must:
        return f"not refused by {refusal.pattern}"
    if answer["asked"] != answer["asked_of_f16"]:
        return f"the memory said {answer['asked']}, and with f16 {answer['asked_of_f16']}"
    if not answer["finite"]:
        return "logits that are no numbers"
    faults = []
    if answer["kl"] > answer["bound"]:
        faults.append(f"KL divergence {answer['kl']:.2e} from f16, at most {answer['bound']:.2e}")
    if "lost" in answer and answer["lost"] > answer["may_lose"]:
        faults.append(f"{answer['lost']:.2e} from the same without the operation, at most {answer['may_lose']:.2e}")
    return "; ".join(faults)


@pytest.mark.parametrize("question", [dict(do="windowed", types="turbo3")], ids=["turbo3"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_window_is_there_if_the_log_says_so(answers, kind, question):
    answer = answers(kind, question)
    if "died" in answer:
        pytest.fail(answer["died"], pytrace=False)
    assert (answer["kl"] < 0.8 * answer["without"]) == answer["said"]
    assert answer["kl"] == answer["without"] or answer["said"]


def sizes() -> list:
    made = []
    for kind, memory in KINDS.items():
        for i, sequences in enumerate((1,) if memory.alone else (1, 8, 64, 256)):
            for unified in (True,) if kind in NO_STREAMS else (True, False):
                # llama.cpp makes room for 256 tokens of each sequence at least, or of all of them if they share it
                for length in {256, max(2, 1024 // sequences) if unified else 256}:
                    types = (ONE_TYPE if memory.is_mla else PAIRS)[i % 3]
                    question = dict(do="memory", types=types, sequences=sequences, length=length, unified=unified)
                    layout = "unified" if unified else "streams"
                    name = f"{kind}-{sequences} sequences of {length}-{types}-{layout}"
                    made.append(pytest.param(kind, question, id=name))
    return made


@pytest.mark.parametrize(("kind", "question"), sizes())
def test_never_more_memory_than_f16(answers, kind, question):
    answer = answers(kind, question)
    if "died" in answer or answer["turbo"] > answer["f16"]:
        pytest.fail(answer.get("died") or f"{answer['turbo']:.2f} MiB, f16 {answer['f16']:.2f} MiB", pytrace=False)


def damages() -> list:
    kinds = ("plain", "sliding window", "hybrid, linear attention", "hybrid, sliding window", "MLA", "recurrent")
    return [
        pytest.param(kind, dict(do="damaged", types=types, how=how), id=f"{kind}-{types}-{how}")
        for kind in kinds
        for types in ("f16", "turbo4")
        for how in DAMAGES
        if kind != "recurrent" or how != "a far position"  # it has one cell, and no positions in a row
    ]


@pytest.mark.parametrize(("kind", "question"), damages())
def test_a_state_that_is_not_whole(answers, kind, question):
    """It is refused, and the context is as good as new."""
    answer = answers(kind, question)
    if "died" in answer:
        pytest.fail(answer["died"], pytrace=False)
    assert answer["read"] == 0
    assert answer["kl"] < ROUNDING


REFUSED = [
    ("heads of 80", "turbo4", "turbo4", 1, "head size of 80"),
    ("heads of 80", "f16", "turbo3", 1, "head size of 80"),
    ("latent vectors of 544", "turbo4", "turbo4", 1, "head size of 544"),
    ("indexer keys of 32", "turbo4", "turbo4", 1, "head size of 32"),
    ("indexer keys of 32", "turbo4", "f16", 1, "head size of 32"),
    ("no flash attention", "turbo4", "turbo4", 1, "flash"),
    ("MLA", "turbo4", "turbo3", 1, "different K .turbo4. and V .turbo3."),
    ("MLA", "f16", "turbo4", 1, "different K .f16. and V .turbo4."),
    ("compressed", "turbo4", "f16", 1, "different K .turbo4. and V .f16."),
    ("compressed", "turbo4", "turbo4", 2, "Use one sequence"),
]


@pytest.mark.parametrize(
    ("kind", "question", "why"),
    [
        pytest.param(kind, dict(do="opened", k=k, v=v, sequences=sequences), why, id=f"{kind}-{k}:{v}-{sequences}")
        for kind, k, v, sequences, why in REFUSED
    ],
)
def test_refused_by_name(answers, kind, question, why):
    """In the last line of the log, which is all that some programs show."""
    answer = answers(kind, question)
    if not re.search(why, answer.get("refused", "")):
        pytest.fail(answer.get("died") or str(answer), pytrace=False)


NUMBERS = (4, 5, 31, 36, 43, 60, 119, 123, 400, -1, 2**31 - 1)


@pytest.mark.parametrize("kind", ["plain", "hybrid, linear attention"])
@pytest.mark.parametrize(
    "question",
    [
        pytest.param(dict(do="opened", k=k, v=v), id=f"{k}:{v}")
        for number in NUMBERS
        for k, v in ((number, 1), (1, number), (number, number))
    ],
)
def test_numbers_that_are_no_type(answers, kind, question):
    """Forks of llama.cpp have other numbers for types of the same names: ours are named."""
    answer = answers(kind, question)
    number = next(number for number in (question["k"], question["v"]) if number != 1)
    if not re.search(rf"(?<![\d-]){number}(?!\d).*120.*122", answer.get("refused", "")):
        pytest.fail(answer.get("died") or str(answer), pytrace=False)
