"""What several tests need: a real model and a real text."""

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from turboquant_gguf import models

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "ggml_turbo" / "graft"))  # the scripts of the build, which the wheel does not hold

# The same examples in every run; HYPOTHESIS_PROFILE=explore tries others.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))

# A runner started in the background ignores SIGINT, and every child would inherit that: tests that interrupt could not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1: the GGUF named in models/manifest.toml, fetched once into the user's cache."""
    try:
        return models.fetch("smollm2-135m")
    except models.NoNetworkError as error:
        pytest.skip(str(error))


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
