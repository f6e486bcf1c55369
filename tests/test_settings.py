"""Recent window and calibration reach a context by a typed call, options of llama.cpp's programs, or variables."""

import ctypes
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest

import tiny_model
from turboquant_gguf.core import child
from turboquant_gguf.errors import TurboquantError
from turboquant_gguf.llamacpp import cachefacts, ggml, native, recentwindow
from turboquant_gguf.llamacpp.cachetypes import CacheTypes
from turboquant_gguf.llamacpp.logits import Model
from turboquant_gguf.llamacpp.recentwindow import RecentWindow

TURBO4 = CacheTypes("turbo4", "turbo4")
DEFAULT = (64, 4)


def windows(log: str) -> list[tuple[int, int]]:
    """What the log says of recent windows: the last and the first tokens of each cache that has one."""
    found = re.findall(r"recent window: the last (\d+) tokens and the first (\d+) of each sequence", log)
    return [(int(last), int(first)) for last, first in found]


@pytest.fixture
def opened(tiny) -> Callable[..., list[tuple[int, int]]]:
    """The windows that a context has, made with options of Model.open."""

    def run(**options: object) -> list[tuple[int, int]]:
        with Model(tiny) as model:
            begin = len(model.log)
            with model.open(512, TURBO4, **options):
                return windows("".join(model.log[begin:]))

    return run


def set_options(draft: bool, window: int, sinks: int) -> bool:
    """Call llama_turbo_set_options; -1 says nothing."""
    function = ctypes.CDLL(str(ggml.library_path("llama"))).llama_turbo_set_options
    function.restype, function.argtypes = ctypes.c_bool, [ctypes.c_void_p, ctypes.c_bool]
    params = ggml.ContextParams(cache_window=window, cache_sinks=sinks, calibration=-1)
    return function(ctypes.byref(params), draft)


@pytest.fixture
def options():
    """Sets what the options of a program set, until the test ends."""
    yield set_options
    assert set_options(False, -1, -1) and set_options(True, -1, -1)


def test_a_call_is_for_the_next_context_of_its_thread(opened):
    assert opened() == [DEFAULT]
    assert opened(recent_window=RecentWindow(32, 2)) == [(32, 2)]
    assert opened() == [DEFAULT]
    assert opened(recent_window=RecentWindow(recent=0)) == []
    recentwindow.set_next(RecentWindow(16, 1))
    seen = []
    thread = Thread(target=lambda: seen.append(opened()))
    thread.start()
    thread.join()
    assert seen == [[DEFAULT]]
    assert opened() == [(16, 1)]


def test_a_context_that_cannot_be_made_takes_it_as_well(tmp_path, opened):
    """What was meant for it does not turn up in another."""
    with Model(tiny_model.write(tmp_path / "narrow.gguf", head_size=80)) as model:
        with pytest.raises(TurboquantError):
            model.open(512, TURBO4, recent_window=RecentWindow(32, 2))
    assert opened() == [DEFAULT]


def test_the_call_comes_before_options_and_they_before_variables(opened, options, monkeypatch):
    monkeypatch.setenv("TURBO_CACHE_WINDOW", "8")
    monkeypatch.setenv("TURBO_CACHE_SINKS", "3")
    assert opened() == [(8, 3)]
    options(False, 16, -1)
    assert opened() == [(16, 3)]
    assert opened(recent_window=RecentWindow(32)) == [(32, 3)]


def test_old_names_of_variables_are_read_with_one_warning(opened, tiny, monkeypatch):
    monkeypatch.setenv("LLAMA_ARG_CACHE_WINDOW", "24")
    assert opened() == [(24, 4)]
    monkeypatch.setenv("TURBO_CACHE_WINDOW", "8")
    assert opened() == [(8, 4)]
    script = (
        "import sys; from pathlib import Path; from turboquant_gguf.llamacpp.logits import Model; "
        "from turboquant_gguf.llamacpp.cachetypes import CacheTypes\n"
        "with Model(Path(sys.argv[1])) as model:\n"
        "    for _ in range(2):\n"
        "        with model.open(512, CacheTypes('turbo4', 'turbo4')): pass\n"
        "    print(''.join(model.log))"
    )
    old = {"LLAMA_ARG_CACHE_WINDOW": "24", "LLAMA_ARG_CACHE_SINKS": "2", "LLAMA_TURBO_CALIBRATION": "0"}
    environment = {name: value for name, value in os.environ.items() if name != "TURBO_CACHE_WINDOW"} | old
    command = [sys.executable, "-c", script, tiny]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert windows(done.stdout) == [(24, 2)] * 2
    for name, current in recentwindow.VARIABLES.items():
        assert done.stdout.count(f"{name} is called {current} now") == 1


@pytest.mark.parametrize("name", ["TURBO_CACHE_WINDOW", "TURBO_CACHE_SINKS", "TURBO_CALIBRATION"])
@pytest.mark.parametrize("value", ["1e9", "-1", "many", "1234567890"])
def test_a_variable_that_makes_no_sense_is_refused_by_name(tiny, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with Model(tiny) as model:
        with pytest.raises(TurboquantError):
            model.open(512, TURBO4)
        assert f"{name} is '{value}'" in "".join(model.log)


def test_a_call_or_an_option_that_makes_no_sense_is_refused(opened, options):
    with pytest.raises(ValueError, match="cannot be"):
        RecentWindow(-1)
    wrong = ggml.ContextParams(cache_window=-2, cache_sinks=0, calibration=0)
    assert not ggml.function("llama_turbo_set_next")(ctypes.byref(wrong))
    wrong = ggml.ContextParams(cache_window=8, cache_sinks=0, calibration=3)
    assert not ggml.function("llama_turbo_set_next")(ctypes.byref(wrong))
    assert not options(False, -5, 0)
    assert opened() == [DEFAULT]


def test_python_says_of_the_window_what_llama_cpp_does(monkeypatch):
    for name in (*recentwindow.VARIABLES, *recentwindow.VARIABLES.values()):
        monkeypatch.delenv(name, raising=False)
    assert recentwindow.in_effect() == RecentWindow()
    with recentwindow.use(RecentWindow(8, 2)):
        assert recentwindow.in_effect().arguments() == ["--cache-window", "8", "--cache-sinks", "2"]
        said = recentwindow.variables()
        assert said == {"LLAMA_ARG_CACHE_WINDOW": "8", "LLAMA_ARG_CACHE_SINKS": "2"}  # as in results of before
        with recentwindow.use(RecentWindow(recent=0)):
            assert recentwindow.in_effect() == RecentWindow(0, 2)
        recentwindow.set_variables({})
        assert recentwindow.in_effect() == RecentWindow()
        recentwindow.set_variables(said)
        assert recentwindow.in_effect() == RecentWindow(8, 2)
    assert recentwindow.variables() == {}


# ---- a target and a draft ----


def served(tiny: Path, folder: Path, *arguments: object) -> list[tuple[int, int]]:
    """The windows of a llama-server with `tiny` as its model and as its draft: of the target, then of the draft."""
    command = [native.tool_path("llama-server"), "--model", tiny, "--model-draft", tiny, "--spec-type", "draft-simple"]
    command += ["--port", "0", "--no-ui", "--no-warmup", "--ctx-size", "1024", "--parallel", "1", "-fit", "off"]
    command += ["--cache-type-k", "turbo4", "--cache-type-v", "turbo4", "-ctkd", "turbo4", "-ctvd", "turbo4"]
    command += [*cachefacts.LOG_ARGUMENTS, *map(str, arguments)]
    file = folder / "server.log"
    with file.open("wb") as output, child.running(command, stdout=output, stderr=subprocess.STDOUT) as process:
        while "listening on" not in file.read_text("utf-8", "replace"):
            assert process.poll() is None, file.read_text()[-2000:]
            time.sleep(0.05)
    return windows(file.read_text())


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((), [DEFAULT, DEFAULT]),
        (("--cache-window", 32, "--cache-sinks", 2), [(32, 2), (32, 2)]),
        (("--cache-window", 32, "--cache-window-draft", 16), [(32, 4), (16, 4)]),
        (("--cache-window-draft", 16, "--cache-sinks-draft", 1), [DEFAULT, (16, 1)]),
        (("--cache-window", 32, "--cache-window-draft", 0), [(32, 4)]),
        (("--cache-window", 0, "--cache-window-draft", 16), [(16, 4)]),
    ],
)
def test_a_draft_model_has_the_same_window_or_its_own(tiny, tmp_path, arguments, expected):
    assert served(tiny, tmp_path, *arguments) == expected


@pytest.mark.parametrize("option", ["--cache-window", "--cache-sinks", "--cache-window-draft", "--cache-sinks-draft"])
@pytest.mark.parametrize("value", ["-1", "many", "1e3"])
def test_an_option_that_makes_no_sense_is_refused(tiny, option, value):
    command = [native.tool_path("llama-server"), "--model", tiny, option, value]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert f"'{value}' is not a number of tokens" in done.stdout + done.stderr
