"""How far long work has come: a bar on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_SECONDS = 20
"""Between two plain lines."""

STEPS = (MofNCompleteColumn(), TimeRemainingColumn())
BYTES = (DownloadColumn(), TimeRemainingColumn())
"""What stands behind the bar."""

_DAY = 24 * 3600


@contextmanager
def bar(console: Console, columns: tuple[ProgressColumn, ...] = STEPS) -> Iterator[Progress]:
    """A bar for tasks, which may be added and changed as rich's `Progress` says, and is gone at the end.

    It goes to `console` if that is a terminal, else to stderr: as plain lines, if that is none either.
    """
    if not console.is_terminal and not console.quiet:
        console = Console(stderr=True)
    live = console.is_terminal and not console.quiet
    shown = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        *columns,
        console=console,
        transient=True,
        disable=not live,
        speed_estimate_period=_DAY,  # steps may take minutes, so that the estimate needs all of them
    )
    with shown:
        if live or console.quiet:
            yield shown
            return
        done = threading.Event()
        thread = threading.Thread(target=_print_lines, args=(shown, console, done), daemon=True)
        thread.start()
        try:
            yield shown
        finally:
            done.set()
            thread.join()


@contextmanager
def status(console: Console, text: str) -> Iterator[None]:
    """A bar that shows the time alone, for work of which nobody knows how far it has come. text: what it is."""
    with bar(console, (TimeElapsedColumn(),)) as shown:
        shown.add_task(text, total=None)
        yield


def _print_lines(shown: Progress, console: Console, done: threading.Event) -> None:
    while not done.wait(PLAIN_SECONDS):
        if task := next((task for task in shown.tasks if task.visible and not task.finished), None):
            console.print(_line(task), soft_wrap=True, markup=False, highlight=False)


def _line(task: Task) -> str:
    parts = [task.description, *([f"{task.percentage:.0f} %"] if task.total else []), _time(task.elapsed)]
    return ", ".join(parts) + (f", about {_time(task.time_remaining)} left" if task.time_remaining else "")


def _time(seconds: float | None) -> str:
    minutes, seconds = divmod(int(seconds or 0), 60)
    return f"{minutes}:{seconds:02}"
