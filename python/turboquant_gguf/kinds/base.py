"""What a kind of measurement is: one class that measures, and says what its measurements mean.

An instance is a piece of work: plain values, so that it can be sent to other processes and machines. Everything about
the results is a class method, which needs nothing that runs a model: what does is imported where it measures.
"""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..core.tables import HeatMap, Table
from ..errors import TurboquantError
from ..llamacpp import provenance
from ..llamacpp.cachetypes import F16, CacheTypes
from ..llamacpp.placement import Placement

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..measure.store import Measurement
    from ..report.plots import Theme

Step = Callable[[str, float], object]
"""Called while something is measured, with what that is, and which share of the piece of work is done (0 to 1)."""

Types = tuple[CacheTypes, ...]


@dataclass(frozen=True)
class Row:
    """A measurement of these types in this part. value: as `Kind.summarize` reads it, by default a JSON array."""

    types: CacheTypes
    value: bytes
    part: int = 0


@dataclass(frozen=True)
class Failure:
    """What could not be measured, and why. `Kind.failure` makes one of a TurboquantError."""

    what: str
    message: str
    details: str = ""
    exit_code: int = 1


@dataclass(frozen=True)
class Option:
    """An option of a kind's command. names, more: as click.Option takes them.

    sweep: whether `sweep` has it as well, where options of all kinds stand together and no name may be there twice;
    `plan` is not given the others there. sweep_default: what it is there, if that is something else. old_name: one
    that still works, and warns.
    """

    names: tuple[str, ...]
    more: dict[str, Any]
    sweep: bool = False
    sweep_default: Any = None
    old_name: str = ""

    @property
    def parameter(self) -> str:
        """The name of the argument of `plan` that it sets."""
        return self.names[0].removeprefix("--").partition("/")[0].replace("-", "_")


def option(*names: str, sweep: bool = False, sweep_default: Any = None, old_name: str = "", **more: Any) -> Option:
    """An Option, written as click.option is."""
    return Option(names, more, sweep, sweep_default, old_name)


@dataclass(frozen=True)
class Work:
    """What all kinds are told of a piece of work. facts: provenance.model of the file.

    sweep: whether it is one of several kinds or models, so that what does not fit this model is left out.
    """

    model: Path
    facts: Mapping[str, Any]
    types: Types
    placement: Placement
    sweep: bool


@dataclass(frozen=True)
class Finding:
    """What measurements of one kind and one model with the same settings say.

    machines: where they were made. time: of the last of them, UTC, ISO 8601. values: by cache types; of what form, the
    kind says. parts: how many parts all of these types were measured on.
    """

    kind: type[Kind]
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    machines: list[Mapping[str, Any]]
    time: str
    values: dict[CacheTypes, Any]
    parts: int

    def as_json(self) -> dict[str, Any]:
        """Plain values: the same for every kind but for what is in a result."""
        results = [
            {"types": str(types), "type_k": types.k, "type_v": types.v, "bits": types.bits, **result}
            for types, result in self.kind.results(self)
        ]
        facts = {"settings": self.settings, "machines": self.machines, "time": self.time}
        return facts | {f"{self.kind.part}s": self.parts, "results": results}


@dataclass(frozen=True)
class Panel:
    """A plot. alt: what it shows, in words. draw: puts it into empty axes."""

    title: str
    alt: str
    draw: Callable[[Axes, Theme], None]


@dataclass(frozen=True)
class Kind(ABC):
    """A kind of measurement, and as an instance a piece of work of it.

    parts: which cache types to measure in each part (a chunk of a text, a round, a trial), by the part's number.
    facts: provenance.model of the model, whose fingerprint must be the same everywhere. placement: where it computes.

    A subclass is a frozen dataclass, too; its own fields, plain values, follow these four. `register` checks the rest.
    """

    name: ClassVar[str]
    """What its rows are called in a file of measurements."""
    title: ClassVar[str]
    """The heading of its results."""
    command: ClassVar[str]
    """The subcommand that measures it alone; its help follows in `summary`, `help` and `examples`."""
    summary: ClassVar[str]
    help: ClassVar[str]
    examples: ClassVar[str]
    note: ClassVar[str] = ""
    """A sentence below the table of its command, on what the columns mean."""
    reading: ClassVar[tuple[tuple[str, str], ...]] = ()
    """How to read its findings, in paragraphs: the words that each begins with, which are emphasized, and the rest."""
    options: ClassVar[tuple[Option, ...]] = ()
    default_types: ClassVar[tuple[str, ...]] = ("f16", "turbo4")
    default_model: ClassVar[str | None] = None
    """The model of models.catalogue that the command takes if it is given none."""
    in_sweep: ClassVar[bool] = True
    """Whether `sweep` measures it without being asked. If not, it does where its required options are given there."""
    alone: ClassVar[bool] = False
    """Whether it wants a machine for itself, and says something of that machine alone."""
    part: ClassVar[str] = "part"
    """What a part is called."""
    shared_parts: ClassVar[int | None] = None
    """How many parts make a piece of work for a cluster; None: all."""
    merged: ClassVar[str | None] = None
    """The setting whose values are shown together where nothing else tells findings apart."""
    columns: ClassVar[tuple[str, ...]] = ()
    """Columns of its own in a CSV file, besides metric, value, stderr, low and high."""

    model: Path
    facts: Mapping[str, Any]
    placement: Placement
    parts: Mapping[int, Types]

    #
    # what there is to do
    #

    @classmethod
    def reference(cls, options: Mapping[str, Any]) -> CacheTypes:
        """What all others are compared with, which is measured in any case. options: as `prepare` returns them."""
        return F16

    @classmethod
    def prepare(cls, **options: Any) -> dict[str, Any]:
        """The options, looked at before anything is measured. Raises TurboquantError if one cannot be used."""
        return options

    @classmethod
    @abstractmethod
    def plan(cls, work: Work, **options: Any) -> Iterator[Self]:
        """The pieces of work for a model: `cls(work.model, work.facts, work.placement, parts, ...)`, and its fields.

        work.types: to be measured, the reference among them. options: as `prepare` returns them; all need defaults but
        those that `prepare` sets, or that `sweep` has. Raises TurboquantError if it cannot be measured.
        """

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the rows depend on besides the model and the cache types, as JSON can hold it.

        "build" must be among it, which is provenance.build(), and what `Placement.settings` returns. Rows of other
        settings are other findings, and rows of the same are not measured again.
        """

    @property
    def label(self) -> str:
        """What messages call this piece of work."""
        return f"{self.model.name}, {self.name}"

    @property
    def rows(self) -> int:
        """How many rows it gives."""
        return sum(map(len, self.parts.values()))

    @property
    def types(self) -> Types:
        """The cache types that any part asks for, in the order in which they were asked for."""
        return tuple(dict.fromkeys(pair for types in self.parts.values() for pair in types))

    def without(self, known: Collection[tuple[CacheTypes, int]]) -> Self:
        """The piece of work without the rows that are `known`: types and part."""
        missing = {number: tuple(pair for pair in types if (pair, number) not in known) for number, types in
                   self.parts.items()}  # fmt: skip
        return replace(self, parts={number: types for number, types in missing.items() if types})

    def split(self) -> list[Self]:
        """The piece of work in several, for several machines."""
        size, numbers = self.shared_parts or len(self.parts), list(self.parts)
        pieces = (numbers[begin : begin + size] for begin in range(0, len(numbers), size))
        return [replace(self, parts={number: self.parts[number] for number in piece}) for piece in pieces]

    @abstractmethod
    def measure(self, step: Step) -> Iterator[Row | Failure]:
        """Measure `parts`, in a process of its own: a Row for each part and each of its types, as soon as it is known.

        Types that fail give a Failure; raises TurboquantError if all of it does. Whatever runs the model must be asked
        what its cache is (llamacpp/cachefacts.py; Context.facts), so that no row is of other types than it says.
        """

    def require_model(self) -> None:
        """Raise TurboquantError unless the file is here, and the one the sweep was started with."""
        if provenance.model(self.model)["fingerprint"] != self.facts["fingerprint"]:
            raise TurboquantError(f"{self.model} is another file here than where the sweep was started.")

    def failure(self, what: object, error: TurboquantError) -> Failure:
        """The failure of a part of this work. what: which."""
        return Failure(f"{self.label}, {what}", str(error), error.details, error.exit_code)

    #
    # what the rows say
    #

    @classmethod
    def summarize(
        cls, rows: Mapping[tuple[CacheTypes, int], Measurement]
    ) -> Iterator[tuple[dict[CacheTypes, Any], list[Measurement]]]:
        """What rows of the same model and settings say, by types and part: values, and the rows they come from.

        Unless a kind has it otherwise, a row is a JSON array, and the value of a type is all of its rows', one after
        the other.
        """
        values: dict[CacheTypes, list[Any]] = {}
        for (types, _), row in rows.items():
            values.setdefault(types, []).extend(json.loads(row.value))
        yield values, list(rows.values())

    @classmethod
    def results(cls, finding: Finding) -> Iterator[tuple[CacheTypes, dict[str, Any]]]:
        """The values as JSON has them: plain ones for each of the types, one or more."""
        for types, found in finding.values.items():
            for one in found:
                yield types, one

    @classmethod
    @abstractmethod
    def conditions(cls, finding: Finding) -> list[str]:
        """What was measured, in words."""

    @classmethod
    @abstractmethod
    def table(cls, finding: Finding) -> Table:
        """The values for people."""

    @classmethod
    def maps(cls, finding: Finding) -> list[HeatMap]:
        """Heat maps, if it has any."""
        return []

    @classmethod
    def panels(cls, finding: Finding) -> list[Panel]:
        """Plots, if it has any."""
        return []

    @classmethod
    @abstractmethod
    def numbers(cls, finding: Finding) -> Iterator[tuple[CacheTypes, dict[str, Any]]]:
        """The values as rows of a CSV file: metric and value, and what they need of stderr, low, high, `columns`."""


def types_by_bits(types: Collection[CacheTypes]) -> list[CacheTypes]:
    """The types, those with the most bits first."""
    return sorted(types, key=lambda pair: -pair.bits)


KINDS: dict[str, type[Kind]] = {}
"""All kinds by name."""


def register(kind: type[Kind]) -> type[Kind]:
    """Make a kind known to the store, sweeps, reports and the command line: a decorator, above @dataclass(frozen=True).

    Raises TypeError if the class is no complete kind, or has a name that another kind has.
    """
    for problem in _problems(kind):
        raise TypeError(f"{kind.__module__}: the kind {kind.__name__} {problem}")
    KINDS[kind.name] = kind
    return kind


def _problems(kind: type[Kind]) -> Iterator[str]:
    """What is wrong with a class as a kind, in words that follow its name."""
    if "__dataclass_fields__" not in vars(kind):
        yield "is no dataclass: @register stands above @dataclass(frozen=True)"
    if lacks := sorted(kind.__abstractmethods__):
        yield f"does not define {', '.join(lacks)}"
    named = [name for name, type in Kind.__annotations__.items() if type.startswith("ClassVar")]
    if lacks := [name for name in named if not hasattr(kind, name)]:
        yield f"does not say {', '.join(lacks)}"
    for other in KINDS.values():
        for name in ("name", "command"):
            if getattr(kind, name) == getattr(other, name):
                yield f"has the {name} of {other.__module__}, {getattr(kind, name)!r}"
    if kind.prepare.__func__ is Kind.prepare.__func__:  # plan gets the options as they are
        wanted = inspect.signature(kind.plan).parameters
        if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in wanted.values()):
            return
        for one in kind.options:
            if one.parameter not in wanted:
                yield f"has the option {one.names[0]}, and no argument {one.parameter} of plan"
            elif not one.sweep and wanted[one.parameter].default is inspect.Parameter.empty:
                yield f"must have a default for {one.parameter} in plan, as `sweep` does not have {one.names[0]}"


def names_to_measure() -> Sequence[str]:
    """The kinds that `sweep` measures by itself."""
    return [name for name, kind in KINDS.items() if kind.in_sweep]
