"""Sentences for people, without line breaks of ours, so that a path can be copied: a terminal breaks its own lines."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from rich.console import Console
from rich.markup import escape


def nearest(name: str, known: Collection[str], otherwise: str, *, most: int = 1) -> str:
    """The end of a sentence about a name that nobody knows: what may have been meant, or else `otherwise`."""
    near = difflib.get_close_matches(name, known, n=most)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def say(text: str, console: Console | None = None) -> None:
    """Print a paragraph in rich's markup to `console`, or to stderr."""
    (console or Console(stderr=True)).print(text, highlight=False, soft_wrap=True)


def error(message: str, details: str = "", *, of: str = "") -> None:
    """Print an error to stderr. of: what failed, if it is not all; details: lines that help to find the cause."""
    say(f"[bold red]Error:[/] {escape(f'{of}: ' if of else '')}{escape(message)}")
    if details:
        say(f"[dim]{escape(details)}[/]")
