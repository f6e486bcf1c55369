"""The turbo types inside llama.cpp: its own operator tests, quality on a real model, every tool that takes a type."""

import concurrent.futures
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import tiny_model
import turboquant_gguf
from turboquant_gguf.llamacpp import native, server
from turboquant_gguf.llamacpp.cachetypes import CacheTypes

ROOT = Path(__file__).parent.parent
TYPES = [kind.name for kind in turboquant_gguf.types()]


def run(tool: str | Path, *arguments: object, ok: bool = True, **environment: str) -> str:
    """Everything the program prints; it must succeed, or fail where ok is False."""
    path = native.tool_path(tool) if isinstance(tool, str) else tool
    done = subprocess.run(
        [path, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1800,
        env={**os.environ, **environment},
    )
    text = done.stdout.decode(errors="replace")
    assert (done.returncode == 0) == ok, f"{path.name} exited with {done.returncode}:\n{text[-4000:]}"
    return text


# ---- llama.cpp's own tests ----


@pytest.fixture(scope="session")
def build_folder() -> Path:
    """The build that the installed package came from."""
    folders = sorted((ROOT / "build").glob("*/CMakeCache.txt"), key=os.path.getmtime)
    if not folders:
        pytest.skip("the package was not built from this folder (python3 tools/bootstrap.py test does)")
    return folders[-1].parent


def build_test(folder: Path, name: str) -> Path:
    cmake = re.search(r"^CMAKE_COMMAND:INTERNAL=(.*)$", (folder / "CMakeCache.txt").read_text(), re.M)[1]
    if not Path(cmake).exists():
        cmake = "cmake"  # pip's copy is gone with its build environment
    subprocess.run([cmake, "--build", folder, "--target", name, "--parallel", str(os.cpu_count())], check=True)
    return folder / "bin" / name


def test_quantize_fns(build_folder: Path):
    """Quantize, dequantize and dot product of every type, turbo types among them."""
    output = run(build_test(build_folder, "test-quantize-fns"), "-v")
    for name in TYPES:
        assert re.search(rf"{name}.*dot product error.*ok", output), output


def test_backend_ops(build_folder: Path):
    """Every operator that touches a turbo type, and the rotation, against ggml's scalar reference paths.

    Memory that nobody wrote holds 0x7f7f7f7f, a huge float: what reads it does not go unnoticed.
    """
    program = build_test(build_folder, "test-backend-ops")
    assert "OK" in run(program, "test", "-b", "CPU", "-o", "MUL_MAT_HADAMARD", MALLOC_PERTURB_="128")
    output = run(program, "test", "-b", "CPU", "-p", "turbo", MALLOC_PERTURB_="128")
    for operator in ("SET_ROWS", "GET_ROWS", "CPY", "MUL_MAT", "MUL_MAT_ID", "FLASH_ATTN_EXT"):
        for name in TYPES:
            assert re.search(rf"{operator}\(.*{name}.*OK", output), f"no {operator} case with {name} ran"


# ---- quality ----


def test_kl_divergence_of_a_real_model(smollm2: Path, tmp_path: Path):
    """turbo4 is at least as close to f16 as stock q4_0, which has more bits; fewer bits are worse, but not lost."""
    text = ROOT / "python" / "turboquant_gguf" / "data" / "demo.txt"
    base = tmp_path / "f16.logits"
    common = ("--model", smollm2, "--file", text, "--ctx-size", 512, "--chunks", 3, "--kl-divergence-base", base)
    run("llama-perplexity", *common)

    def divergence(name: str) -> float:
        output = run("llama-perplexity", *common, "--kl-divergence", "--cache-type-k", name, "--cache-type-v", name)
        return float(re.search(r"Mean +KLD: +([\d.]+)", output)[1])

    kld = {name: divergence(name) for name in ("q4_0", *TYPES)}
    assert kld["turbo4"] <= kld["q4_0"]
    assert kld["turbo4"] < kld["turbo3"] < 0.25
    assert kld["turbo3"] < kld["turbo2"] < 1.2


# ---- the server, as a client sees it ----


def post(url: str, path: str, body: dict) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body, timeout=600, trust_env=False)


def complete(url: str, prompt: str, **options: object) -> dict:
    request = {"prompt": prompt, "temperature": 0, "n_predict": 12, **options}
    return post(url, "/completion", request).raise_for_status().json()


CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid"}


def test_four_slots_at_once(model: Path):
    """Four requests side by side, each on a slot of its own."""
    with server.running(model, CacheTypes.parse("turbo4"), context=2048, extra_args=("--parallel", "4")) as running:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(lambda land: complete(running.url, f"The capital of {land} is"), CAPITALS))
    assert {reply["id_slot"] for reply in replies} == {0, 1, 2, 3}
    for capital, reply in zip(CAPITALS.values(), replies):
        assert capital in reply["content"]


def test_openai_chat(smollm2: Path):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 8}
    with server.running(smollm2, CacheTypes.parse("turbo3"), context=512) as running:
        reply = post(running.url, "/v1/chat/completions", body).raise_for_status().json()
    assert reply["choices"][0]["message"]["content"] and reply["usage"]["completion_tokens"] > 0


def test_slot_survives_saving_and_refuses_another_type(model: Path, tmp_path: Path):
    """A saved slot goes on where it was; a server with another cache type says no instead of reading it wrongly."""
    save = ("--slot-save-path", str(tmp_path), "--parallel", "1")
    types, others = CacheTypes.parse("turbo4:turbo3"), CacheTypes.parse("turbo3")
    prompt = "The capital of France is"
    with server.running(model, types, context=512, extra_args=save) as running:
        complete(running.url, prompt)
        said = complete(running.url, prompt)[
            "content"
        ]  # with the prompt in the slot: its last token is read alone, as below
        post(running.url, "/slots/0?action=save", {"filename": "slot"}).raise_for_status()
    with server.running(model, types, context=512, extra_args=save) as running:
        post(running.url, "/slots/0?action=restore", {"filename": "slot"}).raise_for_status()
        again = complete(running.url, prompt)
        assert again["content"] == said
        assert again["timings"]["prompt_n"] < 3  # the prompt was in the slot
    with server.running(model, others, context=512, extra_args=save) as running:
        assert post(running.url, "/slots/0?action=restore", {"filename": "slot"}).is_error
        assert "Paris" in complete(running.url, prompt)["content"]


def test_draft_model(model: Path):
    """Speculative decoding with turbo caches on both sides."""
    draft = (
        "--model-draft",
        str(model),
        "--spec-type",
        "draft-simple",
        "--cache-type-k-draft",
        "turbo4",
        "--cache-type-v-draft",
        "turbo4",
    )
    with server.running(model, CacheTypes.parse("turbo4"), context=512, extra_args=draft) as running:
        reply = complete(running.url, "The capital of France is", n_predict=32)
    assert "Paris" in reply["content"]
    assert reply["timings"]["draft_n_accepted"] > 0


def test_context_shift(model: Path):
    """Keys that have been shifted (decoded, turned back, moved, encoded again) still carry the text."""
    shift = ("--context-shift", "--parallel", "1", "--keep", "4")
    with server.running(model, CacheTypes.parse("turbo4"), context=256, extra_args=shift) as running:
        reply = complete(running.url, "Once upon a time there was a", n_predict=400, ignore_eos=True, n_probs=1)
        assert "context shift" in running.log()
    assert reply["tokens_predicted"] == 400
    # the model goes on in English and is sure of it; over keys that fit nothing it is neither
    tail = reply["content"][-300:]
    assert re.fullmatch(r"[A-Za-z0-9\s.,;:!?'\"()\-\u2018-\u201d]+", tail), tail
    sure = [token["logprob"] for token in reply["completion_probabilities"][-150:]]
    assert sum(sure) / len(sure) > -1.5


# ---- the other tools ----


def test_bench(smollm2: Path):
    types = ("-ctk", "turbo4", "-ctv", "turbo2", "-fa", "1")
    output = run("llama-bench", "--model", smollm2, *types, "-p", "16", "-n", "4", "-r", "1", "-o", "json")
    (prefill, decode) = json.loads(output[output.index("[") :])
    assert prefill["type_k"] == decode["type_k"] == "turbo4"
    assert prefill["type_v"] == decode["type_v"] == "turbo2"
    assert prefill["avg_ts"] > 0 and decode["avg_ts"] > 0


@pytest.mark.parametrize("name", TYPES)
def test_weights(name: str, tmp_path: Path):
    """llama-quantize writes turbo weights, and the model runs."""
    model = tiny_model.write(tmp_path / "tiny.gguf")
    quantized = tmp_path / "quantized.gguf"
    assert name in run("llama-quantize", model, quantized, name.upper(), 2).lower()
    assert quantized.stat().st_size < model.stat().st_size / 3
    text = tmp_path / "text.txt"
    text.write_text("a model of random weights has nothing to say, but it must say it\n" * 20)
    output = run("llama-perplexity", "--model", quantized, "--file", text, "--ctx-size", 128, "--chunks", 2, "-lv", 4)
    assert name.upper() in output
    assert 50 < float(re.search(r"Final estimate: PPL = ([\d.]+)", output)[1]) < 5000


REFUSED = {  # by what llama.cpp is asked for, with a model of this head size: the reason
    "head size": (80, ("-ctk", "turbo4"), {}, r"K head size of 80\. Cache types that work for it: f16, bf16, f32"),
    "head size of values": (80, ("-ctv", "turbo3", "-fa", "1"), {}, "V head size of 80"),
    "flash attention": (64, ("-ctv", "turbo4", "-fa", "0"), {}, "quantized V cache requires flash_attn"),
    "recent window": (64, ("-ctk", "turbo4"), {"TURBO_CACHE_WINDOW": "1e9"}, "1e9"),
}
TOOLS = {
    "llama-server": (),
    "llama-perplexity": ("--ctx-size", "128"),
    "llama-bench": ("--n-prompt", "8", "--n-gen", "0"),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("case", REFUSED)
def test_the_reason_of_a_refusal_is_the_last_line(case: str, tool: str, tmp_path: Path):
    head_size, flags, environment, reason = REFUSED[case]
    model, text = tiny_model.write(tmp_path / "tiny.gguf", head_size=head_size), tmp_path / "text.txt"
    text.write_text("some text that is long enough for one chunk\n" * 40)
    arguments = [*TOOLS[tool], *(("--file", text) if tool == "llama-perplexity" else ()), *flags]
    output = run(tool, "--model", model, *arguments, ok=False, **environment)
    lines = [line for line in output.strip().splitlines() if not line.startswith("|")]  # llama-bench ends its table
    if case == "recent window" and tool != "llama-bench":  # they read it as an option, and show how options are used
        lines = [line for line in lines if "error while handling" in line]
        reason = "TURBO_CACHE_WINDOW.*'1e9' is not a number of tokens"
    assert re.search(reason, lines[-1]), output[-2000:]


# ---- Python ----


def test_llama_cpp_python_uses_our_library(tmp_path: Path):
    """The bindings load the libllama of this package, and a model runs on a turbo cache through them."""
    pytest.importorskip("llama_cpp", reason="needs the extra `python`")
    script = """
import sys, turboquant_gguf, llama_cpp
from turboquant_gguf.llamacpp import native
assert str(native.library_dir()) in llama_cpp.llama_cpp._lib._name, llama_cpp.llama_cpp._lib._name
number = {kind.name: kind.ggml_type for kind in turboquant_gguf.types()}
model = llama_cpp.Llama(sys.argv[1], n_ctx=256, type_k=number["turbo4"], type_v=number["turbo3"], flash_attn=True)
print(len(model.create_completion("hello", max_tokens=8, temperature=0)["choices"][0]["text"]) > 0)
"""
    model = tiny_model.write(tmp_path / "tiny.gguf")
    done = subprocess.run([sys.executable, "-c", script, model], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("True"), done.stderr[-4000:]
    assert re.search(r"K \(turbo4\).*V \(turbo3\)", done.stderr), done.stderr[-4000:]
