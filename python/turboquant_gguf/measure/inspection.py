"""What a GGUF file holds, what its KV cache takes with each pair of types, and which contexts fit in a memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core import units
from ..errors import TurboquantError
from ..llamacpp.cachetypes import F16, CacheTypes, UnknownTypeError
from ..llamacpp.ggufile import Array, GGUFModel
from ..llamacpp.modelmemory import UBATCH, Layer, ModelMemory

DEFAULT_TYPES = ("f16", "q8_0", "q5_0", "q4_0", "turbo4", "turbo3", "turbo2")
PREFIX = "turboquant."
"""What this project's own metadata keys begin with."""

# general.type, or where there is none general.architecture -> what such a file is
_NOT_A_MODEL = {
    "adapter": "a LoRA adapter",
    "clip": "the vision or audio part of a model (--mmproj)",
    "controlvector": "a control vector",
    "imatrix": "an importance matrix",
    "mmproj": "the vision or audio part of a model (--mmproj)",
    "vocab": "a vocabulary",
}


@dataclass(frozen=True)
class AttentionGroup(Layer):
    """Layers of the same attention: what is said of each, and how many they are."""

    layers: int


@dataclass(frozen=True)
class TensorGroup:
    """The tensors of one type: how many, their bytes, and their share of all bytes."""

    type: str
    tensors: int
    bytes: int
    share: float


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer in a file. pre: how text is cut before it is tokenized; empty if not said. tokens: their number."""

    model: str
    pre: str
    tokens: int
    chat_template: bool


@dataclass(frozen=True)
class Pair:
    """A cache with keys of one type and values of another.

    refusal: why llama.cpp does not take this pair; empty if it does, and only then the numbers are not None.
    bytes_per_token: what each further token takes. smaller_than_f16: f16's as a multiple of that; None if it is 0.
    trained_bytes: all of it at the length the model was trained for. fixed_bytes: of that, or in long contexts if the
    file does not say it, what does not grow with each token: recent and sliding windows, recurrent states. longest_context: tokens that fit in the memory asked for, together with weights and buffers; 0 if
    none. times_f16: that as a multiple of f16's; None if that is 0.
    """

    type_k: str
    type_v: str
    refusal: str = ""
    bytes_per_token: int | None = None
    smaller_than_f16: float | None = None
    fixed_bytes: int | None = None
    trained_bytes: int | None = None
    longest_context: int | None = None
    times_f16: float | None = None


@dataclass(frozen=True)
class Caches:
    """The KV caches of a model, one sequence long. Bytes.

    memory: what contexts had to fit in, None if nothing was asked. weights: what llama.cpp keeps of the model.
    compute: its buffers at the shortest context. together: keys and values must have the same type.
    """

    types: tuple[str, ...]
    sequences: int
    ubatch: int
    memory: int | None
    weights: int
    compute: int
    together: bool
    pairs: tuple[Pair, ...]


@dataclass
class Report:
    """All that is known of a GGUF file. None or empty: the file does not say.

    kind: general.type, such as "model" or "adapter". parameters: values in all tensors. file_bytes, weight_bytes: of
    all files, and of the tensors in them. turboquant: metadata of this project. values_rotated: whether the weights
    rotate the values, so that the cache need not. keys_calibrated: whether quantized keys are stored centred and
    scaled. attention: the layers that have any. caches: None if there are none, and then no_caches says why, or error
    why llama.cpp does not take the model.
    """

    files: list[str]
    file_bytes: int
    kind: str
    architecture: str
    name: str
    parameters: int
    weight_bytes: int
    tensors: list[TensorGroup]
    tokenizer: Tokenizer | None
    turboquant: dict[str, Any]
    values_rotated: bool
    keys_calibrated: bool
    layers: int | None
    trained_context: int | None
    attention: list[AttentionGroup] = field(default_factory=list)
    caches: Caches | None = None
    no_caches: str = ""
    error: str = ""


def inspect(*, file: Path, types: Sequence[str] = DEFAULT_TYPES, memory: int | None = None) -> Report:
    """Read a GGUF file and ask llama.cpp what its caches take.

    file: any part of a split model stands for all of it. types: of keys and of values, each crossed with each.
    memory: bytes; None leaves out which contexts fit. Raises TurboquantError if the file cannot be read, and
    UnknownTypeError; a file that can be read but is no model that llama.cpp loads gives a report that says so.
    """
    types = _single_types(types)
    with GGUFModel(file) as model:
        report = _read(model)
        what = _NOT_A_MODEL.get(report.kind) or _NOT_A_MODEL.get(report.architecture)
        if what:
            report.no_caches = f"This file is {what}, not a model: it has no KV cache."
            return report
        path = model.paths[0]
    try:
        with ModelMemory(path) as measured:
            report.layers = len(measured.layers)
            report.attention = [
                AttentionGroup(**asdict(layer), layers=count)
                for layer, count in Counter(layer for layer in measured.layers if layer.kv_heads).items()
            ]
            report.no_caches = _no_caches(measured)
            if not report.no_caches:
                report.caches = _caches(measured, types, memory, report.trained_context)
    except TurboquantError as error:
        report.error = str(error)
    return report


def _single_types(types: Sequence[str]) -> tuple[str, ...]:
    for text in types:
        if ":" in text:
            raise UnknownTypeError(f"{text!r} is a pair. Name single types: each is tried for keys and for values.")
    return tuple(dict.fromkeys(CacheTypes.parse(text).k for text in types))


def _read(model: GGUFModel) -> Report:
    """What the file itself says."""
    metadata = model.metadata
    architecture = _of_kind(str, metadata, "general.architecture") or ""
    weights = sum(tensor.size for tensor in model.tensors)
    counts = Counter(tensor.type for tensor in model.tensors)
    sizes = {type: sum(tensor.size for tensor in model.tensors if tensor.type == type) for type in counts}
    return Report(
        files=[path.name for path in model.paths],
        file_bytes=model.size,
        kind=_of_kind(str, metadata, "general.type") or "model",
        architecture=architecture,
        name=_of_kind(str, metadata, "general.name") or "",
        parameters=sum(tensor.elements for tensor in model.tensors),
        weight_bytes=weights,
        tensors=[
            TensorGroup(type, counts[type], sizes[type], sizes[type] / weights if weights else 0.0)
            for type in sorted(counts, key=lambda type: -sizes[type])
        ],
        tokenizer=_tokenizer(metadata),
        turboquant={key: _plain(value) for key, value in metadata.items() if key.startswith(PREFIX)},
        values_rotated=f"{PREFIX}values.version" in metadata,  # what llama.cpp goes by, as the next
        keys_calibrated=f"{PREFIX}keys.version" in metadata,
        layers=_of_kind(int, metadata, f"{architecture}.block_count"),
        trained_context=_of_kind(int, metadata, f"{architecture}.context_length"),
    )


def _tokenizer(metadata: Mapping[str, Any]) -> Tokenizer | None:
    model = _of_kind(str, metadata, "tokenizer.ggml.model")
    if not model:
        return None
    return Tokenizer(
        model=model,
        pre=_of_kind(str, metadata, "tokenizer.ggml.pre") or "",
        tokens=len(_of_kind(Array, metadata, "tokenizer.ggml.tokens") or ()),
        chat_template="tokenizer.chat_template" in metadata,
    )


def _of_kind(kind: type, metadata: Mapping[str, Any], key: str) -> Any:
    """The value of `key` if it is of that kind, else None: a file may hold anything."""
    value = metadata.get(key)
    return value if isinstance(value, kind) else None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Array) else value


def _no_caches(measured: ModelMemory) -> str:
    """Why the model has no KV cache, in a sentence; empty if it has one."""
    growth = measured.growth(F16)
    if growth.at_start.cache == 0:
        return "This model keeps no KV cache: it reads a whole text at once."
    if all(not layer.kv_heads for layer in measured.layers):
        return (
            "This model keeps no KV cache: it has no attention. "
            f"Its state takes {units.size_text(growth.at_start.cache)}, however long the text."
        )
    return ""


def _caches(measured: ModelMemory, types: tuple[str, ...], memory: int | None, trained: int | None) -> Caches:
    shortest = measured.measure(F16, UBATCH)
    pairs = tuple(_pair(measured, CacheTypes(k, v), memory, trained) for k in types for v in types)
    return Caches(types, 1, UBATCH, memory, shortest.weights, shortest.compute, measured.together, pairs)


def _pair(measured: ModelMemory, types: CacheTypes, memory: int | None, trained: int | None) -> Pair:
    if refusal := measured.refusal(types):
        return Pair(types.k, types.v, refusal)
    growth = measured.growth(types)
    whole = measured.size(types, trained).cache if trained else None
    pair = Pair(
        type_k=types.k,
        type_v=types.v,
        bytes_per_token=growth.cache_per_token,
        smaller_than_f16=_ratio(measured.growth(F16).cache_per_token, growth.cache_per_token),
        fixed_bytes=whole - trained * growth.cache_per_token if trained else growth.cache_fixed,
        trained_bytes=whole,
    )
    if memory is None:
        return pair
    longest, f16 = (measured.longest_context(which, memory) for which in (types, F16))
    return replace(pair, longest_context=longest, times_f16=_ratio(longest, f16))


def _ratio(value: int, base: int) -> float | None:
    return value / base if base else None
