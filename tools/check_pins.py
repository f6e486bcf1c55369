#!/usr/bin/env python3
"""Whether our insertions fit llama.cpp as other releases of llama-cpp-python carry it, and moving to one of them.

    python3 tools/check_pins.py [VERSION ...]      a table of anchors found, missing and ambiguous; all known releases
    python3 tools/check_pins.py --json [...]       the same as JSON
    python3 tools/check_pins.py --move VERSION     if every anchor fits, build from this release from now on

Source distributions come through pip, by the hashes in ggml_turbo/graft/releases.toml, and no code in them runs. A
release without a hash there is taken as the registry has it. Exit code 1: something does not fit; 2: a release cannot
be had, or the list of insertions not be understood.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import tomllib
from pathlib import Path

GRAFT = Path(__file__).resolve().parent.parent / "ggml_turbo" / "graft"
sys.path.insert(0, str(GRAFT))

import graft  # noqa: E402
import source  # noqa: E402

PIN_FILE, RELEASES_FILE = GRAFT / "pin.toml", GRAFT / "releases.toml"
PROJECT_FILE = GRAFT.parent.parent / "pyproject.toml"


def releases() -> dict[str, str]:
    """SHA-256 of each release that is known, by its version."""
    return tomllib.loads(RELEASES_FILE.read_text())["sha256"]


def fetch(version: str, cache: Path) -> tuple[Path, str]:
    """The llama.cpp of a release, and the SHA-256 of its source distribution. Raises SourceError."""
    pin = {key: value for key, value in source.PIN.items() if key != "sha256"} | {"version": version}
    sha256 = releases().get(version)
    if not sha256:
        with tempfile.TemporaryDirectory() as scratch:
            sha256 = hashlib.sha256(source.download(Path(scratch), pin).read_bytes()).hexdigest()
    return source.pinned(cache, pin | {"sha256": sha256}), sha256


def check(tree: Path) -> dict:
    """What fits a llama.cpp tree: its ggml version, how many insertions are found, the others with their reasons."""
    insertions = graft.load()
    problems = graft.misfits(tree, insertions)
    found = {"ggml": source.ggml_version(tree), "insertions": len(insertions), "found": len(insertions) - len(problems)}
    for problem in ("missing", "ambiguous"):
        found[problem] = [
            {"file": insertion.file, "anchor": insertion.anchor.strip(), "why": insertion.why}
            for insertion, which in problems
            if which == problem
        ]
    return found


def fits(found: dict) -> bool:
    """Whether every insertion was found."""
    return found["found"] == found["insertions"]


def table(results: dict[str, dict]) -> str:
    """Results of `check`, by version, as lines for people."""
    lines = [f"{'release':<10} {'ggml':<10} {'found':>9} {'missing':>8} {'ambiguous':>10}"]
    for version, found in results.items():
        share = f"{found['found']} of {found['insertions']}"
        counts = f"{share:>9} {len(found['missing']):>8} {len(found['ambiguous']):>10}"
        lines.append(f"{version:<10} {found['ggml']:<10} {counts}")
        lines += [
            f"    {problem} in {one['file']}: {one['anchor']}\n        wanted for: {one['why']}"
            for problem in ("missing", "ambiguous")
            for one in found[problem]
        ]
    return "\n".join(lines)


def move(version: str, sha256: str, ggml: str) -> None:
    """Write a release into pin.toml and pyproject.toml, and into releases.toml if it is new."""
    text = PIN_FILE.read_text()
    for key, value in (("version", version), ("sha256", sha256), ("ggml", ggml)):
        text = re.sub(rf'^({key} *= )"[^"]*"', rf'\g<1>"{value}"', text, flags=re.MULTILINE)
    PIN_FILE.write_text(text)
    project, package = PROJECT_FILE.read_text(), source.PIN["package"]
    PROJECT_FILE.write_text(re.sub(rf"{package}==[\w.]+", f"{package}=={version}", project))
    if version not in releases():
        RELEASES_FILE.write_text(RELEASES_FILE.read_text() + f'"{version}" = "{sha256}"\n')


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="releases to try (default: all known ones)")
    parser.add_argument("--move", metavar="VERSION", help="make this release the pin, if every anchor fits")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    cache = os.environ.get("TURBOQUANT_CACHE_DIR") or "~/.cache/turboquant-gguf"
    parser.add_argument("--cache", type=Path, default=Path(cache), help="where sources are kept (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    if chosen.move and chosen.versions:
        parser.error("--move takes one release, and no others beside it")
    versions = [chosen.move] if chosen.move else chosen.versions or list(releases())
    results, hashes = {}, {}
    try:
        for version in versions:
            tree, hashes[version] = fetch(version, chosen.cache.expanduser())
            results[version] = check(tree)
    except (source.SourceError, graft.GraftError) as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(results, indent=2) if chosen.json else table(results))
    if not all(map(fits, results.values())):
        return 1
    if chosen.move:
        move(chosen.move, hashes[chosen.move], results[chosen.move]["ggml"])
        said = f"The pin is llama-cpp-python {chosen.move} now: build it and run the tests (tools/bootstrap.py test)."
        print(said, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
