"""The figures of a report: quality against bits, and speed against depth."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import TurboquantError
from ..kinds.niah import REFERENCE
from ..kinds.quality import Quality
from ..llamacpp.cachetypes import CacheTypes
from ..measure.findings import Finding, QualityFinding
from . import benchplot
from .contents import Section, by_bits, types_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 5.4, 4.2
"""Of a panel, in inches."""

_FIGURE = {"dpi": 72, "layout": "constrained"}
"""A pixel is a point, also for what places labels."""

_BITS = (2, 3, 4, 5, 6, 8, 12, 16, 24, 32)

_PLACES = [
    (distance, direction)
    for distance in (6, 14, 24, 36, 50)
    for direction in ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
]
"""Of a label about its point: distances in points, and directions: to the right, and up."""


@dataclass(frozen=True)
class Theme:
    """Colors: of text and lines, of what lies behind ("none": nothing), of turbo types and of stock types."""

    ink: str
    paper: str
    turbo: str
    stock: str


# Without colors, turbo is dark on white and filled; stock is lighter and hollow.
LIGHT = Theme(ink="#24292f", paper="none", turbo="#0b57a8", stock="#c26a12")
DARK = Theme(ink="#d5dae0", paper="none", turbo="#7cb8ff", stock="#e69b4c")
PRINT = Theme(ink="#24292f", paper="white", turbo="#0b57a8", stock="#c26a12")


@dataclass(frozen=True)
class Panel:
    """A plot. alt: what it shows, in words. draw: puts it into empty axes."""

    title: str
    alt: str
    draw: Callable[[Axes, Theme], None]


def panels(kind: str, finding: QualityFinding | Finding) -> list[Panel]:
    """The plots of a finding: none if its kind has none, or if nothing was measured that could be drawn."""
    return list(_PANELS[kind](finding)) if kind in _PANELS else []


def svg(panel: Panel, theme: Theme) -> bytes:
    """The plot as an image of its own; the same bytes for the same data."""
    buffer = io.BytesIO()
    with _themed(theme):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, HEIGHT), **_FIGURE)
        panel.draw(figure.subplots(), theme)
        _save(figure, buffer, "svg")
    return buffer.getvalue()


def write(sections: Sequence[Section], path: Path, form: str) -> None:
    """Write all plots as one image, a row for each model. form: "png" or "svg".

    Raises TurboquantError if there is nothing to draw, and OSError if writing fails.
    """
    rows = [(section.model["name"], _panels_of(section)) for section in sections]
    rows = [(name, drawn) for name, drawn in rows if drawn]
    if not rows:
        raise TurboquantError("There is neither quality nor speed to draw. Write the report as .html or .md instead.")
    columns = max(len(drawn) for _, drawn in rows)
    with _themed(PRINT), open(path, "wb") as file:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH * columns, (HEIGHT + 0.4) * len(rows)), **_FIGURE)
        for part, (name, drawn) in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
            part.suptitle(name, fontweight="bold", parse_math=False)
            for axes, panel in zip(part.subplots(1, columns, squeeze=False)[0], drawn, strict=False):
                axes.set_title(panel.title, fontsize="medium", parse_math=False)
                panel.draw(axes, PRINT)
        for axes in figure.axes:
            axes.set_visible(axes.has_data())
        _save(figure, file, form)


def _panels_of(section: Section) -> list[Panel]:
    return [panel for kind, found in section.findings.items() for one in found for panel in panels(kind, one)]


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


def _save(figure: Figure, file: IO[bytes], form: str) -> None:
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")
    for axes in figure.axes:
        _spread_labels(axes)
    figure.savefig(file, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)


#
# quality against bits
#


def frontier(finding: QualityFinding) -> list[CacheTypes]:
    """The Pareto frontier: the types than which none has both fewer bits and less divergence. Fewest bits first."""
    best, least = [], math.inf
    points = _points(finding)
    for types in sorted(points, key=lambda pair: (pair.bits, points[pair].kld_mean)):
        if points[types].kld_mean < least:
            best.append(types)
            least = points[types].kld_mean
    return best


def _points(finding: QualityFinding) -> dict[CacheTypes, Quality]:
    """What a logarithmic axis can show: not the types that all are compared with."""
    results = dict(zip(types_of(finding), finding.results, strict=True))
    return {types: result for types, result in results.items() if 0 < result.kld_mean < math.inf}


def _pareto(finding: QualityFinding) -> Iterator[Panel]:
    points, base = _points(finding), finding.settings["base"]
    if points:
        best = ", ".join(map(str, frontier(finding)))
        alt = (
            f"Mean KL divergence from {base} (logarithmic) against bits a value, for {len(points)} cache types. On the "
            f"Pareto frontier, from the fewest bits: {best}. The table has the numbers."
        )
        title = f"KL divergence from {base} against bits a value"
        yield Panel(title, alt, lambda axes, theme: _draw_pareto(axes, theme, finding))


def _draw_pareto(axes: Axes, theme: Theme, finding: QualityFinding) -> None:
    points, best = _points(finding), frontier(finding)
    axes.set_xscale("log")  # most types lie at the lower end
    axes.set_yscale("log", nonpositive="clip")
    corners = [(types.bits, points[types].kld_mean) for types in best]
    steps = [corners[0], *(step for (_, y), (x, y2) in pairwise(corners) for step in ((x, y), (x, y2)))]
    axes.plot(*zip(*steps, strict=True), color=theme.ink, alpha=0.5, linewidth=1, label="Pareto frontier")
    for turbo, name in ((True, "turbo types"), (False, "stock types")):
        own = {types: result for types, result in points.items() if _is_turbo(types) == turbo}
        if own:
            axes.errorbar(
                [types.bits for types in own],
                [result.kld_mean for result in own.values()],
                [result.kld_stderr for result in own.values()],
                fmt="o" if turbo else "s",
                color=theme.turbo if turbo else theme.stock,
                markerfacecolor=None if turbo else "none",
                markersize=7,
                capsize=3,
                label=name,
            )
    for types in by_bits(points):
        axes.annotate(
            str(types),
            (types.bits, points[types].kld_mean),
            (0, 0),
            textcoords="offset points",
            fontweight="bold" if types in best else "normal",
            arrowprops={"arrowstyle": "-", "color": theme.ink, "alpha": 0.4, "linewidth": 0.6, "shrinkB": 5},
        ).set_in_layout(False)
    _plain_numbers(axes)
    axes.margins(x=0.1, y=0.1)
    axes.set_xlabel("bits a value")
    axes.set_ylabel(f"mean KL divergence from {finding.settings['base']}, nats")
    axes.grid(color="0.5", alpha=0.2)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize="small")


def _plain_numbers(axes: Axes) -> None:
    """Numbers such as 0.02 beside logarithmic axes, instead of powers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    for axis, locator in ((axes.xaxis, FixedLocator(_BITS)), (axes.yaxis, LogLocator(subs=(1, 2, 5)))):
        axis.set_major_locator(locator)
        axis.set_major_formatter(FuncFormatter(lambda value, _: np.format_float_positional(value, trim="-")))
        axis.set_minor_locator(NullLocator())


def _is_turbo(types: CacheTypes) -> bool:
    return "turbo" in str(types)


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


#
# speed against depth
#


def _speed(finding: Finding) -> Iterator[Panel]:
    for kind in ("decode", "prefill"):
        ratios = {types: _ratios(finding, types, kind) for types in by_bits(finding.values)}
        drawn = {types: own for types, own in ratios.items() if own and types != REFERENCE}
        if drawn:
            title = f"{kind.capitalize()} of {finding.settings[kind]} tokens, as a multiple of f16"
            names = ", ".join(map(str, drawn))
            alt = f"Speed, as a multiple of f16's, against depth, for {names}. The table has the numbers."
            yield Panel(title, alt, partial(_draw_speed, drawn))


def _ratios(finding: Finding, types: CacheTypes, kind: str) -> dict[int, dict[str, float]]:
    """By depth: median, lowest and highest over the rounds."""
    cells = sorted(finding.values[types], key=lambda cell: cell["depth"])
    return {cell["depth"]: cell[f"{kind}_ratio"] for cell in cells if cell[f"{kind}_ratio"]}


def _draw_speed(drawn: Mapping[CacheTypes, Mapping[int, Mapping[str, float]]], axes: Axes, theme: Theme) -> None:
    benchplot.set_scales(axes, sorted({depth for ratios in drawn.values() for depth in ratios}))
    axes.axhline(1, color=theme.ink, linewidth=1, linestyle=":", label="f16")
    markers = iter(benchplot.MARKERS * len(drawn))
    for turbo, color in ((True, theme.turbo), (False, theme.stock)):
        own = {types: ratios for types, ratios in drawn.items() if _is_turbo(types) == turbo}
        for number, (types, ratios) in enumerate(own.items()):
            medians = [ratio["median"] for ratio in ratios.values()]
            axes.errorbar(
                list(ratios),
                medians,
                (
                    [median - ratio["low"] for median, ratio in zip(medians, ratios.values(), strict=True)],
                    [ratio["high"] - median for median, ratio in zip(medians, ratios.values(), strict=True)],
                ),
                label=str(types),
                color=color,
                alpha=1 - 0.55 * number / len(own),
                linestyle="-" if turbo else "--",
                marker=next(markers),
                markerfacecolor=None if turbo else "none",
                capsize=2,
            )
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, frameon=False, fontsize="small")


_PANELS = {"quality": _pareto, "speed": _speed}
