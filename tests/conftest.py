"""What several tests need: a real model and a real text."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from rich.console import Console

from turboquant_gguf.llamacpp import models
from turboquant_gguf.weights import converter
from turboquant_gguf.weights.calibration import calibrate
from turboquant_gguf.weights.convert import convert

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "ggml_turbo" / "graft"))  # the scripts of the build, which the wheel does not hold

converter.load()  # before any test imports gguf: all of them use the one of this package

# The same examples in every run; HYPOTHESIS_PROFILE=explore tries others.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))

# A runner started in the background ignores SIGINT, and every child would inherit that: tests that interrupt could not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """With TURBOQUANT_NO_SKIPS, a test that skips has failed: what it wants should have been installed.

    The variable holds words of reasons that may be, separated by commas.
    """
    report = yield
    allowed = os.environ.get("TURBOQUANT_NO_SKIPS")
    if allowed is not None and report.skipped and not hasattr(report, "wasxfail"):
        reason = str(call.excinfo.value)
        if not any(words in reason for words in filter(None, allowed.split(","))):
            report.outcome, report.longrepr = "failed", f"skipped, and TURBOQUANT_NO_SKIPS is set: {reason}"
    return report


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not path:
        pytest.skip("there is no Chromium to open pages with")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1: the GGUF named in models/manifest.toml, fetched once into the user's cache."""
    try:
        return models.fetch("smollm2-135m")
    except models.NoNetworkError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_folder(smollm2, tmp_path_factory) -> Path:
    """The same model as a Hugging Face folder, float32: what transformers reads from the GGUF."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": smollm2.parent, "gguf_file": smollm2.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    del read.config.quantization_config  # of the GGUF; what was read is not quantized any more
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    folder = tmp_path_factory.mktemp("checkpoints") / "SmolLM2-135M-Instruct"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_rotated(smollm2_folder) -> Path:
    """SmolLM2-135M-Instruct in float32, its values rotated in the weights."""
    path = smollm2_folder.parent / "rotated.gguf"
    return convert(smollm2_folder, path, outtype="f32", rotate="values", console=Console(quiet=True)).path


@pytest.fixture(scope="session")
def smollm2_plain(smollm2_folder) -> Path:
    """SmolLM2-135M-Instruct in float32, as llama.cpp's converter writes it."""
    path = smollm2_folder.parent / "plain.gguf"
    return convert(smollm2_folder, path, outtype="f32", rotate="none", console=Console(quiet=True)).path


@pytest.fixture(scope="session")
def calibrated(smollm2, tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct, Q4_1, with the calibration of its keys that a user gets."""
    path = tmp_path_factory.mktemp("calibrated") / "smollm2.gguf"
    return calibrate(smollm2, path, console=Console(quiet=True)).path


@pytest.fixture(params=["as it is", "calibrated"])
def model(request, smollm2) -> Path:
    """SmolLM2-135M-Instruct as it is, and with calibrated keys."""
    return smollm2 if request.param == "as it is" else request.getfixturevalue("calibrated")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A random model with heads of 64 values, which computes fast."""
    import checkpoints  # brings transformers and torch

    folder = tmp_path_factory.mktemp("tiny")
    made = checkpoints.gguf(folder, "stablelm, head size 64", rotate="values")
    return made.rename(folder / "tiny.gguf")  # llama-bench takes a comma for the end of a name


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """The raw test split of WikiText-2, from the folder `shared` beside the repository."""
    path = ROOT.parent / "shared" / "data" / "wiki.test.raw"
    if not path.is_file():
        pytest.skip("there is no shared/data/wiki.test.raw beside the repository")
    return path


@pytest.fixture(scope="session")
def pristine() -> Path:
    """The pinned sources of llama.cpp, from the cache that the build fills."""
    import source

    cache = os.environ.get("TURBOQUANT_CACHE_DIR") or "~/.cache/turboquant-gguf"
    return source.pinned(Path(cache).expanduser())


@pytest.fixture(scope="session")
def grafted(pristine, tmp_path_factory) -> Path:
    """The same with our lines in them."""
    import graft

    folder = tmp_path_factory.mktemp("grafted") / "llama.cpp"
    graft.write(pristine, folder, graft.insert(pristine, graft.load()))
    return folder


@pytest.fixture(scope="session")
def stock_libraries(pristine, request) -> Path:
    """The folder of a libllama built from the pinned sources without our insertions; kept in pytest's cache folder."""
    build = request.config.cache.mkdir("stock-llama.cpp")
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_BUILD_COMMON=OFF", "-DGGML_CCACHE=ON", "-DBUILD_SHARED_LIBS=ON"]
    for command in (
        ["cmake", "-S", pristine, "-B", build, *options],
        ["cmake", "--build", build, "--target", "llama", "--parallel", str(os.cpu_count())],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return build / "bin"
