"""Copies a pristine llama.cpp tree and inserts our lines into the copy.

    python graft.py SOURCE DESTINATION    copy and insert; files that stay the same keep their mtime
    python graft.py --check SOURCE        only look whether every anchor is found

insertions.toml says what is inserted where, and why; pin.toml for which llama.cpp.
"""

import argparse
import filecmp
import re
import shutil
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PIN = tomllib.loads((HERE / "pin.toml").read_text())
# Stands in every tree that this tool wrote, so that it never deletes files in a folder it does not own.
MARKER = ".grafted"


class GraftError(Exception):
    """The source tree and the list of insertions do not fit together, or a folder may not be written."""


@dataclass(frozen=True)
class Insertion:
    """Our text at one anchor of one file, or at the same anchor in several blocks of it."""

    file: str
    why: str
    anchor: str
    side: str  # "before" or "after" the anchor
    text: str
    whole_lines: bool  # whole lines beside the line of the anchor, or characters right beside the anchor
    blocks: tuple[str, ...]  # the first lines of the blocks that hold the anchor; empty: the whole file

    def offsets(self, content: str) -> list[int]:
        """Where in the pristine content the text goes."""
        regions = [self._block(content, first) for first in self.blocks] or [(0, len(content))]
        return [self._offset(content, *region) for region in regions]

    def _block(self, content: str, first_line: str) -> tuple[int, int]:
        """From the line that holds first_line to the closing brace at that line's indentation."""
        begin = self._only(content, first_line, 0, len(content))
        begin = content.rfind("\n", 0, begin) + 1
        indent = re.compile(r"[ \t]*").match(content, begin).group()
        end = re.compile(rf"^{indent}}}", re.MULTILINE).search(content, begin)
        return begin, end.end() if end else len(content)

    def _offset(self, content: str, begin: int, end: int) -> int:
        at = self._only(content, self.anchor, begin, end)
        if not self.whole_lines:
            return at if self.side == "before" else at + len(self.anchor)
        if self.side == "before":
            return content.rfind("\n", 0, at) + 1
        line_end = content.find("\n", at + len(self.anchor) - 1)
        return len(content) if line_end < 0 else line_end + 1

    def _only(self, content: str, text: str, begin: int, end: int) -> int:
        at = content.find(text, begin, end)
        if at < 0:
            raise GraftError(self._misfit("is not there", text))
        if content.find(text, at + 1, end) >= 0:
            raise GraftError(self._misfit("stands there more than once", text))
        return at

    def _misfit(self, problem: str, text: str) -> str:
        return (
            f"{self.file}: the anchor {problem}:\n"
            f"    {text.strip()}\n"
            f"wanted for: {self.why}\n"
            f"The insertions are written for the llama.cpp in {PIN['package']} {PIN['version']} (ggml {PIN['ggml']}): "
            "build with that one, or adapt ggml_turbo/graft/insertions.toml."
        )


def load(path: Path = HERE / "insertions.toml") -> list[Insertion]:
    return [_parse(entry) for entry in tomllib.loads(path.read_text())["insert"]]


def _parse(entry: dict) -> Insertion:
    side = "before" if "before" in entry else "after"
    blocks = entry.get("within", [])
    return Insertion(
        file=entry["file"],
        why=entry["why"],
        anchor=entry[side],
        side=side,
        text=entry["lines"] if "lines" in entry else entry["inline"],
        whole_lines="lines" in entry,
        blocks=(blocks,) if isinstance(blocks, str) else tuple(blocks),
    )


def insert(source: Path, insertions: list[Insertion]) -> dict[str, str]:
    """The new content of every file that gets an insertion. Anchors are looked up in pristine text only."""
    by_file: dict[str, list[Insertion]] = {}
    for insertion in insertions:
        by_file.setdefault(insertion.file, []).append(insertion)

    grafted = {}
    for name, group in by_file.items():
        if not (source / name).is_file():
            raise GraftError(f"{source / name} does not exist: is {source} a llama.cpp tree?")
        content = (source / name).read_bytes().decode()
        places = [(offset, insertion.text) for insertion in group for offset in insertion.offsets(content)]
        # From the end to the start, so that earlier offsets stay true; of two at one place the first listed comes first.
        for offset, text in sorted(reversed(places), key=lambda place: place[0], reverse=True):
            content = content[:offset] + text + content[offset:]
        grafted[name] = content
    return grafted


def write(source: Path, destination: Path, grafted: dict[str, str]) -> None:
    """Makes destination a copy of source with the grafted contents, touching only files that differ."""
    if destination.exists() and any(destination.iterdir()) and not (destination / MARKER).exists():
        raise GraftError(f"{destination} holds files that this tool did not write: choose an empty folder")
    destination.mkdir(parents=True, exist_ok=True)
    (destination / MARKER).touch()

    wanted = {MARKER}
    for path in _files(source):
        name = path.relative_to(source).as_posix()
        wanted.add(name)
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in grafted:
            content = grafted[name].encode()
            if not target.is_file() or target.read_bytes() != content:
                target.write_bytes(content)
        elif not target.is_file() or not filecmp.cmp(path, target, shallow=False):
            shutil.copyfile(path, target)
            shutil.copymode(path, target)

    for path in list(destination.rglob("*")):
        if path.is_file() and path.relative_to(destination).as_posix() not in wanted:
            path.unlink()


def _files(source: Path) -> list[Path]:
    parts = [source / part for part in PIN["parts"]]
    files = [part for part in parts if part.is_file()]
    for part in parts:
        files += [path for path in part.rglob("*") if path.is_file()]
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path, nargs="?")
    parser.add_argument("--check", action="store_true", help="write nothing, only look for the anchors")
    arguments = parser.parse_args()
    if (arguments.destination is None) != arguments.check:
        parser.error("give either a destination or --check")
    try:
        grafted = insert(arguments.source, load())
        if not arguments.check:
            write(arguments.source, arguments.destination, grafted)
    except GraftError as error:
        sys.exit(f"graft: {error}")


if __name__ == "__main__":
    main()
