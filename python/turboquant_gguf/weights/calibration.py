"""Centre and scale for stored keys, from what a model's attention does on a text.

A cache of few bits stores k' = s (k - m) and multiplies queries by 1/s. Softmax does not see the difference, and the
error that quantization makes in the scores can be many times smaller. With noise that is the same in all coordinates
of k' (the rotation sees to that) and grows with |k'|, the error of the score of query q and key k is proportional to
|k'| |q'|. What it does to the result of attention is the weight w = p (1 - p) of that pair, where p is its softmax:
keys that nobody looks at may be wrong, and so may the one that gets all of the attention. So m and s minimize

    sum over pairs  w |s (k - m)|^2 |q / s|^2

Setting the derivatives to zero, with the other factor held fixed:

    m = sum a k / sum a,   a = sum over queries of w |q'|^2
    s = (sum b q^2 / sum a (k - m)^2)^(1/4),   b = sum over keys of w |k'|^2

Two passes over the text do: the first begins with m = 0 and s = 1, the second with what the first found. Sums are kept
for each channel, so memory does not depend on the length of the text.

RoPE turns pairs of channels with the position of a key, and so its mean. Where that is so, m is the mean of keys before
RoPE, and what is taken from a key is c(p), the mean of m turned to each position of the tile that p is in; s is the same
in both channels of a pair, so that it does not matter whether keys are turned before or after. Layers without RoPE have
one m for all positions. Which of the two a layer is, the sums of both tell. docs/calibration.md has what each part gains.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from ..core import outputfile, progress, texts
from ..core.signals import deferred
from ..errors import TurboquantError
from ..llamacpp import ggml
from ..llamacpp.ggufile import GGUFModel, rewrite
from ..llamacpp.logits import Context, Model
from ..llamacpp.modelmemory import F16, STEP, ModelMemory
from ..llamacpp.placement import CPU, Placement
from ..llamacpp.recentwindow import RecentWindow, set_next

VERSION = 2
KEY = "turboquant.keys."
"""What the metadata keys of a calibrated file begin with."""

DEFAULT_TOKENS = 4096
WINDOW = 512
"""Tokens that are read at once, from an empty cache: attention over longer distances does not count."""

MIN_TOKENS = 256
"""The shortest text."""

POSITIONS = 1 << 14
"""Positions at which windows are read, at least: so many that what turns with them can be told from what does not."""

READINGS = 6
"""How many windows are read in a pass, at least, each at other positions. Twice as many change no scale by 0.4 %."""

RECENT, SINKS = 64, 4
"""Tokens at the end and at the beginning that the recent window keeps as they are."""

SINK_WEIGHT = np.float32(0.1)
"""Of pairs with the first tokens. Without a recent window, as stock types have none, their keys must not be given up."""

CLEARLY = 0.9
"""A layer's centre turns with RoPE unless one that does not leaves this much less error: at other positions it fails."""

PASSES = 2
_FLOOR = 1e-4  # of the mean of a head's channels: no channel is scaled as if it had no variance at all

Vectors = NDArray[np.float64]
"""Of shape (KV heads, head size)."""


@dataclass(frozen=True)
class Rotary:
    """How the keys of a layer turn with their position: pairs of channels, each by its angle.

    first, second: the channels of each pair. angles: radians a position. tile: positions that have one centre. All
    arrays are of shape (pairs,).
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    angles: NDArray[np.float64]
    tile: int

    def turned(self, vectors: NDArray[np.floating], positions: NDArray[np.int64]) -> NDArray[np.float64]:
        """Vectors (tokens, ..., head size) turned by their positions (tokens,); by negative ones, turned back."""
        shape = (len(positions), *[1] * (vectors.ndim - 2), len(self.angles))
        turns = np.exp(1j * positions[:, None] * self.angles).reshape(shape)
        return self._of_pairs(vectors, self._pairs(vectors) * turns)

    def averaged(self, vectors: Vectors) -> Vectors:
        """The mean of vectors turned by 0, 1, ..., tile - 1."""
        return self._of_pairs(vectors, self._pairs(vectors) * self._mean_turns())

    def tied(self, squares: Vectors) -> Vectors:
        """Squares of channels, each the mean of its pair."""
        tied = squares.copy()
        tied[..., self.first] = tied[..., self.second] = (squares[..., self.first] + squares[..., self.second]) / 2
        return tied

    def _mean_turns(self) -> NDArray[np.complex128]:
        return np.exp(1j * np.arange(self.tile)[:, None] * self.angles).mean(0)

    def _pairs(self, vectors: NDArray) -> NDArray[np.complex128]:
        return vectors[..., self.first] + 1j * vectors[..., self.second]

    def _of_pairs(self, vectors: NDArray, pairs: NDArray[np.complex128]) -> NDArray[np.float64]:
        result = np.broadcast_to(vectors, (*pairs.shape[:-1], vectors.shape[-1])).astype(np.float64)
        result[..., self.first], result[..., self.second] = pairs.real, pairs.imag
        return result


@dataclass(frozen=True)
class Layer:
    """What is done to the keys of one layer: vectors over channels, of shape (KV heads, head size).

    rotary: how the centre, which is that of keys before RoPE, turns with the position; None: it does not.
    """

    center: Vectors
    scale: Vectors
    rotary: Rotary | None = None

    def centers(self, positions: NDArray[np.int64]) -> NDArray[np.float64]:
        """What is taken from keys at `positions` (tokens,): (tokens, KV heads, head size)."""
        if not self.rotary:
            return np.broadcast_to(self.center, (len(positions), *self.center.shape))
        first = positions // self.rotary.tile * self.rotary.tile
        return self.rotary.turned(self.rotary.averaged(self.center)[None], first)


@dataclass(frozen=True)
class Calibration:
    """What was written.

    path: the GGUF. tokens: read. layers: whose keys are calibrated. turning: of those, how many have a centre that turns
    with the position. centred: whether the others are centred, too; reason: why not, or None. error: the expected
    squared error of the scores, weighted as above, as a part of what it was.
    """

    path: Path
    tokens: int
    layers: int
    turning: int
    centred: bool
    reason: str | None
    error: float


def calibrate(
    model: Path,
    output: Path | None = None,
    *,
    in_place: bool = False,
    text: Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    placement: Placement = CPU,
    force: bool = False,
    console: Console,
) -> Calibration:
    """Run `model` (a GGUF) over a text and write a copy of it with the calibration in its metadata.

    output: the copy; None names it after the model, in the current folder. in_place: replace the model by it. text: a
    UTF-8 file; None takes the one in the package. tokens: how many of it to read; of a longer text, windows of 512 are
    drawn at random (seed). placement: where it is run. force: replace an existing output. console: where the progress
    goes. Raises TurboquantError with what to do about it.
    """
    with GGUFModel(model) as file:
        if len(file.paths) > 1:
            raise TurboquantError(
                f"{model} is one of {len(file.paths)} parts. Join them first: llama-gguf-split --merge."
            )
        layers = int(file.metadata.get(f"{file.metadata['general.architecture']}.block_count", 0))
        positions = _positions(file)
    if in_place:
        output = model
        outputfile.check_folder(output)
    else:
        output = output or Path(f"{model.stem}-calibrated.gguf")
        if output.exists() and output.samefile(model):
            raise TurboquantError(f"{output} is the model itself. To replace it, use --in-place instead of -o.")
        outputfile.check(output, force)
    outputfile.check_space(output, model.stat().st_size)
    content = texts.read(text) if text else texts.bundled("calibration.txt")

    found: dict[int, Layer] = {}
    with Model(model, placement) as opened, progress.bar(console) as bar:
        windows = _windows(opened.tokenize(content), tokens, min(WINDOW, positions), seed)
        readings = spread(windows, positions)
        task = bar.add_task("reading windows", total=PASSES * len(readings))
        for number in range(PASSES):
            statistics = _read(opened, readings, found, lambda: bar.advance(task))
            if not statistics.moments:
                raise TurboquantError(
                    f"{model} has no keys that can be calibrated: it stores none, or shares them with its values."
                )
            if not 0 < statistics.error < np.inf:
                raise TurboquantError(
                    f"The attention of {model} cannot be measured: it uses ALiBi, or computes numbers that are none."
                )
            found = {layer: moments.solve(statistics.centred) for layer, moments in statistics.moments.items()}
            if number == 0:
                before = statistics.error
    with outputfile.beside(output) as unfinished:
        rewrite(model, unfinished, KEY, _metadata(found, layers))
        _require_use(unfinished)
    error = statistics.error / before
    read = sum(map(len, windows))
    turning = sum(layer.rotary is not None for layer in found.values())
    return Calibration(output, read, len(found), turning, statistics.centred, statistics.reason, error)


def _require_use(calibrated: Path) -> None:
    """Raises TurboquantError if the attention of this model does not pass where llama.cpp calibrates keys."""
    with ModelMemory(calibrated) as memory:  # its graphs are built, and neither weights read nor a cache allocated
        set_next(RecentWindow(), force_calibration=True)
        memory.measure(F16, STEP)


def _positions(file: GGUFModel) -> int:
    """How many positions to read at. A model that learned its positions has no more."""
    trained = int(file.metadata.get(f"{file.metadata['general.architecture']}.context_length", WINDOW))
    return file.learned_positions or max(trained, POSITIONS)


def _windows(prompt: Sequence[int], tokens: int, length: int, seed: int) -> list[list[int]]:
    """Parts of the text, of `length` tokens and a shorter one; in all at most `tokens`."""
    windows = [list(prompt[begin : begin + length]) for begin in range(0, len(prompt), length)]
    count = -(-tokens // length)
    if len(windows) > count:
        chosen = np.random.Generator(np.random.PCG64(seed)).permutation(len(windows))[:count]
        windows = [windows[number] for number in sorted(chosen)]
    windows[-1] = windows[-1][: tokens - sum(map(len, windows[:-1]))]
    for window in windows:  # each begins as a text does
        window[0] = prompt[0]
    if sum(map(len, windows)) < MIN_TOKENS:
        raise TurboquantError(
            f"The text has {len(prompt)} tokens, too few to learn from. Give a longer one with --text."
        )
    return windows


def spread(windows: Sequence[list[int]], positions: int) -> list[tuple[int, list[int]]]:
    """Every window with the position of its first token, several times if they are few, evenly over the positions."""
    length = max(map(len, windows))
    if positions <= length:
        return [(0, window) for window in windows]
    times = -(-READINGS // len(windows))
    starts = np.linspace(0, positions - length, times * len(windows)).astype(int).tolist()
    return list(zip(starts, [*windows] * times, strict=True))


def _metadata(found: dict[int, Layer], layers: int) -> dict[str, int | NDArray]:
    def joined(name: str) -> NDArray[np.float32]:
        return np.concatenate([getattr(found[number], name).ravel() for number in sorted(found)]).astype(np.float32)

    def of_layers(value: Callable[[Layer], int]) -> NDArray[np.int32]:
        return np.array([value(found[number]) if number in found else 0 for number in range(layers)], np.int32)

    return {
        f"{KEY}version": VERSION,
        f"{KEY}sizes": of_layers(lambda layer: layer.scale.size),
        f"{KEY}turned": of_layers(lambda layer: 2 * len(layer.rotary.angles) if layer.rotary else 0),
        f"{KEY}scale": joined("scale"),
        f"{KEY}center": joined("center"),
    }


#
# statistics
#


class Moments:
    """Weighted sums over the keys and queries of a layer, and the centre and scale that follow from them.

    rotary: how its keys may turn with their position; None: they do not.
    """

    def __init__(self, kv_heads: int, head_size: int, rotary: Rotary | None = None) -> None:
        self.weight = np.zeros((kv_heads, 1))
        self.keys, self.turned_back, self.keys2, self.queries2 = np.zeros((4, kv_heads, head_size))
        self.error = 0.0
        """The sum that is to be small, with the centre and scale that came with the tokens."""
        self._rotary = rotary

    def add(
        self,
        q: NDArray[np.float32],
        k: NDArray[np.float32],
        mask: NDArray[np.float32],
        *,
        factor: float,
        soft_cap: float = 0,
        position: int = 0,
        layer: Layer | None = None,
    ) -> None:
        """Count the tokens of one window.

        q: (tokens, heads, head size). k: (tokens, KV heads, head size). mask: (tokens, tokens), 0 or -inf. factor: of
        the scores. soft_cap: 0 for none. position: of the first token. layer: the best known so far; None for a centre
        of 0 and a scale of 1.
        """
        group = q.shape[1] // k.shape[1]
        counted = _counted(mask)
        layer = layer or Layer(np.zeros(k.shape[1:]), np.ones(k.shape[1:]))
        positions = np.arange(position, position + len(k))
        centers = layer.centers(positions)
        turned_back = self._rotary.turned(k, -positions) if self._rotary else k
        for g, scale in enumerate(layer.scale):
            keys = k[:, g].astype(np.float64)
            size = (((keys - centers[:, g]) * scale) ** 2).sum(-1)
            weight = np.zeros(len(keys))
            for h in range(g * group, (g + 1) * group):
                queries2 = q[:, h].astype(np.float64) ** 2
                pairs = q[:, h] @ k[:, g].T
                pairs *= np.float32(factor)
                _weigh(pairs, mask, soft_cap)
                pairs *= counted
                weight += (queries2 / scale**2).sum(-1).astype(np.float32) @ pairs
                self.queries2[g] += (pairs @ size.astype(np.float32)) @ queries2
            self.weight[g] += weight.sum()
            self.keys[g] += weight @ keys
            self.turned_back[g] += weight @ turned_back[:, g]
            self.keys2[g] += weight @ keys**2
            self.error += weight @ size

    def solve(self, centred: bool) -> Layer:
        """The centre and scale for what was counted; the scales of a head have the geometric mean 1.

        centred: whether a centre that does not turn may be other than 0. One that turns with the position may always.
        """
        weight = np.maximum(self.weight, np.finfo(float).tiny)
        center = self.keys / weight if centred else np.zeros_like(self.keys)
        fixed = _Solution(Layer(center, center), self.keys2 / weight - center**2, self.queries2)
        if not self._rotary:
            return fixed.layer
        center = self.turned_back / weight
        tied = self._rotary.tied
        spread = tied(self.keys2 / weight) - tied(self._rotary.averaged(center) ** 2)
        turning = _Solution(Layer(center, center, self._rotary), spread, tied(self.queries2))
        return (fixed if fixed.error < CLEARLY * turning.error else turning).layer


class _Solution:
    """A layer with the scale that is best for these squares of centred keys and of queries, and the error it leaves."""

    def __init__(self, layer: Layer, keys2: Vectors, queries2: Vectors) -> None:
        keys2, queries2 = _floored(keys2), _floored(queries2)
        scale = (queries2 / keys2) ** 0.25
        self.layer = replace(layer, scale=scale / np.exp(np.log(scale).mean(-1, keepdims=True)))
        self.error = (np.sqrt(queries2 * keys2).sum(-1) ** 2).sum()


def _counted(mask: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much pairs count: those that the recent window keeps as they are do not; all do if a layer sees no others."""
    token = np.arange(len(mask))
    far = (token[:, None] - token >= RECENT) & (token >= SINKS)
    if not (far & (mask == 0)).any():
        return np.ones_like(mask)
    return np.where(token < SINKS, SINK_WEIGHT, far.astype(np.float32))


def _weigh(scores: NDArray[np.float32], mask: NDArray[np.float32], soft_cap: float) -> None:
    """Put p (1 - p) in the place of each score, p being the softmax of its row. New arrays would cost more than sums."""
    if soft_cap:
        scores /= np.float32(soft_cap)
        np.tanh(scores, out=scores)
        scores *= np.float32(soft_cap)
    scores += mask
    scores -= scores.max(-1, keepdims=True)
    p = np.exp(scores, out=scores)
    p /= p.sum(-1, keepdims=True)
    p *= 1 - p


def _floored(squares: Vectors) -> Vectors:
    mean = squares.mean(-1, keepdims=True)
    return np.maximum(squares, np.where(mean > 0, _FLOOR**2 * mean, 1))


class _Statistics:
    """What an observer of a model's attention collects: the moments of every layer.

    known: centre and scale of each layer so far. rotary: how the keys of a layer turn with their position.
    """

    def __init__(self, known: dict[int, Layer], rotary: Callable[[int], Rotary | None]) -> None:
        self.moments: dict[int, Moments] = {}
        self.reason: str | None = None
        self.failure: Exception | None = None
        self.interrupted: Callable[[], bool] = lambda: False
        self.position = 0
        """Of the first token of the window that is being read."""
        self._known = known
        self._rotary = rotary

    @property
    def centred(self) -> bool:
        return self.reason is None

    @property
    def error(self) -> float:
        return sum(moments.error for moments in self.moments.values())

    def observe(self, pointer: ctypes._Pointer, _user_data: object) -> bool:
        """turbo_attention_callback. An exception cannot pass through C: it is kept, and the model stopped."""
        if self.interrupted():
            return False
        try:
            self._count(pointer.contents)
        except Exception as failure:
            self.failure = failure
        return self.failure is None

    def _count(self, got: ggml.Attention) -> None:
        if got.sinks:
            self.reason = "the model has attention sinks, against which a centre would shift all keys"
        elif got.soft_cap:
            self.reason = "the model caps its scores, which a centre would shift"
        tokens, heads, kv_heads, head_size = got.tokens, got.heads, got.kv_heads, got.head_size
        arrays = (
            np.ctypeslib.as_array(got.q, (tokens, heads, head_size)),
            np.ctypeslib.as_array(got.k, (tokens, kv_heads, head_size)),
            np.ctypeslib.as_array(got.mask, (tokens, tokens)),
        )
        if got.layer not in self.moments:
            self.moments[got.layer] = Moments(kv_heads, head_size, self._rotary(got.layer))
        known = self._known.get(got.layer)
        self.moments[got.layer].add(
            *arrays, factor=got.scale, soft_cap=got.soft_cap, position=self.position, layer=known
        )


def _read(
    model: Model,
    readings: Sequence[tuple[int, Sequence[int]]],
    known: dict[int, Layer],
    on_window: Callable[[], None],
) -> _Statistics:
    """Run the model over every window, at its position. known: centre and scale of each layer so far."""
    statistics = _Statistics(known, lambda layer: rotary_of(context, layer))
    callback = ggml.attention_callback(statistics.observe)
    with ExitStack() as owned:
        observer = ggml.function("turbo_observer_new")(callback, None)
        owned.callback(ggml.function("turbo_observer_free"), observer)
        longest = max(len(window) for _, window in readings)
        context = owned.enter_context(model.open(longest, observer=observer))
        for position, window in readings:
            context.clear()
            statistics.position = position
            with deferred() as statistics.interrupted:
                context.read(window, position)
            if statistics.failure:
                raise statistics.failure
            on_window()
    return statistics


def rotary_of(context: Context, layer: int) -> Rotary | None:
    """How the keys of a layer turn with their position; None if they do not."""
    found = ggml.Rotary()
    ggml.function("turbo_get_rotary")(context.handle, layer, ctypes.byref(found))
    if not found.pairs:
        return None
    pairs = np.arange(found.pairs)
    first, second = (pairs, pairs + found.pairs) if found.is_neox else (2 * pairs, 2 * pairs + 1)
    return Rotary(first, second, np.array(found.angles[: found.pairs]), found.tile)
