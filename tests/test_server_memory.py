"""llama-server with models of several kinds of memory, and what it does with their sequences."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from memory_kinds import KINDS, write
from turboquant_gguf.core import child
from turboquant_gguf.llamacpp import native

SECONDS = 60


class Server:
    """A llama-server that is up."""

    def __init__(self, process: subprocess.Popen, url: str, log: Callable[[], str]) -> None:
        self.process, self.log = process, log
        self._client = httpx.Client(base_url=url, timeout=SECONDS, trust_env=False)

    def post(self, path: str, **request: object) -> httpx.Response:
        """The response, of whatever status. Fails, with the end of the log, if the server dies over it."""
        try:
            return self._client.post(path, json=request)
        except httpx.TransportError:
            code = self.process.wait(SECONDS)
            pytest.fail(f"llama-server ended with {code} over {path}: {self.log()[-1500:]}", pytrace=False)

    def complete(self, prompt: str, tokens: int = 16, **request: object) -> dict:
        response = self.post("/completion", prompt=prompt, n_predict=tokens, temperature=0, ignore_eos=True, **request)
        assert response.status_code == httpx.codes.OK, response.text
        return response.json()


@contextlib.contextmanager
def serving(model: Path, types: str, folder: Path, *arguments: str | Path) -> Iterator[Server]:
    """llama-server on loopback, with its own defaults but for the arguments."""
    command = [native.tool_path("llama-server"), "--model", model, "--cache-type-k", types, "--cache-type-v", types]
    command += ["--host", "127.0.0.1", "--port", "0", "--no-ui", "--no-warmup", "--threads", "2", *arguments]
    file = folder / f"{types}.log"

    def log() -> str:
        return file.read_text("utf-8", "replace")

    quiet = os.environ | {"GGML_NO_BACKTRACE": "1"}
    with (
        file.open("wb") as output,
        child.running(command, stdout=output, stderr=subprocess.STDOUT, env=quiet) as process,
    ):
        deadline = time.monotonic() + SECONDS
        while not (listening := re.search(r"listening on (http://\S+)", log())):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"llama-server did not start: {log()[-1500:]}", pytrace=False)
            time.sleep(0.05)
        yield Server(process, listening[1], log)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], Path]:
    """The file of a kind."""
    folder = tmp_path_factory.mktemp("kinds")

    def model(kind: str) -> Path:
        path = folder / f"{list(KINDS).index(kind)}.gguf"
        return path if path.exists() else write(path, KINDS[kind])

    return model


def texts(count: int) -> Sequence[str]:
    """Prompts of many lengths, of which some begin alike."""
    rng = np.random.default_rng(2)
    words = ["sky", "blue", "why", "the", "water", "is", "a", "light", "of", "day"]
    return [" ".join(rng.choice(words, 10 + 7 * (i % 5))) + f" {i // 4}" * (i % 4) for i in range(count)]


@pytest.mark.parametrize("kind", ["hybrid, linear attention", "hybrid, both in each layer", "sliding window", "MLA"])
def test_four_clients(models, tmp_path, kind):
    with serving(models(kind), "turbo4", tmp_path) as server, ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(server.complete, texts(40)))
    assert [answer["tokens_predicted"] for answer in answers] == [16] * 40


def test_an_embedder_without_a_cache(models, tmp_path):
    """A router gives all of its models one cache type; this one has heads of 32, and nothing to quantize."""
    found = []
    for types in ("f16", "turbo4"):
        with serving(models("no cache, heads of 32"), types, tmp_path, "--embedding", "--pooling", "mean") as server:
            response = server.post("/v1/embeddings", input=list(texts(4)))
            assert response.status_code == httpx.codes.OK, response.text
            found.append([entry["embedding"] for entry in response.json()["data"]])
    assert found[0] == found[1]


@pytest.mark.parametrize("types", ["f16", "turbo4"])
@pytest.mark.parametrize("kind", ["plain", "hybrid, linear attention"])
def test_a_slot_file_that_is_cut_short(models, tmp_path, kind, types):
    """It is refused, and the server goes on; as long as it is whole it gives back what was saved."""
    arguments = ("--slot-save-path", tmp_path, "--parallel", "1", "--ctx-size", "1024")
    with serving(models(kind), types, tmp_path, *arguments) as server:
        prompt = texts(5)[4] * 3
        expected = server.complete(prompt, id_slot=0)
        assert server.post("/slots/0?action=save", filename="slot").status_code == httpx.codes.OK
        whole = (tmp_path / "slot").read_bytes()
        for length in (0, 6, 11, 40, len(whole) // 2, len(whole) - 1):
            (tmp_path / "cut").write_bytes(whole[:length])
            response = server.post("/slots/0?action=restore", filename="cut")
            assert response.is_client_error or response.is_server_error, (length, response.text)
            assert server.complete("after all", id_slot=0)["tokens_predicted"] == 16
        assert server.post("/slots/0?action=restore", filename="slot").status_code == httpx.codes.OK
        again = server.complete(prompt, id_slot=0)
        assert again["content"] == expected["content"]


def test_chunks_of_a_prompt_are_used_again(models, tmp_path):
    with serving(models("plain"), "turbo4", tmp_path, "--cache-reuse", "16", "--parallel", "1") as server:
        first, dropped, kept = (
            "the sky " * 8,
            "one two three four five " * 3,
            "water is blue in the light of day " * 4,
        )
        server.complete(first + dropped + kept)
        timings = server.complete(first + kept)["timings"]
    assert timings["cache_n"] > len(first) + 50  # tokens are bytes
    assert timings["cache_n"] + timings["prompt_n"] == pytest.approx(len(first + kept), abs=3)


@pytest.mark.parametrize("kind", ["plain", "sliding window"])
def test_context_shift(models, tmp_path, kind):
    """An answer longer than the context."""
    with serving(models(kind), "turbo4", tmp_path, "--context-shift", "--parallel", "1", "--ctx-size", "256") as server:
        answer = server.complete("why is the sky blue", 600)
    assert answer["tokens_predicted"] == 600
    assert "shifting context" in server.log() or "context shift" in server.log()
