"""Rotating the value space of attention inside the weights, exactly.

A rotation R of each head's values commutes with the weighted sum of attention, so that

    W_v' = R W_v,   b_v' = R b_v,   W_o' = W_o R^T        R = D H

leave the model's function as it was, while the cache holds rotated values (QuaRot, Ashkboos et al. 2024,
arXiv:2404.00456, section 4). H is the orthonormal Walsh-Hadamard transform: it spreads outliers over the head, which is
what a low-bit cache wants. D is a sign for each coordinate; it stands outside H so that a llama.cpp that rotates the
cache by H again does not undo ours. A head size that is not a power of two has blocks of the largest power of two that
divides it. docs/value-rotation.md tells the rest.

It holds where nothing but W_o follows the weighted sum. So there is a list of architectures for which it was checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ..errors import TurboquantError

VERSION = 1
SIGN_SEED = 1
KEY = "turboquant.values."
"""What the metadata keys of a rotated file begin with."""

CHECKED = frozenset(
    """
    apertus arcee bloom chatglm cohere2 command-r ernie4_5 falcon gemma gemma2 gemma3 glm4 glm4moe gpt-oss gpt2
    gptneox granite granitemoe hunyuan-dense lfm2 llama mistral3 nemotron olmo olmo2 olmoe phi2 phi3 qwen2 qwen2moe
    qwen3 qwen3moe seed_oss smollm3 stablelm starcoder2
    """.split()
)
"""GGUF architectures whose rotated form gives the logits of transformers, as tests/test_convert.py shows for each."""

EXCLUDED = {
    architecture: reason
    for reason, architectures in {
        "a gate stands between its attention and the output projection": "afmoe qwen3next qwen35 qwen35moe qwen4exp",
        "a norm stands between its attention and the output projection": "bitnet",
        "its values are a slice of the compressed keys (MLA)": (
            "deepseek2 deepseek2-ocr deepseek32 deepseek4 glm-dsa kimi-linear minicpm3 mistral4 plm"
        ),
    }.items()
    for architecture in architectures.split()
}
"""Why the values of some GGUF architectures cannot be rotated, as the end of a sentence."""


class NotRotatable(Exception):
    """Why a model's values cannot be rotated in its weights, as the end of a sentence."""


@dataclass(frozen=True)
class Rows:
    """Output rows [begin, begin + count) of a tensor, which are values: heads of `head_size` rows."""

    begin: int
    count: int
    head_size: int


@dataclass(frozen=True)
class Columns:
    """All input columns of a tensor, which take the values of heads of `head_size`."""

    head_size: int


@dataclass(frozen=True)
class Plan:
    """What to rotate: the part of each tensor, by GGUF name; and each layer's head size, 0 if it has no attention."""

    parts: Mapping[str, Rows | Columns]
    head_sizes: Sequence[int]

    def metadata(self) -> dict[str, int | str | list[int]]:
        """The keys that say what was done: a number for all layers alike, or an array with one for each."""
        sizes = [block_size(size) if size else 0 for size in self.head_sizes]
        return {
            f"{KEY}version": VERSION,
            f"{KEY}transform": "hadamard",
            f"{KEY}size": sizes[0] if len(set(sizes)) == 1 else sizes,
            f"{KEY}sign_seed": SIGN_SEED,
        }


def plan(architecture: str, metadata: Mapping[str, object], shapes: Mapping[str, Sequence[int]]) -> Plan:
    """What to rotate in a model of a GGUF `architecture`.

    metadata: the GGUF's. shapes: of its tensors by GGUF name, outermost dimension first. Raises NotRotatable with the
    reason, or TurboquantError where metadata and shapes disagree.
    """
    if architecture in EXCLUDED:
        raise NotRotatable(EXCLUDED[architecture])
    if architecture not in CHECKED:
        raise NotRotatable("it is not on the list of those whose rotated weights were checked against transformers")
    if metadata.get(f"{architecture}.attention.clamp_kqv"):
        raise NotRotatable("it clamps its values one by one")
    parts: dict[str, Rows | Columns] = {}
    head_sizes = []
    for layer in range(int(metadata[f"{architecture}.block_count"])):
        # Layers for multi-token prediction are counted, but may not be stored.
        stored = any(name.startswith(f"blk.{layer}.") for name in shapes)
        found = _layer(architecture, metadata, shapes, layer) if stored else {}
        parts.update(found)
        head_sizes.append(next((part.head_size for part in found.values()), 0))
    return Plan(parts, head_sizes)


def _layer(
    architecture: str, metadata: Mapping[str, object], shapes: Mapping[str, Sequence[int]], layer: int
) -> dict[str, Rows | Columns]:
    def number(key: str) -> int:
        value = metadata[f"{architecture}.attention.{key}"]
        return int(value[layer] if isinstance(value, Sequence) else value)

    output = f"blk.{layer}.attn_output.weight"
    heads = number("head_count")
    kv_heads = number("head_count_kv") if f"{architecture}.attention.head_count_kv" in metadata else heads
    if kv_heads == 0:  # a recurrent layer
        return {}
    if output not in shapes:
        raise NotRotatable(f"there is no {output}")
    head_size, rest = divmod(shapes[output][-1], heads)
    if rest or (f"{architecture}.attention.value_length" in metadata and number("value_length") != head_size):
        raise _disagreement(output, shapes[output], heads, kv_heads)
    key_size = number("key_length") if f"{architecture}.attention.key_length" in metadata else head_size
    values = kv_heads * head_size
    parts: dict[str, Rows | Columns] = {output: Columns(head_size)}
    for kind in ("weight", "bias"):
        apart, fused = f"blk.{layer}.attn_v.{kind}", f"blk.{layer}.attn_qkv.{kind}"
        if apart in shapes:
            if shapes[apart][0] != values:
                raise _disagreement(apart, shapes[apart], heads, kv_heads)
            parts[apart] = Rows(0, values, head_size)
        elif fused in shapes:  # the converter has put all of them in the order queries, keys, values
            if shapes[fused][0] != (heads + kv_heads) * key_size + values:
                raise _disagreement(fused, shapes[fused], heads, kv_heads)
            parts[fused] = Rows(shapes[fused][0] - values, values, head_size)
        elif kind == "weight":
            raise NotRotatable(f"layer {layer} has neither {apart} nor {fused}")
    return parts


def _disagreement(name: str, shape: Sequence[int], heads: int, kv_heads: int) -> TurboquantError:
    return TurboquantError(
        f"The configuration and the weights disagree: {name} has the shape {tuple(shape)}, but config.json says "
        f"{heads} heads and {kv_heads} KV heads. Is this config.json of another model?"
    )


def block_size(head_size: int) -> int:
    """The largest power of two that divides the head size."""
    return head_size & -head_size


@cache
def signs(head_size: int) -> NDArray[np.float32]:
    """D: +1 or -1 for each coordinate of a head, by the top bit of each output of PCG64(SIGN_SEED)."""
    raw = np.random.PCG64(SIGN_SEED).random_raw(head_size)
    return np.where(raw >> np.uint64(63), np.float32(-1), np.float32(1))


@cache
def hadamard(size: int) -> NDArray[np.float32]:
    """H: the orthonormal Walsh-Hadamard matrix of a power of two, in natural order (Sylvester)."""
    index = np.arange(size)
    parity = np.bitwise_count(index[:, None] & index) & 1
    return (1 - 2 * parity.astype(np.float32)) / np.float32(size) ** np.float32(0.5)


def rotate(values: NDArray[np.float32], head_size: int) -> NDArray[np.float32]:
    """R v of each head's vector v along the last dimension: float32 (..., heads * head_size), returned in that shape.

    So of the rows w of W_o, too, since W_o R^T has the rows R w.
    """
    heads = (values.reshape(-1, block_size(head_size)) @ hadamard(block_size(head_size))).reshape(-1, head_size)
    heads *= signs(head_size)
    return heads.reshape(values.shape)


def rotate_rows(weights: NDArray[np.float32], head_size: int) -> NDArray[np.float32]:
    """R W of each head's rows W: float32 (heads * head_size, columns) or a bias (heads * head_size,)."""
    size, columns = block_size(head_size), weights.size // len(weights)
    heads = (hadamard(size) @ weights.reshape(-1, size, columns)).reshape(-1, head_size, columns)
    heads *= signs(head_size)[:, None]
    return heads.reshape(weights.shape)


def apply(part: Rows | Columns, tensor: NDArray[np.float32]) -> NDArray[np.float32]:
    """A copy of the tensor with that part rotated: a weight of shape (rows, columns) or a bias of shape (rows,)."""
    if isinstance(part, Columns):
        return rotate(tensor, part.head_size)
    rows = slice(part.begin, part.begin + part.count)
    rotated = rotate_rows(tensor[rows], part.head_size)
    return (
        rotated if part.count == len(tensor) else np.concatenate([tensor[: rows.start], rotated, tensor[rows.stop :]])
    )
