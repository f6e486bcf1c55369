"""Copies a pristine llama.cpp tree and inserts our lines into the copy.

    python graft.py SOURCE DESTINATION [--patch FILE]
        copy and insert; files that stay the same keep their mtime. FILE gets the whole change as one unified diff
    python graft.py --check SOURCE
        only look whether every anchor is found; silent if so. The build keeps the pinned SOURCE in
        ~/.cache/turboquant-gguf

insertions/*.toml say what is inserted where, and why; pin.toml for which llama.cpp. Nothing is removed. An insertion
has

    file            the file of llama.cpp, or a list of files, since code moves from release to release: the first that
                    holds the anchor
    why             the reason it exists, in words that need no other insertion beside them, and no other insertion has
    within          a block, or a list of them, that holds the anchor: by its first line (or lines), from which it
                    reaches to its closing brace; or by a comment, which stands for the block around it. Absent: the
                    whole file
    before, after   the anchor: a text that stands exactly once in the block
    lines           whole lines, put before or after the anchor's line
    inline          characters, put right before or after the anchor

All code is in our own files, with ggml_turbo/ on the include path; compiling and linking them needs no insertion, since
the top CMakeLists.txt adds them to llama.cpp's targets.
"""

import argparse
import difflib
import filecmp
import re
import shutil
import sys
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
PIN = tomllib.loads((HERE / "pin.toml").read_text())
# Stands in every tree that this tool wrote, so that it never deletes files in a folder it does not own.
MARKER = ".grafted"


class GraftError(Exception):
    """The source tree and the list of insertions do not fit together, or a folder may not be written."""


class AnchorError(GraftError):
    """An anchor or a block is not there once: problem is "missing" or "ambiguous"."""

    def __init__(self, problem: str, message: str) -> None:
        super().__init__(message)
        self.problem = problem


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
    others: tuple[str, ...] = ()  # files in which it is looked for where `file` does not hold the anchor

    def placed(self, source: Path) -> "Insertion":
        """The insertion with the file of a tree that holds the anchor."""
        for name in (self.file, *self.others):
            if (source / name).is_file() and self.anchor in (source / name).read_bytes().decode():
                return replace(self, file=name)
        return self

    def offsets(self, content: str) -> list[int]:
        """Where in the pristine content the text goes."""
        regions = [self._block(content, first) for first in self.blocks] or [(0, len(content))]
        return [self._offset(content, *region) for region in regions]

    def _block(self, content: str, first_line: str) -> tuple[int, int]:
        """From the line in which first_line begins to the end of its block; if it is a comment, of the block around it."""
        begin = self._only(content, first_line, 0, len(content), "block")
        begin = content.rfind("\n", 0, begin) + 1
        indent = re.compile(r"[ \t]*").match(content, begin).group()
        if self.file.endswith(".py") and first_line.endswith(":"):
            pattern = rf"^(?!{indent}[ \t])(?=.)"  # the next line that is not further in
        elif first_line.lstrip().startswith("//"):
            pattern = rf"^(?!{indent})[ \t]*}}"
        else:
            pattern = rf"^{indent}}}"
        end = re.compile(pattern, re.MULTILINE).search(content, content.find("\n", begin) + 1)
        if not end:
            raise AnchorError("missing", self._misfit("block has no end", first_line))
        return begin, end.end()

    def _offset(self, content: str, begin: int, end: int) -> int:
        at = self._only(content, self.anchor, begin, end, "anchor")
        if not self.whole_lines:
            return at if self.side == "before" else at + len(self.anchor)
        if self.side == "before":
            return content.rfind("\n", 0, at) + 1
        line_end = content.find("\n", at + len(self.anchor) - 1)
        return len(content) if line_end < 0 else line_end + 1

    def _only(self, content: str, text: str, begin: int, end: int, what: str) -> int:
        """Where the text stands from begin to end. what: it is, for the error."""
        at = content.find(text, begin, end)
        if at < 0:
            where = "" if end - begin == len(content) else f" between lines {_lines(content, begin, end - 1)}"
            raise AnchorError("missing", self._misfit(f"{what} is not there{where}", text))
        if (second := content.find(text, at + 1, end)) >= 0:
            lines = _lines(content, at, second)
            raise AnchorError(
                "ambiguous", self._misfit(f"{what} stands there more than once, as in lines {lines}", text)
            )
        return at

    def _misfit(self, problem: str, text: str) -> str:
        return (
            f"{self.file}: the {problem}:\n"
            f"    {text.strip()}\n"
            f"wanted for: {self.why}\n"
            f"The insertions are written for the llama.cpp in {PIN['package']} {PIN['version']} (ggml {PIN['ggml']}): "
            "build with that one, or adapt the insertion in ggml_turbo/graft/insertions."
        )


def _lines(content: str, first: int, second: int) -> str:
    """The numbers of the lines in which two offsets lie."""
    return f"{content.count(chr(10), 0, first) + 1} and {content.count(chr(10), 0, second) + 1}"


def load(folder: Path = HERE / "insertions") -> list[Insertion]:
    """The insertions of all files in a folder. Raises GraftError if one is not understood."""
    insertions = []
    for path in sorted(folder.glob("*.toml")):
        try:
            content = tomllib.loads(path.read_text())
        except ValueError as error:  # of TOML, and of UTF-8
            raise GraftError(f"{path.name}: {error}") from error
        for entry in content.pop("insert", []):
            insertions.append(_parse(path.name, entry))
        if content:
            raise GraftError(f"{path.name}: {', '.join(content)}: only [[insert]] is known here")
    return insertions


def _parse(name: str, entry: dict) -> Insertion:
    described = f"{name}: the insertion for {entry.get('why', entry)!r}"
    if unknown := entry.keys() - {"file", "why", "within", "before", "after", "lines", "inline"}:
        raise GraftError(f"{described} has unknown keys: {', '.join(sorted(unknown))}")
    for keys in (("file",), ("why",), ("before", "after"), ("lines", "inline")):
        if len(entry.keys() & set(keys)) != 1:
            raise GraftError(f"{described} needs {' or '.join(keys)}, once")
    for key, value in entry.items():
        texts = value if key in ("file", "within") and isinstance(value, list) else [value]
        if not all(isinstance(text, str) and text for text in texts):
            raise GraftError(f"{described} has a {key} that is no text")
    if not entry.get("lines", "\n").endswith("\n"):
        raise GraftError(f"{described} has lines that do not end with a line break")
    side = "before" if "before" in entry else "after"
    blocks, files = (
        (texts,) if isinstance(texts, str) else tuple(texts) for texts in (entry.get("within", []), entry["file"])
    )
    return Insertion(
        file=files[0],
        why=entry["why"],
        anchor=entry[side],
        side=side,
        text=entry["lines"] if "lines" in entry else entry["inline"],
        whole_lines="lines" in entry,
        blocks=blocks,
        others=files[1:],
    )


def misfits(source: Path, insertions: list[Insertion]) -> list[tuple[Insertion, str]]:
    """The insertions that do not fit a tree, each with its problem: "missing" or "ambiguous"."""
    found = []
    for insertion in (one.placed(source) for one in insertions):
        try:
            insertion.offsets((source / insertion.file).read_bytes().decode())
        except FileNotFoundError:
            found.append((insertion, "missing"))
        except AnchorError as error:
            found.append((insertion, error.problem))
    return found


def insert(source: Path, insertions: list[Insertion]) -> dict[str, str]:
    """The new content of every file that gets an insertion. Anchors are looked up in pristine text only."""
    by_file: dict[str, list[Insertion]] = {}
    for insertion in (one.placed(source) for one in insertions):
        by_file.setdefault(insertion.file, []).append(insertion)

    grafted = {}
    for name, group in by_file.items():
        if not (source / name).is_file():
            why = group[0].why
            raise GraftError(f"{source / name} does not exist: is {source} a llama.cpp tree? Wanted for: {why}")
        content = (source / name).read_bytes().decode()
        places = [(offset, insertion.text) for insertion in group for offset in insertion.offsets(content)]
        # From the end to the start, so that earlier offsets stay true; of two at one place the first listed comes first.
        for offset, text in sorted(reversed(places), key=lambda place: place[0], reverse=True):
            content = content[:offset] + text + content[offset:]
        grafted[name] = content
    return grafted


def patch(source: Path, grafted: dict[str, str]) -> str:
    """The change of all files as one unified diff, as `git apply` and `patch -p1` take it."""
    pieces = []
    for name, content in sorted(grafted.items()):
        before = (source / name).read_bytes().decode().splitlines(keepends=True)
        after = content.splitlines(keepends=True)
        pieces += difflib.unified_diff(before, after, f"a/{name}", f"b/{name}")
    return "".join(pieces)


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
    parser.add_argument("--patch", type=Path, metavar="FILE", help="where the change goes as a unified diff")
    parser.add_argument("--check", action="store_true", help="write nothing, only look for the anchors")
    arguments = parser.parse_args()
    if (arguments.destination is None) != arguments.check:
        parser.error("give either a destination or --check")
    try:
        grafted = insert(arguments.source, load())
        if not arguments.check:
            write(arguments.source, arguments.destination, grafted)
        if arguments.patch:
            arguments.patch.write_bytes(patch(arguments.source, grafted).encode())
    except GraftError as error:
        sys.exit(f"graft: {error}")


if __name__ == "__main__":
    main()
