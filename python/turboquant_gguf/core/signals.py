"""Signals that unwind the program through its `finally` blocks, also where Python or C would lose the exception."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

AGAIN_SECONDS = 0.05

# Windows has no SIGHUP.
_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Ended(SystemExit):
    """A signal that ends the program, on its way out. `code`: 128 and its number, as shells count."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def unwind() -> None:
    """Make SIGTERM and SIGHUP raise Ended, as SIGINT raises KeyboardInterrupt, and let none of the three get lost.

    Python's default would end us at once and leave llama-server running. What is ignored, as under nohup, stays so.
    """
    for number in _ENDING[1:]:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    report = sys.unraisablehook

    # Python drops what is raised while an object or a generator is cleaned up, or in a callback from C.
    def again(dropped: sys.UnraisableHookArgs) -> None:
        if isinstance(dropped.exc_value, Ended | KeyboardInterrupt):
            number = getattr(dropped.exc_value, "number", signal.SIGINT)
            timer = threading.Timer(AGAIN_SECONDS, _raise_in_main, (number,))
            timer.daemon = True
            timer.start()
        else:
            report(dropped)

    sys.unraisablehook = again


def _end(number: int, _frame: object) -> None:
    raise Ended(number)


def _raise_in_main(number: int) -> None:
    if hasattr(signal, "pthread_kill"):  # wakes it where it waits, which raise_signal in another thread does not
        signal.pthread_kill(threading.main_thread().ident, number)
    else:
        signal.raise_signal(number)


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """SIGINT, SIGTERM and SIGHUP in the block take effect at its end. Yields what tells whether one waits.

    A handler that raises inside a callback from C would be ignored, and Ctrl-C with it. What is ignored stays so, for
    the children that are started here too. In a thread other than the main one, where Python handles no signals,
    nothing is changed.
    """
    waiting: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {number: signal.getsignal(number) for number in _ENDING if signal.getsignal(number) != signal.SIG_IGN}
    for number in previous:
        signal.signal(number, lambda number, _frame: waiting.append(number))
    try:
        yield lambda: bool(waiting)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])
