"""The file of measurements: what goes wrong with it is a sentence, and two processes do not measure the same."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from unittest.mock import patch

import pytest

from turboquant_gguf.errors import TurboquantError
from turboquant_gguf.llamacpp.cachetypes import CacheTypes
from turboquant_gguf.measure import store as library
from turboquant_gguf.measure.store import Store

F16 = CacheTypes("f16", "f16")
MODEL = {"name": "m", "fingerprint": "1"}
WORK = ("quality", MODEL, {"text": "t"})


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "results.sqlite"
    with Store(path) as store:
        for part in range(300):
            store.add(*WORK[:2], F16, WORK[2], bytes(100), part=part)
    return path


def add(store: Store) -> None:
    store.add(*WORK[:2], F16, WORK[2], bytes(100_000), part=999)


# ---- what goes wrong ----


def locked(path: Path) -> None:
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        with Store(path) as store:
            add(store)


def read_only(path: Path) -> None:
    with Store(path, read_only=True) as store:
        add(store)


def full(path: Path) -> None:
    def connect(*arguments: object, **options: object) -> sqlite3.Connection:
        database = connected(*arguments, **options)
        database.execute("PRAGMA max_page_count = 1")  # as many as there are now
        return database

    connected = sqlite3.connect
    with patch.object(sqlite3, "connect", connect), Store(path) as store:
        add(store)


def no_folder(path: Path) -> None:
    Store(path / "results.sqlite")


def another_file(path: Path) -> None:
    path.write_text("hello" * 100)
    Store(path)


def overwritten(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096 * 4 : 4096 * 8] = b"x" * 4096 * 4
    path.write_bytes(content)
    with Store(path, read_only=True) as store:
        store.all("quality")


def changed(column: str, value: object):
    def read(path: Path) -> None:
        with sqlite3.connect(path) as database:
            database.execute(f"UPDATE measurement SET {column} = ? WHERE part = 7", (value,))
        database.close()
        with Store(path, read_only=True) as store:
            store.all("quality")

    return read


@pytest.mark.parametrize(
    "go_wrong, because",
    [
        (locked, "is being written by another process. Wait"),
        (read_only, "cannot be written. Change its permissions"),
        (full, "cannot grow: the disk is full. Free some space"),
        (no_folder, "cannot be opened as a file of measurements. See that its folder exists"),
        (another_file, "is not a file of measurements. Choose another"),
        (overwritten, "is damaged. Move it away"),
        (changed("settings", '{"text'), "is damaged"),
        (changed("machine", b"\xff\xfe"), "is damaged"),
        (changed("type_k", "f17"), "is damaged"),
    ],
)
def test_errors_are_sentences_that_name_the_file(path, monkeypatch, go_wrong, because):
    monkeypatch.setattr(library, "WAIT_SECONDS", 0.1)
    with pytest.raises(TurboquantError, match=re.escape(str(path))) as caught:
        go_wrong(path)
    assert because in str(caught.value) and caught.value.details


def test_files_of_version_1_are_taken_over(path):
    with sqlite3.connect(path) as database:
        database.executescript(
            "DROP INDEX by_settings; DROP TABLE claim; PRAGMA user_version = 1;"
            "INSERT INTO measurement (kind, model, type_k, type_v, settings, part, value, machine, time)"
            "SELECT kind, model, type_k, type_v, settings, part, 'later', machine, time FROM measurement WHERE part < 5"
        )
    database.close()
    with Store(path, read_only=True) as store:
        assert len(store.all("quality")) == 305
    with Store(path) as store:
        found = store.find(*WORK)
        assert len(store.all("quality")) == len(found) == 300
        assert [found[F16, part] == "later" for part in (0, 4, 5)] == [True, True, False]
        assert store.claim(*WORK) == ""


# ---- claims ----


def claimed_elsewhere(path: Path) -> subprocess.Popen:
    """A process that has claimed WORK, and does nothing."""
    code = (
        "import sys, time, pathlib; from turboquant_gguf.measure.store import Store\n"
        f"store = Store(pathlib.Path(sys.argv[1])); print(repr(store.claim(*{WORK!r})), flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "''\n"
    return process


def test_what_a_living_process_has_claimed_is_left_to_it(path):
    process = claimed_elsewhere(path)
    try:
        with Store(path) as store:
            assert store.claim(*WORK) == f"process {process.pid} on {library.socket.gethostname()}"
            assert store.claim(*WORK[:2], {"text": "another"}) == ""
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert store.claim(*WORK) == ""
    finally:
        process.kill()
        process.stdout.close()


def test_a_claim_that_is_not_renewed_is_void(path, monkeypatch):
    """Also of another machine, and of another process that was given the number of a dead one."""
    with Store(path) as here, Store(path) as there:
        assert here.claim(*WORK) == ""
        with closing(sqlite3.connect(path)) as database, database:
            database.execute("UPDATE claim SET host = 'elsewhere'")
        assert there.claim(*WORK) == f"process {os.getpid()} on elsewhere"
        monkeypatch.setattr(library, "DEAD_SECONDS", 0.2)
        time.sleep(0.3)
        assert there.claim(*WORK) == ""
        here.release(*WORK)  # no longer its own
        assert here.claim(*WORK)
        there.release(*WORK)
        assert here.claim(*WORK) == ""


def test_whoever_claims_says_that_it_is_alive(path, monkeypatch):
    monkeypatch.setattr(library, "ALIVE_SECONDS", 0.05)
    monkeypatch.setattr(library, "DEAD_SECONDS", 1)
    with Store(path) as here, Store(path) as there:
        assert here.claim(*WORK) == ""
        time.sleep(1.5)
        assert there.claim(*WORK)


def test_a_claim_can_be_waited_for(path):
    waits = 0
    with Store(path) as here, Store(path) as there:
        here.claim(*WORK)
        while there.claim(*WORK):
            waits += 1
            if waits == 3:
                here.release(*WORK)
        assert waits == 3 and here.claim(*WORK)
        there.release(*WORK)
        assert here.claim(*WORK) == ""
