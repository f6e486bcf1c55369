"""Sentences for people, without line breaks of ours, so that a path can be copied: a terminal breaks its own lines."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape


def say(text: str, console: Console | None = None) -> None:
    """Print a paragraph in rich's markup to `console`, or to stderr."""
    (console or Console(stderr=True)).print(text, highlight=False, soft_wrap=True)


def error(message: str, details: str = "", *, of: str = "") -> None:
    """Print an error to stderr. of: what failed, if it is not all; details: lines that help to find the cause."""
    say(f"[bold red]Error:[/] {escape(f'{of}: ' if of else '')}{escape(message)}")
    if details:
        say(f"[dim]{escape(details)}[/]")
