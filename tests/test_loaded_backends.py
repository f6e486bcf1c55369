"""Back ends that are files of their own, loaded at run time: the layout of a wheel for others (tools/build_wheel.py).

Its libggml is compiled here; the CPU back end of the installed package, under another name and behind a door that such
files have, stands for one of its variants. All of the real ones are in the wheel that tools/check_wheel.py checks.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import turboquant_gguf
from conftest import ROOT
from turboquant_gguf.llamacpp import native

TURBO = ROOT / "ggml_turbo"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="this layout is tested on Linux")

# What GGML_BACKEND_DL_IMPL and GGML_BACKEND_DL_SCORE_IMPL put into a back end.
DOOR = """
#include <stdlib.h>
void * ggml_backend_cpu_reg(void);
void * ggml_backend_init(void) { %s }
int ggml_backend_score(void) { return %d; }
"""
VARIANTS = {"impossible": ("abort();", 0), "worse": ("abort();", 1), "best": ("return ggml_backend_cpu_reg();", 2)}

SEEN = """
import json, pathlib, sys
import numpy
import turboquant_gguf
from turboquant_gguf.llamacpp import ggml, modelmemory, provenance

x = numpy.random.default_rng(7).standard_normal((3, 128), numpy.float32)
with modelmemory.ModelMemory(pathlib.Path(sys.argv[1])):
    pass
print(json.dumps({
    "library": str(ggml.library_path("ggml-cpu")),
    "simd": turboquant_gguf.simd(),
    "backends": provenance.versions()["backends"],
    "devices": provenance.machine()["devices"],
    "build": provenance.build(),
    "blocks": turboquant_gguf.quantize(x, "turbo3").tolist(),
}))
"""


@pytest.fixture(scope="module")
def package(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the installed package, its back ends loaded at run time."""
    folder = tmp_path_factory.mktemp("loaded")
    package = folder / "turboquant_gguf"
    shutil.copytree(native.PACKAGE, package)
    library = package / "lib"
    compiler = ["c++", "-std=gnu++17", "-O1", "-DNDEBUG", "-fPIC", "-shared", "-Wl,-rpath,$ORIGIN", f"-L{library}"]
    include = [f"-I{folder}" for folder in (TURBO, pristine / "ggml" / "include", pristine / "ggml" / "src")]
    macros = ["-DGGML_BACKEND_DL", "-DGGML_SHARED", "-DGGML_BUILD"]
    upstream = [pristine / "ggml" / "src" / name for name in ("ggml-backend-reg.cpp", "ggml-backend-dl.cpp")]
    forced = ["-include", TURBO / "registry" / "backend-dir.h"]
    subprocess.run(
        [*compiler, *macros, *include, *forced, *upstream, TURBO / "registry" / "turbo-library.cpp",
         "-Wl,-soname,libggml.so", "-lggml-base", "-ldl", "-o", library / "libggml.so"],
        check=True,
    )  # fmt: skip
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    real = shutil.move(library / "libggml-cpu.so", elsewhere)
    for name, (body, score) in VARIANTS.items():
        source = folder / f"{name}.c"
        source.write_text(DOOR % (body, score))
        links = [real, f"-Wl,-rpath,{elsewhere}"] if name == "best" else []
        output = library / f"libggml-cpu-{name}.so"
        subprocess.run(["cc", "-fPIC", "-shared", source, *links, "-o", output], check=True)
    return package


def seen(package: Path, model: Path) -> dict:
    """What Python has of the package in a folder."""
    command = [sys.executable, "-c", SEEN, model]
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_best_variant_is_chosen_and_python_finds_it(package, smollm2):
    loaded, linked = seen(package, smollm2), seen(native.PACKAGE, smollm2)
    assert loaded.pop("library") == str(package.parent / "elsewhere" / "libggml-cpu.so")
    assert linked.pop("library") == str(native.library_dir() / "libggml-cpu.so")
    assert "CPU" in loaded["backends"] and loaded["simd"] == turboquant_gguf.simd()
    assert loaded == linked | {"backends": loaded["backends"]}


@pytest.mark.parametrize("tool", ["llama-bench", "llama-server"])
def test_programs_find_it(package, tool):
    listed = subprocess.run([package / "bin" / tool, "--list-devices"], capture_output=True, text=True, check=True)
    assert "Available devices" in listed.stdout + listed.stderr


def test_no_back_end_is_a_sentence(package, tmp_path):
    empty = tmp_path / "turboquant_gguf"
    shutil.copytree(package, empty, ignore=shutil.ignore_patterns("libggml-cpu-*"))
    command = [sys.executable, "-c", "import turboquant_gguf; turboquant_gguf.simd()"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=False
    )
    assert "there is no CPU back end in" in done.stderr and done.returncode == 1
