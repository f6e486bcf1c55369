"""Tables of text: rows in groups under headings, shown on a terminal or written as Markdown; and numbers in them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.markup import escape
from rich.table import Table as Grid

NOTHING = "–"
"""The cell of what was not measured."""

_MOST_DECIMALS = 5


@dataclass(frozen=True)
class Column:
    """heading: with line breaks for narrow tables. words: not numbers. detail: left out where room is short."""

    heading: str
    words: bool = False
    detail: bool = False

    @property
    def title(self) -> str:
        """The heading in one line."""
        return " ".join(self.heading.split())


TYPE = Column("cache\ntype", words=True)
BITS = Column("\nbits")


@dataclass(frozen=True)
class Table:
    """rows: in groups, by what they have in common ("" if there is one group). The first column names the row."""

    caption: str
    columns: list[Column]
    rows: dict[str, list[list[str]]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class HeatMap:
    """Shares from 0 to 1 by depth (rows, in percent) and length (columns, in tokens); None where there is none."""

    types: str
    lengths: list[int]
    shares: dict[float, list[float | None]]


def grid(*headings: str, words: int = 1, gap: int = 2, **more: object) -> Grid:
    """An empty table for a terminal. words: how many columns from the left hold words, not numbers. more: of rich."""
    made = Grid(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold", **more)
    for number, heading in enumerate(headings):
        made.add_column(heading, justify="left" if number < words else "right", no_wrap=True)
    return made


def grids(table: Table) -> Iterator[Grid | str]:
    """A table for a terminal, without details: its heading, then each group under its name, all of the same width."""
    shown = [i for i, column in enumerate(table.columns) if not column.detail]
    groups = {
        group: [[row[i].replace(" ± ", "±") for i in shown] for row in rows] for group, rows in table.rows.items()
    }
    headings = [table.columns[i].heading.split("\n") for i in shown]
    cells = [[*heading, *(row[n] for rows in groups.values() for row in rows)] for n, heading in enumerate(headings)]
    for group, rows in {"": [], **groups}.items():
        made = grid(gap=1, show_header=not group)
        for i, column in zip(shown, cells, strict=True):
            made.add_column(
                table.columns[i].heading,
                justify="left" if table.columns[i].words else "right",
                min_width=max(map(len, column)),
                no_wrap=True,
            )
        for row in rows:
            made.add_row(*map(escape, row))
        if group:
            yield f"[bold]{escape(group)}[/]"
        yield made


def markdown(table: Table) -> str:
    """A table as GitHub reads it."""
    rows = [[column.title for column in table.columns]]
    rows.append(["---" if column.words else "---:" for column in table.columns])
    for group, members in table.rows.items():
        rows += [[f"**{marked(group)}**", *[""] * (len(table.columns) - 1)]] if group else []
        rows += [list(map(marked, row)) for row in members]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def marked(text: str) -> str:
    """Text that means itself in Markdown. Underscores within words already do."""
    return re.sub(r"([\\`*<>|\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def with_error(value: float, error: float | None, sign: str = "") -> str:
    """A value and its standard error with two digits, such as "17.53 ± 0.35"; with one where it is very small."""
    if not error or not math.isfinite(error):
        return f"{value:{sign}.4g}"
    exponent = math.floor(math.log10(error))
    decimals = max(0, min(1 - exponent, max(_MOST_DECIMALS, -exponent)))
    return f"{value:{sign}.{decimals}f} ± {error:.{decimals}f}"


def short(value: float) -> str:
    """Three digits, without an exponent."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{min(max(0, 2 - math.floor(math.log10(abs(value)))), _MOST_DECIMALS)}f}"


def share(value: float | None) -> str:
    """A share from 0 to 1 as a percentage."""
    return NOTHING if value is None else f"{100 * value:.0f} %"


def count(number: int, word: str) -> str:
    """A number of things, such as "1 chunk" or "3 chunks"."""
    return f"{number} {word}{'s' * (number != 1)}"
