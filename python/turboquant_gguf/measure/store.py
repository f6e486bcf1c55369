"""Measurements in one SQLite file: of several models, on several machines, by several processes at a time.

A row is one measurement: of what kind, of which model, with which cache types and settings, on which machine, when, and
what came out. What is measured again on the same machine takes the place of the row before; where machines differ, the
later row counts. Who measures something claims it, so that nobody else does meanwhile.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from ..core.folders import cache_folder
from ..errors import TurboquantError
from ..llamacpp import ggml, provenance
from ..llamacpp.cachetypes import CacheTypes

VERSION = 2
_SCHEMA = """
CREATE TABLE IF NOT EXISTS measurement (
    id       INTEGER PRIMARY KEY,
    kind     TEXT    NOT NULL, -- "quality", "speed", ...
    model    TEXT    NOT NULL, -- JSON: what provenance.model says of it
    type_k   TEXT    NOT NULL,
    type_v   TEXT    NOT NULL,
    settings TEXT    NOT NULL, -- JSON: what the result depends on
    part     INTEGER NOT NULL, -- of a measurement that is made piece by piece, such as a chunk of a text
    value    BLOB    NOT NULL, -- what came out; its form is the kind's own
    machine  TEXT    NOT NULL, -- JSON
    time     TEXT    NOT NULL  -- UTC, ISO 8601
);
CREATE TABLE IF NOT EXISTS claim (
    work     TEXT    PRIMARY KEY, -- JSON: kind, fingerprint of the model, settings
    owner    TEXT    NOT NULL,    -- of whoever measures it
    host     TEXT    NOT NULL,
    process  INTEGER NOT NULL,
    seen     REAL    NOT NULL     -- when it was alive, seconds since 1970
);
"""
# Version 1 had neither claims nor this, and may hold rows that another one replaces.
_UNIQUE = """
DELETE FROM measurement WHERE id NOT IN (
    SELECT max(id) FROM measurement
    GROUP BY kind, json_extract(model, '$.fingerprint'), settings, type_k, type_v, part, machine
);
DROP INDEX IF EXISTS by_settings;
CREATE UNIQUE INDEX IF NOT EXISTS by_settings ON measurement
    (kind, settings, json_extract(model, '$.fingerprint'), type_k, type_v, part, machine);
"""

WAIT_SECONDS = 60  # for another process to let go of the file
POLL_SECONDS = 1
ALIVE_SECONDS = 15
DEAD_SECONDS = 120
"""Whoever claimed something says every ALIVE_SECONDS that it is alive, and is taken for dead after DEAD_SECONDS."""

# What SQLite reports, by its primary result code, and what the user can do.
_ADVICE = {
    sqlite3.SQLITE_BUSY: "is being written by another process. Wait for that to end, or stop it.",
    sqlite3.SQLITE_LOCKED: "is being written by another process. Wait for that to end, or stop it.",
    sqlite3.SQLITE_READONLY: "cannot be written. Change its permissions or its folder's, or choose another file.",
    sqlite3.SQLITE_PERM: "may not be opened. Change its permissions, or choose another file.",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened as a file of measurements. See that its folder exists and that you may "
    "write there, or choose another file.",
    sqlite3.SQLITE_FULL: "cannot grow: the disk is full. Free some space; what was measured before is kept.",
    sqlite3.SQLITE_IOERR: "cannot be read or written: the disk is full or damaged. Free some space, or choose another "
    "file.",
    sqlite3.SQLITE_NOTADB: "is not a file of measurements. Choose another, or move it away.",
}
_DAMAGED = "is damaged. Move it away and measure again; `sqlite3 FILE .recover` may save some of what it holds."


def default_results() -> Path:
    """The file of measurements in the user's cache folder."""
    return cache_folder() / "measurements.sqlite"


@dataclass(frozen=True)
class Measurement:
    """A row. value: bytes, in the form of the kind; machine: as provenance.machine says; time: UTC, ISO 8601."""

    kind: str
    model: Mapping[str, Any]
    types: CacheTypes
    settings: Mapping[str, Any]
    part: int
    value: bytes
    machine: Mapping[str, Any]
    time: str


class Store:
    """An open file of measurements. A context manager. Every row is on disk when `add` returns.

    read_only: the file must exist, and stays as it is. All methods raise TurboquantError, which names the file and says
    what to do, if it is something else, of a later version, damaged, locked, or cannot be written.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._owner = uuid.uuid4().hex
        self._pulse: threading.Thread | None = None
        self._closed = threading.Event()
        with self.reading():
            self._db = self._connect("ro" if read_only else "rwc")
            try:
                self._prepare(read_only)
            except BaseException:
                self._db.close()
                raise

    def _connect(self, mode: str) -> sqlite3.Connection:
        address = f"{self.path.absolute().as_uri()}?mode={mode}"
        return sqlite3.connect(address, WAIT_SECONDS, isolation_level=None, uri=True)

    def _prepare(self, read_only: bool) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version > VERSION or (not version and (tables or read_only)):
            raise TurboquantError(
                f"{self.path} is not a file of measurements that this version of turboquant-gguf knows."
            )
        if not read_only and version < VERSION:
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} {_UNIQUE} PRAGMA user_version = {VERSION}; COMMIT;")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._pulse:
            self._pulse.join()
        self._db.close()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Raises TurboquantError for what goes wrong inside the block because of what the file holds, or of SQLite."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", None)  # there is none where the module itself complains
            raise self._unusable(_ADVICE.get(code & 0xFF if code else None, _DAMAGED), str(error)) from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # rows that are none
            raise self._unusable(_DAMAGED, f"{type(error).__name__}: {error}") from error

    def _unusable(self, advice: str, cause: str) -> TurboquantError:
        return TurboquantError(f"{self.path} {advice.replace('FILE', str(self.path))}", cause)

    def add(
        self,
        kind: str,
        model: Mapping[str, Any],
        types: CacheTypes,
        settings: Mapping[str, Any],
        value: bytes,
        *,
        part: int = 0,
        machine: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a measurement made now, on this machine unless another is given."""
        row = (kind, text_of(model), types.k, types.v, text_of(settings), part, value)
        where = text_of(provenance.machine() if machine is None else machine)
        with self.reading():
            self._db.execute(
                "INSERT OR REPLACE INTO measurement (kind, model, type_k, type_v, settings, part, value, machine, time)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*row, where, datetime.now(UTC).isoformat(timespec="seconds")),
            )

    def find(
        self,
        kind: str,
        model: Mapping[str, Any],
        settings: Mapping[str, Any],
        *,
        machine: Mapping[str, Any] | None = None,
    ) -> dict[tuple[CacheTypes, int], bytes]:
        """The values of these settings and of the model with that fingerprint, by cache types and part.

        machine: only what was measured there; None for any.
        """
        with self.reading():
            rows = self._db.execute(
                "SELECT type_k, type_v, part, value FROM measurement "
                "WHERE kind = ? AND json_extract(model, '$.fingerprint') = ? AND settings = ? "
                "AND machine = ifnull(?, machine) ORDER BY id",
                (kind, model["fingerprint"], text_of(settings), machine and text_of(machine)),
            )
            return {(CacheTypes(k, v), part): value for k, v, part, value in rows}

    def all(self, kind: str) -> list[Measurement]:
        """All measurements of a kind, in the order in which they were made."""
        with self.reading():
            rows = self._db.execute(
                "SELECT model, type_k, type_v, settings, part, value, machine, time FROM measurement "
                "WHERE kind = ? ORDER BY id",
                (kind,),
            )
            return [
                Measurement(
                    kind,
                    json.loads(model),
                    CacheTypes(_known(k), _known(v)),
                    json.loads(settings),
                    part,
                    value,
                    json.loads(machine),
                    time,
                )
                for model, k, v, settings, part, value, machine, time in rows
            ]

    #
    # claims
    #

    def claim(self, kind: str, model: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
        """Claim these measurements until `release`. Returns who has them, such as "process 12 on box"; empty: we do.

        The claim of a process that is not alive any more does not count.
        """
        with self.reading(), self._transaction():
            work = _work(kind, model, settings)
            found = self._db.execute("SELECT owner, host, process, seen FROM claim WHERE work = ?", (work,)).fetchone()
            if found and found[0] != self._owner and _is_alive(*found[1:]):
                return f"process {found[2]} on {found[1]}"
            mine = (work, self._owner, socket.gethostname(), os.getpid(), time.time())
            self._db.execute("INSERT OR REPLACE INTO claim VALUES (?, ?, ?, ?, ?)", mine)
        if not self._pulse:
            self._pulse = threading.Thread(target=self._beat, daemon=True)
            self._pulse.start()
        return ""

    def release(self, kind: str, model: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Give back what `claim` has claimed."""
        with self.reading():
            claim = (_work(kind, model, settings), self._owner)
            self._db.execute("DELETE FROM claim WHERE work = ? AND owner = ?", claim)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        with self._db:  # commits or rolls back
            yield

    def _beat(self) -> None:
        """Say that we are alive, until the file is closed."""
        while not self._closed.wait(ALIVE_SECONDS):
            with suppress(sqlite3.Error), closing(self._connect("rw")) as db:
                db.execute("UPDATE claim SET seen = ? WHERE owner = ?", (time.time(), self._owner))


def _work(kind: str, model: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    return text_of({"kind": kind, "fingerprint": model["fingerprint"], "settings": settings})


def _is_alive(host: str, process: int, seen: float) -> bool:
    if time.time() - seen > DEAD_SECONDS:
        return False
    if host != socket.gethostname() or os.name != "posix":  # where os.kill would end it instead of asking
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


def _known(type: str) -> str:
    ggml.type_number(type)  # ValueError for what is none
    return type


def text_of(facts: Any) -> str:
    """Plain values as JSON, the same text for the same facts: what the file has, and compares."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))
