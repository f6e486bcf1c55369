"""Child processes that never outlive the block that uses them, nor us, however we end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .signals import deferred

GRACE_SECONDS = 5
IS_POSIX = os.name == "posix"

# Becomes the command, and leaves a process behind that waits for the end of a pipe which only we can write to. That end
# comes with ours, SIGKILL included, and then it kills the group, which is the command, its children and itself. So it
# is there before the command is, and a number given to another process meanwhile cannot be meant.
_WITH_US = """
{ trap '' HUP INT TERM; read -r _; kill -s KILL -- -$$; } <"/dev/fd/$1" >/dev/null 2>&1 &
shift
exec "$@"
"""


@contextmanager
def running(command: Sequence[str | Path], **popen) -> Iterator[subprocess.Popen]:
    """Run `command` for the length of the block and stop it, with its own children, on the way out.

    The child gets a session of its own, so that Ctrl-C reaches only us and the order of stopping is ours. If we are
    killed (SIGKILL), so is it, at once; not on Windows, where it goes on.
    `popen`: further arguments of subprocess.Popen. Raises OSError if the command cannot be started.
    """
    words = [str(word) for word in command]
    if not shutil.which(words[0]):
        raise FileNotFoundError(2, "There is no such program", words[0])
    options = {"stdin": subprocess.DEVNULL, **popen}
    pipe = ()
    if IS_POSIX:
        pipe = os.pipe()
        words = ["/bin/sh", "-c", _WITH_US, "sh", str(pipe[0]), *words]
        options |= {"pass_fds": (pipe[0], *popen.get("pass_fds", ())), "start_new_session": True}
    else:
        options["creationflags"] = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    process = None
    try:
        with deferred():  # a signal while it starts would leave a child that nobody knows
            process = subprocess.Popen(words, **options)
        yield process
    finally:
        if process:
            _stop(process)
        for end in pipe:
            os.close(end)


def _stop(process: subprocess.Popen) -> None:
    if IS_POSIX:
        _stop_group(process)
    else:
        tree = ["taskkill", "/T", "/F", "/PID", str(process.pid)]
        subprocess.run(tree, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    process.wait()
    if process.stdout:
        process.stdout.close()


def _stop_group(process: subprocess.Popen) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        except (ProcessLookupError, PermissionError):  # nobody is left; macOS says "not permitted" of zombies
            break
