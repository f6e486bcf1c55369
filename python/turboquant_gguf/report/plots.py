"""The figures of a report: the panels of its findings, in colors, with labels that do not overlap."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import TurboquantError
from ..kinds.base import Panel
from .contents import Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 5.4, 4.2
"""The size of a panel, in inches."""

ABREAST = 3
"""Panels side by side."""

FORMATS = (".png", ".svg", ".pdf")
"""Suffixes of images."""

_FIGURE = {"dpi": 72, "layout": "constrained"}
"""A pixel is a point, also for what places labels."""

_NO_DATE = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}

_PLACES = [
    (distance, direction)
    for distance in (6, 14, 24, 36, 50)
    for direction in ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
]
"""Places of a label about its point: distances in points, and directions: to the right, and up."""


@dataclass(frozen=True)
class Theme:
    """Colors of text and lines, of what lies behind ("none": nothing), of turbo types and of stock types."""

    ink: str
    paper: str
    turbo: str
    stock: str


# Without colors, turbo is dark on white and filled; stock is lighter and hollow.
LIGHT = Theme(ink="#24292f", paper="none", turbo="#0b57a8", stock="#c26a12")
DARK = Theme(ink="#d5dae0", paper="none", turbo="#7cb8ff", stock="#e69b4c")
PRINT = Theme(ink="#24292f", paper="white", turbo="#0b57a8", stock="#c26a12")


def svg(panel: Panel, theme: Theme) -> bytes:
    """The plot as an image of its own; the same bytes for the same data."""
    buffer = io.BytesIO()
    with _themed(theme):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, HEIGHT), **_FIGURE)
        panel.draw(figure.subplots(), theme)
        save(figure, buffer, "svg")
    return buffer.getvalue()


def check() -> None:
    """Raise TurboquantError if matplotlib, an optional dependency, is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise TurboquantError("A plot needs matplotlib. Install it with: pip install matplotlib") from error


def write(sections: Sequence[Section], path: Path, form: str) -> None:
    """Write all plots as one image, the panels of each model below each other's. form: "png", "svg" or "pdf".

    Raises TurboquantError if there is nothing to draw, and OSError if writing fails.
    """
    check()
    drawn = {section.model["name"]: _panels_of(section) for section in sections}
    drawn = {name: panels for name, panels in drawn.items() if panels}
    if not drawn:
        raise TurboquantError(
            "There is nothing to draw: what was measured has no plot. `turboquant-gguf report` shows it as tables."
        )
    columns = min(ABREAST, max(map(len, drawn.values())))
    rows = [-(-len(panels) // columns) for panels in drawn.values()]
    with _themed(PRINT), open(path, "wb") as file:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH * columns, (HEIGHT + 0.4) * sum(rows)), **_FIGURE)
        parts = figure.subfigures(len(drawn), 1, squeeze=False, height_ratios=rows)[:, 0]
        for part, own, (name, panels) in zip(parts, rows, drawn.items(), strict=True):
            part.suptitle(name, fontweight="bold", parse_math=False)
            for axes, panel in zip(part.subplots(own, columns, squeeze=False).flat, panels, strict=False):
                axes.set_title(panel.title, fontsize="medium", parse_math=False)
                panel.draw(axes, PRINT)
        for axes in figure.axes:
            axes.set_visible(axes.has_data())
        save(figure, file, form)


def _panels_of(section: Section) -> list[Panel]:
    return [panel for found in section.findings.values() for one in found for panel in one.kind.panels(one)]


@contextmanager
def _themed(theme: Theme) -> Iterator[None]:
    import matplotlib

    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    paper = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    settings = {
        "font.size": 11,
        "svg.hashsalt": "turboquant-gguf",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(settings | dict.fromkeys(ink, theme.ink) | dict.fromkeys(paper, theme.paper)):
        yield


def save(figure: Figure, file: IO[bytes] | Path, form: str) -> None:
    """Write a figure that is laid out as _FIGURE says, its labels apart. form: "png", "svg" or "pdf"."""
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")
    for axes in figure.axes:
        _spread_labels(axes)
    figure.savefig(file, format=form, dpi=150, metadata=_NO_DATE.get(form))


def _spread_labels(axes: Axes) -> None:
    """Move the labels of points to where they hide least of the points, the lines, and each other."""
    from matplotlib.text import Annotation, Text

    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    points = axes.transData.transform([label.xy for label in labels]) if labels else []
    marks = [np.concatenate([point - 6, point + 6]) for point in points]
    if legend := axes.get_legend():
        marks.append(legend.get_window_extent().extents)
    lines = np.array(list(_lines(axes)))
    frame = np.array([[*axes.bbox.min + 5, *axes.bbox.max - 5]])
    for label, point in zip(labels, points, strict=True):
        size = Text.get_window_extent(label).size + 2
        boxes = [_box(point, size, distance, direction) for distance, direction in _PLACES]
        costs = [
            10 * (_common(box, np.array(marks)) + size.prod() - _common(box, frame)) + _common(box, lines) + distance
            for box, (distance, _) in zip(boxes, _PLACES, strict=True)
        ]
        best = int(np.argmin(costs))
        distance, (right, up) = _PLACES[best]
        label.set_position((distance * right, distance * up))
        label.set_horizontalalignment(("center", "left", "right")[right])
        label.set_verticalalignment(("center", "bottom", "top")[up])
        marks.append(boxes[best])


def _lines(axes: Axes) -> Iterator[NDArray[np.float64]]:
    """Boxes (left, bottom, right, top) around the pieces of all lines, in pixels."""
    lines = [line.get_xydata() for line in axes.lines if line.get_linestyle() != "None"]
    lines += [vertices for bars in axes.collections for vertices in bars.get_segments()]
    for vertices in lines:
        for ends in pairwise(axes.transData.transform(vertices)):
            yield np.concatenate([np.min(ends, 0) - 1, np.max(ends, 0) + 1])


def _box(
    point: NDArray[np.float64], size: NDArray[np.float64], distance: float, direction: tuple[int, int]
) -> NDArray[np.float64]:
    """What a label of this size covers: (left, bottom, right, top)."""
    low = point + distance * np.array(direction) - size * (1 - np.array(direction)) / 2
    return np.concatenate([low, low + size])


def _common(box: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """The area that a box shares with others, (n, 4), in all."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return float(sides.clip(0).prod(-1).sum())
