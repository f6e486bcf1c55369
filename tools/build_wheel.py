#!/usr/bin/env python3
"""A wheel that others can install: for every processor of this architecture, on systems as old as this compiler serves.

    python3 tools/build_wheel.py                    # into dist/
    python3 tools/build_wheel.py --output FOLDER
    python3 tools/build_wheel.py --twice            # again from a copy elsewhere, without ccache: the same bytes?

The wheel has a CPU back end for each instruction set, of which the best is chosen at start, and no HTTPS in llama.cpp's
programs (CMakeLists.txt: TURBOQUANT_PORTABLE). On Linux auditwheel adds the compiler's OpenMP library and names the
oldest manylinux that takes the result. Builds in build/portable, where a second run compiles only what changed. Needs a
compiler and Python 3.11; tools are fetched by hash. CMAKE_ARGS reaches the build.
"""

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The time of every file in the wheel; and of __DATE__, if llama.cpp had one.
EPOCH = "315619200"  # 1980-01-02, which an archive can have in every time zone
NOT_COPIED = (".git", ".venv", "build", "dist", "__pycache__", ".*_cache")


def run(*command: object, **environment: str) -> None:
    """Runs a program. SystemExit if it fails: it has said why."""
    print("$", *command, file=sys.stderr)
    done = subprocess.run(list(map(str, command)), env={**os.environ, **environment}, check=False)
    if done.returncode:
        sys.exit(f"{command[0]} ended with exit code {done.returncode}.")


def tools(folder: Path) -> Path:
    """The bin folder of an environment with what is needed to build and to repair."""
    venv.create(folder, with_pip=True, clear=True)
    requirements = ["build-requirements.txt", *["wheel-requirements.txt"] * (sys.platform == "linux")]
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    for name in requirements:
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r", ROOT / "tools" / name)
    return python.parent


def build(source: Path, scratch: Path, output: Path, **environment: str) -> Path:
    """The wheel of the sources in a folder, in `output`. scratch: an empty folder for what comes before."""
    programs = tools(scratch / "tools")
    environment = {
        "SOURCE_DATE_EPOCH": EPOCH,
        "NODE_OPTIONS": f"--require={source / 'tools' / 'steady_clock.cjs'}",
        **environment,
        "PATH": os.pathsep.join([str(programs), os.environ.get("PATH", os.defpath)]),
    }
    run(
        programs / "python", "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--disable-pip-version-check",
        "--config-settings=build-dir=build/portable", "--config-settings=cmake.define.TURBOQUANT_PORTABLE=ON",
        "--wheel-dir", scratch / "built", source, **environment,
    )  # fmt: skip
    (built,) = (scratch / "built").glob("*.whl")
    output.mkdir(parents=True, exist_ok=True)
    if sys.platform != "linux":
        return Path(shutil.copy(built, output))
    run(programs / "auditwheel", "repair", "--wheel-dir", scratch / "repaired", built, **environment)
    (repaired,) = (scratch / "repaired").glob("*.whl")
    return Path(shutil.copy(repaired, output))


def differences(one: Path, other: Path) -> list[str]:
    """The names of files in two archives whose bytes differ, or that only one of them has."""
    with zipfile.ZipFile(one) as first, zipfile.ZipFile(other) as second:
        names = [set(archive.namelist()) for archive in (first, second)]
        same = {name for name in names[0] & names[1] if first.read(name) == second.read(name)}
    return sorted((names[0] | names[1]) - same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="the folder for the wheel (default: dist)")
    parser.add_argument("--twice", action="store_true", help="build again elsewhere, and compare")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build(ROOT, Path(scratch), arguments.output.absolute())
    print(wheel)
    if not arguments.twice:
        return
    with tempfile.TemporaryDirectory() as elsewhere:
        source = Path(elsewhere) / "sources"
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_COPIED))
        second = build(source, Path(elsewhere), Path(elsewhere) / "dist", CCACHE_DISABLE="1")
        if not filecmp.cmp(wheel, second, shallow=False):
            where = ", ".join(differences(wheel, second)) or "the archive alone"
            sys.exit(f"Built from {source}, it differs in: {where}")
    print("Built from another folder, it is the same, byte by byte.")


if __name__ == "__main__":
    main()
