"""Compiles kernels for GPUs: for the emulator in tests/simt, with nvcc, and with clang for AMD's. No GPU is needed."""

import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

import turboquant_gguf

ROOT = Path(__file__).parent.parent
SIMT = ROOT / "tests" / "simt"
SOURCE = ROOT / "ggml_turbo"
STAND_INS = ROOT / "tests" / "gpu_headers"  # headers that llama.cpp's name and that no package here has
INSTALLED = Path(turboquant_gguf.__file__).parent

NVIDIA = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
# Of an architecture, what its device libraries say: the number of its instruction set, whether waves have 64 lanes.
AMD = {
    "gfx90a": (9010, "on"),
    "gfx942": (9402, "on"),
    "gfx1100": (11000, "off"),
    "gfx1201": (12001, "off"),
}

STRICT = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-ffp-contract=off"]
INCLUDES = [f"-I{path}" for path in (SIMT, SOURCE, SOURCE / "format", INSTALLED / "include")]
EMULATED = [
    *STRICT,
    *INCLUDES,
    f"-I{ROOT / 'tests'}",
    "-O1",
    "-gline-tables-only",
    "-ftrivial-auto-var-init=pattern",
    "-fstack-clash-protection",
]
# Traps say nothing of the place, but take vectors as a whole.
UNCHECKED = ["-fsanitize=alignment", "-fsanitize-trap=alignment"]
# Every memory access becomes a call, which tests/simt/accesses.cpp answers in place of the sanitizer's own library.
CHECKED = ["-fsanitize=thread", "-mllvm", "-tsan-instrument-read-before-write=1"]
# Code that only AMD's compiler takes, as far as the emulator can: waves run in step there.
AS_HIP = ["-DGGML_USE_HIP", "-D__builtin_amdgcn_fence(...)=((void) 0)", "-D__builtin_amdgcn_wave_barrier=__syncwarp"]

BITCODE = Path("/usr/lib/x86_64-linux-gnu/amdgcn/bitcode")
DEBIAN_PACKAGES = "clang-19, libamdhip64-dev, rocm-device-libs"
PYPI_PACKAGES = "nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cuda-crt, nvidia-cuda-runtime and nvidia-cuda-cccl, all ==13.0.*"


def clang() -> str:
    """A clang++ that compiles the emulator. Skips the test if there is none."""
    for name in ("clang++-19", "clang++"):
        if path := shutil.which(name):
            version = re.search(r"version (\d+)", run([path, "--version"]))
            if version and int(version[1]) >= 16:
                return path
    pytest.skip(f"needs clang 16 or later (Debian: {DEBIAN_PACKAGES})")


def nvcc() -> str:
    """NVIDIA's compiler: of PATH, or of PyPI's packages. Skips the test if there is none."""
    packaged = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin" / "nvcc"
    if path := shutil.which("nvcc") or (packaged.exists() and str(packaged)):
        return path
    pytest.skip(f"needs nvcc, of the CUDA toolkit or of PyPI ({PYPI_PACKAGES})")


def run(command: list) -> str:
    """What a compiler writes; the test fails with it if the compiler does."""
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def build_emulator(folder: Path) -> None:
    """Compiles tests/simt into a folder, for `emulate`."""
    for name in ("core", "accesses"):
        flags = ["-std=c++20", "-O2", "-g", "-Wall", "-Wextra", "-Werror"]
        run([clang(), *flags, "-c", SIMT / f"{name}.cpp", "-o", folder / f"{name}.o"])


def emulate(folder: Path, name: str, source: Path, *flags: str, checked: bool = False) -> Path:
    """The program of a source that launches kernels, linked with the emulator in `folder` and the installed ggml."""
    compiled = folder / f"{name}.o"
    run([clang(), *flags, *EMULATED, *(CHECKED if checked else UNCHECKED), "-c", source, "-o", compiled])
    objects = [compiled, folder / "core.o", *([folder / "accesses.o"] if checked else [])]
    libraries = [f"-L{INSTALLED / 'lib'}", f"-Wl,-rpath,{INSTALLED / 'lib'}", "-lggml-base"]
    run([clang(), *objects, *libraries, "-o", folder / name])
    return folder / name


@dataclass(frozen=True)
class Resources:
    """What a compiler says that a kernel takes of a multiprocessor."""

    kernel: str
    architecture: str
    registers: int
    spilled: int  # bytes, or registers of AMD's
    shared: int  # bytes
    scratch: int = 0  # bytes of memory that a lane of AMD's spills to, or has arrays in


def exact_flags(kind: str) -> list[str]:
    """The flags that CMakeLists.txt gives to the encoder. kind: CUDA or HIP."""
    return re.search(rf"set\(TURBO_EXACT_{kind} +(.*)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()


def _headers(grafted: Path) -> list[str]:
    inside = grafted / "ggml"
    return [f"-I{path}" for path in (inside / "src", inside / "include", SOURCE, SOURCE / "format", STAND_INS)]


# What llama.cpp gives to nvcc.
FAST = ["-std=c++17", "-O3", "-use_fast_math", "-extended-lambda"]


def compile_nvidia(
    grafted: Path, source: Path, output: Path, architectures: tuple = NVIDIA, *flags: str
) -> list[Resources]:
    """Compile as llama.cpp does, with our flags at the end; returns what each kernel takes."""
    wanted = [f"-gencode=arch=compute_{sm[3:]},code={sm}" for sm in architectures]
    warn = [word for flag in ("-Wall", "-Wextra", "-Wno-unused-function") for word in ("-Xcompiler", flag)]
    text = run(
        [
            nvcc(),
            *FAST,
            *warn,
            "--threads",
            os.cpu_count(),
            *wanted,
            "-Xptxas",
            "-v",
            *_headers(grafted),
            *flags,
            "-c",
            source,
            "-o",
            output,
        ]
    )
    assert not (warnings := re.findall(rf"^{SOURCE}.*warning.*$", text, re.MULTILINE)), warnings
    kernels = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
        text,
        re.DOTALL,
    )
    return [
        Resources(name, sm, int(used), int(out) + int(back), int(shared or 0))
        for name, sm, out, back, used, shared in kernels
    ]


def ptx(grafted: Path, source: Path, output: Path, *flags: str) -> str:
    """NVIDIA's intermediate code, in which every operation has its rounding in its name."""
    run([nvcc(), *FAST, "-arch=sm_75", *_headers(grafted), *flags, "-ptx", source, "-o", output])
    return output.read_text()


def cubin(grafted: Path, source: Path, output: Path, architecture: str, *flags: str) -> None:
    """Compile for one architecture, to what nvdisasm reads."""
    run([nvcc(), *FAST, f"-arch={architecture}", *_headers(grafted), *flags, "-cubin", source, "-o", output])


MISSING = """#include <stdio.h>
#include <stdlib.h>
static void missing(const char * name) { fprintf(stderr, "simt: llama.cpp calls %s\\n", name); abort(); }
"""


def emulated_device(grafted: Path, folder: Path, kernels: str) -> Path:
    """llama.cpp's CUDA back end as a library to load, with kernels in the emulator, of objects that nvcc makes.

    kernels: of attention, as TURBO_ATTENTION_KERNELS has them: all take minutes. The device takes only what is ours
    (tests/simt/cuda_backend.cpp).
    """
    units = folder / "units.cu"
    includes = "".join(f'#include "cuda/{unit.name}"\n' for unit in sorted((SOURCE / "cuda").glob("*.cu")))
    units.write_text(f"#define TURBO_ATTENTION_KERNELS(X) {kernels}\n{includes}")
    few = f"-DTURBO_ATTENTION_KERNELS(X)={kernels}"
    host = [
        *FAST,
        "-arch=sm_75",
        "-Xcompiler",
        "-fPIC",
        "-DGGML_BACKEND_SHARED",
        "-DGGML_BACKEND_BUILD",
        "-DGGML_CUDA_NO_VMM",
        *_headers(grafted),
    ]
    emulator = [*STRICT, "-O2", "-g", "-fPIC"]
    commands = [
        [nvcc(), *host, "-c", grafted / "ggml" / "src" / "ggml-cuda" / "ggml-cuda.cu", "-o", folder / "ggml-cuda.o"],
        [nvcc(), *host, *exact_flags("CUDA"), "-c", units, "-o", folder / "units.o"],
        [clang(), *emulator, "-c", SIMT / "core.cpp", "-o", folder / "core.o"],
        *(
            [nvcc(), "-std=c++17", "-O2", "-Xcompiler", "-fPIC", *_headers(grafted), "-c", SIMT / f"{name}.cpp"]
            + ["-o", folder / f"{name}.o"]
            for name in ("cuda_runtime", "cuda_products")
        ),
        [
            clang(),
            *emulator,
            few,
            *INCLUDES,
            "-c",
            SIMT / "cuda_device.cpp",
            "-o",
            folder / "cuda_device.o",
        ],
        [
            clang(),
            *emulator,
            "-DGGML_BACKEND_SHARED",
            "-DGGML_BACKEND_BUILD",
            *_headers(grafted),
            "-c",
            SIMT / "cuda_backend.cpp",
            "-o",
            folder / "cuda_backend.o",
        ],
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))
    objects = [
        folder / f"{name}.o"
        for name in ("ggml-cuda", "units", "core", "cuda_runtime", "cuda_products", "cuda_device", "cuda_backend")
    ]
    library = folder / "libggml-cuda-emulated.so"
    link = [
        clang(),
        "-shared",
        "-o",
        library,
        *objects,
        f"-L{INSTALLED / 'lib'}",
        f"-Wl,-rpath,{INSTALLED / 'lib'}",
        "-lggml-base",
    ]
    run(link)
    # The operators of llama.cpp: the device never takes them, but a library is loaded with all it names.
    wanted = re.findall(r"^ +U (\w+)$", run(["nm", "-D", "--undefined-only", library]), re.MULTILINE)
    present = set(
        re.findall(
            r" \w (\w+)$", run(["nm", "-D", "--defined-only", INSTALLED / "lib" / "libggml-base.so"]), re.MULTILINE
        )
    )
    missing = folder / "missing.c"
    missing.write_text(
        MISSING
        + "".join(
            f'void missing{i}(void) __asm__("{name}");\nvoid missing{i}(void) {{ missing("{name}"); }}\n'
            for i, name in enumerate(name for name in wanted if name not in present)
        )
    )
    run([clang(), "-x", "c", "-fPIC", "-c", missing, "-o", folder / "missing.o"])
    run([*link, folder / "missing.o"])
    return library


def compile_amd(grafted: Path, source: Path, output: Path, architecture: str, *flags: str) -> list[Resources]:
    """Compile to AMD's assembly, with Debian's HIP; returns what each kernel takes. Skips the test without it."""
    if not BITCODE.is_dir() or not Path("/usr/include/hip/hip_runtime.h").is_file():
        pytest.skip(f"needs HIP's headers and device libraries (Debian: {DEBIAN_PACKAGES})")
    compiler = clang()
    # Debian's libraries know older devices only: this line is all that a library of the device would say.
    number, wave = AMD[architecture]
    version = output.with_suffix(".ll")
    version.write_text(f"@__oclc_ISA_version = linkonce_odr protected addrspace(4) constant i32 {number}, align 4\n")
    bitcode = output.with_suffix(".bc")
    run([compiler, "-target", "amdgcn-amd-amdhsa", "-nogpulib", "-x", "ir", "-c", "-emit-llvm", version, "-o", bitcode])
    libraries = [
        bitcode,
        *(
            BITCODE / f"{name}.bc"
            for name in (
                "ocml",
                "ockl",
                "oclc_daz_opt_off",
                "oclc_unsafe_math_off",
                "oclc_finite_only_off",
                "oclc_correctly_rounded_sqrt_on",
                f"oclc_wavefrontsize64_{wave}",
            )
        ),
    ]
    linked = [word for library in libraries for word in ("-Xclang", "-mlink-builtin-bitcode", "-Xclang", library)]
    text = run(
        [
            compiler,
            "-Wall",
            "-Wextra",
            "-Wno-unused-function",
            "-x",
            "hip",
            f"--offload-arch={architecture}",
            "--offload-device-only",
            "-nogpulib",
            "-nogpuinc",
            "-include",
            "__clang_hip_runtime_wrapper.h",
            "-DGGML_USE_HIP",
            "-D__HIP_PLATFORM_AMD__",
            "-std=c++17",
            "-O3",
            *linked,
            *_headers(grafted),
            *flags,
            "-Rpass-analysis=kernel-resource-usage",
            "-S",
            source,
            "-o",
            output,
        ]
    )
    assert not (warnings := re.findall(rf"^{SOURCE}.*warning:.*$", text, re.MULTILINE)), warnings
    kernels = re.findall(
        r"Function Name: (\w+).*? VGPRs: (\d+).*?ScratchSize \[bytes/lane\]: (\d+)"
        r".*?SGPRs Spill: (\d+).*?VGPRs Spill: (\d+)"
        r".*?LDS Size \[bytes/block\]: (\d+)",
        text,
        re.DOTALL,
    )
    return [
        Resources(name, architecture, int(used), int(scalar) + int(vector), int(shared), int(scratch))
        for name, used, scratch, scalar, vector, shared in kernels
    ]
