"""llama-cpp-python of another release than the one that fits: a sentence, and never our libraries with its structs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_model
import turboquant_gguf
from turboquant_gguf.llamacpp import bindings, native

# What happens to structs of another release: the process ends on the spot.
IMPORTED = """\
import os
if os.environ.get("LLAMA_CPP_LIB_PATH") == {ours!r}:
    os.abort()
print("imported")
"""


@pytest.fixture
def install(tmp_path):
    """A folder for PYTHONPATH with a llama-cpp-python of that version, which aborts if it is to use our libraries."""

    def made(version: str) -> dict[str, str]:
        package = tmp_path / "llama_cpp"
        package.mkdir()
        (package / "__init__.py").write_text(IMPORTED.format(ours=str(native.library_dir())))
        (package / "llama_cpp.py").touch()
        info = tmp_path / f"llama_cpp_python-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: {version}\n")
        where = str(Path(turboquant_gguf.__file__).parent.parent)
        return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), where])}

    return made


def run(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_another_release_is_a_sentence(install, tmp_path):
    model = tiny_model.write(tmp_path / "model.gguf")
    failed = run(install("0.3.0"), "-m", "turboquant_gguf", "calibrate", model)
    assert failed.returncode == 1, failed.stderr
    assert "and 0.3.0 is installed" in " ".join(failed.stderr.split())
    assert "pip install 'turboquant-gguf[python]'" in " ".join(failed.stderr.split())
    assert "Traceback" not in failed.stderr and failed.stdout == ""


def test_another_release_keeps_its_libraries_and_is_warned_of(install):
    """Also where a parent process, with other packages, has pointed it at ours."""
    environment = install("0.3.0") | {"LLAMA_CPP_LIB_PATH": str(native.library_dir())}
    quiet = run(environment, "-W", "error", "-c", "import turboquant_gguf")
    assert quiet.returncode == 0, quiet.stderr
    done = run(environment, "-c", "import turboquant_gguf, llama_cpp")
    assert done.stdout == "imported\n", done.stderr
    assert "llama-cpp-python 0.3.0 uses its own llama.cpp, without the turbo types" in done.stderr


def test_libraries_of_the_users_own_choice_stay(install):
    environment = install("0.3.0") | {"LLAMA_CPP_LIB_PATH": "/elsewhere"}
    code = "import os, turboquant_gguf, llama_cpp; print(os.environ['LLAMA_CPP_LIB_PATH'])"
    done = run(environment, "-W", "error", "-c", code)
    assert done.stdout == "imported\n/elsewhere\n", done.stderr


@pytest.mark.parametrize("build", ["", "+cu128"])
def test_the_release_that_fits_gets_our_libraries(install, build):
    """Builds of it for a GPU have the same structs."""
    environment = install(bindings.FITTING_RELEASE + build)
    environment.pop("LLAMA_CPP_LIB_PATH", None)
    done = run(environment, "-W", "error", "-c", "import turboquant_gguf, llama_cpp")
    assert done.returncode < 0, "our libraries were not chosen"
