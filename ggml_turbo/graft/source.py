"""Prints the folder of the pristine llama.cpp sources that the graft is written for.

python source.py --cache CACHE      the pinned source distribution, through pip, kept in CACHE
python source.py --tree TREE        a llama.cpp tree of the user's own, if its version fits
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
PIN = tomllib.loads((HERE / "pin.toml").read_text())
NAME = f"{PIN['package']} {PIN['version']}"
OFFLINE = (
    f"Without a network: get the source distribution of {NAME} elsewhere, unpack it, "
    f"and configure with -DLLAMA_CPP_DIR=<its {PIN['folder']} folder>."
)

# Python 3.11.0 to 3.11.3, Debian 12's among them, know no filter; the archive is one whose hash was checked.
SAFELY = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}

BACKEND = """\
from pathlib import Path


def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = Path(folder, "{module}-{version}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: {package}\\nVersion: {version}\\n")
    return info.name
"""


class SourceError(Exception):
    """The pinned sources cannot be had, or the tree given is not the right one."""


def tree(path: Path) -> Path:
    """path, if it holds the ggml version of the pin."""
    cmake = path / "ggml" / "CMakeLists.txt"
    if not cmake.is_file():
        raise SourceError(f"LLAMA_CPP_DIR={path} is not a llama.cpp tree: it has no ggml/CMakeLists.txt.")
    version = ggml_version(path)
    if version != PIN["ggml"]:
        raise SourceError(
            f"LLAMA_CPP_DIR={path} has ggml {version}; this version of turboquant-gguf supports ggml {PIN['ggml']}, "
            f"as in {NAME}. Check that version out, or leave LLAMA_CPP_DIR out and the build fetches it."
        )
    return path


def ggml_version(tree: Path) -> str:
    """The version that a llama.cpp tree says it has, such as "0.25.3"."""
    text = (tree / "ggml" / "CMakeLists.txt").read_text()
    parts = dict(re.findall(r"set\(GGML_VERSION_(MAJOR|MINOR|PATCH) (\d+)\)", text))
    return ".".join(parts.get(part, "?") for part in ("MAJOR", "MINOR", "PATCH"))


def pinned(cache: Path, pin: dict | None = None) -> Path:
    """The unpacked folder in the cache. It appears there in one step, so what exists is complete.

    pin: another than that of pin.toml, with the same keys.
    """
    pin = pin or PIN
    folder = cache / f"llama.cpp-{pin['version']}-{pin['sha256'][:12]}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="unpack-") as scratch:
            archive = download(Path(scratch), pin)
            unpacked = unpack(archive, Path(scratch))
            try:
                os.rename(unpacked, folder)
            except OSError:
                if not folder.is_dir():  # otherwise another build was faster, and its copy is as good
                    raise
    except OSError as error:
        raise SourceError(
            f"cannot write the source cache {cache} ({error}): set TURBOQUANT_CACHE_DIR to a writable folder."
        ) from error
    return folder


def download(scratch: Path, pin: dict) -> Path:
    """The source distribution in `scratch`, through pip, which checks its hash before it looks inside.

    pin: as in pin.toml; without "sha256", which is for a release that has none here yet, pip asks the registry for it.
    For metadata that nobody needs here, pip then asks the build back end that the distribution names. A stand-in of
    that name answers, so that neither code of the distribution runs nor build requirements are fetched for it.
    """
    requirement, backend = scratch / "requirement.txt", scratch / "backend"
    name = f"{pin['package']} {pin['version']}"
    known = [f"--hash=sha256:{pin['sha256']}"] if "sha256" in pin else []
    requirement.write_text(" ".join([f"{pin['package']}=={pin['version']}", *known]) + "\n")
    module = backend.joinpath(*pin["backend"].split(".")).with_suffix(".py")
    module.parent.mkdir(parents=True)
    for package in module.relative_to(backend).parents[:-1]:  # without these, the same package installed would go first
        (backend / package / "__init__.py").touch()
    module.write_text(BACKEND.format(**pin, module=pin["package"].replace("-", "_")))
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-binary",
        pin["package"],
        "--no-build-isolation",
        *(["--require-hashes"] if known else []),
        "--requirement",
        str(requirement),
        "--dest",
        str(scratch),
    ]
    path = os.pathsep.join(filter(None, [str(backend), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    archives = list(scratch.glob("*.tar.gz"))
    if result.returncode != 0 or not archives:
        said = (result.stderr or result.stdout).strip()
        if "DO NOT MATCH THE HASHES" in said:
            raise SourceError(
                f"The download of {name} has another SHA-256 than {pin['sha256']}: it is damaged or not the published "
                f"file, and was thrown away.\nRun `{sys.executable} -m pip cache purge` and try again. {OFFLINE}"
            )
        last = said.splitlines()[-1] if said else "pip said nothing"
        raise SourceError(f"pip could not download {name}: {last}\nCheck the network and try again. {OFFLINE}")
    return archives[0]


def unpack(archive: Path, scratch: Path) -> Path:
    """Unpacks only the llama.cpp folder of the archive."""
    prefix = f"{archive.name.removesuffix('.tar.gz')}/{PIN['folder']}/"
    target = scratch / "tree"
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.startswith(prefix):
                member.name = member.name.removeprefix(prefix)
                tar.extract(member, target, **SAFELY)
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
