"""Our Metal kernels as one source, which a device compiles from memory, where there are no files to include.

python flatten.py FILE      writes the source; to a FILE.inc as a string of C++
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def flatten(path: Path, folder: Path, seen: set[str]) -> str:
    """The text of a file with each file that it includes from ggml_turbo/ once, at the first place that does.

    folder: of files that are called metal/...
    """

    def included(match: re.Match) -> str:
        name = match[1]
        if name in seen:
            return ""
        seen.add(name)
        return flatten(folder / name[6:] if name.startswith("metal/") else HERE.parent / name, folder, seen)

    text = re.sub(r"^#pragma once\n", "", path.read_text(), flags=re.MULTILINE)
    return re.sub(r'^#include "([^"]+)"\n', included, text, flags=re.MULTILINE)


def source(folder: Path = HERE) -> str:
    """All kernels of a folder."""
    return flatten(folder / "turbo.metal", folder, set())


if __name__ == "__main__":
    output = Path(sys.argv[1])
    output.write_text(f'R"msl(\n{source()})msl"\n' if output.suffix == ".inc" else source())
