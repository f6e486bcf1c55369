"""llama.cpp's own converter of Hugging Face checkpoints and its gguf-py: of the pinned version, in this package."""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType, new_class

from .. import codec
from ..errors import TurboquantError
from ..llamacpp import native

FOLDER = native.PACKAGE / "converter"
NEEDS = ("torch", "transformers", "sentencepiece", "google.protobuf", "yaml")


@cache
def load() -> tuple[ModuleType, ModuleType]:
    """The modules `conversion` and `gguf`, the latter with the turbo types in gguf.quants.

    Raises TurboquantError if what they need is not installed, or if another gguf-py is already imported: two versions
    cannot live in one process.
    """
    for folder in (FOLDER / "gguf-py", FOLDER):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    try:
        import conversion
        import gguf
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith(NEEDS):
            raise TurboquantError(
                f"Converting needs the Python package {error.name}. Install what it takes: "
                "pip install 'turboquant-gguf[convert]'"
            ) from error
        raise
    for module in (conversion, gguf):
        if FOLDER not in (native.PACKAGE / (module.__file__ or "")).parents:
            raise TurboquantError(
                f"Another {module.__name__} ({module.__file__}) is imported already, and converting needs the one of "
                "this package. Import turboquant_gguf.convert before it."
            )
    _add_codecs(gguf.quants)
    return conversion, gguf


def _add_codecs(quants: ModuleType) -> None:
    """Has gguf.quants.quantize and dequantize know the turbo types, through the C library."""
    for turbo in codec.types():

        def methods(namespace: dict[str, object], name: str = turbo.name) -> None:
            namespace["quantize_blocks"] = classmethod(lambda cls, blocks: codec.quantize(blocks, name))
            namespace["dequantize_blocks"] = classmethod(lambda cls, blocks: codec.dequantize(blocks, name))

        # As each type of gguf-py is: a subclass of the base of all, registered by being one.
        qtype = quants.GGMLQuantizationType(turbo.ggml_type)
        new_class(qtype.name, quants.BF16.__bases__, {"qtype": qtype}, methods)
