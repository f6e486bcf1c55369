"""Sentences for people. A path in them stays in one piece, so that it can be copied."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape


def say(text: str, console: Console | None = None) -> None:
    """Print a paragraph in rich's markup to `console`, or to stderr.

    Lines are broken between words on a terminal, and nowhere else.
    """
    console = console or Console(stderr=True)
    wrap = {"overflow": "ignore", "crop": False} if console.is_terminal else {"soft_wrap": True}
    console.print(text, highlight=False, **wrap)


def error(message: str, details: str = "", *, of: str = "") -> None:
    """Print an error to stderr. of: what failed, if it is not all; details: lines that help to find the cause."""
    say(f"[bold red]Error:[/] {escape(f'{of}: ' if of else '')}{escape(message)}")
    if details:
        say(f"[dim]{escape(details)}[/]")
