"""Child processes that never outlive the block that uses them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .signals import deferred

GRACE_SECONDS = 5


@contextmanager
def running(command: Sequence[str | Path], **popen) -> Iterator[subprocess.Popen]:
    """Run `command` for the length of the block and stop it, with its own children, on the way out.

    The child gets a session of its own, so that Ctrl-C reaches only us and the order of stopping is ours.
    A signal that ends Python on the spot (an unhandled SIGTERM, SIGKILL) skips this; the command line handles SIGTERM.
    `popen`: further arguments of subprocess.Popen. Raises OSError if the command cannot be started.
    """
    process = None
    try:
        with deferred():  # a signal while it starts would leave a child that nobody knows
            process = subprocess.Popen(
                [str(word) for word in command], stdin=subprocess.DEVNULL, start_new_session=True, **popen
            )
        yield process
    finally:
        if process:
            _stop(process)


def _stop(process: subprocess.Popen) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        except (ProcessLookupError, PermissionError):  # nobody is left; macOS says "not permitted" of zombies
            break
    process.wait()
    if process.stdout:
        process.stdout.close()
