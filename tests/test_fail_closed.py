"""An architecture whose attention passes by where keys are calibrated and a window is kept is noticed in its graph."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import checkpoints
from turboquant_gguf.llamacpp import ggml

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD puts functions before libllama's")

# Logits of 40 tokens in a context of turbo3 keys and values, or what is said where there is none; then the log.
SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from turboquant_gguf.llamacpp.cachetypes import CacheTypes
from turboquant_gguf.errors import TurboquantError
from turboquant_gguf.llamacpp.logits import Model
from turboquant_gguf.llamacpp.recentwindow import RecentWindow
path, output, window = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with Model(path) as model:
    try:
        with model.open(256, CacheTypes("turbo3", "turbo3"), recent_window=RecentWindow(window)) as context:
            for i in range(2):
                np.save(f"{output}-{i}", context.logits(list(range(40))))
    except TurboquantError as error:
        print("REFUSED", error)
    print("".join(model.log))
"""


def name_of(function: str, symbols: list[str]) -> str:
    """The linker's name of a function of llama_turbo_kv."""
    wanted = f"14llama_turbo_kv{len(function)}{function}E"
    (found,) = (name for name in symbols if wanted in name)
    return found


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Callable[..., tuple[str, list[np.ndarray]]]:
    """Run SCRIPT on a model with a window of some tokens, and a part of our attention lost: its output, and logits."""
    folder = tmp_path_factory.mktemp("planted")
    library = ggml.library_path("llama")
    listed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-1] for line in listed.splitlines()]
    names = [f"-DCALIBRATE={name_of('calibrate_layer', symbols)}", f"-DATTEND={name_of('attend', symbols)}"]

    def run(model: Path, window: int, plant: str | None = None, script: str = SCRIPT) -> tuple[str, list[np.ndarray]]:
        environment = os.environ | {"PLANTED_LIBLLAMA": str(library)}
        if plant:
            source, made = Path(__file__).with_name("planted_attention.c"), folder / f"{plant}.so"
            flags = ["-shared", "-fPIC", f"-DPLANT={plant}", *names, "-ldl"]
            subprocess.run([os.environ.get("CC", "cc"), source, "-o", made, *flags], check=True)
            environment["LD_PRELOAD"] = str(made)
        for old in folder.glob("logits-*"):
            old.unlink()
        command = [sys.executable, "-c", script, model, folder / "logits", str(window)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout, [np.load(file) for file in sorted(folder.glob("logits-*"))]

    return run


@pytest.mark.parametrize("name, sizes", [("llama", {"head_dim": 64}), ("gemma3", {"head_dim": 64})])
@pytest.mark.parametrize("plant", ["QUERIES", "KEYS", "BOTH"])
def test_keys_that_are_calibrated_in_some_layers_only(planted, plant, name, sizes, tmp_path):
    """The context is refused by name: its scores would be of other keys than its queries are meant for."""
    model = checkpoints.gguf(tmp_path, name, **sizes)
    calibrated = checkpoints.random_calibration(model, tmp_path / "calibrated.gguf")
    for window in (0, 32):
        said, logits = planted(calibrated, window, plant)
        assert "REFUSED" in said, said[-2000:]
        assert re.search("keys cannot be calibrated: [1-9] layers of this model", said)  # of one of its caches
        assert not logits
    said, logits = planted(model, 0, plant)  # nothing to be wrong about
    assert "REFUSED" not in said and len(logits) == 2
    said, logits = planted(calibrated, 32)
    assert "REFUSED" not in said and len(logits) == 2


def test_centres_that_some_layers_do_not_attend_to(planted, tmp_path):
    """Where a centre turns with the position, other attention than ours does not know it."""
    model = checkpoints.gguf(tmp_path, "llama", head_dim=64)
    for version, refused in ((1, False), (2, True)):
        calibrated = checkpoints.random_calibration(model, tmp_path / f"{version}.gguf", version)
        said, _ = planted(calibrated, 32, "WINDOW")
        assert ("keys cannot be calibrated: 1 layers of this model" in said) == ("REFUSED" in said) == refused


def test_a_window_that_some_layers_do_not_attend_to(planted, tmp_path):
    """It is switched off, which the log says once, and the model is the one without it."""
    model = checkpoints.gguf(tmp_path, "llama", head_dim=64)
    line = "no recent window: 1 of 2 layers of this model attend to their keys in a way that has none"
    said, without = planted(model, 0)
    assert line not in said
    said, within = planted(model, 32)
    assert line not in said and not np.array_equal(within, without)
    said, found = planted(model, 32, "WINDOW")
    assert said.count(line) == 1
    assert np.array_equal(found, without)


CALIBRATE = """
import sys
from pathlib import Path
from rich.console import Console
from turboquant_gguf.weights.calibration import calibrate
from turboquant_gguf.errors import TurboquantError
output = Path(sys.argv[1]).with_name("out.gguf")
try:
    calibrate(Path(sys.argv[1]), output, console=Console(quiet=True), force=True)
except TurboquantError as error:
    print("REFUSED", error)
print(output.exists())
"""


def test_calibrate_writes_no_file_that_could_not_be_used(planted, tmp_path):
    model = checkpoints.gguf(tmp_path, "llama", head_dim=64)
    said, _ = planted(model, 0, "BOTH", CALIBRATE)
    assert "REFUSED" in said and "keys cannot be calibrated" in said and said.endswith("False\n")
    said, _ = planted(model, 0, None, CALIBRATE)
    assert said == "True\n"
