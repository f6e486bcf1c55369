"""Prints the folder of the pristine llama.cpp sources that the graft is written for.

    python source.py --cache CACHE      the pinned source distribution, through pip, kept in CACHE
    python source.py --tree TREE        a llama.cpp tree of the user's own, if its version fits
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

PIN = tomllib.loads((Path(__file__).resolve().parent / "pin.toml").read_text())
NAME = f"{PIN['package']} {PIN['version']}"
OFFLINE = (
    f"Without a network: get the source distribution of {NAME} elsewhere, unpack it, "
    f"and configure with -DLLAMA_CPP_DIR=<its {PIN['folder']} folder>."
)


class SourceError(Exception):
    """The pinned sources cannot be had, or the tree given is not the right one."""


def tree(path: Path) -> Path:
    """path, if it holds the ggml version of the pin."""
    cmake = path / "ggml" / "CMakeLists.txt"
    if not cmake.is_file():
        raise SourceError(f"LLAMA_CPP_DIR={path} is not a llama.cpp tree: it has no ggml/CMakeLists.txt.")
    parts = dict(re.findall(r"set\(GGML_VERSION_(MAJOR|MINOR|PATCH) (\d+)\)", cmake.read_text()))
    version = ".".join(parts.get(part, "?") for part in ("MAJOR", "MINOR", "PATCH"))
    if version != PIN["ggml"]:
        raise SourceError(
            f"LLAMA_CPP_DIR={path} has ggml {version}; this version of turboquant-gguf supports ggml {PIN['ggml']}, "
            f"as in {NAME}. Check that version out, or leave LLAMA_CPP_DIR out and the build fetches it."
        )
    return path


def pinned(cache: Path) -> Path:
    """The unpacked folder in the cache. It appears there in one step, so what exists is complete."""
    folder = cache / f"llama.cpp-{PIN['version']}-{PIN['sha256'][:12]}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="unpack-") as scratch:
            archive = download(Path(scratch))
            verify(archive)
            unpacked = unpack(archive, Path(scratch))
            try:
                os.rename(unpacked, folder)
            except OSError:
                if not folder.is_dir():  # otherwise another build was faster, and its copy is as good
                    raise
    except OSError as error:
        raise SourceError(f"cannot write the source cache {cache} ({error}): set TURBOQUANT_CACHE_DIR to a writable folder.") from error
    return folder


def download(scratch: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--no-binary", PIN["package"], "--dest", str(scratch), f"{PIN['package']}=={PIN['version']}",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    archives = list(scratch.glob("*.tar.gz"))
    if result.returncode != 0 or not archives:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["pip said nothing"]
        raise SourceError(f"pip could not download {NAME}: {lines[-1]}\nCheck the network and try again. {OFFLINE}")
    return archives[0]


def verify(archive: Path) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != PIN["sha256"]:
        raise SourceError(
            f"{archive.name} has SHA-256 {found}, expected {PIN['sha256']}: the download is damaged or not the published file.\n"
            f"Run `{sys.executable} -m pip cache purge` and try again. {OFFLINE}"
        )


def unpack(archive: Path, scratch: Path) -> Path:
    """Unpacks only the llama.cpp folder of the archive."""
    prefix = f"{archive.name.removesuffix('.tar.gz')}/{PIN['folder']}/"
    target = scratch / "tree"
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.startswith(prefix):
                member.name = member.name.removeprefix(prefix)
                tar.extract(member, target, filter="data")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--cache", type=Path)
    where.add_argument("--tree", type=Path)
    arguments = parser.parse_args()
    try:
        print(tree(arguments.tree.resolve()) if arguments.tree else pinned(arguments.cache.expanduser()))
    except SourceError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
