"""Output files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import TurboquantError


def check(output: Path, force: bool) -> None:
    """Raise TurboquantError if `output` cannot be written, or exists and is not to be replaced (force)."""
    if output.is_dir():
        raise TurboquantError(f"{output} is a folder. Give the name of the file to write.")
    if output.exists() and not force:
        raise TurboquantError(f"{output} exists already. Give another name with -o, or replace it with --force.")
    if not output.absolute().parent.is_dir():
        raise TurboquantError(f"There is no folder {output.absolute().parent} to write {output.name} into.")


def check_space(output: Path, size: int) -> None:
    """Raise TurboquantError unless `size` bytes fit where `output` goes."""
    if (free := shutil.disk_usage(output.absolute().parent).free) < size:
        raise TurboquantError(
            f"The file takes {size / 1e9:.1f} GB, and {output.absolute().parent} has {free / 1e9:.1f} GB left. "
            "Free some space, or write elsewhere with -o."
        )


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """A file beside `output` that takes its name if all goes well, and is gone otherwise."""
    unfinished = output.with_name(f"{output.name}.partial")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)
