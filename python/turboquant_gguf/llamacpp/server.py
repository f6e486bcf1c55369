"""llama-server on loopback for the length of a `with` block."""

from __future__ import annotations

import itertools
import json
import re
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from ..core import child
from ..errors import TurboquantError
from . import cachefacts, native
from .cachefacts import CacheFacts
from .cachetypes import CacheTypes
from .placement import CPU, Placement
from .recentwindow import RecentWindow
from .toolerrors import advice, check_model_file, tool_error

HOST = "127.0.0.1"
START_SECONDS = 600  # a model of tens of gigabytes from a slow disk
ANSWER_SECONDS = 600  # between two tokens, a long prompt before the first included
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Answer:
    """What a model said. decode_speed: tokens a second after the prompt, by the server's clock.

    The speed is that of the median token, so a moment in which the machine was busy elsewhere does not count.
    """

    text: str
    tokens: int
    decode_speed: float


class Server:
    """A llama-server that is up. url: its address; facts: its KV cache in effect; process: it."""

    def __init__(self, process: subprocess.Popen, log_file: Path):
        self.process = process
        self._log_file = log_file
        self.url = ""
        self.facts: CacheFacts | None = None

    def log(self) -> str:
        """Everything the server has printed so far."""
        return self._log_file.read_text("utf-8", "replace")

    def ask(self, prompt: str, *, max_tokens: int = 128, on_text: Callable[[str], None] | None = None) -> Answer:
        """Ask one question at temperature 0; `on_text` gets each piece of the answer as it arrives.

        Raises TurboquantError if the server refuses the prompt or dies over it.
        """
        request = {
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": max_tokens,
            "stream": True,
            "timings_per_token": True,
        }
        pieces: list[str] = []
        clock: dict[int, float] = {}  # milliseconds of decoding by the number of tokens decoded
        try:
            for event in self._stream("/v1/chat/completions", request):
                if timings := event.get("timings"):
                    clock[timings["predicted_n"]] = timings["predicted_ms"]
                if piece := _text_of(event):
                    pieces.append(piece)
                    if on_text:
                        on_text(piece)
        except httpx.TransportError as error:
            raise self.failure() from error
        return Answer("".join(pieces), max(clock, default=0), _median_speed(clock))

    def failure(self) -> TurboquantError:
        """Why it does not answer, from its exit code and its log."""
        try:
            returncode = self.process.wait(1)  # a dying server closes its sockets a little before it is gone
        except subprocess.TimeoutExpired:
            returncode = None
        return tool_error("llama-server", returncode, self.log())

    @contextmanager
    def token_counter(self) -> Iterator[Callable[[str], int]]:
        """A function that says how many tokens the model gets for a prompt of `ask`, the chat template's included."""
        try:
            with httpx.Client(base_url=self.url, timeout=ANSWER_SECONDS, trust_env=False) as client:

                def count(prompt: str) -> int:
                    messages = [{"role": "user", "content": prompt}]
                    text = _checked(client.post("/apply-template", json={"messages": messages})).json()["prompt"]
                    request = {"content": text, "add_special": True, "parse_special": True}
                    return len(_checked(client.post("/tokenize", json=request)).json()["tokens"])

                yield count
        except httpx.TransportError as error:
            raise self.failure() from error

    def _stream(self, path: str, request: dict) -> Iterator[dict]:
        # trust_env is off because a proxy of the environment must not get requests to loopback.
        with (
            httpx.Client(base_url=self.url, timeout=ANSWER_SECONDS, trust_env=False) as client,
            client.stream("POST", path, json=request) as response,
        ):
            for line in _checked(response).iter_lines():
                if line.startswith("error:"):
                    raise _refusal(line.removeprefix("error:"))
                if line.startswith("data:") and line != "data: [DONE]":
                    yield json.loads(line.removeprefix("data:"))

    def _wait_until_ready(self, asked: CacheTypes) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            log = self.log()
            if listening := re.search(r"listening on (http://\S+)", log):
                self.url = listening[1]
                self.facts = cachefacts.require(log, asked)
                self._require_health()
                return
            time.sleep(POLL_SECONDS)
        raise self.failure()

    def _require_health(self) -> None:
        try:
            health = httpx.get(f"{self.url}/health", trust_env=False)
        except httpx.TransportError as error:
            raise self.failure() from error
        if health.status_code != httpx.codes.OK:
            raise self.failure()


# What llama-server says of each device that it computes on. CUDA_Host and its like are memory of the CPU.
_ON_DEVICE = re.compile(r" (?!CPU|\S+_Host )\S+ +compute buffer size")


@contextmanager
def running(
    model: Path,
    types: CacheTypes,
    *,
    context: int = 4096,
    port: int = 0,
    placement: Placement = CPU,
    recent_window: RecentWindow | None = None,
    extra_args: Sequence[str] = (),
) -> Iterator[Server]:
    """Run llama-server with `model` and a KV cache of `types` for `context` tokens; it is always stopped after.

    port: 0 takes a free one. placement: where it computes. recent_window: None is what the environment says.
    extra_args: further arguments of llama-server, such as ("--parallel", "4"). Raises TurboquantError if the model file
    is no GGUF, the port is taken, the server does not come up, or its cache or its place is not what was asked for.
    """
    check_model_file(model)
    if port:
        _require_free(port)
    command = [
        native.tool_path("llama-server"), "--model", model, "--host", HOST, "--port", str(port),
        "--ctx-size", str(context), "--cache-type-k", types.k, "--cache-type-v", types.v, "--no-ui",
        *cachefacts.LOG_ARGUMENTS, *placement.arguments(),
        *(recent_window.arguments() if recent_window else ()), *extra_args,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="turboquant-") as folder:
        log_file = Path(folder) / "llama-server.log"
        with log_file.open("wb") as log, child.running(command, stdout=log, stderr=subprocess.STDOUT) as process:
            server = Server(process, log_file)
            server._wait_until_ready(types)
            if placement.gpu_layers and not _ON_DEVICE.search(server.log()):
                raise TurboquantError(
                    f"llama-server does not find the GPU and would compute without {placement.device}."
                )
            yield server


def _require_free(port: int) -> None:
    # Asked here because two llama-servers may share a port (SO_REUSEPORT) and answer each other's questions.
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just released is free
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise TurboquantError(
                f"Port {port} cannot be used: {error.strerror}. Choose another with --port, or none for a free one."
            ) from error


def _median_speed(clock: dict[int, float]) -> float:
    """Tokens a second, from milliseconds by number of tokens; 0 for fewer than two tokens."""
    gaps = [(clock[b] - clock[a]) / (b - a) for a, b in itertools.pairwise(sorted(clock))]
    return 1000 / statistics.median(gaps) if gaps else 0.0


def _text_of(event: dict) -> str:
    choices = event.get("choices") or [{}]
    delta = choices[0].get("delta", {})
    return delta.get("content") or delta.get("reasoning_content") or ""


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_error:
        response.read()
        raise _refusal(response.text)
    return response


def _refusal(body: str) -> TurboquantError:
    with suppress(ValueError, KeyError, TypeError):  # not llama-server's JSON: shown as it is
        body = json.loads(body)["error"]["message"]
    return TurboquantError(f"llama-server refused the question: {body.strip()}. {advice(body) or ''}".rstrip())
