"""A model whose cache lies on a Vulkan device, against the CPU: all that happens to sequences. Run by test_vulkan.py.

What the two compute in another way: the CPU rounds queries to 8 bits, a device without float32 units for it multiplies matrices in f16,
and both move a few values of a cache to the neighbouring code. The bound is far below what a cache of other values gives.
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tiny_model
from checkpoints import random_calibration
from sequences import Sequences
from turboquant_gguf.llamacpp.cachetypes import CacheTypes
from turboquant_gguf.llamacpp.logits import EXACT, Model
from turboquant_gguf.weights.verify import compare

TURBO4, MIXED = CacheTypes.parse("turbo4"), CacheTypes.parse("turbo3:turbo2")
BOUND = 0.03
TOKENS = [3 + token * 37 % 250 for token in range(200)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def calibrated(plain: Path) -> Path:
    return random_calibration(plain, plain.with_name("calibrated.gguf"))


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


def on(
    path: Path, gpu_layers: int, types: CacheTypes, run: Callable = everything, **options: object
) -> tuple[list[np.ndarray], str]:
    """What `run` finds with so many layers on the device, and the log."""
    with Model(path, gpu_layers=gpu_layers) as model, Sequences(
        path, types, model=model, sequences=4, length=160, **options
    ) as cache:
        return run(cache), "".join(model.log)


def errors(expected: list[np.ndarray], found: list[np.ndarray]) -> list[float]:
    assert all(np.isfinite(x).all() for x in found)
    return [compare(*pair).relative_error for pair in zip(expected, found, strict=True)]


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("window", [0, 32])
@pytest.mark.parametrize("types", [TURBO4, MIXED], ids=str)
def test_all_that_happens_to_sequences(plain: Path, types: CacheTypes, window: int, unified: bool):
    options = dict(window=window, unified=unified)
    expected, _ = on(plain, 0, types, **options)
    found, log = on(plain, 99, types, **options)
    assert re.search(r"Vulkan0 KV buffer size", log)
    assert ("recent window: the last 32" in log) == bool(window) and "no recent window" not in log
    assert max(errors(expected, found)) < BOUND, errors(expected, found)


def test_calibrated_keys(plain: Path, calibrated: Path):
    """Centres that turn are exact: in a cache of float32 they change nothing. And a device gives what the CPU gives."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TURBO_CALIBRATION", "force")
        exact, _ = on(plain, 0, EXACT, flash="disabled")
        found, log = on(calibrated, 99, EXACT, flash="enabled")
    assert "centred in 2 of them, by position" in log and "not centred" not in log
    assert max(errors(exact, found)) < BOUND, errors(exact, found)
    expected, _ = on(calibrated, 0, TURBO4, window=32)
    found, _ = on(calibrated, 99, TURBO4, window=32)
    assert max(errors(expected, found)) < BOUND, errors(expected, found)


def test_layers_on_both(calibrated: Path):
    """Each layer's cache and ring lie where the layer does, or all of them with the CPU."""
    expected, _ = on(calibrated, 0, TURBO4, window=32)
    for gpu_layers, options in ((1, {}), (2, {}), (99, dict(offload_kqv=False))):
        found, log = on(calibrated, gpu_layers, TURBO4, window=32, **options)
        buffers = set(re.findall(r"(\w+) KV buffer size", log))
        assert buffers == {(): {"CPU", "Vulkan0"}}.get(tuple(options), {"CPU"}), buffers
        assert "recent window: the last 32" in log and "no recent window" not in log
        assert max(errors(expected, found)) < BOUND, errors(expected, found)


def test_a_state_goes_from_a_device_to_the_cpu_and_back(plain: Path):
    def begin(cache: Sequences) -> tuple[bytes, np.ndarray]:
        cache.prompt(TOKENS[:100])
        return cache.saved(0), cache.answer(TOKENS[100:104], 100)

    def go_on(cache: Sequences) -> np.ndarray:
        cache.prompt(TOKENS[50:90])
        cache.restore(state, 0)
        return cache.answer(TOKENS[100:104], 100)

    for first, second in ((99, 0), (0, 99), (99, 99)):
        (state, expected), _ = on(plain, first, TURBO4, begin, window=32)
        found, _ = on(plain, second, TURBO4, go_on, window=32)
        assert compare(expected, found).relative_error < BOUND


def test_what_a_device_does_not_compute_is_named(plain: Path):
    """Keys of a type that no shader of ours decodes: the window is off, the device named, and the model runs."""
    types = CacheTypes("q4_0", "q4_0")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TURBO_CALIBRATION", "0")
        _, log = on(plain, 99, types, window=32)
    assert "recent window: the last 32" in log  # of stock types, too
