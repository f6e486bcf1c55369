"""Prints a SHA-256 of all that a build compiles: the grafted llama.cpp, and our files.

    python digest.py GRAFTED

Two builds with the same digest and the same options compute the same, wherever and by whichever path they were built.
"""

import hashlib
import sys
from collections.abc import Collection
from pathlib import Path

OURS = Path(__file__).resolve().parent.parent
NOT_COMPILED = {".md", ".py", ".toml", ".bin"}


def digest(folder: Path, skipped: Collection[str] = ()) -> str:
    """SHA-256 of the names and contents of all files below a folder, but those with a suffix in `skipped`."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix not in {".pyc", *skipped}:
            data = path.read_bytes()
            found.update(f"{path.relative_to(folder).as_posix()}\0{len(data)}\0".encode() + data)
    return found.hexdigest()


if __name__ == "__main__":
    print(hashlib.sha256((digest(Path(sys.argv[1])) + digest(OURS, NOT_COMPILED)).encode()).hexdigest())
