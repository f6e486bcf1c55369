"""Output files that appear whole or not at all, also where two commands write the same one, or one is killed."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where leftovers stay
    fcntl = None

from ..errors import TurboquantError

LOCK = "turboquant.lock"
"""A file in the folder of an unfinished one, locked as long as the command that made it lives."""


def check(output: Path, force: bool) -> None:
    """Raise TurboquantError if `output` cannot be written, or exists and is not to be replaced (force)."""
    if output.is_dir():
        raise TurboquantError(f"{output} is a folder. Give the name of the file to write.")
    if _is_stream(output):
        raise TurboquantError(f"{output} is a device or a pipe. Give the name of a file to write.")
    if output.exists() and not force:
        raise TurboquantError(f"{output} exists already. Give another name with -o, or replace it with --force.")
    check_folder(output)


def check_folder(output: Path) -> None:
    """Raise TurboquantError unless files can be made in the folder of `output`."""
    folder = output.absolute().parent
    if not folder.is_dir():
        raise TurboquantError(f"There is no folder {folder} to write {output.name} into.")
    if _is_stream(output):
        return
    try:  # permissions do not tell everything
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise TurboquantError(
            f"{output.name} cannot be written into {folder}: {error.strerror}. Write it elsewhere."
        ) from error


def check_space(output: Path, size: int) -> None:
    """Raise TurboquantError unless `size` bytes fit where `output` goes."""
    if (free := shutil.disk_usage(output.absolute().parent).free) < size:
        raise TurboquantError(
            f"The file takes {size / 1e9:.1f} GB, and {output.absolute().parent} has {free / 1e9:.1f} GB left. "
            "Free some space, or write elsewhere with -o."
        )


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """The path of a file to write, which takes the name `output` if all goes well, and is gone otherwise.

    It has the name of `output`, in a folder beside it that no other command and no other user writes to; other files
    may be put there meanwhile. What a killed command left of the same output is removed. A device or a pipe is written
    to as it is. Raises OSError.
    """
    if _is_stream(output):
        yield output
        return
    folder = output.absolute().parent
    _remove_leftovers(folder, output.name)
    with tempfile.TemporaryDirectory(prefix=f"{output.name}.", suffix=".partial", dir=folder) as own:
        unfinished = Path(own) / output.name
        with _locked(Path(own)):
            yield unfinished
            _sync(unfinished)
            unfinished.replace(output)
        with suppress(OSError):  # not every file system can; the file itself is safe
            _sync(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / f"{LOCK}.new").open("x") as lock:
        if fcntl:
            with suppress(OSError):  # a file system without locks: nobody else can lock it either
                fcntl.flock(lock, fcntl.LOCK_EX)
            os.rename(lock.name, folder / LOCK)  # only now, so that a lock file that is not locked is a leftover
        yield


def _remove_leftovers(folder: Path, name: str) -> None:
    if not fcntl:
        return
    for leftover in folder.glob(f"{glob.escape(name)}.*.partial"):
        # That of a living command is locked, and another user's cannot be opened.
        with suppress(OSError), (leftover / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover)


def _is_stream(output: Path) -> bool:
    # /dev/stdout may be a regular file, but its name must not be given to another.
    return output.exists() and (not output.is_file() or str(output.absolute().parent) in ("/dev", "/dev/fd"))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs what can be written to
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
