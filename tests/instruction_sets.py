"""Compiles C and C++ for each instruction set that there is SIMD code for, and runs the result, emulated if need be."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "ggml_turbo"
EMULATED = Path(__file__).parent / "emulated"
X86 = ["-msse4.1", "-mavx2", "-mfma", "-mf16c"]
AVX512 = [*X86, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vbmi"))]
SIMDE = Path("/usr/include/simde/x86/avx512.h")  # emulates AVX-512 and AVX-VNNI

# name -> machine, flags, what turbo_cpu_simd says
BUILDS = {
    "scalar": ("x86_64", [], "scalar"),
    "scalar-f16c": ("x86_64", ["-mavx", "-mf16c"], "scalar"),
    "avx2": ("x86_64", X86, "avx2"),
    "avx2-vnni": ("x86_64", [*X86, "-mavxvnni"], "avx2"),
    "avx512": ("x86_64", AVX512, "avx512"),
    "avx512-vnni": ("x86_64", [*AVX512, "-mavx512vnni"], "avx512"),
    "neon": ("aarch64", [], "neon"),
    "neon-dotprod": ("aarch64", ["-march=armv8.2-a+dotprod"], "neon"),
}
DEBIAN_PACKAGES = "gcc-aarch64-linux-gnu, g++-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user, libsimde-dev"


def cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    return set(info.read_text().split()) if info.exists() else set()


def _for_this_processor(flags: list[str]) -> list[str]:
    """The flags, or others that emulate what the processor has not. Skips the test if neither will do."""
    names = {flag: flag.removeprefix("-m").replace(".", "_") for flag in flags}
    names |= {"-mavx512vnni": "avx512_vnni", "-mavxvnni": "avx_vnni"}
    absent = [flag for flag in flags if names[flag] not in cpu_flags()]
    if not absent:
        return flags
    emulated = [flag for flag in flags if flag.startswith(("-mavx512", "-mavxvnni"))]
    if not SIMDE.exists() or not set(absent) <= set(emulated):
        missing = ", ".join(names[flag] for flag in absent)
        pytest.skip(f"this processor has no {missing} (to emulate it: {DEBIAN_PACKAGES})")
    macros = [f"-D__{flag.removeprefix('-m').upper()}__" for flag in emulated]
    # included first of all: ggml includes it where it must be C
    header = [f"-I{EMULATED}", "-include", str(EMULATED / "immintrin.h"), "-w", "-Wno-psabi"]
    return [flag for flag in flags if flag not in emulated] + macros + header


def compile(build: str, output: Path, sources: list[Path], *flags: str) -> list[str]:
    """Compile for `build`, as C++ if one of the sources is, and return the command that runs it.

    Skips the test where that cannot be done.
    """
    machine, machine_flags, _ = BUILDS[build]
    cxx = any(source.suffix == ".cpp" for source in sources)
    compilers, runner = ["cc", "c++"], []
    here = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    if machine == "aarch64" and here != machine:
        compilers, runner = ["aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++"], ["qemu-aarch64"]
        machine_flags = [*machine_flags, "-static"]
    elif machine != here:
        pytest.skip(f"needs an {machine} machine")
    if missing := [tool for tool in (*compilers[: 1 + cxx], *runner) if not shutil.which(tool)]:
        pytest.skip(f"needs {' and '.join(missing)} (Debian: {DEBIAN_PACKAGES})")
    if machine == "x86_64":
        machine_flags = _for_this_processor(machine_flags)

    common = [
        "-O2",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",  # GCC 12 warns of its own AVX-512 headers
        f"-I{SOURCE}",
        f"-I{SOURCE}/format",
        *machine_flags,
        *flags,
    ]
    objects = []
    for source in sources:
        objects.append(output.with_name(f"{source.stem}.o"))
        language = [compilers[1], "-std=gnu++17"] if source.suffix == ".cpp" else [compilers[0], "-std=gnu11"]
        subprocess.run([*language, *common, "-c", source, "-o", objects[-1]], check=True)
    subprocess.run([compilers[cxx], *common, *objects, "-o", output, "-lm"], check=True)
    return [*runner, str(output)]
