"""Hugging Face checkpoint folders: found whole, or refused with the reason."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from ..errors import TurboquantError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "tokenizer.jsonl", "tokenizer.tok.json", "spiece.model", "tekken.json",
    "vocab.txt", "vocab.json", "*.tiktoken", "*.bpe.model", "rwkv_vocab*.txt",
)  # fmt: skip
"""Files of which one at least is there if there is a tokenizer."""

DEQUANTIZED = ("bitnet", "compressed-tensors", "fp8", "gptq", "modelopt", "mxfp4")
"""Methods of quantization that llama.cpp's converter can undo, or keeps."""

_METHODS = {"awq": "AWQ", "bitsandbytes": "bitsandbytes", "hqq": "HQQ", "gptq": "GPTQ", "exl2": "EXL2", "exl3": "EXL3"}
_LFS = b"version https://git-lfs.github.com/spec/"


def find(folder: Path) -> list[Path]:
    """The safetensors files of the checkpoint in `folder`; none if it has the older pytorch_model*.bin.

    Raises TurboquantError if it is no checkpoint, if files are missing, or if it is quantized in a way that cannot be
    undone.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.is_file() else "does not exist"
        raise TurboquantError(f"{folder} {what}. Give the folder of a Hugging Face checkpoint (with its config.json).")
    _require_fetched(folder)
    shards = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if (folder / ADAPTER).is_file() and not ((folder / CONFIG).is_file() and (shards or pickles)):
        base = _json(folder / ADAPTER).get("base_model_name_or_path") or "another model"
        raise TurboquantError(
            f"{folder} holds an adapter for {base}, not a model. Merge the two first (merge_and_unload of the package "
            "peft) and convert what that saves."
        )
    _require_unquantized(folder, _json(folder / CONFIG))
    if (folder / INDEX).is_file():
        named = set(_json(folder / INDEX).get("weight_map", {}).values())
        if missing := sorted(name for name in named if not (folder / name).is_file()):
            raise TurboquantError(
                f"{len(missing)} of the {len(named)} files of weights are not in {folder}: {', '.join(missing)}. "
                "Download the checkpoint again."
            )
        shards = sorted(folder / name for name in named)
    if not shards and not pickles:
        raise TurboquantError(f"{folder} holds no weights (*.safetensors or pytorch_model*.bin). Download them too.")
    for path in [] if shards else pickles:
        if not zipfile.is_zipfile(path):
            raise TurboquantError(
                f"{path} is damaged, or in the format of PyTorch before 1.6. Download it again, or get the checkpoint "
                "with safetensors."
            )
    if not any(path for pattern in TOKENIZERS for path in folder.glob(pattern)):
        raise TurboquantError(f"{folder} has no tokenizer (tokenizer.json or tokenizer.model). Download it too.")
    return shards


def _require_fetched(folder: Path) -> None:
    """Raise TurboquantError if files that are read are only pointers to files."""
    weights = "model*.safetensors" if any(folder.glob("model*.safetensors")) else "pytorch_model*.bin"
    read = {path for pattern in ("*.json", weights, *TOKENIZERS) for path in folder.glob(pattern)}
    pointers = sorted(path.name for path in read if _begins_with(path, _LFS))
    if pointers:
        raise TurboquantError(
            f"{', '.join(pointers[:3])}{', ...' if pointers[3:] else ''} in {folder} hold only pointers of Git LFS. "
            f"Fetch what they stand for: git -C {folder} lfs pull"
        )


def _begins_with(path: Path, content: bytes) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(content)) == content


def _require_unquantized(folder: Path, config: dict) -> None:
    found = next(
        (
            part[key]
            for part in (config, config.get("text_config") or {})
            for key in ("quantization_config", "quantization")  # the second is MLX's
            if isinstance(part.get(key), dict)
        ),
        None,
    )
    if found is None:
        return
    bits = found.get("bits")
    method = found.get("quant_method") or ("MLX" if bits else None)
    if method is None or method in DEQUANTIZED and (method, bits) != ("gptq", 3):
        return
    how = _METHODS.get(method, method) + (f" ({bits} bits)" if bits else "")
    raise TurboquantError(
        f"{folder} is quantized with {how}, which llama.cpp's converter cannot undo. Convert the checkpoint it was "
        "made from; --outtype q8_0 or llama-quantize makes that small."
    )


def check_whole(shard: Path) -> None:
    """Raise TurboquantError unless the safetensors file holds all that it says. Needs safetensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="numpy"):
            pass
    except SafetensorError as error:
        raise TurboquantError(f"{shard} is damaged or incomplete ({error}). Download it again.") from error


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise TurboquantError(
            f"{path.parent} has no {path.name}, so it is no Hugging Face checkpoint. Give the folder that holds it."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TurboquantError(f"{path} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(found, dict):
        raise TurboquantError(f"{path} does not hold a JSON object. Download it again.")
    return found
