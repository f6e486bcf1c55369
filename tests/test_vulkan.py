"""The Vulkan back end on Mesa's lavapipe, a driver that computes on the CPU: operators, and a model whose cache it holds.

Of llama.cpp's ggml-vulkan alone is built what these tests use: the library, without optimization, and the shaders that
vulkan_glslc lists. The package under test loads it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import device_sequences
import tiny_model
from checkpoints import random_calibration
from turboquant_gguf.llamacpp.cachetypes import CacheTypes
from turboquant_gguf.llamacpp.logits import EXACT

ROOT = Path(__file__).parent.parent
DRIVERS = "/usr/share/vulkan/icd.d"
NEEDED = {  # what a package of Debian 12 brings
    "glslc": lambda: shutil.which("glslc"),
    "libvulkan-dev": lambda: Path("/usr/include/vulkan/vulkan.hpp").is_file(),
    "spirv-headers": lambda: Path("/usr/include/spirv/unified1/spirv.hpp").is_file(),
    "mesa-vulkan-drivers": lambda: list(Path(DRIVERS).glob("lvp_icd*.json")),
}

TURBO4, MIXED = CacheTypes.parse("turbo4"), CacheTypes.parse("turbo3:turbo2")


def build(folder: Path, shaders: Path) -> Path:
    """The library of the back end, with our shaders of that folder."""
    options = [
        "-DGGML_VULKAN=ON", "-DGGML_BACKEND_DL=ON", "-DGGML_CPU=OFF", "-DGGML_RPC=OFF", "-DCMAKE_BUILD_TYPE=Release",
        "-DCMAKE_CXX_FLAGS_RELEASE=-O0 -DNDEBUG", f"-DVulkan_GLSLC_EXECUTABLE={ROOT / 'tests' / 'vulkan_glslc'}",
        f"-DTURBO_VULKAN_DIR={shaders}",
    ]  # fmt: skip
    for command in (
        ["cmake", "-S", ROOT, "-B", folder, *options],
        ["cmake", "--build", folder, "--target", "ggml-vulkan", "--parallel", str(os.cpu_count())],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (library,) = folder.glob("bin/*ggml-vulkan.*")
    return library


@pytest.fixture(scope="session")
def build_folder(request: pytest.FixtureRequest) -> Path:
    if missing := [package for package, is_there in NEEDED.items() if not is_there()]:
        pytest.skip(f"{', '.join(missing)} is not installed")
    return request.config.cache.mkdir("vulkan")


@pytest.fixture(scope="session")
def library(build_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copy(build(build_folder, ROOT / "ggml_turbo" / "vulkan"), tmp_path_factory.mktemp("vulkan"))


@pytest.fixture(scope="session")
def device(library: Path, build_folder: Path) -> dict[str, str]:
    """Variables that give a process the device Vulkan0."""
    return {
        "GGML_BACKEND_PATH": str(library),
        "TEST_DEVICE": "Vulkan0",
        "VK_ICD_FILENAMES": str(next(Path(DRIVERS).glob("lvp_icd*.json"))),
        "GGML_VK_VISIBLE_DEVICES": "0",  # a device that is a CPU must be asked for
        "GALLIVM_PERF": "nopt",  # seconds a pipeline, not minutes
        "GGML_VK_DISABLE_F16": "1",  # matrices are multiplied in float32, so that logits can be near the CPU's
        "MESA_SHADER_CACHE_DIR": str(build_folder / "pipelines"),
    }


def run_operators(device: dict[str, str], *options: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        Path(__file__).with_name("device_operators.py"),
    ]
    return subprocess.run(
        [*command, *options], env=os.environ | device, capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.mark.parametrize("which", ["rows", "attention"])
def test_operators(device, which: str):
    done = run_operators(device, "-k", which)
    assert done.returncode == 0, done.stdout[-4000:]


FAULTS = {  # a line of a shader, what stands there instead, and what notices
    "turbo-encode.comp": ("of_state < least", "of_state <= least", "set_rows"),
    "turbo-attention.comp": ("if (in_window >= 0 &&", "if (in_window > 0 &&", "recent_window and turbo4"),
}


@pytest.mark.parametrize("shader", FAULTS)
def test_a_fault_in_a_shader_is_noticed(device, build_folder: Path, shader: str, tmp_path: Path):
    right, wrong, noticed = FAULTS[shader]
    copy = shutil.copytree(ROOT / "ggml_turbo" / "vulkan", tmp_path / "vulkan")
    text = (copy / shader).read_text()
    assert text.count(right) == 1
    (copy / shader).write_text(text.replace(right, wrong))
    done = run_operators(device | {"GGML_BACKEND_PATH": str(build(build_folder, copy))}, "-x", "-k", noticed)
    assert done.returncode == 1 and "FAILED" in done.stdout, done.stdout[-4000:]


# ---- a model ----


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def calibrated(plain: Path) -> Path:
    return random_calibration(plain, plain.with_name("calibrated.gguf"))


@pytest.mark.parametrize("types, window, unified", [(TURBO4, 32, True), (MIXED, 32, False), (MIXED, 0, True)], ids=str)
def test_all_that_happens_to_sequences(device, plain: Path, types: CacheTypes, window: int, unified: bool):
    log = device_sequences.both(device, plain, types, window=window, unified=unified)
    assert "Vulkan0 KV buffer size" in log
    assert ("recent window: the last 32" in log) == bool(window) and "no recent window" not in log


def test_calibrated_keys(device, calibrated: Path):
    log = device_sequences.both(device, calibrated, TURBO4, window=32)
    assert "centred in 2 of them, by position" in log and "not centred" not in log


def test_centres_that_turn_change_nothing(device, plain: Path, calibrated: Path, monkeypatch: pytest.MonkeyPatch):
    """In a cache of float32, on a device."""
    monkeypatch.setenv("TURBO_CALIBRATION", "force")
    do, options = device_sequences.everything, dict(flash="enabled")
    expected, _ = device_sequences.run(plain, EXACT, 0, do, (), dict(flash="disabled"))
    found, _ = device_sequences.on_device(device, calibrated, EXACT, 99, do, (), options)
    assert device_sequences.error(expected, found) < 1e-3


@pytest.mark.parametrize("gpu_layers, options", [(2, {}), (99, {"offload_kqv": False})])
def test_layers_on_both(device, calibrated: Path, gpu_layers: int, options: dict):
    """Each layer's cache and ring lie where the layer does, or all of them with the CPU."""
    log = device_sequences.both(device, calibrated, TURBO4, gpu_layers, window=32, **options)
    assert set(re.findall(r"(\w+) KV buffer size", log)) == ({"CPU"} if options else {"CPU", "Vulkan0"})
    assert "recent window: the last 32" in log and "no recent window" not in log


@pytest.mark.parametrize("layers", [(99, 0), (0, 99)])
def test_a_state_goes_from_a_device_to_the_cpu_and_back(device, plain: Path, layers: tuple[int, int]):
    device_sequences.require_states_to_move(device, plain, TURBO4, layers)


@pytest.mark.parametrize(
    "command",
    [
        ["ppl", "MODEL", "--text", "text.txt", "--context", "256", "--chunks", "1", "--types", "turbo4"],
        ["bench", "MODEL", "--depths", "0", "--prefill", "16", "--decode", "2", "--repetitions", "1", "--types", "f16"],
        ["demo", "--model", "MODEL", "--max-tokens", "2", "--types", "f16"],
    ],
    ids=lambda command: command[0],
)
def test_commands_say_what_device_they_used(device, plain: Path, tmp_path: Path, command: list[str]):
    text = "The lens gathers what the mirror throws away, and the light goes out over the water. " * 24
    (tmp_path / "text.txt").write_text(text)
    words = [str(plain) if word == "MODEL" else word for word in command]
    more = {"TURBOQUANT_CACHE_DIR": str(tmp_path), "COLUMNS": "300"}
    done = subprocess.run(
        [sys.executable, "-m", "turboquant_gguf.cli", *words, "--gpu-layers", "2", "--json"],
        env=os.environ | device | more, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    if command[0] in ("ppl", "bench"):
        (finding,) = said["findings"]
        assert (finding["settings"]["gpu_layers"], finding["settings"]["kv_offload"]) == (2, True)
        assert "2 layers on llvmpipe" in done.stderr and "llvmpipe" in finding["machines"][0]["gpus"][0]
    else:
        assert said[0]["device"].startswith("2 layers on llvmpipe")
