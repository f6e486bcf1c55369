"""Speed of several KV-cache types at several depths, by llama-bench, as ratios to f16.

A machine that grows warm or busy slows down whatever runs then. So every type is measured once in each round, in an
order that turns around from round to round, and is compared only with the f16 of its own round and depth.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from ..core import callbacks, tables
from ..core.tables import NOTHING, TYPE, Column, Table
from ..core.units import GB
from ..errors import TurboquantError
from ..llamacpp import provenance
from ..llamacpp.cachetypes import F16, CacheTypes
from .base import Failure, Finding, Kind, Panel, Row, Step, Work, option, register, types_by_bits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..measure.store import Measurement
    from ..report.plots import Theme

METRICS = ("prefill_speed", "prefill_ratio", "decode_speed", "decode_ratio", "cache_traffic")
"""Speeds in tokens a second. Ratios are speeds as multiples of f16's in the same round. cache_traffic: bytes of K and V
read in a second of decoding, taking it that each token reads all of the context before it once."""

MARKERS = "osD^vP*X<>"


@register
@dataclass(frozen=True)
class Speed(Kind):
    """Speed at several depths, a part for each round; a row is a JSON array of depth and METRICS, null where not known.

    In files of earlier versions a row is of all rounds: METRICS are then the median, and the lowest and the highest.
    """

    name = "speed"
    title = "Speed"
    command = "bench"
    summary = "Measure the speed of cache types against f16."
    help = """Measure how fast MODEL runs with several KV-cache types, as multiples of f16.

    MODEL is a GGUF file; without it, SmolLM2-135M-Instruct (93 MB) is fetched once. llama-bench measures every type at
    every depth once in each round, and a type is compared with the f16 of its own round, so a machine that slows down
    meanwhile does not favour any. Leave the machine alone while it runs."""
    examples = """
  turboquant-gguf bench
  turboquant-gguf bench my.gguf --types turbo4,turbo4:turbo3 --depths 0,8192
  turboquant-gguf bench my.gguf --prefill 0 --repetitions 7 --plot speed.png
  turboquant-gguf bench my.gguf --baseline ~/llama.cpp/build/bin
  turboquant-gguf bench my.gguf --json > speed.json"""
    note = (
        "Times f16: the median over the rounds of the ratio to f16 in the same round, and the lowest and the highest."
    )
    reading = (
        (
            "Speed",
            "is compared with f16 in the same round of measurements, so that a machine that slows down does "
            "not favour any type: 2 is twice as fast as f16. Decoding is what answers take, prefill is the "
            "reading of the prompt. Bars show the lowest and the highest round.",
        ),
    )
    default_types = ("f16", "q8_0", "q4_0", "turbo4", "turbo3", "turbo2", "turbo4:turbo3")
    default_model = "smollm2-135m"
    alone = True
    part = "round"
    columns = ("depth",)
    options = (
        option(
            "--depths",
            sweep=True,
            sweep_default="0,4096",
            default="0,4096,16384",
            callback=callbacks.numbers(least=0),
            help="Tokens already in the cache, separated by commas.",
        ),
        option("--prefill", type=click.IntRange(min=0), default=512, help="Prompt tokens to measure; 0 leaves it out."),
        option(
            "--decode", type=click.IntRange(min=0), default=32, help="Tokens to generate one by one; 0 leaves it out."
        ),
        option(
            "--repetitions",
            sweep=True,
            type=click.IntRange(min=1),
            default=3,
            help="Rounds; each measures everything once.",
        ),
        option(
            "--baseline",
            type=click.Path(path_type=Path),
            metavar="FOLDER",
            help="Take f16 from the llama-bench in FOLDER, such as a stock llama.cpp's.",
        ),
    )

    depths: tuple[int, ...]
    prefill: int
    decode: int
    baseline: Path | None

    @classmethod
    def prepare(cls, **options: Any) -> dict[str, Any]:
        from .runners import llamabench

        if not options.get("prefill", 1) and not options.get("decode", 1):
            raise click.UsageError("--prefill and --decode are both 0, so there is nothing to measure.")
        llamabench.tool(options.get("baseline"))
        return options

    @classmethod
    def plan(
        cls,
        work: Work,
        *,
        depths: Sequence[int] = (0, 4096, 16384),
        prefill: int = 512,
        decode: int = 32,
        repetitions: int = 3,
        baseline: Path | None = None,
    ) -> Iterator[Self]:
        rounds = dict.fromkeys(range(repetitions), work.types)
        sizes = (tuple(sorted(set(depths))), prefill, decode)
        yield cls(work.model, work.facts, work.placement, rounds, *sizes, baseline and baseline.absolute())

    @property
    def settings(self) -> dict[str, Any]:
        asked = {"depths": list(self.depths), "prefill": self.prefill, "decode": self.decode}
        asked |= {"threads": self.placement.threads} | self.placement.settings()
        return asked | {"baseline": self.baseline and str(self.baseline), "build": provenance.build()}

    def measure(self, step: Step) -> Iterator[Row | Failure]:
        from .runners import llamabench
        from .runners.llamabench import Sample

        tool = llamabench.tool(None)
        common = ("-m", self.model, "-p", str(self.prefill), "-n", str(self.decode))
        common += tuple(self.placement.bench_arguments())
        fails_from: dict[CacheTypes | None, int] = {}  # depths at which these types failed once are not tried again
        # Time goes with the tokens that are processed: the context once, the prefill twice (to warm up), and decoding.
        tokens = {depth: depth + 2 * self.prefill + 8 * self.decode for depth in self.depths}
        total, done, measured = len(self.parts) * sum(tokens.values()), 0.0, False
        for number, types in self.parts.items():
            subjects = list(dict.fromkeys([None if self.baseline else F16, *types]))  # None: f16 of the baseline
            values: dict[CacheTypes, list[dict[str, Any]]] = {pair: [] for pair in types}
            for depth in self.depths:
                samples: dict[CacheTypes | None, Sample] = {}
                for pair in subjects if number % 2 == 0 else subjects[::-1]:
                    step(f"round {number + 1}  depth {depth}  {pair or 'f16 baseline'}", done / total)
                    done += tokens[depth] / len(subjects)
                    if depth >= fails_from.get(pair, depth + 1):
                        continue
                    try:
                        used = tool if pair else llamabench.tool(self.baseline)
                        samples[pair] = llamabench.run(used, pair or F16, (*common, "-d", str(depth)))
                        measured = True
                    except TurboquantError as error:
                        if not measured:  # the first f16 itself: nothing could be compared
                            raise
                        fails_from[pair] = depth
                        yield self.failure(f"{pair or 'f16 baseline'} at depth {depth}", error)
                base = samples.get(subjects[0])
                for pair in types:
                    if pair in samples:
                        metrics = metrics_of(samples[pair], base, depth + self.decode / 2)
                        values[pair].append({"depth": depth, **metrics})
            for pair, found in values.items():
                if found:
                    yield Row(pair, json.dumps(found).encode(), number)

    @classmethod
    def summarize(
        cls, rows: Mapping[tuple[CacheTypes, int], Measurement]
    ) -> Iterator[tuple[dict[CacheTypes, list[dict[str, Any]]], list[Measurement]]]:
        """The median, lowest and highest of METRICS over the rounds, by depth."""
        rounds: dict[CacheTypes, dict[int, list[dict[str, Any]]]] = {}
        for (types, _), row in rows.items():
            for one in json.loads(row.value):
                rounds.setdefault(types, {}).setdefault(one["depth"], []).append(one)
        values = {
            types: [
                {"depth": depth} | {metric: spread([one[metric] for one in found]) for metric in METRICS}
                for depth, found in sorted(depths.items())
            ]
            for types, depths in rounds.items()
        }
        yield values, list(rows.values())

    @classmethod
    def conditions(cls, finding: Finding) -> list[str]:
        settings = finding.settings
        return [
            *(f"{kind} of {tables.count(settings[kind], 'token')}" for kind in _measured(finding)),
            *([tables.count(settings["threads"], "thread")] if settings["threads"] else []),
            tables.count(settings.get("repetitions", finding.parts), "round"),
            *([f"f16 of {settings['baseline']}"] if settings.get("baseline") else []),
        ]

    @classmethod
    def table(cls, finding: Finding) -> Table:
        kinds = _measured(finding)
        columns = [TYPE]
        for kind in kinds:
            columns += [Column(f"{kind}\ntok/s"), Column("times\nf16"), Column("lowest..\nhighest")]
            columns += [Column("cache\nGB/s", detail=True)] if kind == "decode" else []
        rows: dict[str, list[list[str]]] = {}
        cells = [(types, cell) for types in types_by_bits(finding.values) for cell in finding.values[types]]
        for types, cell in sorted(cells, key=lambda one: one[1]["depth"]):
            row = [str(types)]
            for kind in kinds:
                speed, ratio = cell[f"{kind}_speed"], cell[f"{kind}_ratio"]
                row += [f"{speed['median']:.1f}" if speed else NOTHING]
                row += (
                    [f"{ratio['median']:.2f}", f"{ratio['low']:.2f}..{ratio['high']:.2f}"] if ratio else [NOTHING] * 2
                )
                if kind == "decode":
                    traffic = cell["cache_traffic"]
                    row += [tables.short(traffic["median"] / GB) if traffic else NOTHING]
            rows.setdefault(f"depth {cell['depth']}", []).append(row)
        return Table("Speed by depth, the tokens already in the cache", columns, rows)

    @classmethod
    def panels(cls, finding: Finding) -> list[Panel]:
        found = []
        for kind in _measured(finding):
            ratios = {types: _ratios(finding, types, kind) for types in types_by_bits(finding.values)}
            drawn = {types: own for types, own in ratios.items() if own and types != F16}
            if drawn:
                title = f"{kind.capitalize()} of {finding.settings[kind]} tokens, as a multiple of f16"
                names = ", ".join(map(str, drawn))
                alt = f"Speed, as a multiple of f16's, against depth, for {names}. The table has the numbers."
                found.append(Panel(title, alt, partial(_draw, drawn)))
        return found

    @classmethod
    def numbers(cls, finding: Finding) -> Iterator[tuple[CacheTypes, dict[str, Any]]]:
        for types, cells in finding.values.items():
            for cell in cells:
                for metric in METRICS:
                    if found := cell[metric]:
                        value = {"value": found["median"], "low": found["low"], "high": found["high"]}
                        yield types, {"depth": cell["depth"], "metric": metric} | value


def metrics_of(sample: Any, base: Any, tokens: float) -> dict[str, float | None]:
    """METRICS of a llamabench.Sample. base: that of f16, None without. tokens: in the cache, on average."""
    found: dict[str, float | None] = {}
    for kind in ("prefill", "decode"):
        speed = getattr(sample, f"{kind}_speed")
        other = base and getattr(base, f"{kind}_speed")
        found |= {f"{kind}_speed": speed, f"{kind}_ratio": speed / other if speed and other else None}
    traffic = sample.decode_speed and sample.decode_speed * sample.cache.size_of(tokens)
    return found | {"cache_traffic": traffic}


def spread(values: Sequence[Any]) -> dict[str, float] | None:
    """The median of a metric over the rounds, with the lowest and the highest; None where no round has it."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if isinstance(known[0], dict):  # of all rounds, in files of earlier versions
        return known[0]
    return {"median": statistics.median(known), "low": min(known), "high": max(known)}


def _measured(finding: Finding) -> list[str]:
    return [kind for kind in ("decode", "prefill") if finding.settings[kind]]


#
# the plot: speed against depth
#


def _ratios(finding: Finding, types: CacheTypes, kind: str) -> dict[int, dict[str, float]]:
    """The median, lowest and highest ratio, by depth."""
    return {cell["depth"]: cell[f"{kind}_ratio"] for cell in finding.values[types] if cell[f"{kind}_ratio"]}


def _draw(drawn: Mapping[CacheTypes, Mapping[int, Mapping[str, float]]], axes: Axes, theme: Theme) -> None:
    _set_scales(axes, sorted({depth for ratios in drawn.values() for depth in ratios}))
    axes.axhline(1, color=theme.ink, linewidth=1, linestyle=":", label="f16")
    markers = iter(MARKERS * len(drawn))
    for turbo, color in ((True, theme.turbo), (False, theme.stock)):
        own = {types: ratios for types, ratios in drawn.items() if types.is_turbo == turbo}
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


def _set_scales(axes: Axes, depths: list[int]) -> None:
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
