"""Callbacks for click: what they make of the text of an option, or refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from ..errors import TurboquantError
from . import outputfile

Callback = Callable[[click.Context, click.Parameter, str | None], tuple | None]


def numbers(*, least: int) -> Callback:
    """Numbers of tokens from `least` on, separated by commas."""

    def parse(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
        if text is None:
            return None
        for word in (words := text.split(",")):
            if not word.strip().isdecimal() or int(word) < least:
                raise click.BadParameter(f"{word!r} is not a number of tokens. Write them like 1024,4096.")
        return tuple(map(int, words))

    return parse


def percentages(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[float, ...]:
    """Percentages from 0 to 100, separated by commas."""
    return tuple(map(_percentage, text.split(",")))


def _percentage(word: str) -> float:
    try:
        if 0 <= (depth := float(word)) <= 100:
            return depth
    except ValueError:
        pass
    raise click.BadParameter(f"{word!r} is not a percentage from 0 to 100. Write them like 0,50,100.")


def names(_context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...]:
    """Names separated by commas, each once."""
    found = tuple(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
    if text and not found:
        raise click.UsageError(f"{parameter.opts[0]} names no {parameter.name.removesuffix('s')}.")
    return found


def output(_context: click.Context, _parameter: click.Parameter, path: Path | None) -> Path | None:
    """A file that can be written, found out now, not after an hour of measuring."""
    if path:
        try:
            outputfile.check_folder(path)
        except TurboquantError as error:
            raise click.BadParameter(str(error)) from error
    return path


def new_file(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """A file that can be written and must not exist, but for --force."""
    if path and path.exists() and not context.params.get("force"):
        raise click.BadParameter(f"{path} exists already. Give another name, or replace it with --force.")
    return output(context, parameter, path)
