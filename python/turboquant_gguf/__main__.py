"""`turboquant-gguf`, and `python -m turboquant_gguf`: the command line (cli.py) in a process of its own.

A damaged model can make llama.cpp abort, which ends its process on the spot. We are the one that is left to say so.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from .core import child

CRASH_LOG = "TURBOQUANT_CRASH_LOG"
"""The environment variable that names the file descriptor for what C prints to stderr."""

_TAIL_BYTES = 1 << 14


def main() -> int:
    """Run the command line with the arguments of this process, and return its exit code."""
    if os.name != "posix":
        from .cli import main

        return main()
    command = [sys.executable, "-m", f"{__package__}.cli", *sys.argv[1:]]
    ours, log = os.pipe()
    environment = {"GGML_NO_BACKTRACE": "1", **os.environ, CRASH_LOG: str(log)}
    try:
        with child.running(command, stdin=None, pass_fds=(log,), env=environment) as process:
            os.close(log)
            _pass_on_signals(process)
            tail = _Tail(ours)
            process.wait()
    except KeyboardInterrupt:  # before there was anybody to tell
        return 128 + signal.SIGINT
    if process.returncode >= 0:
        return process.returncode
    _say_why(signal.Signals(-process.returncode), tail.text())
    return 128 - process.returncode


def _pass_on_signals(process: subprocess.Popen) -> None:
    def stop(*_: object) -> None:  # Ctrl-Z: all that compute, its workers with it, until all go on
        os.killpg(process.pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        os.killpg(process.pid, signal.SIGCONT)

    signal.signal(signal.SIGTSTP, stop)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda number, _frame: process.send_signal(number))


class _Tail:
    """Reads a pipe, in a thread of its own, and keeps the end of what is written there."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._read = descriptor, b""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while piece := os.read(self._descriptor, _TAIL_BYTES):
            self._read = (self._read + piece)[-_TAIL_BYTES:]

    def text(self) -> str:
        """The end of what was written, once everybody has closed the pipe."""
        self._thread.join()
        return self._read.decode("utf-8", "replace")


def _say_why(number: signal.Signals, log: str) -> None:
    from .core import messages
    from .llamacpp.toolerrors import crash

    error = crash([word for word in sys.argv[1:] if _is_gguf(Path(word))], number, log)
    messages.error(str(error), error.details)


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except (OSError, ValueError):
        return False


if __name__ == "__main__":
    sys.exit(main())
