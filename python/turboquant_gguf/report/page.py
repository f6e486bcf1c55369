"""A file of measurements as a page to read, as tables for a README, as figures, and as data."""

from __future__ import annotations

import base64
import importlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from ..core import outputfile, progress
from ..core.tables import share
from ..errors import TurboquantError
from ..kinds import KINDS
from ..measure.store import Store
from . import contents, csv, plots, tables
from .contents import Section


def report(
    results: Path, *, outputs: Sequence[Path] = (), models: Sequence[str] = (), console: Console
) -> list[Section]:
    """Write what the file of measurements `results` says into `outputs`, and return it.

    outputs: the suffix, of FORMATS, says what is written. Each file appears whole or not at all, and replaces what had
    its name. models: parts of the names of those to show, in upper or lower case; none for all. Raises TurboquantError
    before anything is written if an output cannot be, or is `results` itself, if there is nothing to show, or if a
    package is missing.
    """
    for output in outputs:
        _check(output, results)
    if not results.is_file():
        raise TurboquantError(
            f"There is no file of measurements {results}. turboquant-gguf sweep and ppl --results make one."
        )
    with Store(results, read_only=True) as store, store.reading():
        sections = contents.read(store)
        tables.markdown(sections)  # looks at everything, so that what is damaged is found here
    if not sections:
        raise TurboquantError(
            f"Nothing is measured yet in {results}. Measure with: turboquant-gguf sweep MODEL --results {results}"
        )
    shown = [section for section in sections if _is_asked_for(section.model["name"], models)]
    if not shown:
        names = ", ".join(dict.fromkeys(section.model["name"] for section in sections))
        raise TurboquantError(f"No model in {results} is called {' or '.join(models)}. There are: {names}.")
    for output in outputs:
        with progress.status(console, f"writing {output.name}"), outputfile.beside(output) as unfinished:
            _WRITERS[output.suffix.lower()](shown, unfinished)
    return shown


def _check(output: Path, results: Path) -> None:
    suffix = output.suffix.lower()
    if suffix not in FORMATS:
        raise TurboquantError(f"{output.name} does not end in {', '.join(FORMATS)}, so it is unclear what to write.")
    if output.exists() and results.exists() and output.samefile(results):
        raise TurboquantError(f"{output} is the file of measurements itself. Give another name with -o.")
    outputfile.check(output, force=True)
    for name in _PACKAGES.get(suffix, ()):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise TurboquantError(
                f"{output.name} needs {name}, which is not installed. Install it with: "
                "pip install 'turboquant-gguf[report]'"
            ) from error


def _is_asked_for(name: str, models: Sequence[str]) -> bool:
    return not models or any(part.lower() in name.lower() for part in models)


def _html(sections: Sequence[Section], path: Path) -> None:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    machines = tables.machines_of(sections)
    shown = [kind for kind in KINDS if any(section.findings[kind] for section in sections)]
    environment = Environment(
        loader=PackageLoader("turboquant_gguf", "data"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    page = environment.get_template("report.html.j2").render(
        sections=sections,
        reading=[paragraph for kind in shown for paragraph in KINDS[kind].reading],
        facts=tables.facts,
        parts=lambda section: tables.parts(section, machines),
        figures=_figures,
        left_out=tables.left_out,
        share_text=share,
        provenance=tables.provenance(sections),
    )
    path.write_text(page, "utf-8")


def _figures(part: tables.Part) -> Iterator[dict[str, str]]:
    """The figures of a part as data URIs, for a light and for a dark page."""
    if part.maps:  # which are tables here
        return
    for panel in part.finding.kind.panels(part.finding):
        images = {
            name: f"data:image/svg+xml;base64,{base64.b64encode(plots.svg(panel, theme)).decode()}"
            for name, theme in (("light", plots.LIGHT), ("dark", plots.DARK))
        }
        yield {"title": panel.title, "alt": panel.alt, **images}


def _markdown(sections: Sequence[Section], path: Path) -> None:
    path.write_text(tables.markdown(sections), "utf-8")


def _json(sections: Sequence[Section], path: Path) -> None:
    path.write_text(json.dumps(contents.as_json(sections), indent=2) + "\n", "utf-8")


_WRITERS = {
    ".html": _html,
    ".md": _markdown,
    ".csv": csv.write,
    ".json": _json,
    ".png": partial(plots.write, form="png"),
    ".svg": partial(plots.write, form="svg"),
}
FORMATS = tuple(_WRITERS)
_PACKAGES = {".html": ("jinja2", "matplotlib"), ".png": ("matplotlib",), ".svg": ("matplotlib",)}
