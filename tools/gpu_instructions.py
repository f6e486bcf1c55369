#!/usr/bin/env python3
"""Instructions of the inner loops of our CUDA kernels, by kind, for each value or state that a lane works on.

    python3 tools/gpu_instructions.py                       # for one architecture of each generation
    python3 tools/gpu_instructions.py --architecture sm_90 --kernel attend
    python3 tools/gpu_instructions.py --json counts.json

It compiles ggml_turbo/cuda with nvcc as the build does, disassembles, and takes of each kernel the innermost loop with
the most work in it. Work is counted by an instruction that stands once for each unit of it: see UNITS. Code in the loop
that runs rarely is counted in full; of attention, only the usual way through it. It needs nvcc and nvdisasm, of the
CUDA toolkit or of PyPI (nvidia-cuda-nvdisasm); no GPU.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "ggml_turbo" / "graft")]

import graft
import source

import gpu_compilers

# What kernels of this name do again and again, the instruction that tells how often, and how many one stands for. A
# product of m16n8k16 takes 16 x 8 values, which 32 lanes have decoded.
UNITS = {
    "turbo_encode": ("state", "FFMA", 1.0),
    "turbo_decode": ("value", "STG", 1.0),
    "turbo_attend": ("value", "HMMA", 4.0),
}
# Instructions by the part of a multiprocessor that executes them.
KINDS = {
    "integer and logic": "LOP3 SHF PRMT IADD3 IADD LEA SEL ISETP FSETP IMNMX VIMNMX VIMNMX3 SGXT BMSK IABS FMNMX "
    "FMNMX3 FSEL VIADD VIADDMNMX MOV PLOP3 P2R R2P FCHK VABSDIFF VABSDIFF4",
    "multiply and add": "FFMA FADD FMUL IMAD HFMA2 HADD2 HMUL2 IDP FFMA2 FADD2 FMUL2 HSET2 HSETP2 HMNMX2",
    "shared memory": "LDS STS LDSM SHFL ATOMS REDUX",
    "tensor cores": "HMMA IMMA",
    "global memory": "LDG STG LD ST LDGSTS LDGDEPBAR DEPBAR RED ATOM ATOMG CCTL",
    "constants": "LDC ULDC LDCU",
    "spills": "LDL STL",
    "conversions": "MUFU I2F F2I I2FP F2F I2I POPC FLO BREV F2FP F2IP I2IP FRND",
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}


@dataclass(frozen=True)
class Loop:
    """The inner loop of a kernel."""

    kernel: str
    architecture: str
    unit: str
    units: float  # in one turn, for a lane
    instructions: int  # of one turn
    per_unit: dict[str, float]  # by kind

    @property
    def total(self) -> float:
        return self.instructions / self.units


def nvdisasm() -> str:
    """The path of NVIDIA's disassembler."""
    packaged = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin" / "nvdisasm"
    if path := shutil.which("nvdisasm") or (packaged.exists() and str(packaged)):
        return path
    sys.exit("nvdisasm is missing: install the CUDA toolkit, or pip install nvidia-cuda-nvdisasm")


def kind(instruction: str) -> str:
    """The kind of an instruction such as LOP3.LUT."""
    name = instruction.split(".")[0]
    return KIND_OF.get(name, "uniform" if name.startswith("U") or name in ("R2UR", "S2UR") else "control")


def functions(disassembly: str) -> dict[str, list[str]]:
    """The lines of each function: instructions, and labels that end with a colon."""
    found: dict[str, list[str]] = {}
    for section in re.split(r"\n//-+ \.text\.", disassembly)[1:]:
        lines = found.setdefault(section.split()[0], [])
        for line in section.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                lines.append(label[1] + ":")
            elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                lines.append(code[1])
    return found


def instruction(line: str) -> str:
    """LOP3.LUT of a line, without predicate and operands."""
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0]


def ways(lines: list[str]) -> tuple[dict[int, list[str]], dict[int, list[int]]]:
    """The blocks of a function: by number, their instructions, and the numbers of those that can follow."""
    codes = [line for line in lines if not line.endswith(":")]
    labels, at = {}, 0
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = at
        else:
            at += 1
    ends = ("BRA", "EXIT", "RET", "CALL")
    starts = {0, *labels.values(), *(i + 1 for i, code in enumerate(codes) if instruction(code).startswith(ends))}
    ordered = sorted(start for start in starts if start < len(codes))
    blocks = {a: codes[a:b] for a, b in zip(ordered, [*ordered[1:], len(codes)], strict=True)}
    following = {}
    for start, block in blocks.items():
        last, after = block[-1], start + len(block)
        name, target = instruction(last), re.search(r"`\((\.L_x_\d+)\)", last)
        if name.startswith("BRA") and not name.startswith(("BRA.DIV", "BRA.CONV")):  # these two: lanes go together
            is_conditional = last.startswith("@") or re.search(r"BRA\S*\s+!?U?P\d", last)
            following[start] = [labels[target[1]], *([after] if is_conditional else [])]
        elif name.startswith(("EXIT", "RET")) and not last.startswith("@"):
            following[start] = []
        else:
            following[start] = [after]
        following[start] = [block for block in following[start] if block in blocks]
    return blocks, following


def usual_way(lines: list[str]) -> list[str]:
    """Of the loop with the most products, the instructions on the way that does all products and copies, loads a mask
    before the copies are ended, and is short apart from that. Empty if there are no products in a loop.
    """
    blocks, following = ways(lines)
    before = {block: [other for other in blocks if block in following[other]] for block in blocks}
    seen, open_, order, back = set(), [(0, iter(following[0]))], [], []
    active = {0}
    seen.add(0)
    while open_:
        block, rest = open_[-1]
        for other in rest:
            if other in active:
                back.append((block, other))
            elif other not in seen:
                seen.add(other)
                active.add(other)
                open_.append((other, iter(following[other])))
                break
        else:
            active.discard(block)
            order.append(block)
            open_.pop()
    products = {block: sum(instruction(code).startswith("HMMA") for code in blocks[block]) for block in blocks}
    best: tuple[set[int], int] | None = None
    for end, head in back:
        body, todo = {head}, [end]
        while todo:
            if (block := todo.pop()) not in body:
                body.add(block)
                todo += before[block]
        if sum(products[block] for block in body) and (best is None or len(body) > len(best[0])):
            best = body, head
    if best is None:
        return []
    body, head = best
    committed = min(
        (block for block in body if any("LDGDEPBAR" in code for code in blocks[block])), default=max(blocks)
    )

    def worth(block: int) -> int:
        names = [instruction(code) for code in blocks[block]]
        wanted = sum(1000 for name in names if name.startswith(("HMMA", "LDGSTS")))
        if block <= committed and "LDG.E.U16" not in names:
            wanted += sum(60 for name in names if re.fullmatch(r"LDG\.E(\.CONSTANT)?", name))
        return wanted - len(names)

    value, way = {head: worth(head)}, {head: [head]}
    for block in reversed(order):
        for other in following[block] if block in value else ():
            if (
                other in body
                and (block, other) not in back
                and value[block] + worth(other) > value.get(other, -(10**9))
            ):
                value[other], way[other] = value[block] + worth(other), [*way[block], other]
    last = max((end for end, start in back if start == head and end in value), key=value.__getitem__)
    return [code for block in way[last] for code in blocks[block]]


def loops(lines: list[str]) -> list[list[str]]:
    """The instructions of every loop: from a label to a branch back to it."""
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    found = []
    for i, line in enumerate(lines):
        branch = re.match(r"(?:@!?U?P\w+\s+)?BRA\S*\s+.*?`\((\.L_x_\d+)\)", line)
        if branch and labels.get(branch[1], i) < i:
            found.append([code for code in lines[labels[branch[1]] : i + 1] if not code.endswith(":")])
    return found


def inner_loop(kernel: str, architecture: str, lines: list[str]) -> Loop | None:
    """The shortest loop that has at least half as much work in it as any; None if the kernel is of no known name."""
    unit = next((UNITS[name] for name in UNITS if name in kernel), None)
    if not unit:
        return None
    name, counted, each = unit
    candidates = [usual_way(lines)] if counted == "HMMA" else loops(lines)
    if "turbo_attend" in kernel and architecture == "sm_75":
        each /= 2  # a product is two instructions there
    work = [(sum(instruction(code).split(".")[0] == counted for code in loop), loop) for loop in candidates]
    most = max((count for count, _ in work), default=0)
    if most == 0:
        return None
    count, loop = min(((count, loop) for count, loop in work if 2 * count >= most), key=lambda pair: len(pair[1]))
    kinds = Counter(kind(instruction(code)) for code in loop)
    units = count * each
    return Loop(kernel, architecture, name, units, len(loop), {name: kinds[name] / units for name in kinds})


def demangled(name: str) -> str:
    """turbo_encode<4> of a mangled name."""
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"^void |\(.*$|\(int\)", "", text.replace("(int)", ""))


def count(grafted: Path, folder: Path, architecture: str) -> list[Loop]:
    """The inner loops of all kernels, compiled for an architecture."""
    found = []
    for unit in sorted((ROOT / "ggml_turbo" / "cuda").glob("*.cu")):
        cubin = folder / f"{unit.stem}.{architecture}.cubin"
        exact = gpu_compilers.exact_flags("CUDA") if unit.stem == "turbo-encode" else ()
        gpu_compilers.cubin(grafted, unit, cubin, architecture, *exact)
        text = subprocess.run([nvdisasm(), "-c", cubin], capture_output=True, text=True, check=True).stdout
        for name, lines in functions(text).items():
            if loop := inner_loop(demangled(name), architecture, lines):
                found.append(loop)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--architecture", action="append", choices=gpu_compilers.NVIDIA, help="default: sm_75, sm_86, sm_90, sm_120"
    )
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all counts there")
    options = parser.parse_args()
    nvdisasm()
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        graft.write(
            pristine := source.pinned(Path("~/.cache/turboquant-gguf").expanduser()),
            folder / "llama.cpp",
            graft.insert(pristine, graft.load()),
        )
        for architecture in options.architecture or ["sm_75", "sm_86", "sm_90", "sm_120"]:
            try:
                found += [
                    loop for loop in count(folder / "llama.cpp", folder, architecture) if options.kernel in loop.kernel
                ]
            except pytest.skip.Exception as missing:
                sys.exit(str(missing))
    kinds = [kind for kind in (*KINDS, "uniform", "control") if any(kind in loop.per_unit for loop in found)]
    table = Table("kernel", "for", "a", "all", *kinds, title="instructions of the inner loop")
    for loop in sorted(found, key=lambda loop: loop.kernel):
        cells = [f"{loop.per_unit.get(kind, 0):.2f}" for kind in kinds]
        table.add_row(loop.kernel, loop.architecture, loop.unit, f"{loop.total:.2f}", *cells)
    Console(width=max(180, Console().width)).print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(loop) for loop in found], indent=1))


if __name__ == "__main__":
    main()
