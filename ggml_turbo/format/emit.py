#!/usr/bin/env python3
"""Tables of the turbo types for C, CUDA, Metal, GLSL and Python, made from codebooks.toml.

    python3 emit.py            # write them
    python3 emit.py --check    # only compare; exit 1 and name those that differ

C (also C++)               tables/turbo-types.h, the list of types, and tables/turbo-tables.h
CUDA, HIP                  tables/turbo-tables.cuh
Metal                      tables/turbo-tables.metal
GLSL                       tables/turbo-tables.glsl
Python                     turbo_tables.py of the package
"""

import argparse
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = HERE / "codebooks.toml"
PYTHON = HERE.parents[1] / "python" / "turboquant_gguf" / "turbo_tables.py"
NOTE = "Emitted by ggml_turbo/format/emit.py from codebooks.toml; do not edit."


@dataclass(frozen=True)
class Type:
    """A section of codebooks.toml."""

    name: str
    type: int
    bits: int
    rms_to_scale: float
    max_to_scale: float
    mse: float
    a: list[int]
    b: list[int]
    p: list[int]

    @property
    def codebook(self) -> list[int]:
        """256 entries by state."""
        return [self.a[s & 15] + self.b[s >> 4 ^ self.p[s & 15]] for s in range(256)]

    @property
    def by_low(self) -> list[int]:
        """The codebook with the entry of state u << k | t at t << (8-k) | u."""
        codes = 1 << self.bits
        return [self.codebook[u * codes + t] for t in range(codes) for u in range(256 // codes)]


def load(path: Path = DATA) -> list[Type]:
    """The types of a codebooks.toml, by bits. Raises ValueError where one is not what the format allows."""
    types = [Type(name, **section) for name, section in tomllib.loads(path.read_text()).items()]
    for kind in types:
        if kind.name != f"turbo{kind.bits}":
            raise ValueError(f"{path}: {kind.name} has {kind.bits} bits")
        if [len(table) for table in (kind.a, kind.b, kind.p)] != [16] * 3 or not set(kind.p) <= set(range(16)):
            raise ValueError(f"{path}: {kind.name}: a, b and p have 16 entries, those of p from 0 to 15")
        if max(map(abs, kind.codebook)) > 127:
            raise ValueError(f"{path}: {kind.name}: an entry of the codebook is not within -127 .. 127")
    if [kind.bits for kind in types] != list(range(types[0].bits, types[0].bits + len(types))):
        raise ValueError(f"{path}: the types must be in the order of their bits, without a gap")
    return types


def _array(values: list, indent: str = "", brackets: str = "{}") -> str:
    lines = [", ".join(f"{v:>4}" for v in values[i : i + 16]) for i in range(0, len(values), 16)]
    return f"{brackets[0]}\n{indent}    " + f",\n{indent}    ".join(lines) + f"\n{indent}{brackets[1]}"


def _type_list(types: list[Type]) -> str:
    rows = " ".join(f"X({kind.bits}, {kind.type})" for kind in types)
    return (
        f"#pragma once\n\n// {NOTE}\n\n"
        "// X(k, number in ggml) of every turbo type. A list of types anywhere in C and C++ is made of this one.\n"
        f"#define TURBO_TYPES(X) {rows}\n\n"
        f"#define TURBO_FEWEST_BITS {types[0].bits}\n"
        f"#define TURBO_MOST_BITS   {types[-1].bits}\n\n"
        "// For ggml.h and the lists of types in llama.cpp.\n"
        f"#define TURBO_TYPE_COUNT {max(kind.type for kind in types) + 1}\n"
        "#define TURBO_ENUMERATOR(K, ID) GGML_TYPE_TURBO##K = ID,\n"
        "#define TURBO_TYPE(K, ID)       GGML_TYPE_TURBO##K,\n"
        "#define TURBO_CASE(K, ID)       case GGML_TYPE_TURBO##K:\n"
    )


def _c(types: list[Type]) -> str:
    entries = ""
    for kind in types:
        fields = "".join(
            f"        .{name:<12} = {_array(getattr(kind, name), '        ')},\n"
            for name in ("a", "b", "p", "codebook", "by_low")
        )
        entries += (
            "    {\n"
            f"        .bits         = {kind.bits},\n"
            f"        .rms_to_scale = {kind.rms_to_scale}f,\n"
            f"        .max_to_scale = {kind.max_to_scale}f,\n"
            f"        .mse          = {kind.mse}f,\n"
            f"{fields}    }},\n"
        )
    return (
        f'#pragma once\n\n// {NOTE}\n\n#include "../ggml-turbo.h"\n\n'
        f"static const turbo_codec turbo_codecs[{len(types)}] = {{\n{entries}}};\n"
    )


def _cuda(types: list[Type]) -> str:
    text = (
        f"#pragma once\n\n// {NOTE}\n//\n"
        "// a, b and p in words, four int8 entries each, the first lowest: constants of the code, for byte permutations.\n"
        "// The codebook is in global memory: copy what a kernel needs to shared memory.\n\n"
        "template<int K> struct turbo_tables;\n"
    )
    for kind in types:
        words = "".join(
            f"    static constexpr uint32_t {name}[4] = {{ {', '.join(_words(getattr(kind, name)))} }};\n"
            for name in "abp"
        )
        text += (
            f"\nstatic const __device__ int8_t {kind.name}_codebook[256] = {_array(kind.codebook)};\n"
            f"template<> struct turbo_tables<{kind.bits}> {{\n"
            f"    static constexpr float rms_to_scale = {kind.rms_to_scale}f, max_to_scale = {kind.max_to_scale}f;\n"
            f"{words}"
            f"    static __device__ const int8_t * codebook() {{ return {kind.name}_codebook; }}\n"
            "};\n"
        )
    return text


def _metal(types: list[Type]) -> str:
    text = (
        f"// {NOTE}\n//\n"
        "// Copy what a kernel needs to threadgroup memory or registers: reading constant memory by state serializes.\n"
    )
    for kind in types:
        text += (
            f"\nstatic const constant float {kind.name}_rms_to_scale = {kind.rms_to_scale}f;\n"
            f"static const constant float {kind.name}_max_to_scale = {kind.max_to_scale}f;\n"
        )
        for name in ("a", "b", "p", "codebook"):
            values = getattr(kind, name)
            text += f"static const constant char {kind.name}_{name}[{len(values)}] = {_array(values)};\n"
    return text


def _words(values: list[int]) -> list[str]:
    """Four entries a word of 32 bits, the first lowest."""
    raw = bytes(v & 255 for v in values)
    return [f"0x{int.from_bytes(raw[i : i + 4], 'little'):08x}u" for i in range(0, len(raw), 4)]


def _glsl(types: list[Type]) -> str:
    text = (
        f"// {NOTE}\n//\n"
        "// Four int8 entries a word, the first lowest: bitfieldExtract(int(t[i >> 2]), 8*(i & 3), 8) is entry i.\n"
        "// Copy what a shader needs to shared memory: some drivers keep constant arrays in private memory.\n"
    )
    for kind in types:
        text += (
            f"\nconst uint {kind.name}_type = {kind.type}; // the number in ggml\n"
            f"const float {kind.name}_rms_to_scale = {kind.rms_to_scale};\n"
            f"const float {kind.name}_max_to_scale = {kind.max_to_scale};\n"
        )
        for name in ("a", "b", "p", "codebook"):
            words = _words(getattr(kind, name))
            lines = [", ".join(words[i : i + 8]) for i in range(0, len(words), 8)]
            text += f"const uint {kind.name}_{name}[{len(words)}] = uint[](\n    " + ",\n    ".join(lines) + "\n);\n"
    return text


def _python(types: list[Type]) -> str:
    rows = ""
    for kind in types:
        tables = "".join(f"        {name}=({', '.join(map(str, getattr(kind, name)))}),\n" for name in ("a", "b", "p"))
        rows += (
            f'    TurboTable(\n        name="{kind.name}",\n        ggml_type={kind.type},\n        bits={kind.bits},\n'
            f"        rms_to_scale={kind.rms_to_scale},\n        max_to_scale={kind.max_to_scale},\n"
            f"        mse={kind.mse},\n{tables}    ),\n"
        )
    return f'''"""The turbo types and their tables. {NOTE}"""

from typing import NamedTuple


class TurboTable(NamedTuple):
    """One type: ggml's number, bits of a code, the encoder's scale factors, mean squared error, three tables of 16.

    codebook[s] = a[s & 15] + b[(s >> 4) ^ p[s & 15]]
    """

    name: str
    ggml_type: int
    bits: int
    rms_to_scale: float
    max_to_scale: float
    mse: float
    a: tuple[int, ...]
    b: tuple[int, ...]
    p: tuple[int, ...]


TABLES = (
{rows})
"""From the smallest type to the most exact."""

NAMES = tuple(table.name for table in TABLES)
"""Names of the turbo types: a type is one of ours if its name is here."""
'''


def emitted(types: list[Type]) -> dict[Path, str]:
    """The text of every table file."""
    tables = HERE / "tables"
    return {
        tables / "turbo-types.h": _type_list(types),
        tables / "turbo-tables.h": _c(types),
        tables / "turbo-tables.cuh": _cuda(types),
        tables / "turbo-tables.metal": _metal(types),
        tables / "turbo-tables.glsl": _glsl(types),
        PYTHON: _python(types),
    }


def outdated() -> list[Path]:
    """Table files that are not what codebooks.toml gives."""
    return [path for path, text in emitted(load()).items() if not path.exists() or path.read_text() != text]


def write() -> None:
    """Writes the table files that are outdated, and leaves the others as they are."""
    texts = emitted(load())
    for path in outdated():
        path.write_text(texts[path])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not what it should be")
    options = parser.parse_args()
    if options.check:
        sys.exit("\n".join(f"{path} is not what emit.py makes of {DATA}" for path in outdated()) or None)
    write()


if __name__ == "__main__":
    main()
