"""The Metal back end without a Mac: llama.cpp's own on Linux, its kernels and ours in the emulator (tests/simt)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import device_sequences
import gpu_compilers
import metal_library
import tiny_architectures
import tiny_model
from checkpoints import random_calibration
from gpu_compilers import ROOT
from metal_library import Kernels
from sequences import RefusedError
from turboquant_gguf.llamacpp.cachetypes import CacheTypes

ALL = Kernels(
    stock=("fa_f16", "fa_vec_f16", "fa_vec_q8_0", "fa_aux", "quantize"),
    instances=r"[^b]f16_dk64_dv64|q8_0_dk64_dv64|kv_q8_0|_(set|get)_rows_(f32_i64_|f16$|f32$|q8_0)",
)


@pytest.fixture(scope="module")
def library(grafted, tmp_path_factory) -> Path:
    return metal_library.build(grafted, tmp_path_factory.mktemp("metal"), ALL)


FEW = "_c[12]$"  # attention with values of 64 and 128: half the time to compile


def run(library: Path, file: str, *options: str) -> subprocess.CompletedProcess:
    """The tests of a file, by a process that has the device."""
    # -s: what the emulator says goes with the process, not into pytest's files.
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "--noconftest"]
    command = [*pytest_here, Path(__file__).with_name(file), *options]
    variables = {"GGML_BACKEND_PATH": str(library), "TEST_DEVICE": "MTL0", "GGML_NO_BACKTRACE": "1"}
    folders = [str(ROOT / "ggml_turbo" / "graft"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables["PYTHONPATH"] = os.pathsep.join(folders)  # as conftest.py has it, which takes seconds
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize("file", ["metal_stock.py", "device_operators.py", "metal_operators.py"])
def test_operators(library, file: str):
    done = run(library, file)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_fast_math_changes_no_byte(grafted, library, tmp_path: Path):
    """Metal compiles like that: what the compiler sees it may fuse and reorder, and infinities it need not know."""
    fast = metal_library.build(grafted, tmp_path, Kernels(fast=True, ours=FEW), beside=library.parent)
    done = run(fast, "device_operators.py", "-k", "rows or (attention and (turbo3-turbo2 or turbo2-turbo3))")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


# Few of them, since every memory access is checked; all kernels have a part.
CHECKED = "(set_rows and turbo2) or (copied and turbo3) or (window and turbo2-turbo3)"
PRODUCTS = "turbo4 and (weights and 37 or experts and 101)"


def test_no_access_is_wrong(grafted, library, tmp_path: Path):
    """No race in a threadgroup, between threadgroups or between kernels, and nothing read that nobody has written."""
    checked = metal_library.build(grafted, tmp_path, Kernels(checked=True, ours=FEW), beside=library.parent)
    done = run(checked, "device_operators.py", "-k", CHECKED)
    for file, *tests in (("metal_operators.py", "-k", PRODUCTS), ("metal_counts.py",)):
        done = run(checked, file, *tests) if done.returncode == 0 else done
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


BARRIER = "        threadgroup_barrier(mem_flags::mem_threadgroup);\n"
SIMD_BARRIER = "        simdgroup_barrier(mem_flags::mem_threadgroup);\n"

# What is changed in which file; what the emulator, or a test, must say; and the tests that see it.
PLANTED = {
    "a removed barrier of a SIMD group": (
        ("turbo-encode.metal", SIMD_BARRIER + "    }\n\n    const float scale", "    }\n\n    const float scale"),
        "race|nothing has written",
        ("device_operators.py", "set_rows and turbo4"),
    ),
    "a removed barrier of a threadgroup": (
        ("turbo-attention.metal", BARRIER + "\n        // Values", "        // Values"),
        "race|nothing has written",
        ("device_operators.py", "attention and turbo3-turbo2"),
    ),
    "a removed barrier between kernels": (
        ("turbo-metal.cpp", "ggml_metal_encoder_memory_barrier(encoder);\n        turbo_combine", "turbo_combine"),
        "race: reads byte .* which another block wrote",
        ("device_operators.py", "attention and turbo3-turbo2"),
    ),
    "a table that is half there": (
        ("turbo-block.metal", "s < TURBO_STATES; s += n_threads", "s < TURBO_STATES/2; s += n_threads"),
        "nothing has written",
        ("metal_operators.py", "products and turbo4"),
    ),
    "a lost code": (
        ("turbo-encode.metal", "next[o] & 15", "next[o] & 7"),
        "FAILED .*set_rows",
        ("device_operators.py", "set_rows and turbo4"),
    ),
    "a key that counts twice": (
        ("turbo-attention.metal", "column < 0 ||", "column <= 0 ||"),
        "FAILED .*recent_window",
        ("device_operators.py", "recent_window and turbo2"),
    ),
    "values that no query sees": (
        ("turbo-block.metal", "if (seen >> row & 1) {", "if (seen >> row & 1 || row < TURBO_KEYS) {"),
        "FAILED .*no_number|accesses byte .* of an array",
        ("metal_operators.py", "no_number"),
    ),
    "columns of another expert": (
        ("turbo-mul-mat.metal", "first < a.n_ids; first += 32", "first < a.n_ids; first += 33"),
        "FAILED .*experts",
        ("metal_operators.py", "experts and 101 and turbo4"),
    ),
    "more threadgroup memory than two have room for": (
        ("turbo-args.h", "rows[8*M*TURBO_CHANNELS(M)]", "rows[8*M*QK_TURBO]"),
        "FAILED .*head_sizes",
        ("metal_operators.py", "head_sizes and 64-32"),
    ),
    "threadgroup memory that nobody asked for": (
        ("turbo-metal.cpp", "sizeof(turbo_attention_memory<1>)", "sizeof(turbo_attention_memory<1>) - 1056"),
        "dynamic shared memory",
        ("metal_counts.py", "decoded_once"),
    ),
    "a type that is taken and has no kernel": (
        ("turbo-metal.cpp", "turbo_has_kernel(v->ne[0]) && ", ""),
        "there is no kernel turbo_attention_m1_c5|FAILED .*refused",
        ("metal_operators.py", "without_a_kernel"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_seen(grafted, library, tmp_path: Path, fault: str):
    changed, said, (file, tests) = PLANTED[fault]
    kernels = Kernels(checked="FAILED" not in said, changed=changed, ours=FEW)
    done = run(metal_library.build(grafted, tmp_path, kernels, beside=library.parent), file, "-x", "-k", tests)
    text = done.stdout + done.stderr
    assert done.returncode in (1, 70) and re.search(said, text), text[-4000:]


def test_a_fault_in_a_stock_kernel_is_seen(grafted, library, tmp_path: Path):
    kernels = Kernels(
        stock=("fa_vec_q8_0", "fa_aux"),
        instances="q8_0_dk64_dv64",
        ours=FEW,
        changed=(
            "fa_vec_common.metal",
            SIMD_BARRIER + "\n            // online softmax",
            "\n            // online softmax",
        ),
    )
    done = run(metal_library.build(grafted, tmp_path, kernels, beside=library.parent), "metal_stock.py", "-k", "3-q8_0")
    assert done.returncode == 1 and "FAILED" in done.stdout, done.stdout[-4000:]


def test_all_threadgroup_memory_is_what_the_host_asks_for():
    """Which metal_operators.py counts: no kernel has variables there."""
    assert metal_library.threadgroup_variables(metal_library.flatten.source()) == []
    assert metal_library.threadgroup_variables("    threadgroup half codebook[256];\n") == ["half codebook[256]"]


def test_cmake_makes_our_library_first(request: pytest.FixtureRequest):
    """As on a Mac, but for its frameworks, and what make would do is only printed.

    Whether llama.cpp embeds its kernels or has them as files makes no difference to ours; files are installed, too.
    """
    folder = request.config.cache.mkdir("metal-cmake")
    frameworks = [f"-D{name}=m" for name in ("FOUNDATION_LIBRARY", "METAL_FRAMEWORK", "METALKIT_FRAMEWORK")]
    options = ["-DGGML_METAL=ON", "-DGGML_BACKEND_DL=ON", "-DGGML_CPU=OFF", "-DGGML_RPC=OFF", *frameworks]
    for embed in ("ON", "OFF"):
        configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Unix Makefiles", *options]
        gpu_compilers.run([*configure, f"-DGGML_METAL_EMBED_LIBRARY={embed}"])
        # It ends where a library is to be linked with one that nobody has made.
        make = ["make", "-C", folder, "--dry-run", "ggml-metal"]
        steps = subprocess.run(make, capture_output=True, text=True, check=False).stdout
        assert 0 < steps.index("metal/flatten.py") < steps.index("metal/turbo-metal.cpp")
        assert ("-o " + str(folder / "bin" / "default.metallib") in steps) == (embed == "OFF")
        assert ("default.metallib" in (folder / "cmake_install.cmake").read_text()) == (embed == "OFF")


def test_address_spaces_do_not_mix(tmp_path: Path):
    """What the emulator cannot see, since all of its memory is one; and the compiler sees it where it is planted."""
    assert metal_library.mistakes(tmp_path / "right", Kernels()) == ""
    changed = ("turbo-block.metal", "uint d, threadgroup const half * codebook", "uint d, device const half * codebook")
    assert "address space '1'" in metal_library.mistakes(tmp_path / "wrong", Kernels(changed=changed))


# ---- a model ----

TURBO4, MIXED = CacheTypes.parse("turbo4"), CacheTypes.parse("turbo3:turbo2")


@pytest.fixture(scope="module")
def device(library) -> dict[str, str]:
    """Variables that give a process the device MTL0, which takes what is ours and leaves the rest to the CPU."""
    return {"GGML_BACKEND_PATH": str(library), "SIMT_METAL_ONLY_OURS": "1"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("models") / "tiny.gguf")


def test_all_that_happens_to_sequences(device, plain: Path):
    log = device_sequences.both(device, plain, TURBO4, window=32)
    assert "MTL0 KV buffer size" in log
    assert "recent window: the last 32" in log and "no recent window" not in log


def test_calibrated_keys_streams_and_a_layer_on_the_cpu(device, plain: Path):
    calibrated = random_calibration(plain, plain.with_name("calibrated.gguf"))
    log = device_sequences.both(device, calibrated, MIXED, 2, window=32, unified=False)
    assert "centred in 2 of them, by position" in log and "not centred" not in log
    assert "MTL0 KV buffer size" in log and "CPU KV buffer size" in log and "no recent window" not in log


def test_two_sequences_together_and_apart(device, plain: Path):
    do, options = device_sequences.slots, {"window": 32}
    expected, _ = device_sequences.run(plain, TURBO4, 0, do, (), options)
    found, _ = device_sequences.on_device(device, plain, TURBO4, 99, do, (), options)
    device_sequences.require_as_exact(plain, expected, found, do)
    assert device_sequences.error(found[2:], found[:2]) < device_sequences.SMALL


@pytest.mark.parametrize("layers", [(99, 0), (0, 99)])
def test_a_state_goes_from_a_device_to_the_cpu_and_back(device, plain: Path, layers: tuple[int, int]):
    device_sequences.require_states_to_move(device, plain, TURBO4, layers)


def test_two_slots_of_a_server(device, plain: Path):
    """Answers to two questions at once, which are longer than the recent window, are those to one after the other."""
    questions = ["The lens gathers what the mirror throws away, " * 2, "and the light goes out over the water. " * 2]
    together, apart, log = device_sequences.in_process(device, device_sequences.served, plain, TURBO4, questions)
    assert "MTL0 KV buffer size" in log
    assert {answer["id_slot"] for answer in together} == {0, 1}
    for answers in zip(together, apart, strict=True):
        for one, other in zip(*(answer["completion_probabilities"] for answer in answers), strict=False):
            assert abs(one["logprob"] - other["logprob"]) < 0.1
            if one["id"] != other["id"]:  # two that are about as likely; what follows is another text
                break


def test_a_device_without_our_kernels_is_refused(device, plain: Path):
    """A sentence, where llama.cpp would abort; not for a stock type, nor for a model that keeps no keys."""
    old = device | {"SIMT_METAL_OLD": "1"}
    for lacking in (old, device | {"SIMT_METAL_NO_COMPILER": "1"}):
        with pytest.raises(RefusedError, match="K cache cannot be turbo4 on MTL0, .*, which has no kernels for it"):
            device_sequences.on_device(lacking, plain, TURBO4, 99, device_sequences.save, (), {})
    (_, found), _ = device_sequences.on_device(old, plain, CacheTypes.parse("f16"), 99, device_sequences.save, (), {})
    assert np.isfinite(found[0]).all()
    embedder = tiny_architectures.write(plain.with_name("embedder.gguf"), "bert")
    _, log = device_sequences.on_device(old, embedder, TURBO4, 99, device_sequences.nothing, (), {})
    assert "this model keeps no keys and values: cache types turbo4 and turbo4 have nothing to do" in log
