"""The graft: what it inserts into llama.cpp, and what is said when the sources do not fit."""

import hashlib
import io
import os
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import graft
import pytest
import source

REPOSITORY = Path(__file__).resolve().parent.parent

INSERTIONS = graft.load()


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


def test_running_twice_changes_nothing(pristine, tmp_path):
    grafted = graft.insert(pristine, INSERTIONS)
    graft.write(pristine, tmp_path, grafted)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    graft.write(pristine, tmp_path, grafted)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name != graft.MARKER}
    assert len(after) > 1000
    assert after == {path: before[path] for path in after}
    assert "GGML_TYPE_TURBO3" in (tmp_path / "ggml/include/ggml.h").read_text()


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
    file="src/a.c", why="tests", anchor="case 1:", side="before", text="        case 0:\n", whole_lines=True,
    blocks=("int second(int type) {",),
)


def test_lines_go_into_the_named_block_only(small):
    assert graft.insert(small, [INSERTION])["src/a.c"] == C_FILE.replace(
        "        case 1: return 2;", "        case 0:\n        case 1: return 2;")


def test_lines_after_and_inline(small):
    after = replace(INSERTION, side="after", anchor="case 1: return 1;", text="        case 5:\n", blocks=())
    inline = replace(INSERTION, side="after", anchor="case 1:", text=" case 7:", whole_lines=False)
    content = graft.insert(small, [after, inline])["src/a.c"]
    assert "case 1: return 1;\n        case 5:\n    }" in content
    assert "case 1: case 7: return 2;" in content


def test_insertions_at_one_place_keep_the_order_of_the_list(small):
    content = graft.insert(small, [INSERTION, replace(INSERTION, text="        case 9:\n")])["src/a.c"]
    assert "case 0:\n        case 9:\n        case 1: return 2;" in content


@pytest.mark.parametrize("change, problem", [
    ({"anchor": "case 3:"}, "the anchor is not there"),
    ({"blocks": ("int third(",)}, "the anchor is not there"),
    ({"blocks": ()}, "the anchor stands there more than once"),
])
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
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(index), "NO_CACHE_DIR": "1"}.items():
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
        "set(GGML_VERSION_MAJOR 9)\nset(GGML_VERSION_MINOR 8)\nset(GGML_VERSION_PATCH 7)\n")
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
        capture_output=True, text=True)
    assert result.returncode != 0
    assert "supports ggml" in " ".join(result.stderr.split())
