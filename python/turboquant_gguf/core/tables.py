"""Tables of text: rows in groups under headings, shown on a terminal or written as Markdown; and numbers in them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.markup import escape
from rich.table import Table as Grid

NOTHING = "–"
"""The cell of what was not measured."""

_MOST_DECIMALS = 5


@dataclass(frozen=True)
class Column:
    """A column of a table.

    heading: with line breaks for narrow tables. words: not numbers. detail: left out where room is short. style: of its
    cells on a terminal, such as "bold".
    """

    heading: str
    words: bool = False
    detail: bool = False
    style: str = ""

    @property
    def title(self) -> str:
        """The heading in one line."""
        return " ".join(self.heading.split())


TYPE = Column("cache\ntype", words=True)
BITS = Column("\nbits")


@dataclass(frozen=True)
class Table:
    """Rows of text under headings.

    rows: in groups, by what they have in common ("" if there is one group). The first column names the row.
    """

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


Cells = tuple[Column, list[str]]
"""A column, and its cells from all groups."""


@dataclass(frozen=True)
class Shown:
    """A table as rich prints it on a terminal, without details: the headings, then each group under its name.

    Columns that do not fit side by side stand below, again after the first. gap: blanks between columns. styles: of the
    rows, one each, such as "bold"; none for plain ones.
    """

    table: Table
    gap: int = 2
    styles: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Grid | str]:
        columns = [
            (column, [row[i].replace(" ± ", "±") for rows in self.table.rows.values() for row in rows])
            for i, column in enumerate(self.table.columns)
            if not column.detail
        ]
        for part in self._parts(columns, options.max_width):
            yield self._grid(part, slice(0))
            begin = 0
            for group, rows in self.table.rows.items():
                if group:
                    yield f"[bold]{escape(group)}[/]"
                yield self._grid(part, slice(begin, begin + len(rows)), header=False)
                begin += len(rows)

    def _parts(self, columns: list[Cells], width: int) -> Iterator[list[Cells]]:
        """The columns in as few parts as fit, the first column in each of them."""
        first, *others = columns
        part, left = [first], width - _width(first)
        for column in others:
            if len(part) > 1 and left < self.gap + _width(column):
                yield part
                part, left = [first], width - _width(first)
            part.append(column)
            left -= self.gap + _width(column)
        yield part

    def _grid(self, part: list[Cells], rows: slice, *, header: bool = True) -> Grid:
        """Some rows of a part; all grids of a part have the same width."""
        made = Grid(box=None, pad_edge=False, padding=(0, self.gap, 0, 0), header_style="bold", show_header=header)
        for column, cells in part:
            made.add_column(
                column.heading,
                justify="left" if column.words else "right",
                style=column.style,
                min_width=_width((column, cells)),
                no_wrap=True,
            )
        styles = self.styles or [""] * len(part[0][1])
        for style, *cells in zip(styles[rows], *(cells[rows] for _, cells in part), strict=True):
            made.add_row(*map(escape, cells), style=style)
        return made


def _width(column: Cells) -> int:
    heading, cells = column
    return max(map(cell_len, [*heading.heading.split("\n"), *cells]))


def columns(*headings: str) -> list[Column]:
    """Columns of numbers behind a first one of words."""
    return [Column(heading, words=not number) for number, heading in enumerate(headings)]


def facts(found: Iterable[tuple[str, str]]) -> Grid:
    """Names and what is to be said of them, a line each, for a terminal; long texts are wrapped."""
    made = Grid.grid(padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column()
    for name, text in found:
        made.add_row(name, escape(text))
    return made


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
    """A number with three digits, without an exponent."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{min(max(0, 2 - math.floor(math.log10(abs(value)))), _MOST_DECIMALS)}f}"


def share(value: float | None) -> str:
    """A share from 0 to 1 as a percentage."""
    return NOTHING if value is None else f"{100 * value:.0f} %"


def count(number: int, word: str) -> str:
    """A number of things, such as "1 chunk" or "3 chunks"."""
    return f"{number} {word}{'s' * (number != 1)}"
