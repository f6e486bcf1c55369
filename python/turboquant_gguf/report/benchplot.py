"""The plot of a benchmark: speed against depth, as a multiple of f16's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..core import outputfile
from ..errors import TurboquantError
from ..kinds.bench import Report, Spread, heading

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")
MARKERS = "osD^vP*X<>"


def check() -> None:
    """Raise TurboquantError if matplotlib, an optional dependency, is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise TurboquantError("A plot needs matplotlib. Install it with: pip install matplotlib") from error


def write(report: Report, path: Path) -> None:
    """Write the plot to `path`, whose suffix is one of FORMATS. Raises OSError if that fails.

    One panel for decoding and one for prefill, as far as they were measured; a line for each type, from lowest to
    highest of the rounds.
    """
    check()
    from matplotlib.figure import Figure

    settings = report.settings
    panels = [
        (f"{kind} of {settings[kind]} tokens", f"{kind}_ratio") for kind in ("decode", "prefill") if settings[kind]
    ]
    figure = Figure(figsize=(3 + 3.5 * len(panels), 4.5), layout="constrained")
    figure.suptitle(heading(report), fontsize="small")
    for axes, (title, ratio) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set_title(title, fontsize="medium")
        set_scales(axes, settings["depths"])
        _draw(axes, report, ratio)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2 + 2 * len(panels), frameon=False)
    with outputfile.beside(path) as unfinished:
        figure.savefig(unfinished, dpi=150)


def set_scales(axes: Axes, depths: list[int]) -> None:
    """Depth to the right, multiples of f16 upward."""
    # Logarithmic above the first depth that has a logarithm: depths are mostly chosen as powers of two.
    axes.set_xscale("symlog", base=2, linthresh=next(filter(None, depths), 1))
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.minorticks_off()
    axes.margins(x=0.06)
    axes.set_xlabel("depth: tokens in the cache")
    axes.set_ylabel("speed, times f16")
    axes.grid(axis="y", color="0.5", alpha=0.2)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw(axes: Axes, report: Report, ratio: str) -> None:
    from matplotlib import colormaps

    axes.axhline(1, color="black", linewidth=1, linestyle="--", label=report.base)
    names = [name for name in report.settings["types"] if name != report.base]
    for i, name in enumerate(names):
        # From dark to light in the order of the table, so that gray prints tell them apart; markers do it too.
        shade = colormaps["viridis"](0.88 * i / max(1, len(names) - 1))
        spreads: dict[int, Spread] = {
            result.depth: getattr(result, ratio)
            for result in report.results
            if result.name == name and getattr(result, ratio)
        }
        medians = [spread.median for spread in spreads.values()]
        below = [spread.median - spread.low for spread in spreads.values()]
        above = [spread.high - spread.median for spread in spreads.values()]
        axes.errorbar(
            list(spreads), medians, (below, above), label=name, color=shade, marker=MARKERS[i % len(MARKERS)], capsize=2
        )
    axes.set_ylim(bottom=0)
