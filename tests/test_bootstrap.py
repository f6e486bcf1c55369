"""tools/bootstrap.py in a small repository of its own: a real .venv, the real pip, a build that takes no time."""

import ast
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

BOOTSTRAP = Path(__file__).parent.parent / "tools" / "bootstrap.py"

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "turboquant-gguf"
version = "0.1.0"
"""

# A build backend that needs no network. It writes a wheel whose command prints a greeting from python/greeting.txt,
# prints steps as ninja does, and fails or waits if the repository holds a file that says so.
BACKEND = r"""
import time, zipfile
from pathlib import Path

INFO = "turboquant_gguf-0.1.0.dist-info/"
METADATA = "Metadata-Version: 2.1\nName: turboquant-gguf\nVersion: 0.1.0\n"

def build_wheel(folder, config_settings=None, metadata_directory=None):
    print("[1/2] Building C object first.c", flush=True)
    with open("builds.txt", "a") as builds:
        builds.write("one\n")
    if Path("fail").exists():
        raise SystemExit("first.c:3: error: a semicolon is missing")
    while Path("wait").exists():
        time.sleep(0.05)
    print("[2/2] Linking", flush=True)
    name = "turboquant_gguf-0.1.0-py3-none-any.whl"
    greeting = Path("python/greeting.txt").read_text()
    with zipfile.ZipFile(Path(folder) / name, "w") as wheel:
        wheel.writestr("greet.py", f"import sys\ndef main(): print({greeting!r}, sys.argv[1:])\n")
        wheel.writestr(INFO + "METADATA", METADATA)
        wheel.writestr(INFO + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(INFO + "entry_points.txt", "[console_scripts]\nturboquant-gguf = greet:main\n")
        wheel.writestr(INFO + "RECORD", "")
    return name
"""


class Repository:
    """A clone with a bootstrap script."""

    def __init__(self, root: Path):
        self.root = root
        (root / "tools").mkdir(parents=True)
        (root / "python").mkdir()
        shutil.copy(BOOTSTRAP, root / "tools")
        (root / "pyproject.toml").write_text(PYPROJECT)
        (root / "backend.py").write_text(BACKEND)
        (root / "python" / "greeting.txt").write_text("hello")
        (root / "tools" / "build-requirements.txt").write_text("# none\n")

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        command = [sys._base_executable, self.root / "tools" / "bootstrap.py", *arguments]
        return subprocess.Popen(
            command,
            env={**os.environ, "PIP_NO_INDEX": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        process = self.start(*arguments, **environment)
        stdout, stderr = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def builds(self) -> int:
        log = self.root / "builds.txt"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def wait_for_build(self, number: int = 1) -> None:
        deadline = time.monotonic() + 60
        while self.builds() < number:
            assert time.monotonic() < deadline, "the build did not begin"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Repository:
    """A repository after one demo. Making a .venv takes seconds, so tests share it, and each leaves it installed."""
    repository = Repository(tmp_path_factory.mktemp("bootstrap") / "repository")
    first = repository.run("demo", "--flag")
    assert (first.returncode, first.stdout) == (0, "hello ['demo', '--flag']\n"), first.stderr
    assert "installing turboquant-gguf" in first.stderr
    assert "turboquant-gguf: installed in 0:" in first.stderr
    return repository


def test_second_run_builds_nothing(installed):
    builds = installed.builds()
    again = installed.run("demo")
    assert (again.returncode, again.stdout, again.stderr) == (0, "hello ['demo']\n", "")
    assert installed.builds() == builds


def test_changed_source_is_installed(installed):
    (installed.root / "python" / "greeting.txt").write_text("good day")
    assert installed.run("demo").stdout == "good day ['demo']\n"


def test_changed_cmake_arguments_build_again(installed):
    builds = installed.builds()
    assert installed.run("demo", CMAKE_ARGS="-DGGML_CUDA=ON").returncode == 0
    assert installed.builds() == builds + 1


def test_damaged_venv_is_made_anew(installed):
    (installed.root / ".venv" / "bin" / "python").unlink()
    repaired = installed.run("demo")
    assert repaired.returncode == 0, repaired.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_install_leaves_nothing_that_breaks_the_next(installed, number, code):
    wait = installed.root / "wait"
    wait.touch()
    (installed.root / "python" / "greeting.txt").write_text(f"after {number.name}")
    process = installed.start("demo", PIP_NO_INPUT="1")
    installed.wait_for_build(installed.builds() + 1)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert (installed.root / ".venv" / "bootstrap-unfinished").exists()
    wait.unlink()
    assert installed.run("demo").stdout == f"after {number.name} ['demo']\n"


def test_failed_build_names_the_error_and_the_next_run_recovers(installed):
    (installed.root / "fail").touch()
    (installed.root / "python" / "greeting.txt").write_text("mended")
    failed = installed.run("demo")
    assert failed.returncode == 1
    assert "first.c:3: error: a semicolon is missing" in failed.stderr
    assert "turboquant-gguf: installed in" not in failed.stderr
    (installed.root / "fail").unlink()
    assert installed.run("demo").stdout == "mended ['demo']\n"


def test_test_command_installs_the_extras_and_runs_pytest(installed):
    missing = installed.run("test", "-q")  # this pyproject names no pytest: its absence shows what was run
    assert "No module named pytest" in missing.stderr
    stamp = json.loads((installed.root / ".venv" / "bootstrap-stamp.json").read_text())
    assert {"cluster", "convert", "eval", "python", "report", "test"} <= set(stamp["extras"])


def test_build_tools_are_installed_by_hash(tmp_path):
    """Another file of the same name and version is refused; what the build then asks for is not fetched elsewhere."""
    repository = Repository(tmp_path / "repository")
    (repository.root / "pyproject.toml").write_text(PYPROJECT.replace("requires = []", 'requires = ["a_tool"]'))
    (repository.root / "backend.py").write_text("import a_tool\n" + BACKEND)
    wheel = tmp_path / "index" / "a_tool-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    info = "a_tool-1.0.dist-info/"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a_tool.py", "")
        archive.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: a_tool\nVersion: 1.0\n")
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(info + "RECORD", "")
    listed = repository.root / "tools" / "build-requirements.txt"
    offline = {"PIP_FIND_LINKS": str(wheel.parent), "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1"}

    listed.write_text(f"a_tool==1.0 --hash=sha256:{'0' * 64}\n")
    failed = repository.run("demo", **offline)
    assert failed.returncode == 1 and "The download of the build tools is not the published file" in failed.stderr
    assert repository.builds() == 0

    listed.write_text(f"a_tool==1.0 --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
    assert repository.run("demo", **offline).stdout == "hello ['demo']\n"


def test_what_builds_is_listed_with_a_hash():
    """All that pyproject.toml asks for but pip, which each .venv has, and each requirement with at least one hash."""
    root = BOOTSTRAP.parent.parent
    listed = (root / "tools" / "build-requirements.txt").read_text()
    lines = [line for line in listed.replace("\\\n", "").splitlines() if not line.startswith("#")]
    assert lines and all(re.fullmatch(r"[\w-]+==[\w.]+( +--hash=sha256:[0-9a-f]{64})+ *", line) for line in lines)
    wanted = tomllib.loads((root / "pyproject.toml").read_text())["build-system"]["requires"]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in [*wanted, "cmake", "ninja"]} - {"pip"}
    assert names <= {line.partition("==")[0] for line in lines}


def test_bindings_are_installed_by_hash_before_they_run(tmp_path):
    """Their version is that of the sources, and so is the hash: another file is refused, and nothing in it runs."""
    repository = Repository(tmp_path / "repository")
    root = repository.root
    (root / "pyproject.toml").write_text(
        PYPROJECT + '[project.optional-dependencies]\npython = ["llama-cpp-python==1.0"]\ntest = []\n'
    )
    archive = tmp_path / "index" / "llama_cpp_python-1.0.tar.gz"
    archive.parent.mkdir()
    members = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 1.0\n",
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": BACKEND.replace("turboquant_gguf-0.1.0", "llama_cpp_python-1.0")
        .replace("Name: turboquant-gguf\\nVersion: 0.1.0", "Name: llama-cpp-python\\nVersion: 1.0")
        .replace('Path("python/greeting.txt").read_text()', f"open({str(tmp_path / 'ran')!r}, 'w').write('') or ''"),
    }
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(f"llama_cpp_python-1.0/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content.encode()))
    pin = root / "ggml_turbo" / "graft" / "pin.toml"
    pin.parent.mkdir(parents=True)
    offline = {"PIP_FIND_LINKS": str(archive.parent), "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1"}

    pin.write_text(f'sha256 = "{"0" * 64}"\n')
    failed = repository.run("test", **offline)
    assert failed.returncode == 1 and "is not the published file" in failed.stderr, failed.stderr
    assert not (tmp_path / "ran").exists()

    pin.write_text(f'sha256 = "{hashlib.sha256(archive.read_bytes()).hexdigest()}"\n')
    assert "the Python bindings: installed in" in repository.run("test", **offline).stderr
    assert (tmp_path / "ran").exists()


def test_the_bindings_are_of_the_pinned_version():
    root = BOOTSTRAP.parent.parent
    pin = tomllib.loads((root / "ggml_turbo" / "graft" / "pin.toml").read_text())
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["python"] == [f"{pin['package']}=={pin['version']}"]


def test_half_made_venv_is_made_anew(tmp_path):
    repository = Repository(tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "pyvenv.cfg").write_text("home = /nowhere\n")
    assert repository.run("demo").stdout == "hello ['demo']\n"


def test_missing_compiler(tmp_path):
    failed = Repository(tmp_path).run("demo", CXX="no-such-compiler")
    assert failed.returncode == 1
    assert failed.stderr.startswith("Error: There is no C++ compiler no-such-compiler. Install one:")
    assert not (tmp_path / ".venv").exists()


def test_no_network(tmp_path):
    repository = Repository(tmp_path)
    (tmp_path / "pyproject.toml").write_text(PYPROJECT + 'dependencies = ["numpy"]\n')
    closed_port = "http://127.0.0.1:9/simple"
    offline = {"PIP_NO_INDEX": "0", "PIP_INDEX_URL": closed_port, "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1"}
    failed = repository.run("demo", PIP_CONFIG_FILE=os.devnull, PIP_FIND_LINKS="", **offline)
    assert failed.returncode == 1
    assert "Error: The package index cannot be reached" in failed.stderr


def test_no_venv_module(tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "venv.py").write_text("raise SystemExit('ensurepip is not available. On Debian, install python3-venv')")
    repository = Repository(tmp_path / "repository")
    failed = repository.run("demo", PYTHONPATH=str(broken))
    assert failed.returncode == 1
    assert "sudo apt-get install python3-venv" in failed.stderr
    assert not (tmp_path / "repository" / ".venv").exists()


def test_old_python_is_told_so():
    old = next((path for name in ("python3.10", "python3.9", "python3.8") if (path := _starts(name))), None)
    if old is None:
        pytest.skip("no Python older than 3.11 on this machine")
    refused = subprocess.run([old, BOOTSTRAP, "demo"], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "is too old: this needs Python 3.11 or newer" in refused.stderr


def test_old_python_can_read_far_enough_to_complain():
    ast.parse(BOOTSTRAP.read_text(), feature_version=(3, 7))


def test_help_and_unknown_command():
    command = [sys.executable, BOOTSTRAP]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0
    assert "tools/bootstrap.py demo" in shown.stdout
    assert subprocess.run([*command, "dmo"], capture_output=True, check=False).returncode == 2


def _starts(name: str) -> str | None:
    path = shutil.which(name)
    works = path and subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0
    return path if works else None
