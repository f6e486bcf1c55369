"""The plot of a needle-in-a-haystack test: a heat map for each cache type."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..core import outputfile
from ..kinds.niah import Report, heading, shares
from . import benchplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable

ABREAST = 3
"""Panels side by side."""

MOST_LABELS = 120
"""A panel of more cells than that has no room for numbers."""


def write(report: Report, path: Path) -> None:
    """Write the plot to `path`, whose suffix is one of benchplot.FORMATS. Raises OSError if that fails.

    One panel for each type: the percentage of needles found, by length and depth; empty where none was asked for.
    """
    benchplot.check()
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    scores = report.scores
    columns = min(ABREAST, len(scores))
    rows = -(-len(scores) // columns)
    width = max(2.4, 0.55 * len(report.settings["lengths"]))
    height = max(1.8, 0.3 * len(report.settings["depths"]))
    figure = Figure(figsize=(1.2 + columns * width, 1 + rows * (height + 0.4)), layout="constrained")
    figure.suptitle(heading(report), fontsize="small")
    # Gray prints keep its order: it grows steadily lighter.
    colors = ScalarMappable(Normalize(0, 100), "viridis")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, score in zip(panels.flat, scores, strict=False):
        axes.set_title(f"{score.types}: {score.found} of {score.asked}", fontsize="medium")
        _draw(axes, report, score.types, colors)
    for axes in panels.flat[len(scores) - columns : len(scores)]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    for axes in panels.flat[len(scores) :]:
        axes.set_visible(False)
    figure.supxlabel("prompt tokens", fontsize="medium")
    figure.supylabel("depth of the needle, %", fontsize="medium")
    figure.colorbar(colors, ax=panels, label="needles found, %")
    with outputfile.beside(path) as unfinished:
        figure.savefig(unfinished, dpi=150)


def _draw(axes: Axes, report: Report, types: str, colors: ScalarMappable) -> None:
    lengths, depths = report.settings["lengths"], report.settings["depths"]
    found = {place: 100 * share for place, share in shares(report, types).items()}
    grid = [[found.get((length, depth), math.nan) for length in lengths] for depth in depths]
    axes.imshow(grid, norm=colors.norm, cmap=colors.cmap, aspect="auto")
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize="small")
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize="small")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(lengths) * len(depths) > MOST_LABELS:
        return
    for (length, depth), share in found.items():
        color = "black" if share > 50 else "white"
        place = (lengths.index(length), depths.index(depth))
        axes.annotate(f"{share:.0f}", place, ha="center", va="center", color=color, fontsize="small")
