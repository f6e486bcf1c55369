"""The graft: what it inserts into llama.cpp, and what is said when the sources do not fit."""

import hashlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import graft
import pytest
import source

REPOSITORY = Path(__file__).resolve().parent.parent

INSERTIONS = graft.load()

# Words that point to another insertion: a failed anchor shows a reason alone.
POINTS_ELSEWHERE = re.compile(r"(and|or|also|likewise|otherwise|it|its|that|this|declares)\b|.*\bnext$", re.IGNORECASE)


@pytest.mark.parametrize("insertion", INSERTIONS, ids=lambda insertion: f"{insertion.file}: {insertion.why}")
def test_every_anchor_is_in_the_pinned_sources(pristine, insertion):
    content = (pristine / insertion.file).read_text()
    offsets = insertion.offsets(content)
    assert len(offsets) == max(1, len(insertion.blocks))
    assert len(set(offsets)) == len(offsets)


def test_nothing_of_llama_cpp_is_removed(pristine):
    for name, content in graft.insert(pristine, INSERTIONS).items():
        remaining = iter(content)
        assert all(character in remaining for character in (pristine / name).read_text()), name


def test_the_list_is_short_and_its_reasons_stand_alone():
    backend = re.compile(r"ggml/src/ggml-(?!cpu/)\w+/")  # one that we have beside the CPU's may have a few of its own
    of_backends = Counter(found[0] for insertion in INSERTIONS if (found := backend.match(insertion.file)))
    assert len(INSERTIONS) - of_backends.total() <= 55
    assert all(count <= 10 for count in of_backends.values())
    assert len({insertion.why for insertion in INSERTIONS}) == len(INSERTIONS)
    for insertion in INSERTIONS:
        assert len(insertion.why.split()) > 3 and not POINTS_ELSEWHERE.match(insertion.why), insertion.why


def test_the_patch_of_a_build_gives_the_grafted_tree(pristine, tmp_path):
    """What reviewers read is what is compiled: pristine sources with the patch are the grafted ones."""
    build = tmp_path / "build"
    command = [sys.executable, graft.__file__, pristine, build / "llama.cpp", "--patch", build / "turbo.patch"]
    subprocess.run(command, check=True)
    patched = tmp_path / "patched"
    names = {insertion.file for insertion in INSERTIONS}
    for name in names:
        (patched / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(pristine / name, patched / name)
    subprocess.run(["git", "apply", build / "turbo.patch"], cwd=patched, check=True)
    for name in names:
        assert (patched / name).read_bytes() == (build / "llama.cpp" / name).read_bytes(), name
    assert (build / "turbo.patch").read_text().count("\n+++ b/") == len(names)


def test_running_twice_changes_nothing(pristine, tmp_path):
    grafted = graft.insert(pristine, INSERTIONS)
    graft.write(pristine, tmp_path, grafted)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    graft.write(pristine, tmp_path, grafted)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != graft.MARKER]
    after = {path: path.stat().st_mtime_ns for path in files}
    assert len(after) > 1000
    assert after == {path: before[path] for path in after}
    assert "TURBO_TYPES(TURBO_ENUMERATOR)" in (tmp_path / "ggml/include/ggml.h").read_text()


# A tree of one file, to see how a single insertion behaves.
C_FILE = """\
int first(int type) {
    switch (type) {
        case 1: return 1;
    }
}
int second(int type) {
    switch (type) {
        case 1: return 2;
    }
}
"""


@pytest.fixture
def small(tmp_path) -> Path:
    (tmp_path / "tree" / "src").mkdir(parents=True)
    (tmp_path / "tree" / "src" / "a.c").write_text(C_FILE)
    return tmp_path / "tree"


INSERTION = graft.Insertion(
    file="src/a.c",
    why="tests",
    anchor="case 1:",
    side="before",
    text="        case 0:\n",
    whole_lines=True,
    blocks=("int second(int type) {",),
)


def test_lines_go_into_the_named_block_only(small):
    assert graft.insert(small, [INSERTION])["src/a.c"] == C_FILE.replace(
        "        case 1: return 2;", "        case 0:\n        case 1: return 2;"
    )


def test_lines_after_and_inline(small):
    after = replace(INSERTION, side="after", anchor="case 1: return 1;", text="        case 5:\n", blocks=())
    inline = replace(INSERTION, side="after", anchor="case 1:", text=" case 7:", whole_lines=False)
    content = graft.insert(small, [after, inline])["src/a.c"]
    assert "case 1: return 1;\n        case 5:\n    }" in content
    assert "case 1: case 7: return 2;" in content


def test_insertions_at_one_place_keep_the_order_of_the_list(small):
    content = graft.insert(small, [INSERTION, replace(INSERTION, text="        case 9:\n")])["src/a.c"]
    assert "case 0:\n        case 9:\n        case 1: return 2;" in content


def test_code_that_moved_is_found_in_its_other_file(small):
    moved = replace(INSERTION, file="src/new.c", others=("src/a.c",))
    for _ in range(2):
        assert list(graft.insert(small, [moved])) == ["src/a.c"] and not graft.misfits(small, [moved])
        (small / "src" / "new.c").write_text("int other;\n")
    (small / "src" / "new.c").write_text(C_FILE)
    assert list(graft.insert(small, [moved])) == ["src/new.c"]
    for name in ("a.c", "new.c"):
        (small / "src" / name).write_text("")
    with pytest.raises(graft.AnchorError, match="src/new.c: the block is not there"):
        graft.insert(small, [moved])


FUNCTION = """\
int head(
        int a) {
    // a comment
    for (;;) {
    }
    int late = 1;
}
int late = 2;
"""
CLASS = """\
class A:
    late = 1

    def f(self): ...
class B:
    late = 2
"""


@pytest.mark.parametrize(
    "name, content, block",
    [
        ("src/b.c", FUNCTION, "int head("),
        ("src/b.c", FUNCTION, "int head(\n        int a) {"),
        ("src/b.c", FUNCTION, "    // a comment"),
        ("src/b.py", CLASS, "class A:"),
    ],
)
def test_a_block_reaches_to_its_end(small, name, content, block):
    """To the end of a function, past the blocks in it; of the block around a comment; of a class of Python."""
    (small / name).write_text(content)
    insertion = replace(INSERTION, file=name, blocks=(block,), anchor="late = ", text="early = ", whole_lines=False)
    assert graft.insert(small, [insertion])[name] == content.replace("late = 1", "early = late = 1")


def test_a_block_without_an_end_is_refused(small):
    (small / "src" / "b.c").write_text("int head() {\n    int late = 1;\n")
    with pytest.raises(graft.GraftError, match="the block has no end"):
        graft.insert(small, [replace(INSERTION, file="src/b.c", blocks=("int head() {",), anchor="late")])


@pytest.mark.parametrize(
    "entry, problem",
    [
        ('file = "a"\nwhy = "w"\nbefore = "x"\nlines = "y"\nwhitin = "z"', "unknown keys: whitin"),
        ('file = "a"\nwhy = "w"\nbefore = "x"\nafter = "x"\nlines = "y"', "needs before or after, once"),
        ('file = "a"\nwhy = "w"\nlines = "y"', "needs before or after, once"),
        ('file = "a"\nwhy = "w"\nbefore = "x"\nlines = "y"\ninline = "y"', "needs lines or inline, once"),
        ('file = "a"\nbefore = "x"\nlines = "y"', "needs why, once"),
        ('file = ["a", 3]\nwhy = "w"\nbefore = "x"\nlines = "y"', "has a file that is no text"),
        ('file = 3\nwhy = "w"\nbefore = "x"\nlines = "y"', "has a file that is no text"),
        ('file = "a"\nwhy = "w"\nwithin = ["a", 1]\nbefore = "x"\nlines = "y"', "has a within that is no text"),
        ('file = "a"\nwhy = "w"\nbefore = ""\nlines = "y"', "has a before that is no text"),
        ('file = "a"\nwhy = "w"\nbefore = "x"\nlines = "y"', "has lines that do not end with a line break"),
    ],
)
def test_an_entry_of_the_list_that_is_not_understood_is_refused(tmp_path, entry, problem):
    (tmp_path / "some.toml").write_text(f"[[insert]]\n{entry}\n")
    with pytest.raises(graft.GraftError, match=f"some.toml: the insertion for .* {problem}"):
        graft.load(tmp_path)
    (tmp_path / "some.toml").write_text(f"[[inserts]]\n{entry}\n")
    with pytest.raises(graft.GraftError, match="inserts: only"):
        graft.load(tmp_path)
    (tmp_path / "some.toml").write_text("[[insert]]\nfile\n")
    with pytest.raises(graft.GraftError, match="some.toml: .*line 2"):
        graft.load(tmp_path)


def test_a_file_that_llama_cpp_does_not_have_says_for_what_it_was_wanted(small):
    with pytest.raises(graft.GraftError, match=r"src/z.c does not exist: .* Wanted for: tests"):
        graft.insert(small, [replace(INSERTION, file="src/z.c")])


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"anchor": "case 3:"}, "the anchor is not there between lines 6 and 10"),
        ({"blocks": ("int third(",)}, "the block is not there:"),
        ({"blocks": ()}, "the anchor stands there more than once, as in lines 3 and 8"),
    ],
)
def test_an_anchor_that_does_not_fit_stops_with_file_anchor_and_version(small, change, problem):
    with pytest.raises(graft.GraftError) as error:
        graft.insert(small, [replace(INSERTION, **change)])
    said = str(error.value)
    anchor = change.get("anchor") or next(iter(change.get("blocks") or ["case 1:"]))
    assert problem in said
    for part in ("src/a.c", anchor, graft.PIN["version"], graft.PIN["ggml"]):
        assert part in said


def test_a_file_that_left_the_source_leaves_the_copy(small, tmp_path):
    copy = tmp_path / "copy"
    graft.write(small, copy, {})
    (small / "src" / "a.c").unlink()
    (small / "src" / "b.c").write_text("int b;\n")
    graft.write(small, copy, {})
    assert sorted(path.name for path in (copy / "src").iterdir()) == ["b.c"]


def test_a_folder_with_other_files_is_never_written(small, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    with pytest.raises(graft.GraftError, match="did not write"):
        graft.write(small, tmp_path / "home", {})
    assert (tmp_path / "home" / "thesis.txt").read_text() == "mine"


# ---- where the sources come from


def write_archive(path: Path, members: dict[str, str]) -> str:
    """Write a source distribution with files of these contents; its SHA-256."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(f"{path.name.removesuffix('.tar.gz')}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes a source distribution with the right name and the wrong content, which pip finds instead of the right one.

    Called with lines of its pyproject.toml, returns its SHA-256. All code in it, and in what it requires, would leave
    `ran` in tmp_path.
    """
    index = tmp_path / "index"
    index.mkdir()
    package, version = source.PIN["package"], source.PIN["version"]
    hostile = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    write_archive(index / "requirement-1.tar.gz", {"setup.py": hostile})
    settings = {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(index), "NO_CACHE_DIR": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)

    def make(*lines: str) -> str:
        build = ["[build-system]", "requires = ['requirement']", f"build-backend = '{source.PIN['backend']}'", *lines]
        return write_archive(
            index / f"{package.replace('-', '_')}-{version}.tar.gz",
            {
                "setup.py": hostile,
                "scikit_build_core/build.py": hostile,
                "pyproject.toml": "\n".join(build),
                "PKG-INFO": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n",
                f"{source.PIN['folder']}/CMakeLists.txt": "wrong",
            },
        )

    return make


def test_another_download_is_refused_before_anything_in_it_runs(fake, tmp_path):
    fake("backend-path = ['.']")
    with pytest.raises(source.SourceError, match="another SHA-256 than .*\n.*pip cache purge"):
        source.pinned(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert not (tmp_path / "ran").exists()


def test_nothing_of_the_right_download_runs_either(fake, tmp_path, monkeypatch):
    monkeypatch.setitem(source.PIN, "sha256", fake())
    assert (source.pinned(tmp_path / "cache") / "CMakeLists.txt").read_text() == "wrong"
    assert not (tmp_path / "ran").exists()


def test_an_interrupted_unpacking_does_not_count_as_done(fake, tmp_path, monkeypatch):
    monkeypatch.setitem(source.PIN, "sha256", fake())

    def interrupted(archive, scratch):
        (scratch / "tree").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as first_run:
        first_run.setattr(source, "unpack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            source.pinned(tmp_path / "cache")
    assert (source.pinned(tmp_path / "cache") / "CMakeLists.txt").read_text() == "wrong"
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(source.SourceError, match="Check the network.*-DLLAMA_CPP_DIR"):
        source.pinned(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(source.SourceError, match="TURBOQUANT_CACHE_DIR"):
        source.pinned(tmp_path / "file" / "cache")


@pytest.fixture
def newer_tree(tmp_path) -> Path:
    """A llama.cpp tree of another version."""
    (tmp_path / "newer" / "ggml").mkdir(parents=True)
    (tmp_path / "newer" / "ggml" / "CMakeLists.txt").write_text(
        "set(GGML_VERSION_MAJOR 9)\nset(GGML_VERSION_MINOR 8)\nset(GGML_VERSION_PATCH 7)\n"
    )
    return tmp_path / "newer"


def test_a_tree_of_another_version_is_refused(newer_tree):
    with pytest.raises(source.SourceError, match=rf"has ggml 9\.8\.7; .* supports ggml {source.PIN['ggml']}"):
        source.tree(newer_tree)


def test_a_folder_that_is_no_llama_cpp_is_refused(tmp_path):
    with pytest.raises(source.SourceError, match="is not a llama.cpp tree"):
        source.tree(tmp_path)


def test_the_pinned_sources_pass_as_a_tree(pristine):
    assert source.tree(pristine) == pristine


def test_cmake_shows_the_message(newer_tree, tmp_path):
    result = subprocess.run(
        ["cmake", "-S", REPOSITORY, "-B", tmp_path / "build", f"-DLLAMA_CPP_DIR={newer_tree}"],
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "supports ggml" in " ".join(result.stderr.split())


# ---- other releases (tools/check_pins.py)


@pytest.fixture
def check_pins(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    return importlib.import_module("check_pins")


@pytest.fixture
def copied_pins(check_pins, tmp_path, monkeypatch) -> Path:
    """The files that a move changes, as copies that a test may change."""
    folder = tmp_path / "pins"
    folder.mkdir()
    for name in ("PIN_FILE", "RELEASES_FILE", "PROJECT_FILE"):
        shutil.copy(getattr(check_pins, name), folder)
        monkeypatch.setattr(check_pins, name, folder / getattr(check_pins, name).name)
    return folder


@pytest.fixture
def cached(pristine, tmp_path):
    """A cache of sources in which the pristine ones stand for any release; `change` is made to a file of them."""

    def make(version: str, sha256: str, change=lambda text: text, name: str = "ggml/include/ggml.h") -> Path:
        tree = tmp_path / "cache" / f"llama.cpp-{version}-{sha256[:12]}"
        for needed in {insertion.file for insertion in INSERTIONS} | {"ggml/CMakeLists.txt"}:
            (tree / needed).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(pristine / needed, tree / needed)
        (tree / name).write_text(change((tree / name).read_text()))
        return tmp_path / "cache"

    return make


def test_the_pin_is_a_known_release(check_pins):
    assert check_pins.releases()[source.PIN["version"]] == source.PIN["sha256"]
    wanted = {"0.3.28", "0.3.31", "0.3.33", "0.3.34", "0.3.35", "0.3.36"}
    assert wanted <= check_pins.releases().keys()
    project = check_pins.PROJECT_FILE.read_text()
    assert f'{source.PIN["package"]}=={source.PIN["version"]}"' in project


def test_a_release_that_fits_and_two_that_do_not(check_pins, cached, capsys):
    """The table and the JSON name what is missing or ambiguous, and the exit code says that something is."""
    known = check_pins.releases()
    cache = cached("0.3.36", known["0.3.36"])
    assert check_pins.main(["0.3.36", "--cache", str(cache)]) == 0
    assert f"{len(INSERTIONS)} of {len(INSERTIONS)}" in capsys.readouterr().out
    cached("0.3.35", known["0.3.35"], lambda text: text.replace("GGML_TYPE_COUNT", "GGML_TYPE_NUMBER"))
    again = "    GGML_TYPE_Q5_1,\n"
    cached("0.3.34", known["0.3.34"], lambda text: text.replace(again, 2 * again, 1), "common/arg.cpp")
    arguments = ["0.3.36", "0.3.35", "0.3.34", "--cache", str(cache)]
    assert check_pins.main(arguments) == 1
    table = capsys.readouterr().out
    assert "missing in ggml/include/ggml.h: GGML_TYPE_COUNT" in table and "ambiguous in common/arg.cpp" in table
    assert check_pins.main([*arguments, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    counts = {version: (len(one["missing"]), len(one["ambiguous"])) for version, one in found.items()}
    assert counts == {"0.3.36": (0, 0), "0.3.35": (1, 0), "0.3.34": (0, 1)}
    assert all(one["found"] + sum(counts[version]) == one["insertions"] for version, one in found.items())


def test_a_list_that_is_not_understood_is_said_in_a_sentence(check_pins, cached, capsys, monkeypatch):
    def load():
        raise graft.GraftError("some.toml: the insertion for 'x' has unknown keys: y")

    monkeypatch.setattr(graft, "load", load)
    cache = cached("0.3.36", check_pins.releases()["0.3.36"])
    assert check_pins.main(["0.3.36", "--cache", str(cache)]) == 2
    assert capsys.readouterr().err == "some.toml: the insertion for 'x' has unknown keys: y\n"


def test_moving_the_pin_is_one_command(check_pins, copied_pins, cached, capsys, monkeypatch):
    before = {path.name: path.read_text() for path in copied_pins.iterdir()}
    monkeypatch.setattr(source, "download", lambda scratch, pin: shutil.copy(__file__, scratch / "release.tar.gz"))
    sha256 = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    cache = cached("9.9.9", sha256, lambda text: text.replace("GGML_TYPE_COUNT", "GONE"))
    assert check_pins.main(["--move", "9.9.9", "--cache", str(cache)]) == 1  # it does not fit: nothing changes
    assert before == {path.name: path.read_text() for path in copied_pins.iterdir()}
    cached("9.9.9", sha256)
    assert check_pins.main(["--move", "9.9.9", "--cache", str(cache)]) == 0
    assert "build it and run the tests" in capsys.readouterr().err
    pin = tomllib.loads((copied_pins / "pin.toml").read_text())
    assert pin == source.PIN | {"version": "9.9.9", "sha256": sha256}
    assert check_pins.releases()["9.9.9"] == sha256
    assert f'{source.PIN["package"]}==9.9.9"' in (copied_pins / "pyproject.toml").read_text()


def test_a_release_that_cannot_be_had(check_pins, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert check_pins.main(["0.3.28", "--cache", str(tmp_path / "cache")]) == 2
    assert "pip could not download llama-cpp-python 0.3.28" in capsys.readouterr().err
