"""Texts to measure with: a file, or WikiText-2 by name."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ..errors import TurboquantError

WIKITEXT = "wikitext-2"
_DATASET = {
    "path": "Salesforce/wikitext",
    "name": "wikitext-2-raw-v1",
    "split": "test",
    "revision": "b08601e04326c79dfdd32d625aee71d232d685c3",
}


@dataclass(frozen=True)
class Text:
    """A text and what it is called in results."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """SHA-256 of its UTF-8 bytes, in hex digits."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def load(source: str) -> Text:
    """The text of a UTF-8 file, or the raw test split of WikiText-2 for the name "wikitext-2".

    A file of that name goes first. Raises TurboquantError as `read` does.
    """
    if source == WIKITEXT and not Path(source).exists():
        return Text(WIKITEXT, _wikitext())
    return Text(Path(source).name, read(Path(source)))


def read(path: Path) -> str:
    """The content of a UTF-8 file, with its own ends of lines, as llama.cpp reads it.

    Raises TurboquantError if there is no such file, if it cannot be read, is empty or no UTF-8.
    """
    if not path.is_file():
        raise TurboquantError(f"There is no text file {path}. Give the path of one.")
    try:
        content = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise TurboquantError(f"{path} is not UTF-8 text (byte {error.start}). Convert it, or give another.") from error
    except OSError as error:
        raise TurboquantError(f"The text file {path} cannot be read: {error.strerror}.") from error
    if not content.strip():
        raise TurboquantError(f"The text file {path} is empty. Give another.")
    return content


def bundled(name: str) -> str:
    """The content of a file of this package, such as "demo.txt"."""
    return files("turboquant_gguf").joinpath("data", name).read_text("utf-8")


def _wikitext() -> str:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise TurboquantError(
            f"{WIKITEXT} is fetched by the Python package datasets, which is not installed: pip install "
            "'turboquant-gguf[eval]'. Or give a text file."
        ) from error
    try:
        rows = load_dataset(**_DATASET)["text"]
    except Exception as error:  # of the hub, the network or the file system: there is no common class
        raise TurboquantError(
            f"{WIKITEXT} cannot be fetched. Give a text file of your own, such as a wiki.test.raw.", str(error)
        ) from error
    # The dataset holds lines, and left out the blank that makes up an empty one in the original file.
    return "".join(row or " \n" for row in rows)
