"""The work of a sweep, done piece by piece in processes of their own, or on a Dask cluster.

Either way a crash of llama.cpp ends the process of a piece of work, and neither the sweep nor what was measured before.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ..core.signals import unwind
from ..errors import TurboquantError
from ..kinds import Failure, Kind
from ..kinds.base import Row, Step
from ..llamacpp import provenance


@dataclass(frozen=True)
class Progress:
    """What is being measured, and which share of the piece of work is done."""

    text: str
    share: float


Found = tuple[Kind, Row | Failure | Progress, dict[str, Any]]
"""A piece of work, what came of it, and the machine where that was."""

_GRACE_SECONDS = 10


def here(work: Sequence[Kind]) -> Iterator[Found]:
    """Do the work, one piece after the other. What is found comes as soon as it is."""
    spawn = multiprocessing.get_context("spawn")
    for one in work:
        ours, theirs = spawn.Pipe(duplex=False)
        process = spawn.Process(target=_send, args=(one, theirs))
        process.start()
        theirs.close()
        try:
            while found := ours.recv():
                yield one, found, provenance.machine()
        except EOFError:
            process.join()
            yield one, _died(one, process.exitcode), provenance.machine()
        finally:
            process.terminate()
            process.join(_GRACE_SECONDS)
            process.kill()
            ours.close()


def _send(one: Kind, pipe: Connection) -> None:
    """The work of a process: sends what is found, and None at the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the sweep, which then ends us
    unwind()  # stops llama-server on the way out
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for found in _measured(one, lambda text, share: pipe.send(Progress(text, share))):
        pipe.send(found)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing left to stop, and Python may be ending
    pipe.send(None)


def _end_with_parent() -> None:
    """Ends us at once when the sweep is gone, however it ended; llama-server then ends with us."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _measured(one: Kind, step: Step) -> Iterator[Row | Failure]:
    try:
        one.require_model()
        yield from one.measure(step)
    except TurboquantError as error:
        yield Failure(one.label, str(error), error.details, error.exit_code)
    except OSError as error:
        yield Failure(one.label, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except Exception as error:
        what = (
            f"It failed over something it does not expect ({type(error).__name__}: {error}). That is a fault of ours."
        )
        yield Failure(one.label, what, traceback.format_exc())


def _died(one: Kind, code: int | None) -> Failure:
    if code is not None and code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
    else:
        how = f"ended with exit code {code}"
    return Failure(one.label, f"The process that measured it {how}, maybe for want of memory.")


def on_cluster(address: str, work: Sequence[Kind]) -> Iterator[Found]:
    """Do the work on the workers of a Dask scheduler, such as tcp://10.0.0.1:8786, in whatever order they end.

    Workers need this package, and the model under the same path. Raises TurboquantError if there is no scheduler.
    """
    try:
        from distributed import Client, as_completed
    except ModuleNotFoundError as error:
        raise TurboquantError("A cluster needs Dask: pip install 'turboquant-gguf[cluster]'") from error
    try:
        client = Client(address, timeout=_GRACE_SECONDS)
    except (OSError, ValueError) as error:
        raise TurboquantError(
            f"There is no Dask scheduler at {address}. Start one with `dask scheduler`, and `dask worker {address}` on "
            "each machine.",
            str(error),
        ) from error
    with client:
        # Dask gives the work of a worker that died to another one, and gives up after a few.
        futures = {client.submit(_found, one, provenance.switches(), pure=False): one for one in work}
        try:
            for future in as_completed(futures):
                one = futures[future]
                if future.status == "finished":
                    found, machine = future.result()
                    yield from ((one, row, machine) for row in found)
                else:
                    error = future.exception()
                    yield one, Failure(one.label, f"The cluster could not measure it: {error}"), provenance.machine()
        finally:
            client.cancel(list(futures))


def _found(one: Kind, switches: dict[str, str]) -> tuple[list[Row | Failure], dict[str, Any]]:
    """The work of a Dask worker. switches: of the environment where the sweep was started."""
    provenance.switch(switches)
    return list(_measured(one, lambda *_: None)), provenance.machine()
