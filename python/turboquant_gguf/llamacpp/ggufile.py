"""GGUF files as ggml itself reads them: the metadata and the list of tensors, but not the tensors' data."""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.owner import Owner
from ..errors import TurboquantError
from . import ggml, toolerrors

MAX_DIMENSIONS = 4  # GGML_MAX_DIMS

_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file. shape: the innermost dimension first, as ggml counts. size: bytes of its data."""

    name: str
    shape: tuple[int, ...]
    type: str
    size: int

    @property
    def elements(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)


class GGUFFile(Owner):
    """An open GGUF file. A context manager: it owns memory that arrays of the metadata refer to.

    metadata: key -> number, bool, str, or Array. tensors: in the file's order.
    Raises TurboquantError if the file is none, is damaged, or does not hold all the data its tensors need.
    """

    def __init__(self, path: Path) -> None:
        toolerrors.check_model_file(path)
        self.path = path
        self.size = path.stat().st_size
        """Bytes."""
        with ExitStack() as owned, ggml.captured_log() as log:
            params = ggml.GGUFInitParams(True, None)
            self._context: int | None = ggml.function("gguf_init_from_file")(os.fsencode(path), params)
            if not self._context:
                raise _refused(path, "".join(log))
            owned.callback(ggml.function("gguf_free"), self._context)
            self.metadata: Mapping[str, Any] = MappingProxyType(self._read_metadata())
            self.tensors = tuple(self._read_tensors())
            self._owned = owned.pop_all()

    def __exit__(self, *_: object) -> None:
        self._context = None
        super().__exit__()

    def ask(self, function: str, *arguments: Any) -> Any:
        """What ggml's `function` says of this file. Raises ValueError once it is closed."""
        if not self._context:
            raise ValueError(f"{self.path} is closed")
        return ggml.function(function)(self._context, *arguments)

    def _read_metadata(self) -> dict[str, Any]:
        count = self.ask("gguf_get_n_kv")
        return {_text(self.ask("gguf_get_key", number)): self._value(number) for number in range(count)}

    def _value(self, number: int) -> Any:
        kind = _type_name(self.ask("gguf_get_kv_type", number))
        if kind == "arr":
            return Array(self, number)
        value = self.ask(f"gguf_get_val_{kind}", number)
        return _text(value) if kind == "str" else value

    def _read_tensors(self) -> Iterator[Tensor]:
        data = self.ask("gguf_get_data_offset")
        for number in range(self.ask("gguf_get_n_tensors")):
            shape = list(self.ask("gguf_get_tensor_ne", number)[:MAX_DIMENSIONS])
            while len(shape) > 1 and shape[-1] == 1:
                shape.pop()
            size = self.ask("gguf_get_tensor_size", number)
            end = data + self.ask("gguf_get_tensor_offset", number) + size
            name = _text(self.ask("gguf_get_tensor_name", number))
            if end > self.size:
                raise TurboquantError(
                    f"{self.path} is incomplete: it holds {self.size} bytes, and the data of {name} would end at byte "
                    f"{end}. Download it again."
                )
            kind = _text(ggml.function("ggml_type_name")(self.ask("gguf_get_tensor_type", number)))
            yield Tensor(name, tuple(shape), kind, size)


def rewrite(source: Path, output: Path, prefix: str, changes: Mapping[str, int | NDArray]) -> None:
    """Copy a GGUF, with other metadata: `changes` instead of all keys that begin with `prefix`.

    Tensors are copied as they are, in pieces. A number is written as uint32, an array as what it is (int32 or float32).
    Raises TurboquantError as GGUFFile does.
    """
    with GGUFFile(source) as file:
        data = file.ask("gguf_get_data_offset")
        for key in file.metadata:
            if key.startswith(prefix):
                file.ask("gguf_remove_key", key.encode())
        for key, value in changes.items():
            if isinstance(value, int):
                file.ask("gguf_set_val_u32", key.encode(), value)
            else:
                kind = {"int32": "i32", "float32": "f32"}[value.dtype.name]
                array = np.ascontiguousarray(value)
                file.ask("gguf_set_arr_data", key.encode(), _type_number(kind), ggml.pointer(array), array.size)
        if not file.ask("gguf_write_to_file", os.fsencode(output), True):
            raise OSError(None, "The metadata could not be written", str(output))
    with source.open("rb") as old, output.open("ab") as new:
        old.seek(data)
        shutil.copyfileobj(old, new, 1 << 24)


class Array(Sequence):
    """An array in a file's metadata. An element becomes a Python value when it is asked for, not before.

    Usable as long as its file is open; ValueError after that. type: of its elements, as in GGUF_SCALARS, or "str".
    """

    def __init__(self, file: GGUFFile, number: int) -> None:
        self._file, self._number = file, number
        self.type = _type_name(file.ask("gguf_get_arr_type", number))
        self._length = file.ask("gguf_get_arr_n", number)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(self._length))]
        at = range(self._length)[index]
        if self.type == "str":
            return _text(self._file.ask("gguf_get_arr_str", self._number, at))
        scalar = ggml.GGUF_SCALARS[self.type]
        start = self._file.ask("gguf_get_arr_data", self._number)
        return scalar.from_address(start + at * ctypes.sizeof(scalar)).value

    def __repr__(self) -> str:
        return f"<{len(self)} x {self.type}>"


class GGUFModel(Owner):
    """All files of a model: one, or the parts that llama-gguf-split makes. A context manager.

    path: any of its files. paths: all of them, in order. metadata: of the first. tensors: of all. size: bytes of all
    files. Raises TurboquantError as GGUFFile does, and where a part is missing or not the one its name says.
    """

    def __init__(self, path: Path) -> None:
        with ExitStack() as owned:
            asked = owned.enter_context(GGUFFile(path))
            self.paths = _parts(path, asked.metadata)
            files = [asked if part == path else owned.enter_context(GGUFFile(part)) for part in self.paths]
            self.metadata = files[0].metadata
            self.tensors = tuple(tensor for file in files for tensor in file.tensors)
            self.size = sum(file.size for file in files)
            for number, file in enumerate(files):
                if len(files) > 1 and file.metadata.get("split.no") != number:
                    raise TurboquantError(f"{file.path} is not part {number + 1} of its model. Download it again.")
            self._owned = owned.pop_all()

    @property
    def learned_positions(self) -> int | None:
        """How many positions there are, if the model learned them one by one; None if it reads at any."""
        return next((tensor.shape[1] for tensor in self.tensors if tensor.name == "position_embd.weight"), None)


def _parts(path: Path, metadata: Mapping[str, Any]) -> tuple[Path, ...]:
    """The files of the model that `path` is one of."""
    count, number = metadata.get("split.count", 1), metadata.get("split.no", 0)
    if not isinstance(count, int) or not isinstance(number, int):
        raise TurboquantError(f"{path} is damaged: its split.count or split.no is no number. Download it again.")
    if count <= 1:
        return (path,)
    name = _PART_NAME.fullmatch(path.name)
    if not name or int(name["count"]) != count:
        raise TurboquantError(
            f"{path} is one of {count} parts, and the others are found by its name: give it back the one that ends in "
            f"-{number + 1:05}-of-{count:05}.gguf."
        )
    parts = tuple(path.with_name(f"{name['stem']}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1))
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise TurboquantError(
            f"{path} is one of {count} parts, and {len(missing)} of them, such as {missing[0]}, cannot be found. "
            "Download all parts into one folder."
        )
    return parts


def _refused(path: Path, log: str) -> TurboquantError:
    """Why ggml does not read the file, from what it logged."""
    known = toolerrors.advice(log, toolerrors.GGUF)
    return TurboquantError(
        f"{path} {known or f'is damaged or incomplete ({toolerrors.cause(log)}). Download it again.'}"
    )


def _type_name(number: int) -> str:
    return _text(ggml.function("gguf_type_name")(number))


def _type_number(name: str) -> int:
    return next(number for number in range(len(ggml.GGUF_SCALARS) + 2) if _type_name(number) == name)


def _text(value: bytes) -> str:
    return value.decode(errors="replace")
