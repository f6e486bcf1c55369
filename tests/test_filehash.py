"""Hashes of files, and what is remembered of them."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import tiny_architectures
from turboquant_gguf.core import filehash, progress
from turboquant_gguf.llamacpp import provenance

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TURBOQUANT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """How many hashes were computed."""
    count = []
    real = filehash.hashlib.sha256
    monkeypatch.setattr(filehash.hashlib, "sha256", lambda *data: count.append(1) or real(*data))
    return count


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    os.utime(path, (1, 1))
    return path


def hashed(*paths: Path) -> list[str]:
    return filehash.sha256(paths, QUIET)


def test_every_byte_counts(tmp_path):
    path = tiny_architectures.write(tmp_path / "llama.gguf", "llama")
    content = bytearray(path.read_bytes())
    first = provenance.model(path)["fingerprint"]
    for at in np.random.default_rng(0).integers(len(content) // 2, len(content), 20):
        content[at] ^= 1
        path.write_bytes(content)
        assert provenance.model(path)["fingerprint"] != first
        content[at] ^= 1
    path.write_bytes(content)
    assert provenance.model(path.rename(tmp_path / "renamed.gguf"))["fingerprint"] == first


def test_a_file_is_read_once(file, reads):
    first = hashed(file)
    assert hashed(file) == first and len(reads) == 1
    assert hashed(file, file) == first * 2 and len(reads) == 1


@pytest.mark.parametrize("keep_time", [False, True])
def test_a_changed_file_is_read_again(file, reads, keep_time):
    """Also where its size is the same, and its time was set back."""
    first = hashed(file)
    with file.open("r+b") as stream:
        stream.seek(54_321)
        stream.write(b"x")
    if keep_time:
        os.utime(file, (1, 1))
    assert hashed(file) != first and len(reads) == 2


def test_another_file_of_that_name_is_read(file, reads, tmp_path):
    first = hashed(file)
    other = tmp_path / "other"
    other.write_bytes(bytes(99_999) + b"x")
    os.utime(other, (1, 1))
    other.replace(file)
    assert hashed(file) != first


def test_what_has_just_changed_is_not_remembered(file, reads):
    os.utime(file)
    hashed(file)
    hashed(file)
    assert len(reads) == 2


@pytest.mark.parametrize("spoil", ["a file instead of the folder", "another file", "damaged"])
def test_a_cache_that_cannot_be_used(file, cache, reads, spoil):
    if spoil == "a file instead of the folder":
        cache.touch()
    else:
        cache.mkdir()
        (cache / "hashes.sqlite").write_bytes(b"x" * 5000 if spoil == "damaged" else b"hello")
    assert hashed(file) == hashed(file) and len(reads) == 2


def test_progress_of_large_files(file, monkeypatch, capsys):
    monkeypatch.setattr(filehash, "SHOWN_BYTES", 1000)
    monkeypatch.setattr(filehash, "PIECE_BYTES", 10_000)
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.05)
    monkeypatch.setattr(filehash.hashlib, "sha256", Slow)
    filehash.sha256([file], Console(stderr=True))
    assert "hashing the model, " in capsys.readouterr().err


class Slow:
    def update(self, _piece: bytes) -> None:
        time.sleep(0.02)

    def hexdigest(self) -> str:
        return "0"
