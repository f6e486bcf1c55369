"""Hugging Face checkpoint folders: found whole, or refused with the reason."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from .errors import TurboquantError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"


def find(folder: Path) -> list[Path]:
    """The safetensors files of the checkpoint in `folder`; none if it has the older pytorch_model*.bin.

    Raises TurboquantError if it is no checkpoint, or if files are missing.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.is_file() else "does not exist"
        raise TurboquantError(f"{folder} {what}. Give the folder of a Hugging Face checkpoint (with its config.json).")
    _json(folder / CONFIG)
    shards = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        named = set(_json(folder / INDEX).get("weight_map", {}).values())
        if missing := sorted(name for name in named if not (folder / name).is_file()):
            raise TurboquantError(
                f"{len(missing)} of the {len(named)} files of weights are not in {folder}: {', '.join(missing)}. "
                "Download the checkpoint again."
            )
        shards = sorted(folder / name for name in named)
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if not shards and not pickles:
        raise TurboquantError(f"{folder} holds no weights (*.safetensors or pytorch_model*.bin). Download them too.")
    for path in [] if shards else pickles:
        if not zipfile.is_zipfile(path):
            raise TurboquantError(
                f"{path} is damaged, or in the format of PyTorch before 1.6. Download it again, or get the checkpoint "
                "with safetensors."
            )
    return shards


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
