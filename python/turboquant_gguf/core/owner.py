"""Objects that own what must be given back: memory of C, files."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Self


class Owner:
    """A context manager that gives back, at the end of the block, what its `_owned` holds."""

    _owned: ExitStack

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._owned.close()
