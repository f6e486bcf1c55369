"""Every operation on every kind of memory, with turbo caches: right, or refused by name before anything runs.

Right: as near to an f16 cache that the same was done to as the type can be (operations.py), and never farther than the
same cache without the operation where that loses nothing. What f16 cannot do, turbo cannot either, and says so alike.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memory_kinds import KINDS, write
from operations import OPERATIONS

SECONDS = 120
PAIRS = ("turbo4", "turbo4:turbo3", "turbo3", "turbo4:f16", "turbo2", "q8_0:turbo3", "f16:turbo4")
ONE_TYPE = ("turbo4", "turbo3", "turbo2")
LIKE = {"MLA, large channels": "MLA"}
"""Models that compute the same as another, whose cache has an easier task."""


class Died(Exception):
    """The process of a worker ended."""


class Worker:
    """operations.py in a process of its own, which is started again when it has died."""

    def __init__(self, kind: str, models: Callable[[str], Path]) -> None:
        like = [models(LIKE[kind])] if kind in LIKE else []
        self._command = [sys.executable, Path(__file__).with_name("operations.py"), kind, models(kind), *like]
        self._process: subprocess.Popen | None = None

    def ask(self, **request: object) -> dict:
        """The answer to a request. Raises Died, with the signal and the last words."""
        if not self._process:
            self._errors = tempfile.TemporaryFile()
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
                env=os.environ | {"GGML_NO_BACKTRACE": "1"},
            )  # fmt: skip
        print(json.dumps(request), file=self._process.stdin, flush=True)
        during = "start"
        while select.select([self._process.stdout], [], [], SECONDS)[0] and (line := self._process.stdout.readline()):
            said = json.loads(line)
            if "answer" in said:
                return said["answer"]
            during = said["during"]
        if self._process.poll() is None and not select.select([self._process.stdout], [], [], 0)[0]:
            why = f"nothing for {SECONDS} seconds"
            self._process.kill()
        else:
            code = self._process.wait(SECONDS)
            why = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._errors.seek(0)
        last = self._errors.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
        self.close()
        raise Died(f"{why} with {during}: {last}")

    def close(self) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._errors.close()
            self._process = None


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], Path]:
    """The file of a kind, written when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("kinds"), {}

    def model(kind: str) -> Path:
        if kind not in made:
            made[kind] = write(folder / f"{len(made)}.gguf", KINDS[kind])
        return made[kind]

    return model


@pytest.fixture(scope="module")
def workers(models) -> Iterator[Callable[[str], Worker]]:
    """The worker of a kind. One at a time: tests of a kind stand together."""
    running: dict[str, Worker] = {}

    def worker(kind: str) -> Worker:
        if kind not in running:
            for other in running.values():
                other.close()
            running[kind] = Worker(kind, models)
        return running[kind]

    yield worker
    for worker in running.values():
        worker.close()


def cells() -> list:
    """Each operation on each kind with two pairs of types, one in a unified cache and one in streams, one with a window."""
    made = []
    for k, (kind, memory) in enumerate(KINDS.items()):
        pairs = ONE_TYPE if memory.is_mla else PAIRS
        for o, (operation, what) in enumerate(OPERATIONS.items()):
            if memory.reads == "whole" and not what.without_cache:
                continue
            for unified in (True, False):
                types = pairs[(k + o + len(pairs) // 2 * unified) % len(pairs)]
                window = None if (o + unified) % 2 else 0
                name = f"{kind}-{operation}-{types}-{'default window' if window is None else 'no window'}"
                name += "-unified" if unified else "-streams"
                made.append(pytest.param(kind, operation, types, window, unified, id=name))
    return made


def refusal(kind: str, operation: str, types: str) -> str | None:
    """A pattern of what llama_init_from_model must say, where it must refuse."""
    values_as_they_are = types.endswith(":f16")
    if KINDS[kind].reads == "whole" or KINDS[kind].architecture.startswith("mamba"):
        return None  # nothing is quantized
    if operation == "flash attention off" and not values_as_they_are:
        return "quantized V cache.*flash"
    return None


@pytest.mark.parametrize(("kind", "operation", "types", "window", "unified"), cells())
def test_operation(workers, kind, operation, types, window, unified):
    try:
        found = workers(kind).ask(do="cell", operation=operation, types=types, window=window, unified=unified)
    except Died as death:
        pytest.fail(str(death), pytrace=False)
    if fault := wrong(found, refusal(kind, operation, types)):
        pytest.fail(fault, pytrace=False)


def wrong(found: dict, refusal: str | None) -> str | None:
    """What is wrong with the answer of a cell."""
    if refusal or "refused" in found:
        said = found.get("refused", "not refused")
        return None if re.search(refusal or "not refused", said) else f"{said!r}, expected: {refusal or 'an answer'}"
    if found["asked"] != found["asked_of_f16"]:
        return f"the memory said {found['asked']}, and with f16 {found['asked_of_f16']}"
    if not found["finite"]:
        return "logits that are no numbers"
    if found["kl"] > found["bound"]:
        return f"KL divergence {found['kl']:.2e} from f16, at most {found['bound']:.2e}"
    if "lost" in found and found["lost"] > found["may_lose"]:
        return f"KL divergence {found['lost']:.2e} from the same cache without the operation, at most {found['may_lose']:.2e}"
    return None


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("kind", list(KINDS))
def test_never_more_memory_than_f16(workers, kind, unified):
    pairs = ("turbo4", "turbo2") if KINDS[kind].is_mla else ("turbo4", "turbo4:f16", "turbo2")
    more = {}
    for types in pairs:
        for sequences in (1, 8, 64, 256):
            for length in (256,) if not unified else (max(1, 1024 // sequences), 256):
                try:
                    found = workers(kind).ask(do="memory", types=types, sequences=sequences, length=length, unified=unified)
                except Died as death:
                    found = dict(died=str(death))
                if "died" in found or found["turbo"] > found["f16"]:
                    more[types, sequences, length] = found
    assert not more
