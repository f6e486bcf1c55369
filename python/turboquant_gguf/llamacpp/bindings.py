"""llama-cpp-python on the libraries of this package: the one release whose structs are those of this llama.cpp."""

from __future__ import annotations

import os
import re
import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, requires, version
from types import ModuleType

from ..errors import TurboquantError
from . import native

LIBRARIES = "LLAMA_CPP_LIB_PATH"
"""The environment variable that says where llama-cpp-python finds its libraries."""

_PACKAGE = "llama-cpp-python"

FITTING_RELEASE = re.search(rf"^{_PACKAGE}==([^ ;]+)", "\n".join(requires("turboquant-gguf")), re.MULTILINE)[1]
"""The one that the extra "python" asks for."""

_INSTALL = "CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install 'turboquant-gguf[python]'"


def load() -> ModuleType:
    """llama-cpp-python's low-level module. Raises TurboquantError if it is not installed, or of another release."""
    if found := _other_release():
        raise TurboquantError(
            f"This needs {_PACKAGE} {FITTING_RELEASE}, and {found} is installed: its structs are not those of the "
            f"llama.cpp in this package. Install the one that fits: {_INSTALL}"
        )
    try:
        from llama_cpp import llama_cpp
    except ModuleNotFoundError as error:
        raise TurboquantError(f"This needs {_PACKAGE}. Install it without a second llama.cpp: {_INSTALL}") from error
    return llama_cpp


def point_at_us() -> None:
    """Makes llama-cpp-python load the libraries of this package, unless the user has chosen others.

    Another release than the one that fits keeps its own libraries; a warning says so when it is imported.
    """
    ours = str(native.library_dir())
    if os.environ.get(LIBRARIES, ours) != ours:
        return
    if found := _other_release():
        os.environ.pop(LIBRARIES, None)  # a parent process may have set it
        sys.meta_path.insert(0, _Warning(found))
    else:
        os.environ[LIBRARIES] = ours


class _Warning(MetaPathFinder):
    """Finds nothing, and warns when llama-cpp-python is imported. release: the one installed."""

    def __init__(self, release: str) -> None:
        self._release = release

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> None:
        if name == "llama_cpp":
            warnings.warn(
                f"{_PACKAGE} {self._release} uses its own llama.cpp, without the turbo types: turboquant-gguf has the "
                f"libraries of {FITTING_RELEASE}. Install that: {_INSTALL}",
                stacklevel=2,
            )


def _other_release() -> str | None:
    """The release that is installed, if it is not the one that fits."""
    try:
        found = version(_PACKAGE)
    except PackageNotFoundError:
        return None
    return found if found.partition("+")[0] != FITTING_RELEASE else None
