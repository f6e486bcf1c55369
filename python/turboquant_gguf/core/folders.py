"""The folder of this package in the user's cache."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder for models and measurements: $TURBOQUANT_CACHE_DIR, or turboquant-gguf in the user's cache folder."""
    if chosen := os.environ.get("TURBOQUANT_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turboquant-gguf"
