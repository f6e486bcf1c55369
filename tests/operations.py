"""All that programs do with the sequences of a context, and a worker that does it with one model.

    python operations.py KIND MODEL [LIKE]

reads requests, a JSON object a line, and answers each with one. A crash ends the worker, not who asks. LIKE: a model
that computes the same without what makes caches of MODEL inexact.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Self

import gguf
import numpy as np

import turboquant_gguf
from memory_kinds import KINDS, UNFIT, VOCABULARY, Kind
from sequences import RefusedError, Sequences
from turboquant_gguf.llamacpp.cachetypes import CacheTypes
from turboquant_gguf.llamacpp.logits import Model
from turboquant_gguf.weights.verify import compare

TEXT = [int(token) for token in np.random.default_rng(1).integers(3, len(VOCABULARY) - 1, 400)]
F16, STOCK = CacheTypes("f16", "f16"), CacheTypes("q4_0", "q4_0")
SEQUENCES = 8

MORE_THAN_STOCK = 2.0
"""How much farther from f16 a type may be than q4_0 without a window, for its mean squared error: KL divergence grows
with the square of the errors. It is 0.7 to 1.1 times with turbo types, and up to 1.2 times with q8_0."""

DISTURBED = 2.0
"""How much farther from f16 an operation may lead than the same types and window without it: other tokens."""

STORED_AGAIN = 2.0
"""The same where a shift of positions quantizes keys a second time, which doubles their squared error."""

OUTLIERS = 1.6
"""The same for a model whose latent vectors have a few large channels, where one without is the measure. Four of 512
that are twelve times as large make the mean square 2.1 times as large, and with it the error, if keys are rotated; else
it is 4.8 times. So less is left to spare than MORE_THAN_STOCK has."""

PICKED = 3.0
"""The same where attention picks some keys: small errors change which. 2.0 was exceeded by 0.3 % on one processor."""

UNDISTURBED = 0.02
"""Divergence from the same cache without the operation, in the divergence of both from f16: what other orders of sums,
and the codes that they change, lead to where nothing may be lost."""

ROUNDING = 5e-6
"""KL divergence of logits that are the same but for orders of sums, with f16: 3e-6 were seen."""


_libc = ctypes.CDLL(None)
_libc.calloc.restype, _libc.calloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t, ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]


@contextlib.contextmanager
def overwritten_heap() -> Iterator[None]:
    """Zeros for the length of the block where something was freed, as other work of a server leaves: what a stale
    pointer finds there is wrong."""
    taken = [_libc.calloc(1, size) for size in range(24, 1500, 16) for _ in range(3)]
    yield
    for place in taken:
        _libc.free(place)


class Cache(Sequences):
    """A context of a kind of memory. asked: what it said when it was asked for what not every memory can do."""

    def __init__(self, kind: Kind, path: Path, types: CacheTypes, **options: object) -> None:
        self._again = lambda changes: Cache(kind, path, types, **options | changes)
        self._kind, self._types = kind, types
        self.unified = options.get("unified", True)
        self.asked: list[object] = []
        given = (
            dict(sequences=1 if kind.alone else SEQUENCES, swa_full=kind.swa_full, n_threads=1, n_threads_batch=1)
            | options
        )
        # llama.cpp wants room for a token of each sequence in a batch, and texts that are read whole in one ubatch
        given.setdefault("n_batch", max(128, given["sequences"], given.get("n_ubatch", 0)))
        given.setdefault("n_ubatch", 64 if kind.reads == "tokens" and given["sequences"] <= 64 else given["n_batch"])
        if kind.architecture == "bert":
            given |= dict(embeddings=True, pooling_type=0)  # of each token
        super().__init__(path, types, **given)
        if kind.reads == "texts":
            assert self.encode(TEXT[300:340]) == 0

    def another(self, **changes: object) -> Self:
        """A new context like this one, but for the options given."""
        return self._again(changes)

    def ask(self, answer: object) -> object:
        self.asked.append(answer)
        return answer

    def logits(self, count: int) -> np.ndarray:
        if self._kind.architecture != "bert":
            return super().logits(count)
        width = self.llama.llama_model_n_embd(self._model.handle)
        return np.ctypeslib.as_array(self.llama.llama_get_embeddings(self.context), (count, width)).copy()

    def _batch(self, *arguments: object, **options: object) -> int:
        with contextlib.nullcontext() if self._types in (F16, STOCK) else overwritten_heap():
            return super()._batch(*arguments, **options)

    def rest(self, first: int = 120, sequence: int = 0) -> np.ndarray:
        """Token by token, what follows a text of 120 tokens."""
        return self.answer(TEXT[120:144], first, sequence)


# ---- the operations: each returns the logits that tell whether it went right ----


def undisturbed(cache: Cache) -> np.ndarray:
    cache.prompt(TEXT[:120])
    return cache.rest()


def batch(cache: Cache) -> np.ndarray:
    return cache.prompt(TEXT[:120])[60:]


def token_by_token(cache: Cache) -> np.ndarray:
    return cache.answer(TEXT[:120], 0)[60:]


def batches_of_all_sizes(cache: Cache) -> np.ndarray:
    found, first = [], 0
    for size in (50, 1, 1, 7, 1, 30, 2, 28, 1, 1):
        found.append(cache.prompt(TEXT[first : first + size], first=first))
        first += size
    return np.concatenate(found)[60:]


def batch_longer_than_the_window(cache: Cache, step: int = 200) -> np.ndarray:
    """More tokens at once than the ring of a sequence has room for, after as many as fill it."""
    cache.prompt(TEXT[:100])
    return np.concatenate([cache.prompt(TEXT[i : i + step], first=i) for i in range(100, 300, step)])


def batches_shorter_than_the_window(cache: Cache) -> np.ndarray:
    return batch_longer_than_the_window(cache, 20)


def context_shift(cache: Cache) -> np.ndarray:
    cache.prompt(TEXT[:120])
    if not (cache.ask(cache.can_shift) and cache.ask(cache.try_to_remove(0, 4, 44))):
        return cache.rest()
    cache.add(0, 44, -1, -40)
    return cache.rest(80)


def self_extend(cache: Cache) -> np.ndarray:
    """Group attention: positions of what is behind a window are divided, window by window."""
    cache.prompt(TEXT[:120])
    if not cache.ask(cache.can_shift):
        return cache.rest()
    group, window, begin, past = 2, 32, 0, 120
    while past >= begin + window:
        moved = group * begin // window * (window // group) * (group - 1)
        cache.add(0, begin, past, moved)
        cache.divide(0, begin + moved, begin + moved + window, group)
        cache.add(0, begin + moved + window, past + moved, window // group - moved - window)
        past -= window // group
        begin += window // group
    return cache.rest(past)


def saved_and_restored(cache: Cache) -> np.ndarray:
    cache.prompt(TEXT[:120])
    state = cache.saved(0)
    cache.answer(TEXT[200:210], 120)
    cache.remove(0, -1, -1)
    cache.prompt(TEXT[200:260])
    cache.remove(0, -1, -1)
    cache.restore(state, 0)
    return cache.rest()


def saved_into_another(cache: Cache, **changes: object) -> np.ndarray:
    cache.prompt(TEXT[:120])
    state = cache.saved(0)
    with cache.another(**changes) as other:
        other.prompt(TEXT[200:280], 1)
        if cache.ask(other.read_state(state, 2) == len(state)):
            return other.rest(sequence=2)
    return cache.rest()


def saved_into_another_window(cache: Cache) -> np.ndarray:
    return saved_into_another(cache, window=16)


def saved_into_none(cache: Cache) -> np.ndarray:
    return saved_into_another(cache, window=0)


def saved_from_none(cache: Cache) -> np.ndarray:
    with cache.another(window=0) as other:
        other.prompt(TEXT[:120])
        cache.restore(other.saved(0), 2)
    return cache.rest(sequence=2)


def saved_into_the_other_layout(cache: Cache) -> np.ndarray:
    return saved_into_another(cache, unified=not cache.unified)


def whole_state(cache: Cache) -> np.ndarray:
    cache.prompt(TEXT[:120])
    cache.prompt(TEXT[200:260], 1)
    with cache.another() as other:
        other.restore_whole(cache.saved_whole())
        return other.rest()


def restored_while_another_goes_on(cache: Cache) -> np.ndarray:
    return _beside(cache, restore=True)


def never_restored(cache: Cache) -> np.ndarray:
    return _beside(cache, restore=False)


def _beside(cache: Cache, *, restore: bool) -> np.ndarray:
    cache.prompt(TEXT[:120])
    cache.prompt(TEXT[200:260], 1)
    state, found = cache.saved(1), []
    for i, token in enumerate(TEXT[120:144]):
        if restore and i % 8 == 0:
            cache.remove(1, -1, -1)
            cache.restore(state, 1)
        found.append(cache.read((token, 120 + i, 0)))
    return np.concatenate(found)


def restored_to_a_checkpoint(cache: Cache) -> np.ndarray:
    """As llama-server goes back where a part of a sequence cannot be removed."""
    cache.prompt(TEXT[:120])
    partial = cache.llama.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
    state = cache.saved(0, partial)
    cache.answer(TEXT[200:210], 120)
    cache.restore(state, 0, partial)
    cache.ask(cache.try_to_remove(0, 120, -1))
    return cache.rest()


def copied(cache: Cache) -> np.ndarray:
    cache.prompt(TEXT[:120])
    cache.prompt(TEXT[200:230], 1)
    cache.remove(1, -1, -1)
    cache.copy(0, 1)
    cache.remove(0, -1, -1)
    return cache.rest(sequence=1)


def copied_and_both_go_on(cache: Cache) -> np.ndarray:
    cache.prompt(TEXT[:120])
    cache.copy(0, 3)
    return np.concatenate([cache.read((TEXT[120 + i], 120 + i, 0), (TEXT[160 + i], 120 + i, 3)) for i in range(12)])


def rejected_drafts(cache: Cache, length: int = 16) -> np.ndarray:
    cache.prompt(TEXT[:120])
    found, first = [], 120
    for token in TEXT[120:132]:
        found.append(cache.prompt([token, *TEXT[200 : 200 + length]], first=first)[:1])
        first += 1
        if not cache.ask(cache.try_to_remove(0, first, -1)):
            return np.concatenate([*found, cache.rest(first + length)])
    return np.concatenate(found)


def rejected_long_drafts(cache: Cache) -> np.ndarray:
    """As long as the ngram modes of llama-server draft."""
    return rejected_drafts(cache, 63)


def first_half_of_the_rest(cache: Cache) -> np.ndarray:
    return undisturbed(cache)[:12]


def removed_in_the_middle(cache: Cache) -> np.ndarray:
    cache.prompt(TEXT[:120])
    cache.ask(cache.try_to_remove(0, 70, 90))
    return cache.rest()


def prefix_kept(cache: Cache) -> np.ndarray:
    cache.prompt(TEXT[:120])
    if not cache.ask(cache.try_to_remove(0, 60, -1)):
        return cache.rest()
    cache.prompt(TEXT[200:240], first=60)
    return cache.rest(100)


def chunks_used_again(cache: Cache) -> np.ndarray:
    """llama-server's --cache-reuse."""
    cache.prompt(TEXT[:120])
    if not (cache.ask(cache.can_shift) and cache.ask(cache.try_to_remove(0, 20, 50))):
        return cache.rest()
    cache.add(0, 50, 90, -30)
    if not cache.ask(cache.try_to_remove(0, 60, -1)):
        return cache.rest()
    cache.prompt(TEXT[200:240], first=60)
    return cache.rest(100)


def full(cache: Cache) -> np.ndarray:
    """No cell is left; a part is dropped, the rest moves up if it can, and what comes takes the cells of that part."""
    length, step = cache.length, 64
    for first in range(0, length, step):
        entries = ((TEXT[(first + i) % 397], first + i, 0) for i in range(step))
        cache.ask(cache.decode(*entries))
    if cache.ask(cache.decode((7, length, 0))) == 0:  # this memory is never full
        length += 1
    half = length // 2
    if not cache.ask(cache.try_to_remove(0, 4, half)):
        cache.remove(0, -1, -1)
        return undisturbed(cache)
    if cache.ask(cache.can_shift):
        cache.add(0, half, -1, 4 - half)
        length += 4 - half
    cache.prompt(TEXT[:60], first=length)
    return cache.rest(length + 60)


def emptied(cache: Cache) -> np.ndarray:
    cache.prompt(TEXT[200:300])
    cache.prompt(TEXT[200:300], 1)
    cache.clear()
    return undisturbed(cache)


def emptied_but_for_the_data(cache: Cache) -> np.ndarray:
    cache.prompt(TEXT[200:300])
    cache.llama.llama_memory_clear(cache.memory, False)
    return undisturbed(cache)


def aborted(cache: Cache) -> np.ndarray:
    """A batch that is given up in the middle, and read again."""
    cache.prompt(TEXT[:60])
    calls = 0

    @cache.llama.ggml_abort_callback
    def abort(_: object) -> bool:
        nonlocal calls
        calls += 1
        return calls > 20

    cache.llama.llama_set_abort_callback(cache.context, abort, None)
    cache.ask(cache.decode(*((token, 60 + i, 0) for i, token in enumerate(TEXT[60:120]))))
    cache.llama.llama_set_abort_callback(cache.context, cache.llama.ggml_abort_callback(), None)
    if not cache.ask(cache.try_to_remove(0, 60, -1)):
        cache.remove(0, -1, -1)
        return undisturbed(cache)
    cache.prompt(TEXT[60:120], first=60)
    return cache.rest()


def read_in_two(cache: Cache) -> np.ndarray:
    cache.prompt(TEXT[:60])
    cache.prompt(TEXT[60:120], first=60)
    return cache.rest()


def one_kept(cache: Cache) -> np.ndarray:
    for sequence in range(3):
        cache.prompt(TEXT[:120] if sequence == 1 else TEXT[200:280], sequence)
    cache.keep(1)
    return cache.rest(sequence=1)


def embeddings_alone(cache: Cache) -> np.ndarray:
    """Batches without tokens, as of images, and without outputs."""
    rows = cache.embeddings[TEXT[:120]]
    for first in range(0, 120, 40):
        entries = ((0, first + i, 0) for i in range(40))
        cache.ask(cache.decode(*entries, embeddings=rows[first : first + 40], outputs=False))
    return cache.rest()


def image_between_texts(cache: Cache) -> np.ndarray:
    """Tokens of an image see each other in both directions."""
    cache.prompt(TEXT[:60])
    cache.llama.llama_set_causal_attn(cache.context, False)
    rows = cache.embeddings[TEXT[60:100]]
    cache.ask(cache.decode(*((0, 60 + i, 0) for i in range(40)), embeddings=rows, outputs=False))
    cache.llama.llama_set_causal_attn(cache.context, True)
    cache.prompt(TEXT[100:120], first=100)
    return cache.rest()


def tokens_of_several_sequences(cache: Cache) -> np.ndarray:
    """A beginning that is read once for three of them."""
    entries = ((token, i, [0, 1, 2]) for i, token in enumerate(TEXT[:80]))
    if cache.ask(cache.decode(*entries)) != 0:
        return undisturbed(cache)
    return np.concatenate(
        [cache.read(*((TEXT[80 + 40 * sequence + i], 80 + i, sequence) for sequence in range(3))) for i in range(30)]
    )


def far_position(cache: Cache) -> np.ndarray:
    """Past where the chunks of Llama 4 change."""
    cache.prompt(TEXT[:120], first=8130)
    return cache.rest(8250)


def interleaved(cache: Cache, sequences: int = 8, length: int = 90) -> np.ndarray:
    """Some take part, some wait."""
    entries = [(TEXT[(7 * sequence + i) % 397], i, sequence) for i in range(length) for sequence in range(sequences)]
    for first in range(0, len(entries), 128):
        assert cache.decode(*entries[first : first + 128]) == 0
    lengths, found = [length] * sequences, []
    for i in range(24 if sequences == 1 else 6):
        taking_part = [sequence for sequence in range(sequences) if sequences == 1 or (sequence + i) % 3]
        for first in range(0, len(taking_part), 128):
            some = taking_part[first : first + 128]
            found.append(cache.read(*((TEXT[sequence + i], lengths[sequence], sequence) for sequence in some)))
        for sequence in taking_part:
            lengths[sequence] += 1
    return np.concatenate(found)[-100:]


def one_sequence(cache: Cache) -> np.ndarray:
    return interleaved(cache, 1)


def many_sequences(cache: Cache) -> np.ndarray:
    return interleaved(cache, 256, 5)


def texts_at_once(cache: Cache) -> np.ndarray:
    """Without a cache: several texts in one batch."""
    sequences = len(TEXT[:8])
    return cache.read(*((TEXT[sequence + i], i, sequence) for sequence in range(sequences) for i in range(8)))


@dataclass(frozen=True)
class Operation:
    """What is done, and what it is measured by.

    like: what has the same tokens in the cache without it, so that nothing may be lost. whole_window: the recent window
    gains as much as after a text that is read from its beginning. measure: what shows the error of a type, and how many
    times as much is right. options: of the context. without_cache: it is something for models that keep nothing.
    alone: with one sequence. crowds: with more windows, or longer ones, than a short cache may have room for.
    """

    act: Callable[[Cache], np.ndarray]
    like: Callable[[Cache], np.ndarray] | None = None
    whole_window: bool = True
    measure: Callable[[Cache], np.ndarray] = undisturbed
    times: float = 1.0
    options: dict[str, object] = field(default_factory=dict)
    without_cache: bool = False
    alone: bool = False
    crowds: bool = False


OPERATIONS = {
    "batch": Operation(batch, measure=batch, options=dict(n_threads_batch=2), without_cache=True, alone=True),
    "token by token": Operation(token_by_token, measure=batch, alone=True),
    "batches of all sizes": Operation(batches_of_all_sizes, measure=batch, options=dict(n_ubatch=128), alone=True),
    "batch longer than the window": Operation(
        batch_longer_than_the_window,
        batches_shorter_than_the_window,
        options=dict(sequences=1, length=512, n_ubatch=256),
        alone=True,
    ),
    "context shift": Operation(context_shift, whole_window=False, times=STORED_AGAIN, alone=True),
    "self-extend": Operation(self_extend, whole_window=False, times=2 * STORED_AGAIN, alone=True),
    "saved and restored": Operation(saved_and_restored, undisturbed, alone=True),
    "saved into another context": Operation(saved_into_another, undisturbed),
    "saved into another window": Operation(saved_into_another_window, whole_window=False),
    "saved into no window": Operation(saved_into_none, whole_window=False),
    "saved from no window": Operation(saved_from_none, whole_window=False),
    "saved into the other layout": Operation(saved_into_the_other_layout, undisturbed),
    "whole state": Operation(whole_state, undisturbed),
    "restored while another goes on": Operation(restored_while_another_goes_on, never_restored),
    "restored to a checkpoint": Operation(restored_to_a_checkpoint, undisturbed, options=dict(n_rs_seq=16), alone=True),
    "copied": Operation(copied, undisturbed),
    "copied, both go on": Operation(copied_and_both_go_on),
    "rejected drafts": Operation(
        rejected_drafts, first_half_of_the_rest, options=dict(n_rs_seq=16), alone=True, crowds=True
    ),
    "rejected long drafts": Operation(
        # in a context that saves memory enough for a window and a draft, whatever the types
        rejected_long_drafts,
        first_half_of_the_rest,
        options=dict(n_rs_seq=63, n_ubatch=128, length=1024),
        alone=True,
    ),
    "removed in the middle": Operation(removed_in_the_middle, alone=True),
    "prefix kept": Operation(prefix_kept, whole_window=False, alone=True),
    "chunks used again": Operation(chunks_used_again, whole_window=False, times=STORED_AGAIN, alone=True),
    "full": Operation(full, whole_window=False, times=2 * STORED_AGAIN, options=dict(sequences=2)),
    "emptied": Operation(emptied, undisturbed),
    "emptied but for the data": Operation(emptied_but_for_the_data, undisturbed, alone=True),
    "aborted": Operation(aborted, read_in_two, alone=True, crowds=True),
    "one kept": Operation(one_kept, undisturbed),
    "embeddings": Operation(embeddings_alone, undisturbed, alone=True),
    "image between texts": Operation(image_between_texts, alone=True),
    "tokens of several sequences": Operation(tokens_of_several_sequences, whole_window=False),
    "far position": Operation(far_position, alone=True),
    "1 sequence": Operation(one_sequence, options=dict(sequences=1), alone=True),
    "8 sequences": Operation(interleaved, crowds=True),
    "256 sequences": Operation(many_sequences, whole_window=False, measure=many_sequences, options=dict(sequences=256)),
    "flash attention auto": Operation(undisturbed, options=dict(flash="auto"), without_cache=True, alone=True),
    "flash attention off": Operation(
        undisturbed, whole_window=False, options=dict(flash="disabled"), without_cache=True, alone=True
    ),
    "texts at once": Operation(texts_at_once, whole_window=False, measure=texts_at_once, without_cache=True),
}


def with_far_position(state: bytes) -> bytes:
    """The state of a sequence whose last token has the largest position there is."""
    numbers, positions = np.frombuffer(state[: len(state) // 4 * 4], np.int32).copy(), np.arange(120)
    for stride in range(2, 12):  # from one cell's position to the next, over its sequences
        for first in np.flatnonzero(numbers[: -120 * stride] == 0):
            if (numbers[first : first + 120 * stride : stride] == positions).all():
                numbers[first + 119 * stride] = 2**31 - 1
    damaged = numbers.tobytes() + state[len(numbers) * 4 :]
    assert damaged != state
    return damaged


def _restore(cache: Cache, damage: Callable[[bytes], bytes]) -> int:
    cache.clear()
    cache.prompt(TEXT[:120])
    state = damage(cache.saved(0))
    cache.remove(0, -1, -1)
    return cache.read_state(state, 0)


def _restore_file(cache: Cache, damage: Callable[[bytes], bytes]) -> int:
    cache.clear()
    cache.prompt(TEXT[:120])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        tokens, count = (ctypes.c_int32 * 120)(*TEXT[:120]), ctypes.c_size_t()
        assert cache.llama.llama_state_seq_save_file(cache.context, str(path).encode(), 0, tokens, 120)
        path.write_bytes(damage(path.read_bytes()))
        cache.remove(0, -1, -1)
        return cache.llama.llama_state_seq_load_file(
            cache.context, str(path).encode(), 0, tokens, 120, ctypes.byref(count)
        )


DAMAGES: dict[str, Callable[[Cache], int]] = {
    "cut by a byte": lambda cache: _restore(cache, lambda state: state[:-1]),
    "cut in half": lambda cache: _restore(cache, lambda state: state[: len(state) // 2]),
    "nearly nothing": lambda cache: _restore(cache, lambda state: state[:6]),
    "a far position": lambda cache: _restore(cache, with_far_position),
    "file cut by a byte": lambda cache: _restore_file(cache, lambda state: state[:-1]),
    "file cut in half": lambda cache: _restore_file(cache, lambda state: state[: len(state) // 2]),
}


class Worker:
    """A model, and what was found with it so far."""

    def __init__(self, kind: Kind, path: Path, like: Path | None) -> None:
        self._kind, self._path, self._like = kind, path, like

    @cached_property
    def _model(self) -> Model:
        return Model(self._path)

    @cache
    def _rows(
        self, path: Path, act: Callable, types: CacheTypes, window: int | None, unified: bool, options: tuple
    ) -> tuple[np.ndarray, list, bool]:
        """Logits, what the memory said, and whether there is no room for the windows of all sequences."""
        given = dict(model=self._model if path == self._path else None, window=window, unified=unified, **dict(options))
        with Cache(self._kind, path, types, **given) as cache:
            return act(cache), cache.asked, "shorter while all" in cache.log

    @cache
    def _error(
        self, types: CacheTypes, window: int | None, unified: bool, act: Callable[[Cache], np.ndarray] = undisturbed
    ) -> float:
        """KL divergence from f16 where nothing happens."""
        options = (("sequences", 256),) if act is many_sequences else ()
        path = self._like or self._path
        exact, found = (self._rows(path, act, kind, window, unified, options)[0] for kind in (F16, types))
        return compare(exact, found).kl_mean

    def cell(self, operation: str, types: str, window: int | None, unified: bool) -> dict:
        """Run an operation with f16 and with `types`."""
        what, pair = OPERATIONS[operation], CacheTypes(*types.split(":")) if ":" in types else CacheTypes(types, types)
        options = tuple(what.options.items())
        report(during="f16")
        exact, said, _ = self._rows(self._path, what.act, F16, 0, unified, options)
        report(during=types)
        try:
            found, also, shorter = self._rows(self._path, what.act, pair, window, unified, options)
        except RefusedError as error:
            return dict(refused=str(error))
        report(during=f"{types} without the operation")
        answer = dict(asked=also, asked_of_f16=said, rows=len(found), finite=bool(np.isfinite(found).all()))
        if not answer["finite"]:
            return answer
        answer["kl"] = compare(exact, found).kl_mean
        crowded = what.crowds and shorter
        answer["bound"] = self._bound(what, pair, window if what.whole_window and not crowded else 0, unified)
        if what.like and said == also and False not in said and not crowded:
            before, before_in_f16 = (
                self._rows(self._path, what.like, kind, ring, unified, options)[0]
                for kind, ring in ((pair, window), (F16, 0))
            )
            # models that pick blocks of cells lose something with f16, too, where cells come to lie elsewhere
            lost_in_f16 = compare(before_in_f16, exact).kl_mean
            answer["lost"] = compare(before, found).kl_mean
            picked = PICKED if self._kind.picks else 1
            answer["may_lose"] = ROUNDING + picked * UNDISTURBED * self._error(pair, 0, unified) + 2 * lost_in_f16
        return answer

    def _bound(self, what: Operation, types: CacheTypes, window: int | None, unified: bool) -> float:
        """Of the divergence from f16."""
        bound = MORE_THAN_STOCK * relative_error(types) * self._error(STOCK, 0, unified, what.measure)
        if window is None:
            bound = min(bound, DISTURBED * self._error(types, window, unified))
        factor = (OUTLIERS if self._kind.latent_outliers else 1) * (PICKED if self._kind.picks else 1)
        return ROUNDING + what.times * factor * bound

    def windowed(self, types: str) -> dict:
        """Whether the log says that there is a recent window, and what it gains."""
        pair = CacheTypes(types, types)
        report(during=f"{types} with a window")
        with Cache(self._kind, self._path, pair, model=self._model, window=None) as cache:
            said = "recent window: the last" in cache.log and "in a way that has none" not in cache.log
        return dict(said=said, kl=self._error(pair, None, True), without=self._error(pair, 0, True))

    def opened(self, k: str | int, v: str | int, sequences: int = 1) -> dict:
        """A context of types that may be unfit, or numbers that are no types, and whether it works if there is one."""
        report(during=f"types {k} and {v}")
        try:
            with Cache(self._kind, self._path, CacheTypes(k, v), model=self._model, sequences=sequences) as cache:
                return dict(finite=bool(np.isfinite(undisturbed(cache)).all()))
        except RefusedError as error:
            return dict(refused=str(error))

    def damaged(self, types: str, how: str) -> dict:
        """Restore a state that is not whole. Returns what llama.cpp says of it, and how the context does after that."""
        report(during=f"{types}, {how}")
        with Cache(self._kind, self._path, CacheTypes(types, types), model=self._model) as cache:
            expected = undisturbed(cache)
            read = DAMAGES[how](cache)
            cache.clear()
            return dict(read=read, kl=compare(expected, undisturbed(cache)).kl_mean)

    def memory(self, types: str, sequences: int, length: int, unified: bool) -> dict:
        """Bytes that a context keeps, as llama.cpp logs them: of f16, and of `types`."""
        pair = CacheTypes(*types.split(":")) if ":" in types else CacheTypes(types, types)
        found = []
        for kind in (F16, pair):
            given = dict(model=self._model, window=None, sequences=sequences, length=length, unified=unified)
            with Cache(self._kind, self._path, kind, **given) as cache:
                found.append(logged_size(cache.log))
        return dict(f16=found[0], turbo=found[1])


def logged_size(log: str) -> float:
    """MiB of all caches, states and windows."""
    sizes = re.findall(r"(?:(?<!buffer )size = +| in f16, )([\d.]+) MiB", log)
    return sum(map(float, sizes))


@cache
def relative_error(types: CacheTypes) -> float:
    """The mean squared error of the worse of both types on normal numbers, in that of q4_0."""
    return max(_squared_error(types.k), _squared_error(types.v)) / _squared_error("q4_0")


@cache
def _squared_error(name: str) -> float:
    x = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    if name in {kind.name for kind in turboquant_gguf.types()}:
        y = turboquant_gguf.dequantize(turboquant_gguf.quantize(x, name), name)
    else:
        kind = gguf.GGMLQuantizationType[name.upper()]
        y = gguf.dequantize(gguf.quantize(x, kind), kind)
    return float(((x - y) ** 2).mean())


def report(**what: object) -> None:
    print(json.dumps(what), flush=True)


def main() -> None:
    name, path, *like = sys.argv[1:]
    worker = Worker((KINDS | UNFIT)[name], Path(path), Path(like[0]) if like else None)
    for line in sys.stdin:
        request = json.loads(line)
        report(answer=getattr(worker, request.pop("do"))(**request))


if __name__ == "__main__":
    main()
