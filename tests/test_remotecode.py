"""Checkpoints that bring Python files: nothing in them runs unless it is allowed, whatever config.json says."""

import json
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from rich.console import Console

import checkpoints
from turboquant_gguf import cli
from turboquant_gguf.errors import TurboquantError
from turboquant_gguf.weights import converter
from turboquant_gguf.weights.convert import convert
from turboquant_gguf.weights.remotecode import RemoteCodeError, allowed
from turboquant_gguf.weights.verify import run_checkpoint

HOSTILE = """\
open({marker!r}, "a").write(__name__ + "\\n")
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, Qwen2ForCausalLM
from .helper import nothing


class Config(PreTrainedConfig):
    model_type = "hostile"


class Tokenizer(PreTrainedTokenizerFast):
    pass


class Model(Qwen2ForCausalLM):
    pass
"""
PARTS = {"AutoConfig": "configuration", "AutoTokenizer": "tokenization", "AutoModelForCausalLM": "modeling"}


@pytest.fixture(autouse=True)
def _tokenizer_of_the_tests(monkeypatch):
    def asked(prompt=""):
        raise AssertionError(f"the terminal was asked: {prompt}")

    monkeypatch.setattr("builtins.input", asked)
    with checkpoints.any_pre_tokenizer():
        yield


@pytest.fixture(scope="module")
def harmless(tmp_path_factory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("harmless") / "model", "qwen2")


@pytest.fixture
def hostile(harmless, tmp_path):
    """Makes a Qwen2 checkpoint whose Python files leave `ran` in tmp_path. changes: of config.json."""

    def make(**changes: object) -> Path:
        folder = shutil.copytree(harmless, tmp_path / "hostile", dirs_exist_ok=True)
        for part in PARTS.values():
            (folder / f"{part}_hostile.py").write_text(HOSTILE.format(marker=str(tmp_path / "ran")))
        (folder / "helper.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('helper\\n')\nnothing = None\n")
        classes = {
            auto: f"{part}_hostile.{auto.removeprefix('Auto').removesuffix('ForCausalLM')}"
            for auto, part in PARTS.items()
        }
        edit(folder / "config.json", auto_map=classes, **changes)
        tokenizers = {"AutoTokenizer": ["tokenization_hostile.Tokenizer", "tokenization_hostile.Tokenizer"]}
        edit(folder / "tokenizer_config.json", auto_map=tokenizers, tokenizer_class="HostileTokenizer")
        return folder

    return make


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def architectures() -> list[str]:
    """One name for each class of the converter."""
    conversion = converter.load()[0]
    conversion.load_all_models()
    known = conversion.ModelBase._model_classes[conversion.ModelType.TEXT]
    return sorted({cls: name for name, cls in known.items()}.values())


def read_vocabulary(architecture: str, folder: Path) -> None:
    """Has the converter's class for `architecture` read the tokenizer in `folder`, whatever the weights are."""
    conversion, gguf = converter.load()
    model = object.__new__(conversion.get_model_class(architecture))
    model.dir_model = model.target_model_dir = folder
    model.hparams = json.loads((folder / "config.json").read_text())
    model.hf_arch, model.block_count, model.gguf_writer = architecture, 2, gguf.GGUFWriter(None, "llama")
    model.origin_hf_arch, model._ssm_layers, model._tokenizer_is_xlmroberta = None, [], False
    for source in folder.glob("*.py"):  # transformers keeps what it has imported by its hash
        source.write_text(f"{source.read_text()}# {architecture}\n")
    with suppress(Exception, SystemExit):  # most cannot do with a tokenizer of bytes
        model.set_vocab()


@pytest.mark.parametrize("architecture", architectures())
def test_no_architecture_runs_code_unasked(architecture, hostile, tmp_path):
    folder = hostile(architectures=[architecture], model_type="unheard_of")
    with allowed(False, Console(quiet=True)):
        read_vocabulary(architecture, folder)
    assert not (tmp_path / "ran").exists()


def test_most_architectures_would_have_run_it(hostile, tmp_path):
    """The test above tests something: where code is allowed, it runs."""
    ran, folder = set(), hostile(model_type="unheard_of")
    for architecture in architectures():
        with allowed(True, Console(quiet=True)):
            read_vocabulary(architecture, folder)
        if (tmp_path / "ran").exists():
            ran.add(architecture)
            (tmp_path / "ran").unlink()
    assert len(ran) >= 130
    assert ran >= {"DreamModel", "ChatGLMForConditionalGeneration", "LLaDAModelLM", "MiniMaxM2ForCausalLM"}
    assert ran >= {"HunYuanMoEV1ForCausalLM", "KimiLinearForCausalLM", "DeepseekForCausalLM", "NemotronHForCausalLM"}


def test_a_class_of_the_library_is_enough(hostile, tmp_path):
    """The checkpoint of the report: Qwen2 by its type, Dream by its architecture."""
    folder = hostile(architectures=["DreamModel"])
    made = convert(folder, tmp_path / "out.gguf", outtype="f32", console=Console(quiet=True))
    assert made.architecture == "dream" and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("owner", ["", "someone/else--"])
def test_what_needs_code_is_refused_by_the_name_of_the_file(owner, hostile, tmp_path, capsys):
    folder = hostile(architectures=["SeedOssForCausalLM"], model_type="unheard_of")
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, f"{owner}tokenization_hostile.Tokenizer"]})
    assert cli.main(["convert", str(folder), "-o", str(tmp_path / "out.gguf")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "tokenization_hostile.py" + (" of someone/else" if owner else ",") in said
    assert said.endswith("add --trust-remote-code.") and said.startswith("Error: The checkpoint cannot be read")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out.gguf").exists()


def test_allowed_code_is_named_and_runs(hostile, tmp_path, capsys):
    folder = hostile(architectures=["SeedOssForCausalLM"], model_type="unheard_of")
    assert cli.main(["convert", str(folder), "-o", str(tmp_path / "out.gguf"), "--trust-remote-code"]) == 0
    said = capsys.readouterr().out
    for name in ("configuration_hostile.py", "tokenization_hostile.py", "helper.py"):
        assert said.count(f"Running code that the checkpoint names: {name}\n") == 1
    assert "modeling_hostile.py" not in said and "Failed to load" not in said
    ran = (tmp_path / "ran").read_text()
    assert "tokenization_hostile" in ran and "helper" in ran and "modeling" not in ran


def test_running_a_checkpoint_is_no_other(hostile, tmp_path):
    expected = run_checkpoint(hostile(), [1, 2, 3])
    assert expected.shape[0] == 3 and not (tmp_path / "ran").exists()
    with pytest.raises(RemoteCodeError, match="configuration_hostile.py"):
        run_checkpoint(hostile(model_type="unheard_of"), [1, 2, 3])
    assert not (tmp_path / "ran").exists()
    run_checkpoint(hostile(), [1, 2, 3], trust_remote_code=True)
    assert not (tmp_path / "ran").exists()  # allowed is not wanted


def test_a_kernel_that_the_configuration_names_is_not_fetched(hostile, monkeypatch):
    from transformers.integrations import hub_kernels

    fetched = []
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda name, **_: fetched.append(name))
    with pytest.raises(RemoteCodeError, match="the kernel someone/kernel"):
        run_checkpoint(hostile(attn_implementation="someone/kernel"), [1, 2, 3])
    assert not fetched


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_weights_that_are_code_are_refused(save, hostile, tmp_path):
    folder = hostile()
    (folder / "model.safetensors").unlink()
    save({"model.embed_tokens.weight": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(TurboquantError, match=r"pytorch_model.*\.bin .* with safetensors"):
        convert(folder, tmp_path / "out.gguf", console=Console(quiet=True))
    with pytest.raises(TurboquantError, match="transformers cannot load"):
        run_checkpoint(folder, [1, 2, 3])
    assert not (tmp_path / "ran").exists()


def test_transformers_is_as_before_afterwards(hostile, tmp_path):
    from transformers import dynamic_module_utils
    from transformers.models.auto import configuration_auto

    before = dynamic_module_utils.get_cached_module_file, configuration_auto.resolve_trust_remote_code
    with suppress(RemoteCodeError), allowed(False, Console(quiet=True)):
        raise RemoteCodeError("")
    assert before == (dynamic_module_utils.get_cached_module_file, configuration_auto.resolve_trust_remote_code)
