"""What happens to sequences whose cache lies on a device, in a process that has one. test_vulkan.py and test_metal.py run
this.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import httpx
import numpy as np

from sequences import Sequences
from turboquant_gguf.llamacpp import server
from turboquant_gguf.llamacpp.cachetypes import CacheTypes
from turboquant_gguf.llamacpp.logits import EXACT, Model
from turboquant_gguf.llamacpp.placement import Placement
from turboquant_gguf.weights.verify import compare

TOKENS = [3 + token * 37 % 250 for token in range(200)]


def everything(cache: Sequences) -> list[np.ndarray]:
    """A prompt, an answer, rejected drafts, a copy, a context shift, a state that is restored: logits of each."""
    found = [cache.prompt(TOKENS[:100]), cache.answer(TOKENS[100:103], 100)]
    cache.prompt(TOKENS[:5], first=103)  # a draft
    cache.remove(0, 104, -1)
    found.append(cache.answer(TOKENS[104:106], 104))
    cache.copy(0, 1)
    found.append(cache.read((TOKENS[106], 106, 0), (TOKENS[7], 106, 1)))
    state = cache.saved(1)
    cache.remove(0, 4, 44)
    cache.add(0, 44, -1, -40)
    found.append(cache.answer(TOKENS[107:109], 67))
    cache.restore(state, 2)
    found.append(cache.answer(TOKENS[107:109], 107, 2))
    found.append(cache.prompt(TOKENS[20:60], 3))
    return found


def slots(cache: Sequences) -> list[np.ndarray]:
    """Logits of answers to two prompts: together, a token of each in a batch, as slots of a server are; and apart."""
    prompts, answers = (TOKENS[:40], TOKENS[90:150]), (TOKENS[160:164], TOKENS[170:174])
    for sequence, tokens in enumerate(prompts):
        cache.prompt(tokens, sequence)
    steps = [
        cache.read(*((token, len(prompts[i]) + step, i) for i, token in enumerate(pair)))
        for step, pair in enumerate(zip(*answers, strict=True))
    ]
    together = [np.stack(logits) for logits in zip(*steps, strict=True)]
    apart = []
    for sequence, (tokens, answer) in enumerate(zip(prompts, answers, strict=True)):
        cache.prompt(tokens, 2 + sequence)
        apart.append(cache.answer(answer, len(tokens), 2 + sequence))
    return together + apart


def nothing(cache: Sequences) -> None:
    """That the context could be made is what is wanted."""


def save(cache: Sequences) -> tuple[bytes, list[np.ndarray]]:
    """The state of a prompt, and what comes after it."""
    cache.prompt(TOKENS[:100])
    return cache.saved(0), [cache.answer(TOKENS[100:104], 100)]


def restore(cache: Sequences, state: bytes) -> list[np.ndarray]:
    """What comes after a prompt that was saved, in a cache that had another."""
    cache.prompt(TOKENS[50:90])
    cache.restore(state, 0)
    return [cache.answer(TOKENS[100:104], 100)]


def run(
    path: Path, types: CacheTypes, gpu_layers: int, do: Callable, arguments: Sequence, options: dict
) -> tuple[object, str]:
    """What `do` gives for a context of the model with so many layers on a device, and the log."""
    with Model(path, Placement(gpu_layers=gpu_layers)) as model:
        with Sequences(path, types, model=model, sequences=4, length=160, **options) as cache:
            return do(cache, *arguments), "".join(model.log)


def _begin(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def in_process(environment: dict[str, str], do: Callable, *arguments: object) -> object:
    """What `do` gives in a process of its own with these variables: a device stays with the process that loaded it."""
    how = {"mp_context": get_context("spawn"), "initializer": _begin, "initargs": (environment,)}
    with ProcessPoolExecutor(1, **how) as process:
        return process.submit(do, *arguments).result()


def on_device(environment: dict[str, str], *arguments: object) -> tuple[object, str]:
    """The same as `run`, in such a process."""
    return in_process(environment, run, *arguments)


def served(path: Path, types: CacheTypes, questions: list[str]) -> tuple[list[dict], list[dict], str]:
    """Answers of a llama-server with all layers on devices: to all questions at once, to each alone; and its log."""

    def ask(question: str) -> dict:
        request = {"prompt": question, "temperature": 0, "n_predict": 8, "n_probs": 1, "cache_prompt": False}
        reply = httpx.post(f"{running.url}/completion", json=request, timeout=600, trust_env=False)
        return reply.raise_for_status().json()

    more = ("--parallel", str(len(questions)))
    with server.running(path, types, context=512, placement=Placement(gpu_layers=99), extra_args=more) as running:
        with ThreadPoolExecutor(len(questions)) as pool:
            together = list(pool.map(ask, questions))
        return together, [ask(question) for question in questions], running.log()


# ---- the device and the CPU ----

BOUND = 1.5
"""How far logits may be from those of a cache of float32, as multiples of the CPU's. The CPU rounds queries to 8 bits and a
device does not: values of the next layer's cache move to neighbouring codes, and a cache of few bits makes much of it. So
the two are no nearer to each other than each is to float32."""


def error(exact: list[np.ndarray], found: list[np.ndarray]) -> float:
    assert all(np.isfinite(x).all() for x in found)
    return compare(np.concatenate(exact), np.concatenate(found)).relative_error


def require_as_exact(path: Path, expected: list[np.ndarray], found: list[np.ndarray], do: Callable) -> None:
    """The device is about as near to a cache of float32 as the CPU is."""
    exact, _ = run(path, EXACT, 0, do, (), {})
    errors = [error(exact, logits) for logits in (expected, found)]
    assert errors[1] < BOUND * errors[0], errors


SMALL = 0.05
"""An error of logits that other orders of summation make, where they move values of a later layer's cache to
neighbouring codes: a tenth of what the cache types lose.
"""


def require_states_to_move(device: dict[str, str], path: Path, types: CacheTypes, layers: tuple[int, int]) -> None:
    """A state that is saved with the first number of layers on the device goes on where it was with the second."""

    def run_with(gpu_layers: int, do: Callable, *arguments: object) -> object:
        where = (on_device, device) if gpu_layers else (run,)
        return where[0](*where[1:], path, types, gpu_layers, do, arguments, {"window": 32})[0]

    state, expected = run_with(layers[0], save)
    assert error(expected, run_with(layers[1], restore, state)) < SMALL


def both(device: dict[str, str], path: Path, types: CacheTypes, gpu_layers: int = 99, **options: object) -> str:
    """Requires of the device what the CPU does; gives the device's log."""
    do = everything
    expected, _ = run(path, types, 0, do, (), options)
    found, log = on_device(device, path, types, gpu_layers, do, (), options)
    require_as_exact(path, expected, found, do)
    return log
