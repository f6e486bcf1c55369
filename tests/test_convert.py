"""`turboquant-gguf convert`: the same model, whatever it is stored in, and nothing half-written."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file, save_file

import checkpoints
from turboquant_gguf import cli
from turboquant_gguf.errors import TurboquantError
from turboquant_gguf.llamacpp.logits import Model
from turboquant_gguf.weights import converter, value_rotation
from turboquant_gguf.weights.convert import Conversion, convert
from turboquant_gguf.weights.verify import EXACT, Comparison, compare, run_checkpoint, run_gguf

PROMPT = [int(token) for token in np.random.default_rng(0).integers(7, 260, 40)]  # longer than the sliding windows


@pytest.fixture(autouse=True)
def _tokenizer_of_the_tests():
    with checkpoints.any_pre_tokenizer():
        yield


@pytest.fixture
def llama(tmp_path):
    return checkpoints.write(tmp_path / "llama", "llama")


def quietly(folder: Path, output: Path | None = None, **options) -> Conversion:
    return convert(folder, output, console=Console(quiet=True), **options)


def tensors(path: Path) -> dict:
    return {tensor.name: tensor for tensor in converter.load()[1].GGUFReader(path).tensors}


def metadata(path: Path) -> dict:
    return {key: field.contents() for key, field in converter.load()[1].GGUFReader(path).fields.items()}


# ---- the same model ----


@pytest.mark.parametrize("name", checkpoints.ROTATABLE)
def test_logits_are_those_of_transformers(name, tmp_path):
    folder = checkpoints.write(tmp_path / "checkpoint", name)
    plain = quietly(folder, tmp_path / "plain.gguf", outtype="f32", rotate="none")
    rotated = quietly(folder, tmp_path / "rotated.gguf", outtype="f32")
    assert (rotated.architecture, rotated.reason) == (checkpoints.ROTATABLE[name][0], None)

    truth = run_checkpoint(folder, PROMPT)
    errors = [compare(truth, run_gguf(made.path, PROMPT, EXACT)).relative_error for made in (plain, rotated)]
    # float32 in another order of sums; those with GELU are near 3e-5, from ggml's table of it (checkpoints.py)
    assert errors[0] < 1e-4
    assert errors[1] < 1.2 * errors[0] + 1e-7


def is_the_same_model(folder: Path, architecture: str) -> None:
    made = quietly(folder, folder / "out.gguf", outtype="f32", rotate="none", force=True)
    assert made.architecture == architecture
    assert compare(run_checkpoint(folder, PROMPT), run_gguf(made.path, PROMPT, EXACT)).relative_error < 1e-4


@pytest.mark.parametrize("name", checkpoints.HYBRIDS_AND_EXPERTS)
def test_hybrids_and_experts(name, tmp_path):
    folder = checkpoints.write(tmp_path / "checkpoint", name)
    is_the_same_model(folder, checkpoints.HYBRIDS_AND_EXPERTS[name][0])


@pytest.mark.parametrize("name", checkpoints.HUB_SPELLINGS)
def test_names_from_before_transformers_5(name, tmp_path):
    folder = checkpoints.write(tmp_path / "checkpoint", name)
    config = json.loads((folder / "config.json").read_text())
    said, left_out = checkpoints.HUB_SPELLINGS[name]
    kept = {key: value for key, value in config.items() if key not in left_out}
    (folder / "config.json").write_text(json.dumps(kept | said))
    is_the_same_model(folder, checkpoints.HYBRIDS_AND_EXPERTS[name][0])


def test_every_architecture_on_the_list_has_earned_it():
    assert value_rotation.CHECKED == {architecture for architecture, _, _ in checkpoints.ROTATABLE.values()}


def test_architectures_that_are_named_exist():
    named = value_rotation.CHECKED | set(value_rotation.EXCLUDED)
    assert named <= set(converter.load()[1].MODEL_ARCH_NAMES.values())


@pytest.mark.parametrize(
    "name, because",
    [
        ("qwen3next", "a gate stands"),
        ("deepseek2", "MLA"),
        ("exaone4", "not on the list"),
    ],
)
def test_what_cannot_be_rotated_is_converted_without(name, because, tmp_path):
    folder = checkpoints.write(tmp_path / "checkpoint", name)
    made = quietly(folder, tmp_path / "plain.gguf", outtype="f32")
    assert not made.rotated and because in made.reason
    assert not [key for key in metadata(made.path) if key.startswith(value_rotation.KEY)]
    assert np.isfinite(run_gguf(made.path, PROMPT[:8], EXACT)).all()

    with pytest.raises(TurboquantError, match=because):
        quietly(folder, tmp_path / "rotated.gguf", rotate="values")
    assert not (tmp_path / "rotated.gguf").exists()


@pytest.mark.parametrize("dtype, outtype", [(torch.bfloat16, "bf16"), (torch.float16, "f16"), (torch.float32, "f16")])
def test_auto_keeps_the_16_bit_type(dtype, outtype, tmp_path):
    made = quietly(checkpoints.write(tmp_path / "checkpoint", "qwen2", dtype=dtype), tmp_path / "out.gguf")
    assert made.outtype == outtype
    assert tensors(made.path)["blk.0.attn_v.weight"].tensor_type.name.lower() == outtype
    assert tensors(made.path)["blk.0.attn_v.bias"].tensor_type.name == "F32"


def test_16_bit_weights_are_rotated_in_float32(tmp_path):
    folder = checkpoints.write(tmp_path / "checkpoint", "llama", dtype=torch.bfloat16)
    made = quietly(folder, tmp_path / "out.gguf", outtype="f32")
    stored = load_file(folder / "model.safetensors")["model.layers.0.self_attn.v_proj.weight"].float().numpy()
    heads = stored.astype(np.float64).reshape(-1, checkpoints.HEAD_SIZE, checkpoints.WIDTH)
    expected = (rotation(checkpoints.HEAD_SIZE) @ heads).reshape(stored.shape)
    assert np.abs(tensors(made.path)["blk.0.attn_v.weight"].data - expected).max() < 1e-6


@pytest.mark.parametrize("outtype, kl", [("q8_0", 1e-2), ("f16", 1e-5), ("bf16", 1e-3)])
def test_other_types_round_the_rotated_weights(outtype, kl, tmp_path):
    folder = checkpoints.write(tmp_path / "checkpoint", "qwen2")  # whose rows are whole blocks of 32
    made = quietly(folder, tmp_path / "out.gguf", outtype=outtype)
    assert made.rotated
    assert compare(run_checkpoint(folder, PROMPT), run_gguf(made.path, PROMPT, EXACT)).kl_mean < kl


def test_shards_make_the_same_file_as_one(tmp_path):
    whole = quietly(checkpoints.write(tmp_path / "a" / "model", "phi3"), tmp_path / "a.gguf", outtype="f32")
    folder = checkpoints.write(tmp_path / "b" / "model", "phi3", max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    parts = quietly(folder, tmp_path / "b.gguf", outtype="f32")
    found, expected = tensors(parts.path), tensors(whole.path)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name].data, expected[name].data) for name in expected)


def test_two_runs_write_the_same_bytes(llama, tmp_path):
    first, second = (quietly(llama, tmp_path / name) for name in ("first.gguf", "second.gguf"))
    assert first.path.read_bytes() == second.path.read_bytes()


def rotation(head_size: int) -> np.ndarray:
    """R = D H, by Sylvester's construction in float64."""
    h = np.ones((1, 1))
    while len(h) < value_rotation.block_size(head_size):
        h = np.block([[h, h], [h, -h]])
    blocks = np.kron(np.eye(head_size // len(h)), h / len(h) ** 0.5)
    return value_rotation.signs(head_size)[:, None] * blocks


def test_calibrated_in_one_go(llama, tmp_path):
    made = quietly(llama, tmp_path / "out.gguf", outtype="f32", calibrate=True, verify=True)
    assert made.calibrated and {"turboquant.keys.version", "turboquant.values.version"} <= metadata(made.path).keys()
    assert [path.name for path in tmp_path.glob("out*")] == ["out.gguf"]


# ---- verify ----


def test_verify_before_the_file_gets_its_name(llama, tmp_path, monkeypatch):
    assert quietly(llama, tmp_path / "good.gguf", verify=True).rotated
    monkeypatch.setattr(value_rotation, "rotate", lambda values, head_size: -values)
    with pytest.raises(TurboquantError, match="does not predict what the checkpoint predicts"):
        quietly(llama, tmp_path / "bad.gguf", verify=True)
    assert not list(tmp_path.glob("bad*"))


def test_compare_against_hand_made_logits():
    a = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], np.float32))
    b = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]], np.float32)) + 3  # an offset changes no probability
    found = compare(a, b)
    assert found.kl_mean == pytest.approx(0.5 * (0.5 * np.log(2) - 0.25 * np.log(2)), abs=1e-7)
    assert found.kl_max == pytest.approx(0.25 * np.log(2), abs=1e-7)
    assert found.top1 == 0.5
    assert found.difference == pytest.approx(3 + np.log(2), abs=1e-6)
    assert compare(a, a) == Comparison(2, 0, 0, 0, 0, 1)


def test_verify_command(llama, tmp_path):
    quietly(llama, tmp_path / "a.gguf", outtype="f32", rotate="none")
    quietly(llama, tmp_path / "b.gguf", outtype="f32")
    other = checkpoints.write(tmp_path / "other", "llama, biases")

    def run(*arguments):
        return CliRunner().invoke(cli.cli, ["verify", "--tokens", "32", "--json", *map(str, arguments)])

    for pair in ((tmp_path / "a.gguf", tmp_path / "b.gguf"), (llama, tmp_path / "b.gguf")):
        done = run(*pair, "--max-kl", "1e-9")
        figures = json.loads(done.stdout)
        assert done.exit_code == 0 and figures["same"] and figures["tokens"] == 32
    done = run(other, tmp_path / "a.gguf")
    assert done.exit_code == 1 and not json.loads(done.stdout)["same"]


# ---- bad input ----


def refused(folder: Path, match: str, tmp_path: Path, **options) -> None:
    before = set(tmp_path.iterdir())
    with pytest.raises(TurboquantError, match=match):
        quietly(folder, tmp_path / "out.gguf", **options)
    assert set(tmp_path.iterdir()) == before


def test_missing_shard(tmp_path):
    folder = checkpoints.write(tmp_path / "checkpoint", "llama", max_shard_size="200KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()
    refused(folder, r"1 of the \d+ files of weights are not in .*model-00002-of", tmp_path)


def test_truncated_shard(llama, tmp_path):
    shard = llama / "model.safetensors"
    os.truncate(shard, shard.stat().st_size - 1000)
    refused(llama, "model.safetensors is damaged or incomplete", tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("outtype", ["f32", "bf16"])
def test_weights_that_are_no_numbers(llama, tmp_path, value, outtype):
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, llama / "model.safetensors", {"format": "pt"})
    refused(llama, "blk.1.ffn_up.weight holds NaN or infinite weights", tmp_path, outtype=outtype)


def test_large_weights_are_numbers(llama, tmp_path):
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][:] = 3e38  # their sum overflows
    save_file(weights, llama / "model.safetensors", {"format": "pt"})
    assert quietly(llama, tmp_path / "out.gguf", outtype="f32").tensors


@pytest.mark.parametrize("key, value", [("num_key_value_heads", 4), ("num_attention_heads", 8), ("head_dim", 16)])
def test_configuration_of_another_model(llama, tmp_path, key, value):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {key: value}))
    refused(llama, "disagree|cannot load what was written", tmp_path)
    refused(llama, "cannot load what was written|failed on this checkpoint", tmp_path, rotate="none")


def test_unknown_architecture(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(
        json.dumps(config | {"architectures": ["HoloForCausalLM"], "model_type": "holo"})
    )
    refused(llama, "cannot convert HoloForCausalLM", tmp_path)


def test_unknown_tokenizer(llama, tmp_path, monkeypatch):
    def unknown(self, tokenizer):
        raise NotImplementedError("BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")

    monkeypatch.setattr(converter.load()[0].TextModel, "get_vocab_base_pre", unknown)
    refused(llama, "does not know this tokenizer", tmp_path)


def test_folders_that_hold_no_checkpoint(llama, tmp_path):
    refused(tmp_path / "nowhere", "does not exist", tmp_path)
    refused(llama / "config.json", "is a file", tmp_path)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no config.json", tmp_path)
    (llama / "model.safetensors").unlink()
    refused(llama, "holds no weights", tmp_path)
    (llama / "config.json").write_text('{"architectures": ')
    refused(llama, "not valid JSON", tmp_path)


QUANTIZED = {
    "AWQ (4 bits)": dict(quantization_config=dict(quant_method="awq", bits=4)),
    "bitsandbytes": dict(quantization_config=dict(quant_method="bitsandbytes", load_in_4bit=True)),
    "GPTQ (3 bits)": dict(quantization_config=dict(quant_method="gptq", bits=3)),
    "HQQ": dict(quantization_config=dict(quant_method="hqq")),
    "MLX (4 bits)": dict(quantization=dict(group_size=64, bits=4), quantization_config=dict(group_size=64, bits=4)),
    "quanto": dict(text_config=dict(quantization_config=dict(quant_method="quanto"))),
    "torchao": dict(quantization_config=dict(quant_method="torchao")),
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_checkpoints_are_refused_by_method(method, llama, tmp_path):
    configure(llama, **QUANTIZED[method])
    refused(llama, rf"is quantized with {re.escape(method)}, .*Convert the checkpoint it was made from", tmp_path)


def test_a_format_that_the_converter_does_not_know(llama, tmp_path):
    quantized = dict(quant_method="compressed-tensors", format="marlin-24", config_groups={"group_0": {"weights": {}}})
    configure(llama, quantization_config=quantized)
    refused(llama, "cannot undo how this checkpoint is quantized .*marlin-24", tmp_path)


def test_what_the_converter_can_undo_is_converted(llama, tmp_path):
    """Weights in 8-bit floats with a scale for each block of 32 x 32."""
    weights = load_file(llama / "model.safetensors")
    expected = {}
    for name in [name for name in weights if "mlp" in name]:
        weights[name] = (8 * weights[name]).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = torch.full([-(-size // 32) for size in weights[name].shape], 1 / 8)
        expected[name] = weights[name].float() / 8
    save_file(weights, llama / "model.safetensors", {"format": "pt"})
    configure(llama, quantization_config=dict(quant_method="fp8", weight_block_size=[32, 32]))
    made = quietly(llama, tmp_path / "out.gguf", outtype="f32")
    found = tensors(made.path)["blk.1.ffn_up.weight"].data
    assert np.array_equal(found, expected["model.layers.1.mlp.up_proj.weight"].numpy())


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_pointers_of_git_lfs(name, llama, tmp_path):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234\n"
    (llama / name).write_text(pointer)
    (llama / "picture.png").write_text(pointer)  # which nobody reads
    refused(llama, f"{name} in .* hold only pointers of Git LFS.* lfs pull", tmp_path)


@pytest.mark.parametrize("configured", [True, False])
def test_an_adapter_alone(configured, llama, tmp_path):
    (llama / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/model"}')
    (llama / "model.safetensors").rename(llama / "adapter_model.safetensors")
    if not configured:
        (llama / "config.json").unlink()
    refused(llama, "holds an adapter for someone/model, not a model. Merge", tmp_path)


def test_a_model_with_an_adapter_beside_it(llama, tmp_path):
    (llama / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, llama / "adapter_model.safetensors")
    assert quietly(llama, tmp_path / "out.gguf").tensors


def test_no_tokenizer(llama, tmp_path):
    for path in llama.glob("tokenizer*"):
        path.unlink()
    refused(llama, "has no tokenizer .*Download it too", tmp_path)


def test_another_tokenizer_than_the_architecture_needs(tmp_path):
    folder = checkpoints.write(tmp_path / "checkpoint", "gemma")
    (folder / "tokenizer.model").rename(folder / "spiece.model")
    refused(folder, "lacks a file that its architecture needs: tokenizer.model", tmp_path)


def configure(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_outputs_that_cannot_be_written(llama, tmp_path):
    taken = tmp_path / "taken.gguf"
    taken.write_text("precious")
    with pytest.raises(TurboquantError, match="exists already.*--force"):
        quietly(llama, taken)
    assert taken.read_text() == "precious"
    quietly(llama, taken, force=True)
    assert tensors(taken)
    with pytest.raises(TurboquantError, match="There is no folder"):
        quietly(llama, tmp_path / "nowhere" / "out.gguf")
    with pytest.raises(TurboquantError, match="is a folder"):
        quietly(llama, tmp_path)


def test_disk_that_fills_up(llama, tmp_path):
    """A limit on the size of files stands in for the end of the disk: the same failed write."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "from pathlib import Path; from rich.console import Console\n"
        "import checkpoints; from turboquant_gguf.weights.convert import convert\n"
        "with checkpoints.any_pre_tokenizer():\n"
        "    convert(Path(sys.argv[1]), Path(sys.argv[2]), outtype='f32', console=Console())\n"
    )
    command = [sys.executable, "-c", script, llama, tmp_path / "out.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    assert "could not be written whole" in done.stderr, done.stderr
    assert not list(tmp_path.glob("out*"))


def test_disk_that_is_too_small_is_noticed_before_writing(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    refused(llama, "has 0.0 GB left", tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_leaves_nothing(smollm2_folder, tmp_path, number):
    command = [sys.executable, "-m", "turboquant_gguf.cli", "convert", smollm2_folder, "-o", tmp_path / "out.gguf"]
    process = subprocess.Popen([*map(str, command), "--outtype", "q8_0"], stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.iterdir()):  # the partial file
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert not list(tmp_path.iterdir())


def test_what_is_not_installed_is_named(llama, tmp_path):
    script = "import sys; sys.modules[sys.argv.pop(1)] = None; from turboquant_gguf import cli; sys.exit(cli.main())"
    for package in ("torch", "transformers", "yaml"):
        command = [sys.executable, "-c", script, package, "convert", llama, "-o", tmp_path / "out.gguf"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert f"needs the Python package {package}" in done.stderr and "turboquant-gguf[convert]" in done.stderr


# ---- a real model ----


def test_smollm2_is_the_same_model(smollm2_rotated, smollm2_folder):
    prompt = list(range(1000, 1100))
    found = compare(run_checkpoint(smollm2_folder, prompt), run_gguf(smollm2_rotated, prompt, EXACT))
    assert found.relative_error < 1e-5


def test_command(smollm2_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.cli, ["convert", str(smollm2_folder), "--json"], catch_exceptions=False)
    report = json.loads(done.stdout)
    assert report["path"] == f"{smollm2_folder.name}-f16.gguf"  # a float32 checkpoint, auto
    assert (report["architecture"], report["rotated"], report["reason"]) == ("llama", True, None)
    assert report["size"] == (tmp_path / report["path"]).stat().st_size
    assert re.search("values rotated in the weights", done.stderr)


def test_a_closed_model_leaves_the_log_as_it_was(smollm2):
    from llama_cpp import llama_cpp

    def logger() -> int | None:
        function, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
        llama_cpp.llama_log_get(ctypes.byref(function), ctypes.byref(data))
        return ctypes.cast(function, ctypes.c_void_p).value

    before = logger()
    with Model(smollm2):
        assert logger() != before
    assert logger() == before
