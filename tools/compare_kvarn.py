#!/usr/bin/env python3
"""KVarN beside our types: what each costs a model, at equal bits and with the same recent window.

\b
    python3 tools/compare_kvarn.py --text wiki.test.raw
    python3 tools/compare_kvarn.py --text wiki.test.raw --calibrated SmolLM2-135M-Instruct-calibrated.gguf
    python3 tools/compare_kvarn.py --text mine.txt --types turbo4:turbo2,q4_0 --tile 64 --json kvarn.json

The model runs in float32 in transformers. Its attention is replaced by one that sees what a cache of the type in
question gives back for each key (after RoPE) and value, and the true ones of the last --window tokens and of the first
4, whatever the type. Each type is put beside KVarN of as many bits (turbo3 beside kvarn3, q4_0 beside kvarn4). The
scores are those of `turboquant-gguf ppl`, and one more: "times KVarN", the geometric mean over tokens of the ratio of
the type's KL divergence to KVarN's. Below 1 the type is better. Bits count all that is stored, the window apart.
--calibrated adds our types with keys that `turboquant-gguf calibrate` measured.

A chunk of 1024 tokens takes some 20 seconds a row, and says something: its means hang on a few tokens, medians and the
ratio do not.

\b
KVarN here is our own code, after descriptions: the abstract of arXiv 2606.03458, the README of huawei-csl/KVarN, and for
16 rounds, the best kept and limits of factors those of pull requests (vllm 44581 and 46812, mlx-swift-lm 329). It is not
the authors' code, and was not compared with theirs. From the descriptions:
  - The keys of a head, 128 tokens at a time (a tile), are rotated by a Hadamard matrix; so are the values.
  - A tile is balanced: standard deviations of its tokens and of its channels are divided out in turn, in the logarithm,
    16 times; the most even state of all is kept.
  - It is rounded to nearest, asymmetrically: keys with a scale and a zero for each channel, values for each token.
    What was divided out along that axis is part of the scale; what was along the other is stored beside it. All in f16,
    as the bits that are published for its presets have it.
What they leave open, and what was chosen:
  - "Most even": the largest over the smallest deviation of tokens, plus that of channels, is least. The tile as it is
    counts as a state.
  - Deviations are from the mean, and tokens come first. Of the factors along an axis the geometric mean is 1, since
    scales and zeros take up the rest; otherwise those of the two axes drift apart where channels have means.
  - Deviations below a thousandth of the tile's root mean square count as that, and a factor stays within a thousand and
    a thousandth: constant channels have no deviation to divide by.
  - Codes are rounded with the scale, the zero and the factor as f16 has them, which is what reads them. Scale and zero
    span the group from its least to its greatest value, without clipping or search.
  - Tiles begin after the first 4 tokens, which are exact here: outliers among them would spoil the first tile. The last
    tile is as long as the text leaves it.
    That is in KVarN's favour: tiles from the beginning on raise its mean by a fifth (kvarn3, one chunk of WikiText-2).
Another "most even" (the largest of all deviations over the smallest of all) and other limits of factors changed its
divergences there by no more than noise (0.99 and 1.00 times); no balancing at all makes them 1.2 times as large.
What is otherwise than in their program: that keeps the first tile exact, and the last one until it is full. Here, as
with all other types, a query sees the first 4 and the last --window tokens exact, and those before them that are in an
unfinished tile as they will be when it is full. And attention is computed in float32.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from turboquant_gguf import codec
from turboquant_gguf.codec.attention_numpy import decode
from turboquant_gguf.core import tables, texts
from turboquant_gguf.core.tables import BITS, TYPE, Column, Table
from turboquant_gguf.errors import TurboquantError
from turboquant_gguf.kinds.quality import NEIGHBOURS, Loss, Quality, Scores, compare, summarize
from turboquant_gguf.llamacpp import ggml, models
from turboquant_gguf.llamacpp.cachetypes import F16, CacheTypes
from turboquant_gguf.llamacpp.ggufile import GGUFModel
from turboquant_gguf.llamacpp.logits import Model
from turboquant_gguf.llamacpp.modelmemory import STEP
from turboquant_gguf.llamacpp.placement import Placement
from turboquant_gguf.weights.calibration import KEY, RECENT, SINKS, VERSION, Layer, Rotary, rotary_of
from turboquant_gguf.weights.value_rotation import block_size, hadamard

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ROUNDS = 16
TILE = 128
LARGEST_FACTOR = 1e3
TOKENS, CHANNELS = -2, -1
"""Axes of a tile."""

KVARN, EXACT = "kvarn", "exact"
"""What our names of KVarN's types begin with, and the type that changes nothing."""

IDENTITY = 1e-5
"""The largest KL divergence, nats, that rounding in float32 may leave between two ways to compute attention."""

LEAST = 1e-7
"""KL divergence below which there is nothing but rounding: ratios count less as this."""

CONSOLE = Console(stderr=True)
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)

Array = NDArray[np.float32]


#
# KVarN
#


@dataclass(frozen=True)
class Tile:
    """Tiles as they are stored, each (tokens, channels), any number of them in the leading dimensions.

    codes: integers of `bits` bits. step, zero: f16, one each for a group, which is a channel (of keys) or a token (of
    values). factor: f16, one for each place in a group, the same in all groups.
    """

    codes: NDArray[np.uint8]
    step: NDArray[np.float16]
    zero: NDArray[np.float16]
    factor: NDArray[np.float16]
    bits: int

    @property
    def size(self) -> int:
        """Bits that all of it takes."""
        return self.codes.size * self.bits + 16 * (self.step.size + self.zero.size + self.factor.size)

    def decoded(self) -> Array:
        """The values, in float32."""
        return (self.codes * self.step.astype(np.float32) + self.zero) * self.factor


def encode(x: Array, bits: int, group: int) -> Tile:
    """Tiles of x (..., tokens, channels). group: the axis that groups run along, TOKENS for keys, CHANNELS for values.

    The balancing factors of the groups themselves need not be applied: their steps and zeros follow from their values.
    """
    factor = balance(x)[group].astype(np.float16)
    y = x / factor
    low, high = y.min(group, keepdims=True), y.max(group, keepdims=True)
    most = (1 << bits) - 1
    step, zero = ((high - low) / most).astype(np.float16), low.astype(np.float16)
    steps = np.divide(y - zero, step, out=np.zeros_like(y), where=step > 0)  # a constant group is its zero
    return Tile(steps.round().clip(0, most).astype(np.uint8), step, zero, factor, bits)


def balance(x: Array) -> dict[int, Array]:
    """Factors that even out the standard deviations of tiles x (..., tokens, channels) if x is divided by both.

    Returns those of tokens (..., tokens, 1) under TOKENS and those of channels (..., 1, channels) under CHANNELS.
    """
    size = np.sqrt(np.square(x).mean((TOKENS, CHANNELS), keepdims=True))
    x = x / np.where(size > 0, size, 1)
    logs = {axis: np.zeros_like(x.take([0], other)) for axis, other in ((TOKENS, CHANNELS), (CHANNELS, TOKENS))}
    best, least = dict(logs), _unevenness(x)
    for _ in range(ROUNDS):
        for axis, other in ((TOKENS, CHANNELS), (CHANNELS, TOKENS)):
            log = logs[axis] + np.log(_balanced(x, logs).std(other, keepdims=True).clip(1 / LARGEST_FACTOR))
            log -= log.mean(axis, keepdims=True)
            logs[axis] = log.clip(-np.log(LARGEST_FACTOR), np.log(LARGEST_FACTOR))
        unevenness = _unevenness(_balanced(x, logs))
        better = unevenness < least
        least = np.where(better, unevenness, least)
        best = {axis: np.where(better, logs[axis], best[axis]) for axis in logs}
    return {axis: np.exp(log) for axis, log in best.items()}


def _balanced(x: Array, logs: Mapping[int, Array]) -> Array:
    return x * np.exp(-logs[TOKENS] - logs[CHANNELS])


def _unevenness(x: Array) -> Array:
    """The largest deviation over the smallest, of tokens and of channels, added: 2 at best; of shape (..., 1, 1)."""
    found = np.zeros((*x.shape[:-2], 1, 1), np.float32)
    for axis in (TOKENS, CHANNELS):
        deviations = x.std(axis, keepdims=True).clip(1 / LARGEST_FACTOR)
        found += deviations.max((TOKENS, CHANNELS), keepdims=True) / deviations.min((TOKENS, CHANNELS), keepdims=True)
    return found


def kvarn(x: Array, bits: int, group: int, tile: int = TILE) -> Array:
    """What KVarN gives back for x (heads, tokens, head size); bits and group are those of `encode`."""
    rotated = rotate(x, block_size(x.shape[-1]))
    pieces = np.split(rotated, range(tile, x.shape[1], tile), TOKENS)
    decoded = np.concatenate([encode(piece, bits, group).decoded() for piece in pieces], TOKENS)
    return rotate(decoded, block_size(x.shape[-1]))


def kvarn_bits(bits: int, group: int, tile: int, head_size: int) -> float:
    """Bits of a value in a whole tile, all counted."""
    in_group, groups = (tile, head_size) if group == TOKENS else (head_size, tile)
    return bits + 16 * (2 / in_group + 1 / groups)


def rotate(x: Array, size: int) -> Array:
    """x with each `size` neighbours of its last dimension rotated by the Hadamard matrix, which is its own inverse."""
    return (x.reshape(-1, size) @ hadamard(size)).reshape(x.shape)


#
# any type
#


@dataclass(frozen=True)
class Cache(CacheTypes):
    """A cache: types of keys and values, KVarN's being kvarn2 to kvarn8. tile: of those.

    calibrated: whether keys are, by the centres and scales of `layers`; None for a layer without.
    """

    tile: int = TILE
    layers: Sequence[Layer | None] = field(default=(), compare=False)
    calibrated: bool = False

    def __str__(self) -> str:
        return f"{super().__str__()}, calibrated" if self.calibrated else super().__str__()

    @property
    def kvarn(self) -> Cache:
        """KVarN with as many bits. Raises TurboquantError if it has none such."""
        k, v = (f"{KVARN}{int(ggml.bits(type))}" for type in (self.k, self.v))
        if max(ggml.bits(self.k), ggml.bits(self.v)) >= 9:
            raise TurboquantError(f"KVarN has nothing to put beside {self}: give types of less than 9 bits a value.")
        return Cache(k, v, self.tile)

    def stored_bits(self, head_size: int) -> tuple[float, float]:
        """Bits of a value of keys and of values, all that is stored with them counted."""

        def of(type: str, group: int) -> float:
            if type.startswith(KVARN):
                return kvarn_bits(int(type.removeprefix(KVARN)), group, self.tile, head_size)
            return ggml.bits(type)

        return of(self.k, TOKENS), of(self.v, CHANNELS)

    def keys(self, k: Array, layer: int) -> Array:
        """What is read of the keys k (KV heads, tokens, head size) of a layer, which lie at positions 0, 1, ..."""
        known = self.layers[layer] if self.calibrated else None
        if not known:
            return self._read(k, self.k, TOKENS)
        scale, centers = known.scale[:, None], known.centers(np.arange(k.shape[1])).swapaxes(0, 1)
        stored = self._read(((k - centers) * scale).astype(np.float32), self.k, TOKENS)
        return (stored / scale + centers).astype(np.float32)

    def values(self, v: Array) -> Array:
        """What is read of values, of the same shape."""
        return self._read(v, self.v, CHANNELS)

    def _read(self, x: Array, type: str, group: int) -> Array:
        if type == EXACT:
            return x
        if type.startswith(KVARN):
            later = kvarn(x[:, SINKS:], int(type.removeprefix(KVARN)), group, self.tile)
            return np.concatenate([x[:, :SINKS], later], TOKENS)
        size = block_size(x.shape[-1]) if group == TOKENS else codec.BLOCK  # as llama.cpp rotates keys and values
        rotated = rotate(x, size)
        blocks = ggml.quantize(rotated, type)
        return rotate(codec.dequantize(blocks, type) if ggml.is_turbo(type) else decode(blocks, type), size)


def read_calibration(path: Path, head_size: int) -> list[Layer | None]:
    """The calibration of a GGUF by layer, None for layers without, its channels in transformers' order.

    Raises TurboquantError if there is none, or none of this version.
    """
    with GGUFModel(path) as file:
        if file.metadata.get(f"{KEY}version") != VERSION:
            raise TurboquantError(
                f"{path} has no calibration of version {VERSION}. turboquant-gguf calibrate makes it."
            )
        sizes, turned, center, scale = (
            np.array(file.metadata[KEY + name][:]) for name in ("sizes", "turned", "center", "scale")
        )
    begins = np.cumsum(sizes)[:-1]
    with Model(path, Placement(threads=1)) as model, model.open(STEP) as context:
        rotaries = [rotary_of(context, number) for number in range(len(sizes))]
    vectors = zip(np.split(center, begins), np.split(scale, begins), rotaries, turned, strict=True)
    return [
        in_halves(Layer(c.reshape(-1, head_size), s.reshape(-1, head_size), rotary), turns=bool(turns))
        if len(s)
        else None
        for c, s, rotary, turns in vectors
    ]


def in_halves(layer: Layer, *, turns: bool) -> Layer:
    """A layer with the channels of a head as transformers has them: first of all pairs, second of all pairs, others.

    layer: as llama.cpp has them, which says with `rotary` which are pairs. turns: whether its centre does.
    """
    if not layer.rotary:
        return layer
    first, second, head_size = layer.rotary.first, layer.rotary.second, layer.scale.shape[-1]
    order = np.concatenate([first, second, np.arange(2 * len(first), head_size)])
    halves = Rotary(np.arange(len(first)), np.arange(len(first)) + len(first), layer.rotary.angles, layer.rotary.tile)
    return Layer(layer.center[:, order], layer.scale[:, order], halves if turns else None)


#
# the model
#


class Simulation:
    """A model whose attention sees what a cache gives back, and the true keys and values of the recent window.

    window: how many of the last tokens. threads: of the CPU. Raises TurboquantError if transformers cannot read the
    GGUF, or if its heads are of a size that our types do not take.
    """

    NAME = "turboquant_compare_kvarn"

    def __init__(self, path: Path, window: int, threads: int) -> None:
        import torch
        from transformers import AttentionInterface, AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch, self._window = torch, window
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            try:
                model = AutoModelForCausalLM.from_pretrained(
                    path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
                )
            except (OSError, ValueError, ImportError) as error:
                raise TurboquantError(f"transformers cannot read {path}: {error}") from error
        self._model: PreTrainedModel = model.eval()
        config = self._model.config
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if self.head_size % codec.BLOCK:
            raise TurboquantError(
                f"{path} has heads of {self.head_size} channels, which {codec.BLOCK} does not divide."
            )
        AttentionInterface.register(self.NAME, self._attend)

    def logits(self, chunk: Sequence[int], cache: Cache | None) -> Array:
        """Logits that predict the second half of the chunk but its first token, as `Quality.read` has them.

        cache: None is the model's own attention, untouched.
        """
        self._model.set_attn_implementation(self.NAME if cache else "eager")
        self._cache = cache
        with self._torch.inference_mode():
            kept = len(chunk) - len(chunk) // 2
            tokens = self._torch.tensor([chunk])
            return self._model(tokens, logits_to_keep=kept, use_cache=False).logits[0, :-1].numpy()

    def _attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _mask: torch.Tensor | None,
        scaling: float,
        **_others: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attention as transformers calls it: (1, heads, tokens, head size) -> (1, tokens, heads, head size).

        One softmax over stored and true keys, as with the recent window of llama.cpp.
        """
        torch = self._torch
        group = query.shape[1] // key.shape[1]
        position = torch.arange(query.shape[2])
        distance = position[:, None] - position
        true = (distance < self._window) | (position < SINKS)
        stored_k = torch.from_numpy(self._cache.keys(key[0].numpy(), module.layer_idx))
        stored_v = torch.from_numpy(self._cache.values(value[0].numpy()))
        true_k, true_v, stored_k, stored_v = (
            heads.repeat_interleave(group, 0) for heads in (key[0], value[0], stored_k, stored_v)
        )
        scores = torch.where(true, query[0] @ true_k.mT, query[0] @ stored_k.mT) * scaling
        weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
        result = (weights * true) @ true_v + (weights * ~true) @ stored_v
        return result.transpose(0, 1)[None], None


#
# the comparison
#


@dataclass(frozen=True)
class Ratio:
    """The geometric mean, over tokens, of one cache's KL divergence over another's; with its standard error."""

    to: str
    ratio: float
    stderr: float


def paired_ratio(kld: NDArray[np.floating], other: NDArray[np.floating], to: str) -> Ratio:
    """The ratio of divergences of the same tokens, which lie in the order of the text."""
    logs = np.log(np.maximum(kld, LEAST)) - np.log(np.maximum(other, LEAST))
    means = [part.mean() for part in np.array_split(logs, max(2, len(logs) // NEIGHBOURS))]
    ratio = np.exp(logs.mean())
    return Ratio(to, float(ratio), float(ratio * np.std(means, ddof=1) / len(means) ** 0.5))


def caches(types: Sequence[CacheTypes], tile: int, layers: Sequence[Layer | None]) -> list[Cache]:
    """The caches to measure: KVarN's, each before those that are put beside it."""
    found: dict[Cache, None] = {}
    for pair in types:
        plain = Cache(pair.k, pair.v, tile)
        found |= dict.fromkeys([plain.kvarn, plain])
        if layers:
            found[replace(plain, layers=layers, calibrated=True)] = None
    return list(found)


def measure(simulation: Simulation, chunks: Sequence[Sequence[int]], wanted: Sequence[Cache]) -> dict[Cache, Scores]:
    """The scores of each cache, all chunks one after the other, and of one that changes nothing.

    Raises TurboquantError if that one is not the model's own attention.
    """
    exact = Cache(EXACT, EXACT)
    found: dict[Cache, list[Scores]] = {cache: [] for cache in (exact, *wanted)}
    for number, chunk in enumerate(chunks, 1):
        base, targets = simulation.logits(chunk, None), chunk[len(chunk) // 2 + 1 :]
        for done, cache in enumerate(found, 1):
            begin = time.monotonic()
            scores = compare(base, simulation.logits(chunk, cache), targets)
            found[cache].append(scores)
            kld = scores["kld"]
            CONSOLE.print(
                f"chunk {number} of {len(chunks)}, {done} of {len(found)}: {cache}, KL {kld.mean():.2g}, "
                f"{time.monotonic() - begin:.0f} s",
                highlight=False,
            )
            if cache == exact and not kld.max() <= IDENTITY:
                raise TurboquantError(
                    f"Without quantization the KL divergence is {kld.max():.2g}, not 0: this model's attention is not "
                    "what is simulated here (causal, over all tokens, with one softmax)."
                )
    return {cache: np.concatenate(parts) for cache, parts in found.items()}


def results(scores: Mapping[Cache, Scores], head_size: int) -> Iterator[tuple[Cache, Loss, Ratio | None, dict]]:
    """Of each cache but the first, which is exact: what it costs, the ratio to KVarN's, and all of it for JSON."""
    exact, *others = scores
    losses = summarize(scores, exact)
    for cache in others:
        ratio = None
        if not cache.k.startswith(KVARN):
            ratio = paired_ratio(scores[cache]["kld"], scores[cache.kvarn]["kld"], str(cache.kvarn))
        bits_k, bits_v = cache.stored_bits(head_size)
        facts = {"types": str(cache), "bits_k": bits_k, "bits_v": bits_v, **asdict(losses[cache])}
        yield cache, losses[cache], ratio, facts | {"times_kvarn": asdict(ratio) if ratio else None}


def table(found: Sequence[tuple[Cache, Loss, Ratio | None, dict]], caption: str) -> Table:
    """The comparison as text."""
    columns = [
        TYPE, BITS, Column("KL\nmean"), Column("KL\nmedian"), Column("KL\n99 %"), Column("same\ntop, %"),
        Column("times\nKVarN"),
    ]  # fmt: skip
    rows = [
        [
            str(cache),
            f"{facts['bits_k']:g}" + (f":{facts['bits_v']:g}" if facts["bits_k"] != facts["bits_v"] else ""),
            tables.with_error(loss.kld_mean, loss.kld_stderr),
            tables.short(loss.kld_median),
            tables.short(loss.kld_p99),
            f"{100 * loss.top1:.1f}",
            tables.with_error(ratio.ratio, ratio.stderr) if ratio else tables.NOTHING,
        ]
        for cache, loss, ratio, facts in found
    ]
    return Table(caption, columns, {"": rows})


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--model", type=FILE, help="A GGUF that transformers reads; else SmolLM2-135M-Instruct, fetched.")
@click.option("--text", default=texts.WIKITEXT, metavar="FILE", help="What to read: UTF-8, or WikiText-2 by name.")
@click.option("--context", type=click.IntRange(min=16), default=1024, help="Tokens in a chunk.")
@click.option("--chunks", type=click.IntRange(min=1), default=1, help="How many, from the first.")
@click.option("--types", default="turbo4,turbo3,turbo2", help="What to put beside KVarN; K:V for two.")
@click.option("--tile", type=click.IntRange(min=2), default=TILE, help="Tokens in a tile of KVarN.")
@click.option("--window", type=click.IntRange(min=0), default=RECENT, help="How many last tokens a query sees exact.")
@click.option("--calibrated", type=FILE, help="The same model with calibrated keys: our types with them, too.")
@click.option("--threads", type=click.IntRange(min=1), default=1, help="Of the CPU.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures here.")
def main(
    model: Path | None,
    text: str,
    context: int,
    chunks: int,
    types: str,
    tile: int,
    window: int,
    calibrated: Path | None,
    threads: int,
    json_file: Path | None,
) -> None:
    try:
        pairs = [CacheTypes.parse(name) for name in types.split(",")]
        caches(pairs, tile, ())  # refuses types before minutes are spent
        read, path = texts.load(text), model or models.fetch("smollm2-135m")
        with Model(path, vocabulary_only=True) as vocabulary:
            cut = Quality(path, {}, None, {}, read, F16, context).cut(vocabulary)[:chunks]
        CONSOLE.print(f"reading {path.name}")
        simulation = Simulation(path, window, threads)
        layers = read_calibration(calibrated, simulation.head_size) if calibrated else ()
        scores = measure(simulation, cut, caches(pairs, tile, layers))
    except TurboquantError as error:
        raise click.ClickException(str(error)) from error
    found = list(results(scores, simulation.head_size))
    caption = (
        f"{path.stem}, {read.name}, {tables.count(len(cut), 'chunk')} of {context} tokens; the last {window} and the "
        f"first {SINKS} exact; KVarN's tiles of {tile}"
    )
    identity = float(next(iter(scores.values()))["kld"].max())
    if json_file:
        settings = {"model": path.name, "text": read.name, "text_sha256": read.sha256, "context": context,
                    "chunks": len(cut), "tile": tile, "window": window, "sinks": SINKS, "rounds": ROUNDS,
                    "calibrated": calibrated and calibrated.name}  # fmt: skip
        content = {"settings": settings, "identity_kld_max": identity, "results": [facts for *_, facts in found]}
        json_file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    click.echo(f"{caption}\n")
    click.echo(tables.markdown(table(found, caption)))
    click.echo(f"\nWithout quantization the largest KL divergence is {identity:.1g}.")


if __name__ == "__main__":
    main()
