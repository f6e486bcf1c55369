"""SHA-256 of whole files, remembered in the user's cache folder, so that gigabytes are read only once."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from rich.console import Console

from . import progress
from .folders import cache_folder

PIECE_BYTES = 1 << 24
SHOWN_BYTES = 1 << 28  # what is read in less than a second needs no bar
_STILL_NS = 2_000_000_000  # what has changed since may change again without another time
_SCHEMA = "CREATE TABLE IF NOT EXISTS hash (path TEXT PRIMARY KEY, state TEXT NOT NULL, sha256 TEXT NOT NULL)"


def sha256(paths: Sequence[Path], console: Console) -> list[str]:
    """The hashes of files, in hex digits, with progress on `console` where that takes long.

    A file is read again if its size, one of its times or its inode is another than when it was read before. A cache
    folder that cannot be used is not used. Raises OSError if a file cannot be read.
    """
    states = [_state(path) for path in paths]
    known = {path: found for path, state in zip(paths, states, strict=True) if (found := _remembered(path, state))}
    total = sum(path.stat().st_size for path in paths if path not in known)
    quiet = console if total > SHOWN_BYTES else Console(quiet=True)
    with progress.bar(quiet, progress.BYTES) as bar:
        task = bar.add_task("hashing the model", total=total)
        for path, state in zip(paths, states, strict=True):
            if path not in known:
                digest = hashlib.sha256()
                with path.open("rb") as file:
                    while piece := file.read(PIECE_BYTES):
                        digest.update(piece)
                        bar.advance(task, len(piece))
                known[path] = digest.hexdigest()
                if _state(path) == state and time.time_ns() - path.stat().st_mtime_ns > _STILL_NS:
                    _remember(path, state, known[path])
    return [known[path] for path in paths]


def _state(path: Path) -> str:
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"


@contextmanager
def _cache(mode: str) -> Iterator[sqlite3.Connection]:
    address = (cache_folder() / "hashes.sqlite").absolute().as_uri()
    with closing(sqlite3.connect(f"{address}?mode={mode}", 1, isolation_level=None, uri=True)) as database:
        yield database


def _remembered(path: Path, state: str) -> str | None:
    with suppress(sqlite3.Error), _cache("ro") as database:
        row = (os.fspath(path.resolve()), state)
        found = database.execute("SELECT sha256 FROM hash WHERE path = ? AND state = ?", row).fetchone()
        return found and found[0]
    return None


def _remember(path: Path, state: str, found: str) -> None:
    with suppress(sqlite3.Error, OSError):
        cache_folder().mkdir(parents=True, exist_ok=True)
        with _cache("rwc") as database:
            database.execute(_SCHEMA)
            row = (os.fspath(path.resolve()), state, found)
            database.execute("INSERT OR REPLACE INTO hash VALUES (?, ?, ?)", row)
