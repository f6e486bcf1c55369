"""llama.cpp's Metal back end as a library for Linux, its kernels and ours in the emulator (tests/simt/metal)."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gpu_compilers
from gpu_compilers import INSTALLED, ROOT, SIMT, SOURCE

METAL = SOURCE / "metal"
sys.path.insert(0, str(METAL))

import flatten

HOST = (
    "ggml-metal",
    "ggml-metal-common",
    "ggml-metal-device",
    "ggml-metal-fusion",
    "ggml-metal-ops",
    "ggml-metal-tuning",
)
"""The files of the back end that are C++; the others, in Objective-C, are tests/simt/metal/metal_device.cpp here."""

_IN_GRID = {  # an element, by its axis
    "threadgroup_position_in_grid": "simt::current.block_index.{0}",
    "thread_position_in_threadgroup": "simt::current.thread_index.{0}",
    "threads_per_threadgroup": "simt::current.block_dim.{0}",
    "threadgroups_per_grid": "simt::current.grid_dim.{0}",
    "thread_position_in_grid": "simt::current.block_index.{0}*simt::current.block_dim.{0}"
    " + simt::current.thread_index.{0}",
}
_NUMBERS = {
    "thread_index_in_threadgroup": "simt::thread_number()",
    "thread_index_in_simdgroup": "simt::thread_number() % simt::group_size",
    "simdgroup_index_in_threadgroup": "simt::thread_number()/simt::group_size",
    "simdgroups_per_threadgroup": "(simt::current.block_dim.x*simt::current.block_dim.y*simt::current.block_dim.z"
    " + simt::group_size - 1)/simt::group_size",
    "threads_per_simdgroup": "simt::group_size",
}
_CONSTANT = re.compile(r"^constant\s+(\w+)\s+(\w+)\s*\[\[function_constant\(([^\]]*)\)\]\];", re.MULTILINE)
_INSTANCE = re.compile(
    r'^[ \t]*template\s*\[\[host_name\("([^"]+)"\s*\)\]\]\s*(?:kernel\s+)?(\w+)\s+(\w+)\s*(<[^;]*>)?\s*;', re.MULTILINE
)
_KERNEL = re.compile(r'^(?:\[\[host_name\("([^"]+)"\s*\)\]\]\s*)?kernel\s+void\s+(\w+)\s*\(', re.MULTILINE)
_VARIABLE = re.compile(r"^(\s+)threadgroup\s+(\w+(?:<[^;*]*>)?\s+\w+\s*(?:\[[^\]]*\])*)\s*;", re.MULTILINE)
_ATTRIBUTE = re.compile(r"\[\[\s*(\w+)\s*(?:\(\s*(\w+)\s*\))?\s*\]\]")


def _enclosed(text: str, begin: int) -> str:
    """What is inside the parentheses that open at `begin`."""
    depth = 0
    for at in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return text[begin + 1 : at]
    raise ValueError(f"no end of {text[begin : begin + 80]!r}")


def _parameters(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in re.sub(r"//.*", "", text):
        depth += {"(": 1, "<": 1, "[": 1, ")": -1, ">": -1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _arguments(parameters: str) -> str:
    """The arguments of a call, from the attributes of a kernel's parameters."""
    arguments, next_buffer = [], 0
    for parameter in _parameters(parameters):
        name, index = attribute.groups() if (attribute := _ATTRIBUTE.search(parameter)) else (None, None)
        if name == "threadgroup":
            arguments.append("simt_metal::argument{simt_metal::threadgroup_memory()}")
        elif name in _IN_GRID:
            kind, size = re.search(r"(u?short|u?int)([23]?)\s+\w+\s*\[\[", parameter).groups()
            elements = [_IN_GRID[name].format(axis) for axis in "xyz"[: int(size or 1)]]
            arguments.append(f"{kind}{size}({', '.join(elements)})")
        elif name in _NUMBERS:
            arguments.append(f"({re.search(r'(u?short|u?int)', parameter)[1]}) ({_NUMBERS[name]})")
        else:
            next_buffer = int(index) if name == "buffer" else next_buffer
            arguments.append(f"simt_metal::argument{{d.buffer[{next_buffer}]}}")
            next_buffer += 1
    return ", ".join(arguments)


def _is_template(before: str) -> bool:
    """Whether what stands before a kernel makes a template of it."""
    return re.sub(r"//.*", "", before[-2000:]).rstrip().endswith(">")


def as_cpp(texts: dict[str, str], keep: str = "") -> dict[str, str]:
    """C++ of Metal's kernel files, by their names.

    Function constants become variables, kernels and their instances register themselves, and a kernel's threadgroup
    variables become static: one threadgroup runs at a time. keep: a pattern of the instances that are wanted.
    """
    calls = {m[2]: _arguments(_enclosed(text, m.end() - 1)) for text in texts.values() for m in _KERNEL.finditer(text)}

    numbers = itertools.count()

    def register(name: str, function: str, kernel: str) -> str:
        call = f"[](const simt_metal::dispatch & d) {{ (void) d; {function}({calls[kernel]}); }}"
        return f'static simt_metal::kernel_info kernel_{next(numbers)}(simt_library, "{name}", {call});'

    def convert(text: str) -> str:
        tail = [
            register(m[1] or m[2], m[2], m[2]) for m in _KERNEL.finditer(text) if not _is_template(text[: m.start()])
        ]
        text = _CONSTANT.sub(
            lambda m: (
                f"static {m[1]} {m[2]}; static simt_metal::constant_info constant_{m[2]}"
                f"(simt_library, {m[3]}, &{m[2]}, sizeof({m[2]}));"
            ),
            text,
        )
        text = _INSTANCE.sub(lambda m: register(m[1], m[3] + (m[4] or ""), m[3]) if re.search(keep, m[1]) else "", text)
        text = re.sub(r'\[\[(host_name\("[^"]+"\s*\)|threadgroup\(\d+\))\]\]', "", text)
        text = _VARIABLE.sub(r"\1static thread_local threadgroup \2;", text)
        return text + "\n".join(tail) + "\n"

    return {name: convert(text) for name, text in texts.items()}


@dataclass(frozen=True)
class Kernels:
    """What a library is made of, beside llama.cpp's own code on the host: our kernels, and some of llama.cpp's."""

    stock: tuple[str, ...] = ()  # files
    instances: str = ""  # of templates in them: a pattern of names
    ours: str = ""  # the same of ours
    checked: bool = False  # every memory access of our kernels is
    fast: bool = False  # ours are compiled with fast math, as Metal does it
    changed: tuple[str, str, str] | None = None  # a file of either, a text in it, and what stands there instead


def threadgroup_variables(text: str) -> list[str]:
    """What kernels declare in threadgroup memory themselves."""
    return [variable for _, variable in _VARIABLE.findall(text)]


def supports_op(device: Path) -> str:
    """The functions of ggml-metal-device.m that say what the device takes; they are C."""
    text = device.read_text()
    begin = text.index("static bool ggml_metal_supports_mul_mat_op(")
    end = text.index("\n}\n", text.index("bool ggml_metal_device_supports_op(")) + 3
    return text[begin:end]


def _write_sources(upstream: Path, folder: Path, kernels: Kernels) -> list[str]:
    """Writes what is compiled beside files as they are: ours to folder/metal, C++ of kernels to folder/generated."""
    ours, generated = folder / "metal", folder / "generated"
    shutil.copytree(METAL, ours)
    generated.mkdir()
    texts = {path.name: path.read_text() for path in (upstream / "kernels").iterdir()} if kernels.stock else {}
    if kernels.changed:
        name, right, wrong = kernels.changed
        text = texts[name] if name in texts else (ours / name).read_text()
        assert text.count(right) == 1, kernels.changed
        if name in texts:
            texts[name] = text.replace(right, wrong)
        else:
            (ours / name).write_text(text.replace(right, wrong))
    units = {name: f"{name}.metal" for name in (*kernels.stock, "turbo")}
    own = {"turbo.metal": flatten.source(ours)}
    for name, text in (as_cpp(texts, kernels.instances) | as_cpp(own, kernels.ours)).items():
        (generated / name).write_text(text)
    for name, source in units.items():
        library = f'static simt_metal::library simt_library("{name}");'
        (generated / f"{name}.cpp").write_text(f'#include <metal_stdlib>\n{library}\n#include "{source}"\n')
    return list(units)


def build(grafted: Path, folder: Path, kernels: Kernels, beside: Path | None = None) -> Path:
    """The library, for GGML_BACKEND_PATH. beside: the folder of another, whose objects of the same files are taken."""
    upstream = grafted / "ggml" / "src" / "ggml-metal"
    folder.mkdir(exist_ok=True)
    units = _write_sources(upstream, folder, kernels)
    generated, ours = folder / "generated", folder / "metal"
    (generated / "supports-op.inc").write_text(supports_op(upstream / "ggml-metal-device.m"))
    (generated / "turbo-source.inc").write_text('""\n')  # of kernels that are compiled here

    backend = ["-DGGML_BACKEND_DL", "-DGGML_BACKEND_SHARED", "-DGGML_BACKEND_BUILD", "-DGGML_SHARED"]
    folders = (
        folder,
        SIMT / "metal",
        generated,
        SOURCE,
        SOURCE / "format",
        upstream,
        upstream.parent,
        grafted / "ggml" / "include",
    )
    includes = [f"-I{path}" for path in (*folders, ROOT / "tests" / "simt")]
    emulator = ["-std=c++20", "-O2", "-gline-tables-only", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    host = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-w",
        "-include",
        "memory",
        *backend,
        '-DGGML_VERSION="x"',
        '-DGGML_COMMIT="x"',
    ]
    metal = [
        "-std=c++17", "-O1", "-gline-tables-only", "-fPIC", "-D__METAL_VERSION__=310", "-ffp-contract=off",
        "-march=native", "-fsigned-char", "-Xclang", "-ffloat16-excess-precision=none",
        "-include", "stdint.h", "-include", "stddef.h",
        # Loops are unrolled for a GPU's sake; here that takes time only.
        "-mllvm", "-pragma-unroll-threshold=0", "-mllvm", "-unroll-threshold=0",
    ]  # fmt: skip
    strict = [
        "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-Wno-unknown-pragmas", "-Wno-duplicate-decl-specifier",
        "-Wno-unknown-attributes", "-Wno-pass-failed", "-Wno-user-defined-literals", "-ftrivial-auto-var-init=pattern",
        "-fstack-clash-protection", *(["-ffast-math", "-Wno-nan-infinity-disabled"] if kernels.fast else []),
        *(gpu_compilers.CHECKED if kernels.checked else gpu_compilers.UNCHECKED),
    ]  # fmt: skip
    sources = {
        **{generated / f"{name}.cpp": [*metal, *(strict if name == "turbo" else ["-w"])] for name in units},
        **{SIMT / f"{name}.cpp": emulator for name in ("core", *(["accesses"] if kernels.checked else []))},
        SIMT / "metal" / "metal_device.cpp": [*host, "-std=c++20"],
        **{path: [*host, "-Wall", "-Wextra", "-Werror"] for path in sorted(ours.glob("*.cpp"))},
        **{upstream / f"{name}.cpp": host for name in HOST},
    }
    objects = {source: folder / f"{source.stem}.o" for source in sources}

    def compile_one(source: Path) -> None:
        if beside and folder not in source.parents and (beside / objects[source].name).is_file():
            objects[source].symlink_to(beside / objects[source].name)
        else:
            command = [gpu_compilers.clang(), *sources[source], *includes, "-c", source, "-o", objects[source]]
            gpu_compilers.run(command)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources))
    library = folder / "libggml-metal-emulated.so"
    libraries = [f"-L{INSTALLED / 'lib'}", f"-Wl,-rpath,{INSTALLED / 'lib'}", "-lggml-base"]
    linked = ["-shared", "-Wl,--no-undefined", "-o", library, *objects.values(), *libraries]
    gpu_compilers.run([gpu_compilers.clang(), *linked])
    return library


def mistakes(folder: Path, kernels: Kernels) -> str:
    """What clang says of our kernels as Metal's C++14 with address spaces in types; nothing if all is right."""
    _write_sources(Path(), folder, kernels)
    system = [word for path in (SIMT / "metal", ROOT / "tests" / "simt") for word in ("-isystem", path)]
    flags = ["-std=c++17", "-w", "-Werror=pre-c++17-compat", "-DSIMT_ADDRESS_SPACES", "-D__METAL_VERSION__=310"]
    source = folder / "generated" / "turbo.cpp"
    words = [gpu_compilers.clang(), "-fsyntax-only", *flags, *system, f"-I{folder / 'generated'}", source]
    return subprocess.run(words, capture_output=True, text=True, check=False).stderr
