"""The kinds of measurement: every module here registers one. `runners` has what measures, which reports do not need."""

from importlib import import_module
from pkgutil import iter_modules

from .base import KINDS, Failure, Finding, Kind

for _module in iter_modules(__path__):
    if not _module.ispkg:
        import_module(f"{__name__}.{_module.name}")

__all__ = ["KINDS", "Failure", "Finding", "Kind"]
