"""Values rotated in the weights: the plan, the mathematics, and what llama.cpp makes of such a file."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoModelForCausalLM

import checkpoints
from turboquant_gguf.errors import TurboquantError
from turboquant_gguf.llamacpp import native
from turboquant_gguf.llamacpp.cachetypes import CacheTypes
from turboquant_gguf.llamacpp.logits import Model
from turboquant_gguf.weights import converter, value_rotation
from turboquant_gguf.weights.convert import convert
from turboquant_gguf.weights.value_rotation import Columns, NotRotatable, Rows
from turboquant_gguf.weights.verify import EXACT, compare, run_checkpoint, run_gguf

PROMPT = list(range(1000, 1200))


# ---- the transform ----


@given(head_size=st.sampled_from([1, 2, 16, 48, 64, 80, 96, 128, 256]), heads=st.integers(1, 3), seed=st.integers(0, 9))
def test_rotation_is_orthogonal(head_size, heads, seed):
    values = np.random.default_rng(seed).standard_normal((5, heads * head_size)).astype(np.float32)
    rotated = value_rotation.rotate(values, head_size)
    assert rotated.shape == values.shape and rotated.dtype == np.float32
    # an orthogonal map keeps all dot products within a head; errors are a few roundings of sums of head_size terms
    for head in range(heads):
        part = slice(head * head_size, (head + 1) * head_size)
        before, after = (x[:, part].astype(np.float64) for x in (values, rotated))
        assert np.abs(after @ after.T - before @ before.T).max() < 1e-5 * head_size


def test_an_outlier_is_spread_over_its_block():
    values = np.zeros((1, 2 * 96), np.float32)
    values[0, 96 + 40] = 32**0.5  # second head, second block of 32
    rotated = value_rotation.rotate(values, 96)
    assert np.abs(rotated[0, 96 + 32 : 96 + 64]) == pytest.approx(np.ones(32))
    assert np.count_nonzero(rotated) == 32


def test_signs_never_change():
    """They are part of the file format: docs/value-rotation.md gives these."""
    assert "".join("+-"[int(sign < 0)] for sign in value_rotation.signs(64)) == SIGNS
    assert np.array_equal(value_rotation.signs(128)[:64], value_rotation.signs(64))


SIGNS = "--+-++-+-+--+-++++++-++----++--+----+-++---+----+---+-++---+++--"


def test_a_rotation_after_ours_does_not_undo_it():
    """A stock llama.cpp rotates a quantized value cache by H: H D H mixes, where H H would give the outlier back."""
    values = np.zeros((1, 64), np.float32)
    values[0, 7] = 8
    again = value_rotation.rotate(values, 64) @ value_rotation.hadamard(64)
    assert np.abs(again).max() < 4


def test_hadamard_on_queries_and_keys_before_rope_changes_the_model(tmp_path):
    """Why queries and keys are rotated at run time: H and RoPE do not commute."""
    folder = checkpoints.write(tmp_path / "llama", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor([PROMPT[:40]]) % checkpoints.VOCABULARY
    nowhere = torch.zeros_like(tokens)  # at position 0, RoPE is the identity

    def run() -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            return model(tokens).logits[0].numpy(), model(tokens, position_ids=nowhere).logits[0].numpy()

    before = run()
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                rows = projection.weight.numpy()
                part = Rows(0, len(rows), checkpoints.HEAD_SIZE)
                projection.weight.copy_(torch.from_numpy(value_rotation.apply(part, rows)))
    after = run()
    assert compare(before[1], after[1]).relative_error < 1e-5  # without positions it would be exact
    assert compare(before[0], after[0]).relative_error > 0.05


# ---- the plan ----


def llama(heads=4, kv_heads=2, layers=1, **extra):
    return {
        "llama.block_count": layers,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        **extra,
    }


def test_plan_of_separate_projections():
    shapes = {"blk.0.attn_output.weight": (96, 128), "blk.0.attn_v.weight": (64, 96), "blk.0.attn_v.bias": (64,)}
    assert value_rotation.plan("llama", llama(), shapes).parts == {
        "blk.0.attn_output.weight": Columns(32),
        "blk.0.attn_v.weight": Rows(0, 64, 32),
        "blk.0.attn_v.bias": Rows(0, 64, 32),
    }


def test_plan_of_fused_projections_with_other_key_size():
    shapes = {"blk.0.attn_output.weight": (96, 128), "blk.0.attn_qkv.weight": ((4 + 2) * 48 + 64, 96)}
    metadata = llama(**{"llama.attention.key_length": 48, "llama.attention.value_length": 32})
    assert value_rotation.plan("llama", metadata, shapes).parts["blk.0.attn_qkv.weight"] == Rows(288, 64, 32)


def test_plan_of_layers_that_differ():
    """Head counts and head sizes by layer, a layer without attention, and one that is counted but not stored."""
    metadata = llama(heads=[4, 4, 2, 4], kv_heads=[2, 0, 1, 2], layers=4)
    metadata["llama.attention.value_length"] = [32, 32, 128, 32]
    shapes = {
        "blk.0.attn_output.weight": (96, 128),
        "blk.0.attn_v.weight": (64, 96),
        "blk.1.shortconv.conv.weight": (96, 3),
        "blk.2.attn_output.weight": (96, 256),
        "blk.2.attn_v.weight": (128, 96),
    }
    plan = value_rotation.plan("llama", metadata, shapes)
    assert plan.parts["blk.2.attn_v.weight"] == Rows(0, 128, 128)
    assert plan.metadata()["turboquant.values.size"] == [32, 0, 128, 0]


@pytest.mark.parametrize(
    "change, because",
    [
        ({"llama.attention.clamp_kqv": 8.0}, "clamps"),
        ({"output": None}, "no blk.0.attn_output.weight"),
        ({"value": None}, "neither"),
    ],
)
def test_no_plan(change, because):
    shapes = {"blk.0.attn_output.weight": (96, 128), "blk.0.attn_v.weight": (64, 96), "blk.0.ffn_up.weight": (9, 96)}
    if "output" in change:
        del shapes["blk.0.attn_output.weight"]
    if "value" in change:
        del shapes["blk.0.attn_v.weight"]
    with pytest.raises(NotRotatable, match=because):
        value_rotation.plan("llama", llama(**{k: v for k, v in change.items() if v}), shapes)


@pytest.mark.parametrize("architecture", ["bitnet", "qwen35", "deepseek2", "mamba"])
def test_no_plan_for_architectures_where_it_would_be_wrong_or_is_unknown(architecture):
    with pytest.raises(NotRotatable):
        value_rotation.plan(architecture, {}, {})


def test_shapes_that_contradict_the_metadata():
    shapes = {"blk.0.attn_output.weight": (96, 128), "blk.0.attn_v.weight": (96, 96)}
    with pytest.raises(TurboquantError, match=r"blk.0.attn_v.weight has the shape \(96, 96\).*4 heads and 2 KV heads"):
        value_rotation.plan("llama", llama(), shapes)


# ---- what llama.cpp makes of the file ----


def test_metadata(smollm2_rotated):
    fields = converter.load()[1].GGUFReader(smollm2_rotated).fields
    found = {key: field.contents() for key, field in fields.items() if key.startswith("turboquant.")}
    assert found == {
        "turboquant.values.version": 1,
        "turboquant.values.transform": "hadamard",
        "turboquant.values.size": 64,
        "turboquant.values.sign_seed": 1,
    }


def run_elsewhere(model: Path, types: str, libraries: Path = native.library_dir(), **environment: str) -> np.ndarray:
    """The logits of PROMPT from another process, with its own libllama and environment."""
    script = (
        "import sys, numpy; from pathlib import Path\n"
        "from turboquant_gguf.llamacpp.cachetypes import CacheTypes\n"
        "from turboquant_gguf.weights.verify import run_gguf\n"
        "logits = run_gguf(Path(sys.argv[1]), range(1000, 1200), CacheTypes.parse(sys.argv[2]))\n"
        "numpy.save(sys.argv[3], logits)\n"
    )
    out = model.with_name("logits.npy")
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(libraries), **environment}
    subprocess.run([sys.executable, "-c", script, model, types, out], env=environment, check=True, timeout=300)
    return np.load(out)


def test_values_are_not_rotated_again_at_run_time(smollm2_rotated, smollm2_plain):
    """Turning the run-time rotation off changes nothing for a rotated file, and something for a plain one."""
    for model, same in ((smollm2_rotated, True), (smollm2_plain, False)):
        with_rotation, without = (run_elsewhere(model, "f32:turbo3", LLAMA_ATTN_ROT_DISABLE=off) for off in "01")
        assert np.array_equal(with_rotation, without) == same


def test_unknown_version_is_refused(tmp_path):
    model = checkpoints.gguf(tmp_path, "llama", rotate="values")
    content = model.read_bytes()
    key = b"turboquant.values.version"
    old = key + struct.pack("<II", 4, 1)  # a uint32, and its value
    assert content.count(old) == 1
    model.write_bytes(content.replace(old, key + struct.pack("<II", 4, 2)))
    with pytest.raises(TurboquantError) as error:
        Model(model)
    assert "turboquant.values.version is 2, and this build knows version 1 only" in error.value.details


@pytest.mark.parametrize("tensor, refused", [("attn_v", True), ("attn_output", True), ("attn_q", False)])
def test_adapter_of_the_original_weights(tmp_path, tensor, refused):
    """A LoRA adapter was trained on weights that are not there any more, where they were rotated."""
    from llama_cpp import llama_cpp

    folder = checkpoints.write(tmp_path / "checkpoint", "llama")
    adapter = write_adapter(tmp_path / "adapter.gguf", tensor)
    for rotate in ("values", "none"):
        with checkpoints.any_pre_tokenizer():
            path = convert(folder, tmp_path / f"{rotate}.gguf", rotate=rotate, console=Console(quiet=True)).path
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        try:
            loaded = llama_cpp.llama_adapter_lora_init(model, str(adapter).encode())
            assert bool(loaded) == (not refused or rotate == "none")
        finally:
            llama_cpp.llama_model_free(model)


def write_adapter(path: Path, tensor: str) -> Path:
    gguf = converter.load()[1]
    rows, columns = {
        "attn_v": (64, checkpoints.WIDTH),
        "attn_q": (128, checkpoints.WIDTH),
        "attn_output": (checkpoints.WIDTH, 128),
    }[tensor]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 1.0)
    writer.add_tensor(f"blk.0.{tensor}.weight.lora_a", np.ones((4, columns), np.float32))
    writer.add_tensor(f"blk.0.{tensor}.weight.lora_b", np.ones((rows, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_stock_llama_cpp_runs_the_file(smollm2_rotated, smollm2_plain, smollm2_folder, stock_libraries):
    """With an f16 cache as with ours; with a quantized one, its own rotation comes on top and does no harm."""
    stock = run_elsewhere(smollm2_rotated, "f16", stock_libraries)
    assert np.array_equal(stock, run_elsewhere(smollm2_rotated, "f16"))
    truth = run_checkpoint(smollm2_folder, PROMPT)
    plain, rotated = (
        compare(truth, run_elsewhere(model, "f16:q4_0", stock_libraries)) for model in (smollm2_plain, smollm2_rotated)
    )
    assert rotated.kl_mean < 1.25 * plain.kl_mean  # 200 tokens: the noise of one drawing of rounding errors


def test_quantizing_keeps_the_mark(smollm2_rotated, tmp_path):
    quantized = tmp_path / "q8_0.gguf"
    command = [native.tool_path("llama-quantize"), smollm2_rotated, quantized, "Q8_0"]
    subprocess.run(command, check=True, capture_output=True)
    assert "turboquant.values.version" in converter.load()[1].GGUFReader(quantized).fields
    assert compare(run_gguf(smollm2_rotated, PROMPT, EXACT), run_gguf(quantized, PROMPT, EXACT)).kl_mean < 1e-2


@pytest.mark.parametrize("types", ["turbo4", "turbo3", "f32:turbo2"])
def test_quantized_caches_lose_no_quality(smollm2_rotated, smollm2_plain, types):
    cache = CacheTypes.parse(types)
    losses = []
    for model in (smollm2_plain, smollm2_rotated):
        losses.append(compare(run_gguf(model, PROMPT, EXACT), run_gguf(model, PROMPT, cache)).kl_mean)
    assert losses[1] < 1.25 * losses[0]  # as above
