"""The folder of this package in the user's cache."""

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """The folder for models and measurements: $TURBOQUANT_CACHE_DIR, or turboquant-gguf where the system keeps caches."""
    if chosen := os.environ.get("TURBOQUANT_CACHE_DIR"):
        return Path(chosen)
    return platformdirs.user_cache_path("turboquant-gguf", appauthor=False)
