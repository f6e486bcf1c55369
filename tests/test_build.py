"""How the package is built: what CMake makes of it, before anything is compiled."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT
from turboquant_gguf.llamacpp import provenance


@pytest.fixture
def without_network(tmp_path, monkeypatch) -> None:
    """No package index, and no sources that were fetched before."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("TURBOQUANT_CACHE_DIR", str(tmp_path / "cache"))


def test_a_wheel_for_others_from_a_tree_at_hand_is_the_same_build(pristine: Path, without_network, tmp_path: Path):
    """As packagers build: nothing is fetched. Measurements made with it are those of the package that is installed."""
    build = tmp_path / "build"
    given = shlex.split(os.environ.get("CMAKE_ARGS", ""))
    options = ["-DCMAKE_BUILD_TYPE=Release", f"-DLLAMA_CPP_DIR={pristine}", "-DTURBOQUANT_PORTABLE=ON", "-DSKBUILD=2"]
    command = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *given, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not (tmp_path / "cache").exists()
    built, installed = json.loads((build / "build.json").read_text()), provenance.built()
    assert (built["sources"], built["options"]) == (installed["sources"], installed["options"])
    assert "GGML_CPU_REPACK" in built["options"].split()
    variants = [line for line in done.stdout.splitlines() if "Adding CPU backend variant" in line]
    assert len(variants) > 1


def test_sources_that_differ_are_another_build(tmp_path: Path):
    import digest

    (tmp_path / "a.c").write_text("int x;\n")
    (tmp_path / "notes.md").write_text("1")
    first = digest.digest(tmp_path, {".md"})
    (tmp_path / "notes.md").write_text("2")
    assert digest.digest(tmp_path, {".md"}) == first
    (tmp_path / "a.c").write_text("int y;\n")
    changed = digest.digest(tmp_path, {".md"})
    (tmp_path / "a.c").rename(tmp_path / "b.c")
    assert len({first, changed, digest.digest(tmp_path, {".md"})}) == 3
