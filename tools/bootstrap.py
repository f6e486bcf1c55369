#!/usr/bin/env python3
"""From a fresh clone to a running demo or test suite, in one command, with Python's standard library only.

    python3 tools/bootstrap.py demo [arguments of turboquant-gguf demo]
    python3 tools/bootstrap.py test [arguments of pytest]

Builds and installs this repository into .venv and then runs the demo or the tests there. A second run builds only
if a source has changed. Whatever interrupts it, the next run starts clean: while .venv is being changed it holds
a mark, and a .venv found with the mark is made anew. CMAKE_ARGS reaches the build (CMAKE_ARGS=-DGGML_CUDA=ON).
"""

# Python 3.6 must be able to read this file far enough to say that it is too old: no newer syntax here.
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

OLDEST_PYTHON = (3, 11)
ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
UNFINISHED = VENV / "bootstrap-unfinished"
STAMP = VENV / "bootstrap-stamp.json"
LOG = VENV / "bootstrap.log"
BUILD_REQUIREMENTS = ROOT / "tools" / "build-requirements.txt"

# What an installation is made from; a change in any of it asks for a new one.
SOURCES = (
    "pyproject.toml", "CMakeLists.txt", "cmake", "ggml_turbo", "models", "python", "tools/build-requirements.txt",
)  # fmt: skip
EXTRAS = {"demo": [], "test": ["cluster", "convert", "eval", "python", "report", "test"]}

# llama-cpp-python brings a llama.cpp of its own; we want its bindings only, over the libraries built here.
BINDINGS = "llama-cpp-python"
BINDINGS_CMAKE_ARGS = "-DLLAMA_BUILD=OFF"

BAR_WIDTH = 20
STAGE_CHARACTERS = 60  # pip lists all that it installs
GRACE_SECONDS = 10
PLAIN_SECONDS = 20  # between two lines of progress where there is no terminal to redraw a line on


class Failure(Exception):
    """What went wrong and what to do about it, in one or two sentences."""


def main(arguments):
    """Run `arguments` (command first) and return the exit code; on success the command itself takes over."""
    if sys.version_info < OLDEST_PYTHON:
        return _complain(
            "Python %d.%d is too old: this needs Python %d.%d or newer. Install one and run it with that, as in "
            "python3.12 tools/bootstrap.py demo" % (sys.version_info[:2] + OLDEST_PYTHON)
        )
    if os.name != "posix":
        return _complain("This runs on Linux and macOS. On Windows, use it inside WSL.")
    if not arguments or arguments[0] not in EXTRAS:
        print(__doc__.strip())
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    command, rest = arguments[0], arguments[1:]
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        install(EXTRAS[command])
    except Failure as failure:
        return _complain(str(failure))
    except KeyboardInterrupt:
        print("\nInterrupted. The next run starts clean.", file=sys.stderr)
        return 130
    os.environ["PATH"] = "%s:%s" % (VENV / "bin", os.environ.get("PATH", os.defpath))
    if command == "demo":
        run = [str(VENV / "bin" / "turboquant-gguf"), "demo"]
    else:
        os.chdir(str(ROOT))
        run = [str(PYTHON), "-m", "pytest"]
    sys.stdout.flush()
    os.execv(run[0], run + rest)


def _leave(number, _frame):
    sys.exit(128 + number)  # through `finally`, so that no compiler goes on without us


def install(extras):
    """Bring .venv up to date with the sources, with the dependencies of `extras`. Raises Failure."""
    wanted = {"python": sys.version, "sources": _hash_of_sources(), "cmake_args": os.environ.get("CMAKE_ARGS", "")}
    have = _read_stamp() if _works(PYTHON) else {}
    if have and all(have.get(key) == value for key, value in wanted.items()) and set(extras) <= set(have["extras"]):
        return
    _require_compiler()
    if UNFINISHED.exists() or not _works(PYTHON):
        _make_venv()
    # What an earlier run was asked for stays, so that demo and test do not undo each other.
    extras = sorted(set(extras) | set(have.get("extras", [])))
    STAMP.unlink(missing_ok=True)
    UNFINISHED.touch()
    LOG.write_text("")
    # What builds is installed by hash, before anything in it runs, and builds without the isolation in which pip would
    # fetch others. What the bindings depend on comes with our dependencies, which name them as well.
    hashed = ["--no-deps", "--require-hashes", "--requirement"]
    build = ["--no-deps", "--no-build-isolation"]
    _pip("the build tools", [*hashed, str(BUILD_REQUIREMENTS)], {})
    dependencies = _dependencies(extras)
    for requirement in dependencies:
        if requirement.startswith(BINDINGS):
            listed = VENV / "bindings.txt"
            listed.write_text("%s --hash=sha256:%s\n" % (requirement, _pin()["sha256"]))
            _pip("the Python bindings", [*build, *hashed, str(listed)], {"CMAKE_ARGS": BINDINGS_CMAKE_ARGS})
    if dependencies:
        _pip("the Python packages", dependencies, {})
    _pip("turboquant-gguf", [*build, str(ROOT)], {})
    STAMP.write_text(json.dumps(dict(wanted, extras=extras)))
    UNFINISHED.unlink()


def _hash_of_sources():
    digest = hashlib.sha256()
    for name in SOURCES:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and "__pycache__" not in path.parts:
                data = path.read_bytes()
                digest.update(("%s\0%d\0" % (path.relative_to(ROOT), len(data))).encode())
                digest.update(data)
    return digest.hexdigest()


def _read_stamp():
    if UNFINISHED.exists():
        return {}
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def _require_compiler():
    for variable, names in (("CC", "cc gcc clang"), ("CXX", "c++ g++ clang++")):
        chosen = os.environ.get(variable)
        if not any(shutil.which(name) for name in ([chosen.split()[0]] if chosen else names.split())):
            raise Failure(
                "There is no %s compiler%s. Install one: sudo apt-get install build-essential (Debian, Ubuntu), "
                "sudo dnf install gcc gcc-c++ (Fedora), xcode-select --install (macOS)."
                % ("C" if variable == "CC" else "C++", " " + chosen if chosen else "")
            )


def _works(python):
    """Whether `python` starts, is the Python that runs us, and has pip."""
    check = "import sys, pip; sys.exit(sys.version != %r)" % sys.version
    try:
        return subprocess.call([str(python), "-c", check], stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def _make_venv():
    if VENV.exists():
        shutil.rmtree(str(VENV))
    VENV.mkdir()
    UNFINISHED.touch()
    done = subprocess.run(
        [sys.executable, "-m", "venv", str(VENV)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        shutil.rmtree(str(VENV))
        if re.search("ensurepip|No module named '?venv", done.stdout):
            raise Failure(
                "This Python (%s) cannot make a virtual environment. Install the module: "
                "sudo apt-get install python3-venv (Debian, Ubuntu)." % sys.executable
            )
        raise Failure("A virtual environment could not be made in %s: %s" % (VENV, done.stdout.strip()))


def _dependencies(extras):
    """What pyproject.toml says that this project and these of its extras need, as a list of requirements."""
    project = _toml("pyproject.toml")["project"]
    named = project.get("optional-dependencies", {})
    requirements = {line for extra in extras for line in named.get(extra, [])}
    return sorted(requirements.union(project.get("dependencies", [])))


def _pin():
    """The source distribution of llama-cpp-python that the build takes llama.cpp from: the bindings are in it, too."""
    return _toml("ggml_turbo/graft/pin.toml")


def _toml(name):
    import tomllib  # here, because Pythons too old for it must get as far as saying so

    return tomllib.loads((ROOT / name).read_text("utf-8"))


def _pip(what, requirements, environment):
    command = [str(PYTHON), "-m", "pip", "install", "--verbose", "--no-input", "--disable-pip-version-check"]
    progress = Progress(what)
    log = LOG.open("a", encoding="utf-8", buffering=1)  # by lines, for whoever follows it
    with log, progress:
        pip = subprocess.Popen(
            command + requirements,
            cwd=str(ROOT),
            env=dict(os.environ, PYTHONUNBUFFERED="1", **environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that Ctrl-C reaches us alone, and we end the compilers with pip
        )
        try:
            for line in pip.stdout:
                log.write(line)
                progress.read(line)
            pip.wait()
        finally:
            _stop(pip)
    if pip.returncode != 0:
        raise _pip_failure(what, LOG.read_text(encoding="utf-8"))
    print("%s: installed in %s" % (what, progress.elapsed()), file=sys.stderr)


def _stop(process):
    for how in (signal.SIGINT, signal.SIGKILL):  # at the first, pip removes its temporary folders
        if process.poll() is None:
            os.killpg(process.pid, how)
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                continue


def _pip_failure(what, log):
    if re.search("No space left on device", log):
        return Failure("The disk filled up while installing %s. Free some space and run this again." % what)
    if re.search("name resolution|NewConnectionError|Network is unreachable|ProxyError|from versions: none", log):
        return Failure(
            "The package index cannot be reached, so %s cannot be installed. Check the network or pip's proxy "
            "settings and run this again." % what
        )
    if re.search("DO NOT MATCH THE HASHES", log):
        return Failure(
            "The download of %s is not the published file (its hash is wrong) and was thrown away. Run this again; if "
            "it stays so, a proxy or package mirror serves another file." % what
        )
    errors = re.findall(r"^.*\b(?:error|ERROR|Error|FAILED)\b.*$", log, re.MULTILINE)
    shown = errors[:5] or log.strip().splitlines()[-5:]
    return Failure(
        "%s could not be installed. The whole log is %s; its errors begin with:\n  %s"
        % (what, LOG, "\n  ".join(line.strip()[:200] for line in shown))
    )


class Progress:
    """One live line on a terminal, or a plain line now and then elsewhere, from what pip prints."""

    STEP = re.compile(r"^\s*\[(\d+)/(\d+)\]")  # ninja's
    STAGE = re.compile(r"^\s*(?:-- |(?=Collecting|Downloading|Building|Preparing|Installing))(.*)")

    def __init__(self, what):
        self.what = what
        self.live = sys.stderr.isatty()
        self.start = time.monotonic()
        self.stage = "starting"
        self.shown_at = self.start
        self.done = threading.Event()
        self.ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self):
        self._show("installing %s" % self.what)
        self.ticker.start()
        return self

    def __exit__(self, kind, value, trace):
        self.done.set()
        self.ticker.join()
        if self.live:
            sys.stderr.write("\r\033[K")

    def read(self, line):
        """Take the stage from a line of pip's output."""
        step, stage = self.STEP.match(line), self.STAGE.match(line)
        if step:
            done, total = int(step.group(1)), int(step.group(2))
            filled = BAR_WIDTH * done // total
            self.stage = "compiling %s%s %d/%d" % ("#" * filled, "." * (BAR_WIDTH - filled), done, total)
        elif stage:
            self.stage = stage.group(1).strip()[:STAGE_CHARACTERS]

    def _tick(self):
        while not self.done.wait(0.2):
            if self.live or time.monotonic() - self.shown_at >= PLAIN_SECONDS:
                self._show("%s: %s, %s" % (self.what, self.stage, self.elapsed()))

    def _show(self, text):
        self.shown_at = time.monotonic()
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write("\r\033[K" + text[:width])
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def elapsed(self):
        """Minutes and seconds since the start, as text."""
        return "%d:%02d" % divmod(int(time.monotonic() - self.start), 60)


def _complain(message):
    print("Error: " + message, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
