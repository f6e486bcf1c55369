"""The cells of a sweep: each is measured in one go on one machine, and gives rows for a Store.

Cells are plain values, so that they can be sent to other processes and machines. What a row of a kind holds is said
here, and read by nobody but report.py.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from rich.console import Console

from ..errors import TurboquantError
from ..kinds import bench, evaluation, niah, quality
from ..llamacpp import provenance
from ..llamacpp.cachetypes import CacheTypes
from ..llamacpp.logits import Model

_QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Row:
    """A measurement, as Store.add wants it."""

    types: CacheTypes
    value: bytes
    part: int = 0


@dataclass(frozen=True)
class Failure:
    """What could not be measured, and why."""

    what: str
    message: str
    details: str = ""


@dataclass(frozen=True)
class Cell(ABC):
    """What to measure. facts: provenance.model of the file, whose fingerprint must be the same everywhere."""

    kind: ClassVar[str]
    model: Path
    facts: Mapping[str, Any]
    types: tuple[CacheTypes, ...]
    threads: int | None

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.model.name}, {self.kind}"

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the rows depend on besides the model and the types."""

    @property
    def rows(self) -> int:
        """How many rows it gives."""
        return len(self.types)

    def without(self, known: Collection[tuple[CacheTypes, int]]) -> Self:
        """The same without the rows that are `known`: types and part."""
        return replace(self, types=tuple(pair for pair in self.types if (pair, 0) not in known))

    def split(self, size: int) -> list[Self]:
        """The same in several cells, for several machines. size: parts in each."""
        return [self]

    @abstractmethod
    def measure(self) -> Iterator[Row | Failure]:
        """Measure. A type that fails is a Failure; raises TurboquantError if the whole cell does."""

    def require_model(self) -> None:
        """Raise TurboquantError unless the file is here, and the one the sweep was started with."""
        if provenance.model(self.model)["fingerprint"] != self.facts["fingerprint"]:
            raise TurboquantError(f"{self.model} is another file here than where the sweep was started.")

    def _rows(self, values: Mapping[str, Any], failures: Sequence[Any]) -> Iterator[Row | Failure]:
        """A JSON row for each type that has values, and the failures of the others, by the name of the type."""
        for pair in self.types:
            if found := values.get(str(pair)):
                yield Row(pair, json.dumps(found).encode())
        for name, failure in failures:
            yield Failure(f"{self.name}, {name}", failure.message, failure.details)


@dataclass(frozen=True)
class QualityCell(Cell):
    """Scores of caches (quality.Scores, as they lie in memory), a part for each window. windows: number -> types."""

    kind = "quality"
    experiment: quality.Experiment
    windows: Mapping[int, Sequence[CacheTypes]]

    @property
    def settings(self) -> dict[str, Any]:
        return self.experiment.settings

    @property
    def rows(self) -> int:
        return sum(map(len, self.windows.values()))

    def measure(self) -> Iterator[Row | Failure]:
        with Model(self.model, gpu_layers=self.experiment.gpu_layers) as model:
            cut = self.experiment.windows(model)
            for number, types in self.windows.items():
                for pair, scores in self.experiment.measure(model, cut[number], types):
                    yield Row(pair, scores.tobytes(), number)

    def without(self, known: Collection[tuple[CacheTypes, int]]) -> Self:
        return replace(self, windows=quality.plan(known, self.windows))

    def split(self, size: int) -> list[Self]:
        numbers = list(self.windows)
        parts = (numbers[begin : begin + size] for begin in range(0, len(numbers), size))
        return [replace(self, windows={number: self.windows[number] for number in part}) for part in parts]


@dataclass(frozen=True)
class RetrievalCell(Cell):
    """Needles found in prompts of one length: for each type a JSON array of niah.Cell."""

    kind = "retrieval"
    length: int
    depths: tuple[float, ...]
    trials: int

    @property
    def settings(self) -> dict[str, Any]:
        asked = {"length": self.length, "depths": list(self.depths), "trials": self.trials}
        return asked | {"build": provenance.build()}

    def measure(self) -> Iterator[Row | Failure]:
        found = niah.niah(
            model=self.model,
            types=list(map(str, self.types)),
            lengths=[self.length],
            depths=self.depths,
            trials=self.trials,
            threads=self.threads,
            console=_QUIET,
        )
        values: dict[str, list] = {}
        for answer in found.cells:
            values.setdefault(answer.types, []).append(asdict(answer))
        yield from self._rows(values, [(failure.types, failure) for failure in found.failures])


@dataclass(frozen=True)
class TaskCell(Cell):
    """A task of lm-evaluation-harness: for each type a JSON array of evaluation.Score."""

    kind = "task"
    task: str
    task_folder: Path | None
    limit: int | None

    @property
    def settings(self) -> dict[str, Any]:
        return {"task": self.task, "limit": self.limit, "build": provenance.build()}

    def measure(self) -> Iterator[Row | Failure]:
        found = evaluation.evaluate(
            model=self.model,
            tasks=[self.task],
            types=list(map(str, self.types)),
            task_folder=self.task_folder,
            limit=self.limit,
            threads=self.threads,
            console=_QUIET,
        )
        values: dict[str, list] = {}
        for score in found.scores:
            values.setdefault(score.type, []).append(asdict(score))
        yield from self._rows(values, [(failure.type, failure) for failure in found.failures])


@dataclass(frozen=True)
class SpeedCell(Cell):
    """Speed at several depths: for each type a JSON array of bench.Result. It wants the machine for itself."""

    kind = "speed"
    depths: tuple[int, ...]
    prefill: int
    decode: int
    repetitions: int

    @property
    def settings(self) -> dict[str, Any]:
        asked = {"depths": list(self.depths), "prefill": self.prefill, "decode": self.decode}
        how = {"repetitions": self.repetitions, "threads": self.threads, "build": provenance.build()}
        return asked | how

    def measure(self) -> Iterator[Row | Failure]:
        found = bench.bench(
            model=self.model,
            types=list(map(str, self.types)),
            depths=self.depths,
            prefill=self.prefill,
            decode=self.decode,
            threads=self.threads,
            repetitions=self.repetitions,
            console=_QUIET,
        )
        values: dict[str, list] = {}
        for result in found.results:
            values.setdefault(result.name, []).append(asdict(result))
        yield from self._rows(
            values, [(f"{failure.name} at depth {failure.depth}", failure) for failure in found.failures]
        )
