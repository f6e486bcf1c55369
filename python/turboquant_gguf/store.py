"""Measurements in one SQLite file, which is only ever added to: of several models, on several machines.

A row is one measurement: of what kind, of which model, with which cache types and settings, where, when, and what came
out. Where something was measured twice, the later row counts.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from . import provenance
from .cachetypes import CacheTypes
from .errors import TurboquantError

VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS measurement (
    id       INTEGER PRIMARY KEY,
    kind     TEXT    NOT NULL, -- "quality", "speed", ...
    model    TEXT    NOT NULL, -- JSON: what provenance.model says of it
    type_k   TEXT    NOT NULL,
    type_v   TEXT    NOT NULL,
    settings TEXT    NOT NULL, -- JSON: what the result depends on
    part     INTEGER NOT NULL, -- of a measurement that is made piece by piece, such as a window of a text
    value    BLOB    NOT NULL, -- what came out; its form is the kind's own
    machine  TEXT    NOT NULL, -- JSON
    time     TEXT    NOT NULL  -- UTC, ISO 8601
);
CREATE INDEX IF NOT EXISTS by_settings ON measurement (kind, settings);
"""


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

    read_only: the file must exist, and stays as it is. Raises TurboquantError if the file is something else, or of a
    later version.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        try:
            mode = "ro" if read_only else "rwc"
            self._db = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", 60, isolation_level=None, uri=True)
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if version > VERSION or (not version and (tables or read_only)):
                self._db.close()
                raise TurboquantError(
                    f"{path} is not a file of measurements that this version of turboquant-gguf knows."
                )
            if not read_only:
                self._db.executescript(_SCHEMA)
                self._db.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.Error as error:
            raise TurboquantError(f"{path} cannot be used as a file of measurements: {error}.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

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
        row = (kind, _text(model), types.k, types.v, _text(settings), part, value)
        where = _text(provenance.machine() if machine is None else machine)
        self._db.execute(
            "INSERT INTO measurement (kind, model, type_k, type_v, settings, part, value, machine, time) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
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
        rows = self._db.execute(
            "SELECT type_k, type_v, part, value FROM measurement "
            "WHERE kind = ? AND json_extract(model, '$.fingerprint') = ? AND settings = ? "
            "AND machine = ifnull(?, machine) ORDER BY id",
            (kind, model["fingerprint"], _text(settings), machine and _text(machine)),
        )
        return {(CacheTypes(k, v), part): value for k, v, part, value in rows}

    def all(self, kind: str) -> list[Measurement]:
        """All measurements of a kind, in the order in which they were made."""
        rows = self._db.execute(
            "SELECT model, type_k, type_v, settings, part, value, machine, time FROM measurement "
            "WHERE kind = ? ORDER BY id",
            (kind,),
        )
        return [
            Measurement(
                kind, json.loads(model), CacheTypes(k, v), json.loads(settings), part, value, json.loads(machine), time
            )
            for model, k, v, settings, part, value, machine, time in rows
        ]


def _text(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))
