"""The CUDA and HIP back end without a GPU: its kernels in the emulator (tests/simt), and in compilers of devices."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import gpu_compilers
import tiny_model
from gpu_compilers import ROOT, SOURCE
from turboquant_gguf.llamacpp import native

CUDA = SOURCE / "cuda"
UNITS = sorted(set(CUDA.glob("*.cu")) - {CUDA / "turbo-attention.cu"})  # which takes long, and has tests of its own
OPERATORS = ROOT / "tests" / "cuda_operators.cpp"
FAULTS = ROOT / "tests" / "simt_faults.cpp"
VECTORS = SOURCE / "format" / "vectors.bin"

# Devices differ in code: newer ones of NVIDIA's reduce in hardware, AMD's have no directed rounding.
BUILDS = {
    "plain": {"flags": [], "checked": False, "blocks": 40},
    "checked": {"flags": ["-DSIMT_AMPERE"], "checked": True, "blocks": 10},
    "HIP": {"flags": gpu_compilers.AS_HIP, "checked": False, "blocks": 20},
}


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> Path:
    """A folder with the emulator's objects."""
    folder = tmp_path_factory.mktemp("emulator")
    gpu_compilers.build_emulator(folder)
    return folder


# ---- the emulator sees what is wrong ----

# What it says of each kernel of simt_faults.cpp, without and with checked accesses. Wrong sums show in the schedules.
SAYS = [
    ("right", "right"),
    ("wrong sum", "reads bytes 512 to 515 of an input of 512 bytes"),
    ("97 threads wait in vain at .*simt_faults.cpp:27", "deadlock: 128 of 128 threads have not ended"),
    ("reads lane 31, which is not in the mask 0000ffff, at .*simt_faults.cpp:19", "reads lane 31"),
    ("meets at .*simt_faults.cpp:25 threads that are at .*simt_faults.cpp:27", "meets at"),
    ("wrong sum", "reads shared memory, which nothing has written, at .*simt_faults.cpp:30"),
    ("accesses byte 4 of an output of 4 bytes", "writes bytes 4 to 7 of an output of 4 bytes"),
    ("wrong sum|right", "race|reads shared memory, which nothing has written, at .*simt_faults.cpp:35"),
    ("wrong sum", "reads shared memory, which nothing has written, at .*simt_faults.cpp:38"),
    ("right", "accesses byte 128 of 128 bytes of dynamic shared memory, at .*simt_faults.cpp:41"),
    ("not aligned as its type wants", "4 bytes at an address that is no multiple of that, at .*simt_faults.cpp:44"),
    ("writes byte .* of an input of 512 bytes", "writes byte"),
    ("wrong sum|right", "race: writes byte 0 of an output, which thread 0 wrote without a barrier between"),
    ("needs more than .* bytes of stack", "needs more than"),
    ("wrong sum", "reads byte 4 of an output, which nothing has written"),
]


@pytest.fixture(scope="module")
def faults(emulator) -> list[Path]:
    """simt_faults.cpp without and with checked accesses."""
    with ThreadPoolExecutor() as pool:
        return list(
            pool.map(
                lambda checked: gpu_compilers.emulate(emulator, f"faults-{checked}", FAULTS, checked=checked),
                (False, True),
            )
        )


@pytest.mark.parametrize("number", range(len(SAYS)))
def test_the_emulator_sees_faults(faults, number: int):
    for program, expected in zip(faults, SAYS[number], strict=True):
        done = run(program, number)
        said = done.stdout + done.stderr
        assert re.search(expected, said), said
        assert done.returncode == (0 if "right" in said else 1 if "wrong" in said else 70), said


# ---- the operators ----


@pytest.fixture(scope="module")
def operators(emulator) -> dict[str, Path]:
    """cuda_operators.cpp in each of the builds."""

    def build(name: str) -> Path:
        return gpu_compilers.emulate(
            emulator, f"operators-{name}", OPERATORS, *BUILDS[name]["flags"], checked=BUILDS[name]["checked"]
        )

    with ThreadPoolExecutor() as pool:
        return dict(zip(BUILDS, pool.map(build, BUILDS), strict=True))


@pytest.mark.parametrize("build", BUILDS)
def test_operators(operators, build: str):
    done = run(operators[build], VECTORS, BUILDS[build]["blocks"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("right: 3 schedules, 3 types, 5 kinds of data")


# What is changed in which file, and what the emulator or the comparison must say.
PLANTED = {
    "a removed barrier of a warp": (
        "turbo-encode.cuh",
        "        turbo_sync_warp();\n    }\n    return total;",
        "    }\n    return total;",
        "race|nothing has written",
    ),
    "a removed barrier of a block": (
        "turbo-encode.cuh",
        "__syncthreads();\n    if (candidate",
        "if (candidate",
        "race|nothing has written",
    ),
    "a lane's neighbour": ("turbo-encode.cuh", "energy, half, 32)", "energy, half ^ 1, 32)", "wrong: turbo2: bytes"),
    "a lane that stays away": (
        "turbo-encode.cuh",
        "    turbo_traceback<K>(shared",
        "    if (lane == 31) return;\n    turbo_traceback<K>(shared",
        "deadlock",
    ),
    "swapped codes": (
        "turbo-encode.cuh",
        "shared.state[8*lane + j]) << K*j",
        "shared.state[8*lane + j]) << K*(j ^ 1)",
        "wrong: turbo2: bytes",
    ),
    "a header read as a word": (
        "turbo-blocks.cuh",
        "*(const uint16_t *) block",
        "*(const uint32_t *) block",
        "no multiple of that, at .*turbo-blocks.cuh",
    ),
    "costs that start anywhere": (
        "turbo-encode.cuh",
        "shared.row[candidate][0][u] = 0.0f;",
        "",
        "nothing has written, at .*turbo-encode.cuh",
    ),
    "a byte behind the block": (
        "turbo-blocks.cuh",
        "byte + 1 < TURBO_BLOCK_BYTES(K) ? block[byte + 1] : 0",
        "block[byte + 1]",
        "of an input of",
    ),
    "a scale that is too small": (
        "turbo-encode.cuh",
        "return energy >= __fmul_rn(",
        "return energy >= 1.03f*__fmul_rn(",
        "wrong: turbo2: bytes",
    ),
    "a table that is half there": (
        "turbo-table.cuh",
        "s < TURBO_STATES; s += turbo_threads()",
        "s < TURBO_STATES/2; s += turbo_threads()",
        "nothing has written",
    ),
    "the first task for the second": (
        "turbo-encode.cuh",
        "blockIdx.x - n_first",
        "blockIdx.x",
        "of an output of|of an input of",
    ),
    "two of one cache in any order": (
        "turbo-cuda.cu",
        "turbo_owner(nodes[next]) == turbo_owner(nodes[0])",
        "false",
        "wrong: two SET_ROWS are one launch, though both write to one cache",
    ),
    "too much taken": (
        "turbo-describe.cuh",
        "t->ne[0] % QK_TURBO == 0 &&",
        "",
        "wrong: supports CPY: values of a block in two rows",
    ),
}


@pytest.fixture(scope="module")
def planted(emulator, tmp_path_factory) -> dict[str, subprocess.CompletedProcess]:
    """cuda_operators.cpp with each of the faults, as it has run."""

    def plant(fault: str) -> subprocess.CompletedProcess:
        name, right, wrong, _ = PLANTED[fault]
        folder = tmp_path_factory.mktemp("planted")
        shutil.copytree(CUDA, folder / "cuda")
        text = (CUDA / name).read_text()
        assert text.count(right) == 1, fault
        (folder / "cuda" / name).write_text(text.replace(right, wrong))
        for stem in ("core", "accesses"):
            (folder / f"{stem}.o").symlink_to(emulator / f"{stem}.o")
        return run(gpu_compilers.emulate(folder, "planted", OPERATORS, f"-I{folder}", checked=True), VECTORS, 3)

    with ThreadPoolExecutor() as pool:
        return dict(zip(PLANTED, pool.map(plant, PLANTED), strict=True))


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_seen(planted, fault: str):
    said = planted[fault].stdout + planted[fault].stderr
    assert planted[fault].returncode in (1, 70) and re.search(PLANTED[fault][3], said), said


# ---- the compilers ----


WITHOUT_ATTENTION = """
bool turbo_takes_attention(int, const ggml_tensor *) { return false; }
void turbo_compute_attention(ggml_backend_cuda_context &, ggml_tensor *) {}
"""


@pytest.fixture(scope="module")
def all_units(tmp_path_factory) -> Path:
    """One file of all of ours: the headers, which take most of a compiler's time, are read once."""
    path = tmp_path_factory.mktemp("units") / "all.cu"
    path.write_text("".join(f'#include "cuda/{unit.name}"\n' for unit in UNITS) + WITHOUT_ATTENTION)
    return path


# The most that a kernel may take: registers of a thread, bytes of shared memory.
BOUNDS = {"turbo_encode": (60, 18 * 1024), "turbo_decode": (48, 1024), "turbo_copy": (48, 0)}
AMD_BOUNDS = {"turbo_encode": (64, 18 * 1024), "turbo_decode": (64, 1024), "turbo_copy": (64, 0)}


def held(resources: list, bounds: dict, architectures: tuple) -> None:
    seen = set()
    for found in resources:
        name = next((name for name in bounds if name in found.kernel), None)
        assert name, f"{found.kernel} has no bound"
        registers, shared = bounds[name]
        assert found.registers <= registers and found.shared <= shared and found.spilled == 0, found
        seen.add((name, found.architecture))
    assert seen == {(name, architecture) for name in bounds for architecture in architectures}


def test_nvidia_compiles_it_within_bounds(grafted, all_units):
    output = all_units.with_suffix(".o")
    held(
        gpu_compilers.compile_nvidia(
            grafted, all_units, output, gpu_compilers.NVIDIA, *gpu_compilers.exact_flags("CUDA")
        ),
        BOUNDS,
        gpu_compilers.NVIDIA,
    )


def test_the_encoder_is_compiled_without_fast_math(grafted, tmp_path):
    """llama.cpp's flags are fast math; ours come after them. Each operation is rounded as it is written."""
    unit, output = CUDA / "turbo-encode.cu", tmp_path / "encode.ptx"
    loose = re.compile(r"\.ftz|\.approx|div\.full|ex2\.")
    assert loose.search(gpu_compilers.ptx(grafted, unit, output))
    exact = gpu_compilers.ptx(grafted, unit, output, *gpu_compilers.exact_flags("CUDA"))
    assert not loose.search(exact)
    for operation in ("div.rn.f32", "sqrt.rn.f32", "add.rm.f32", "mul.rn.f32"):
        assert operation in exact


@pytest.mark.parametrize("architecture", gpu_compilers.AMD)
def test_amd_compiles_it_within_bounds(grafted, all_units, tmp_path, architecture: str):
    output = tmp_path / "all.s"
    held(
        gpu_compilers.compile_amd(grafted, all_units, output, architecture, *gpu_compilers.exact_flags("HIP")),
        AMD_BOUNDS,
        (architecture,),
    )


# ---- llama.cpp with its cache on the device ----


@pytest.fixture(scope="module")
def device(grafted, tmp_path_factory) -> Path:
    """llama.cpp's own CUDA back end, of nvcc's objects, over the emulator: a library."""
    kernels = "X(4, 3, 1) X(2, 2, 1) X(3, 4, 1)"  # for the types of cuda_worker.py
    return gpu_compilers.emulated_device(grafted, tmp_path_factory.mktemp("device"), kernels)


def test_llama_cpp_with_its_cache_on_an_emulated_device(device, tmp_path):
    """A model reads, answers, copies, shifts, saves and loads. Where the CPU attends, logits are those of the CPU to
    the last bit, since the bytes of the cache are; where the device does, they are near. Products with weights of ours
    go through llama.cpp's code to our decoders, and to a stand-in of cuBLAS.
    """
    model = tiny_model.write(tmp_path / "tiny.gguf")
    worker = [sys.executable, ROOT / "tests" / "cuda_worker.py", device, model]
    done = subprocess.run(worker, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert all(said["buffers"])
    stored, attended, lost = said["stored"], said["attended"], said["lost"]
    assert {distance for types in stored.values() for distance in types.values()} == {0.0}, stored
    # Other roundings lead to a few other codes in the layers behind: a part of what the types lose anyway.
    for types, operations in attended.items():
        for name, distance in operations.items():
            assert 0 < distance < 0.35 * lost[types][name], (types, name, distance, lost[types][name])
    assert all(count > 0 for count in said["launches"].values()), said["launches"]
    assert len(said["products"]) == 27 and all(error <= 1 for error in said["products"].values()), said["products"]
    # Of each of two layers: keys and values of a prompt by two launches, those of a token by one.
    assert said["encoders"] == {
        "turbo4/turbo3": [[0, 2, 2, 0], [0, 0, 0, 2]],
        "turbo2/turbo2": [[4, 0, 0, 0], [0, 0, 0, 2]],
        "turbo3/turbo4": [[0, 2, 2, 0], [0, 0, 0, 2]],
    }


def test_a_window_that_a_device_cannot_have_is_named(device, tmp_path):
    """By llama.cpp's programs, without being asked for more of the log."""
    model = tiny_model.write(tmp_path / "tiny.gguf")
    (tmp_path / "text.txt").write_text("The lens gathers what the mirror throws away. " * 60)
    program = [native.tool_path("llama-perplexity"), "-m", model, "-f", tmp_path / "text.txt", "-c", "256"]
    done = subprocess.run(
        [*program, "--device", "CUDA0", "-ngl", "99", "-ctk", "turbo4", "-ctv", "turbo3", "--chunks", "1"],
        env=os.environ | {"GGML_BACKEND_PATH": str(device), "SIMT_CPU_ATTENDS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = (
        "no recent window: the cache (keys of turbo4, values of turbo3, heads of 64 and 64) is on CUDA0, emulator, "
        "which has no kernel for it"
    )
    assert said in done.stdout + done.stderr, done.stdout + done.stderr
