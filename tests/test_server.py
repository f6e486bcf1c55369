"""llama-server as this package runs it: real servers, a real model."""

import re
import signal
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path

import httpx
import pytest

import turboquant_gguf
from sequences import window_slots
from turboquant_gguf.core import child
from turboquant_gguf.errors import TurboquantError
from turboquant_gguf.llamacpp import cachefacts, models, native, placement, provenance, server
from turboquant_gguf.llamacpp.cachetypes import CacheTypes, UnknownTypeError
from turboquant_gguf.llamacpp.toolerrors import tool_error

PAIRS = ("f16", "turbo4", "turbo3", "turbo2", "turbo4:turbo2", "q8_0:turbo3")
STOCK_BITS = {"f16": 16, "q8_0": 8.5}
QUESTION = "Why is the sky blue?"
CONTEXT = 512


@pytest.fixture
def start(smollm2):
    """Start a server with SmolLM2 and the cache types given as text."""

    def starter(types: str = "f16", **options):
        return server.running(smollm2, CacheTypes.parse(types), **{"context": CONTEXT, **options})

    return starter


@pytest.mark.parametrize("pair", PAIRS)
def test_cache_is_what_was_asked_for(start, pair):
    bits = STOCK_BITS | {kind.name: kind.bits_per_value for kind in turboquant_gguf.types()}
    model = models.catalogue()["smollm2-135m"].facts
    values = model["layers"] * model["kv_heads"] * model["head_size"]
    types = CacheTypes.parse(pair)
    with start(pair) as running:
        facts = running.facts
        answer = running.ask(QUESTION, max_tokens=24)
    assert facts.types == types
    assert facts.cells == CONTEXT
    expected = CONTEXT * values * (bits[types.k] + bits[types.v]) / 8
    if "turbo" in pair:  # the recent window, in f16, of the 4 sequences that llama-server makes room for
        saved = CONTEXT * (32 - bits[types.k] - bits[types.v]) // 32
        expected += min(window_slots(4), saved) * values * 2 * 2
    assert facts.size == pytest.approx(expected, abs=0.016 * cachefacts.MIB)  # llama.cpp prints each to 0.01 MiB
    assert answer.tokens > 0 and answer.decode_speed > 0
    if "turbo2" not in pair:  # a model this small may lose the thread at 2 bits
        assert re.search("sky|light", answer.text)


def test_it_says_what_it_is(start):
    """Our version and the llama.cpp in it, where stock llama.cpp has its build number and commit."""
    known = provenance.versions()
    name = f"turboquant-gguf-{known['turboquant_gguf']}+{known['llama_cpp_source'].replace(' ', '-')}"
    command = [native.tool_path("llama-server"), "--version"]
    said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    assert name in said.stdout
    request = {"prompt": "Hello", "max_tokens": 1}
    with start() as running:
        options = {"timeout": server.ANSWER_SECONDS, "trust_env": False}
        assert name in httpx.get(f"{running.url}/props", **options).json()["build_info"]
        answer = httpx.post(f"{running.url}/v1/completions", json=request, **options).json()
        assert name in answer["system_fingerprint"]


def test_it_says_what_its_cache_is(start):
    turbo4, turbo3 = (kind for kind in turboquant_gguf.types()[::-1] if kind.name != "turbo2")
    with start("turbo4:turbo3", extra_args=("--parallel", "1")) as running:
        options = {"base_url": running.url, "timeout": server.ANSWER_SECONDS, "trust_env": False}
        with httpx.Client(**options) as client:
            slots, models_, props = (client.get(path).json() for path in ("/slots", "/v1/models", "/props"))
        told = slots[0]["kv_cache"]
        assert told == models_["data"][0]["meta"]["kv_cache"]
        assert told == props["default_generation_settings"]["kv_cache"]
        window = re.search(r"recent window: the last (\d+) tokens and the first (\d+) of each", running.log())
    assert told == {
        "type_k": "turbo4",
        "type_v": "turbo3",
        "bits_k": turbo4.bits_per_value,
        "bits_v": turbo3.bits_per_value,
        "recent_window": int(window[1]),
        "sinks": int(window[2]),
    }


def test_its_log_says_what_its_cache_is(smollm2, tmp_path):
    """Where nobody asked for more of the log."""
    layers = models.catalogue()["smollm2-135m"].facts["layers"]
    command = [native.tool_path("llama-server"), "--model", smollm2, "--port", "0", "--ctx-size", "512"]
    log = tmp_path / "log"
    with log.open("w") as out, child.running([*command, "--cache-type-k", "turbo4"], stdout=out, stderr=out):
        deadline = time.monotonic() + server.START_SECONDS
        while "listening on" not in (said := log.read_text()) and time.monotonic() < deadline:
            time.sleep(server.POLL_SECONDS)
    types = r"keys in turbo4 \(4.25 bits\), values in f16 \(16 bits\)"
    found = re.search(rf"KV cache: {types}, (\d+) layers of 512 tokens, ([\d.]+) MiB each, ([\d.]+)", said)
    assert int(found[1]) == layers
    assert float(found[3]) == pytest.approx(layers * float(found[2]), rel=0.02)
    assert re.search(r"KV cache: the last \d+ tokens and the first 4 of each sequence in f16", said)


def test_answer_arrives_piece_by_piece(start):
    pieces = []
    with start() as running:
        answer = running.ask(QUESTION, max_tokens=16, on_text=pieces.append)
    assert len(pieces) > 3
    assert "".join(pieces) == answer.text


def test_proxy_of_the_environment_is_not_asked(start, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with start() as running:
        assert running.ask(QUESTION, max_tokens=2).tokens == 2


def test_server_is_stopped_whatever_happens(start):
    with pytest.raises(ZeroDivisionError), start() as running:
        url = running.url
        assert httpx.get(f"{url}/health", trust_env=False).status_code == httpx.codes.OK
        raise ZeroDivisionError
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", trust_env=False)


def test_port_in_use(start):
    with start() as running:
        port = httpx.URL(running.url).port
        with pytest.raises(TurboquantError, match=f"Port {port} cannot be used"), start(port=port):
            pass
    with start(port=port) as running:  # free again
        assert httpx.URL(running.url).port == port


def test_prompt_longer_than_the_context(start):
    with start() as running, pytest.raises(TurboquantError, match=r"refused the question.*exceeds"):
        running.ask("word " * (2 * CONTEXT))


def test_server_that_dies_over_a_question(start):
    with start() as running, pytest.raises(TurboquantError, match="llama-server was ended by SIGKILL"):
        running.ask(QUESTION, on_text=lambda _: running.process.send_signal(signal.SIGKILL))


def test_no_model_file(tmp_path):
    with pytest.raises(TurboquantError, match="There is no model file"), _server_of(tmp_path / "absent.gguf"):
        pass


def test_file_that_is_no_gguf(tmp_path):
    text = tmp_path / "text.gguf"
    text.write_text("hello")
    with pytest.raises(TurboquantError, match="is not a GGUF file"), _server_of(text):
        pass


def test_truncated_model(smollm2, tmp_path):
    half = tmp_path / "half.gguf"
    half.write_bytes(smollm2.read_bytes()[:5_000_000])
    with pytest.raises(TurboquantError, match="The model file is damaged or incomplete") as caught, _server_of(half):
        pass
    assert "not within the file bounds" in caught.value.details


def _server_of(model: Path):
    return server.running(model, CacheTypes("f16", "f16"), context=CONTEXT)


# --- what the log says ---

LOG = """
llama_kv_cache: size =   36.56 MiB (  4096 cells,  30 layers,  4/1 seqs), K (q8_0):   23.91 MiB, V (q4_0):   12.66 MiB
"""

WINDOWED_LOG = """
llama_kv_cache: size =   64.00 MiB (  8192 cells,   4 layers,  1/1 seqs), K (f16):   32.00 MiB, V (f16):   32.00 MiB
llama_kv_cache: size =   20.00 MiB (  1024 cells,  20 layers,  1/1 seqs), K (f16):   10.00 MiB, V (f16):   10.00 MiB
"""


def test_facts_of_a_log():
    facts = cachefacts.require(LOG, CacheTypes("q8_0", "q4_0"))
    assert facts.cells == 4096
    assert facts.size == round(36.57 * 2**20)
    assert facts.tokens_in(1 << 30) == int(1024 / 36.57 * 4096)


def test_recent_window_is_counted_and_does_not_grow():
    line = "llama_kv_cache: recent window: the last 32 tokens and the first 4 of each sequence in f16, 2.50 MiB\n"
    facts, without = (cachefacts.require(log, CacheTypes("q8_0", "q4_0")) for log in (LOG + line, LOG))
    assert facts.size == pytest.approx(without.size + 2.5 * 2**20, abs=1)
    assert facts.size_per_token == without.size_per_token
    assert facts.size_of(100) == without.size_of(100) + 2.5 * 2**20


def test_sliding_window_does_not_grow():
    facts = cachefacts.require(WINDOWED_LOG, CacheTypes("f16", "f16"))
    assert facts.size == 84 << 20
    assert facts.size_per_token == (64 << 20) / 8192
    assert facts.tokens_in(84 << 20) == 8192  # exactly the cache we have
    assert facts.tokens_in(20 << 20) == 0  # the window alone


@pytest.mark.parametrize("asked", ["q4_0:q4_0", "q8_0:q8_0", "f16"])
def test_other_types_than_asked_for_are_an_error(asked):
    with pytest.raises(TurboquantError, match=f"asked to be {CacheTypes.parse(asked)} and is q8_0:q4_0"):
        cachefacts.require(LOG, CacheTypes.parse(asked))


def test_one_part_of_another_type_is_an_error():
    with pytest.raises(TurboquantError, match="asked to be f16 and is q8_0:q4_0"):
        cachefacts.require(WINDOWED_LOG + LOG, CacheTypes("f16", "f16"))


def test_silent_log_is_an_error():
    with pytest.raises(TurboquantError, match="did not say what its KV cache holds"):
        cachefacts.require("server is listening", CacheTypes("f16", "f16"))


@pytest.mark.parametrize(
    ("log", "advice"),
    [
        (
            "E layer 0 of this model has a K head size of 80. Cache types that work for it: f16, q8_0",
            "work: f16, q8_0.",
        ),
        ("E K cache type q4_0 with block size 32 does not divide n_embd_head_k=80", "80 values, .* whole blocks of 32"),
        ("E srv couldn't bind HTTP server socket", "Choose another with --port"),
        ("E ggml_aligned_malloc: failed to allocate 9.00 GB", "not enough memory"),
        ("E unknown model architecture: 'next'", "older than the model's architecture"),
        ("something new", "The end of its log follows"),
    ],
)
def test_advice(log, advice):
    assert re.search(advice, str(tool_error("llama-server", 1, log)))


# --- types as users write them ---


def test_pairs_of_types():
    assert CacheTypes.parse("turbo4") == CacheTypes("turbo4", "turbo4")
    assert CacheTypes.parse(" turbo4:turbo3 ") == CacheTypes("turbo4", "turbo3")
    assert [str(CacheTypes.parse(text)) for text in ("f16:f16", "f16:q8_0")] == ["f16", "f16:q8_0"]


@pytest.mark.parametrize(("text", "hint"), [("turbo5", "turbo"), ("Turbo4", "did you mean turbo4"), ("f16:", "choose")])
def test_unknown_type(text, hint):
    with pytest.raises(UnknownTypeError, match=hint):
        CacheTypes.parse(text)


@pytest.mark.parametrize(
    "log, is_there",
    [
        ("sched_reserve:        CPU compute buffer size =    96.50 MiB\n", False),
        ("sched_reserve:  CUDA_Host compute buffer size =     9.01 MiB\n", False),
        ("sched_reserve:      CUDA0 compute buffer size =   302.75 MiB\n", True),
        (
            "sched_reserve:  CUDA_Host compute buffer size =     9.01 MiB\nx:    MTL0 compute buffer size = 1 MiB\n",
            True,
        ),
    ],
)
def test_whether_a_server_has_found_its_gpu(smollm2, monkeypatch, log, is_there):
    """llama.cpp says nothing where it finds none, and takes the CPU."""
    monkeypatch.setattr(placement, "devices", lambda *_: ["a GPU"])
    monkeypatch.setattr(server.Server, "log", lambda _: log)
    monkeypatch.setattr(server.Server, "_wait_until_ready", lambda *_: None)
    place = placement.Placement(gpu_layers=9)
    refused = nullcontext() if is_there else pytest.raises(TurboquantError, match="does not find the GPU")
    with refused, server.running(smollm2, CacheTypes("f16", "f16"), placement=place):
        pass
