"""What `inspection` found, as text for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from rich.console import Group, RenderableType
from rich.markup import escape

from ..core import tables
from ..core.tables import Column, Table, count
from ..core.units import count_text, size_text
from ..llamacpp.cachetypes import CacheTypes
from ..llamacpp.modelmemory import MOST_TOKENS
from .inspection import AttentionGroup, Caches, Pair, Report

_SHOWN_ELEMENTS = 8
"""Arrays of more are counted, not shown."""


def heading(report: Report) -> str:
    """The name of the file, or of the first of several parts."""
    others = f" and {len(report.files) - 1} further parts" if len(report.files) > 1 else ""
    return f"[bold]{escape(report.files[0])}[/]{others}"


def facts(report: Report) -> RenderableType:
    """What the file says, a line each."""
    return tables.facts(_facts(report))


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    if report.name:
        yield "name", report.name
    yield "architecture", report.architecture or "not said"
    yield "parameters", count_text(report.parameters)
    if report.layers is not None:
        yield "layers", f"{report.layers}{_layers_apart(report)}"
    if report.attention:
        queries, kept = (_by_layer(report.attention, name) for name in ("heads", "kv_heads"))
        yield "heads", f"{queries}; of keys and values {kept}"
        keys, values = (_by_layer(report.attention, name) for name in ("head_size_k", "head_size_v"))
        yield "head size", keys if keys == values else f"{keys} for keys; {values} for values"
    if any(group.window for group in report.attention):
        windows = [group for group in report.attention if group.window]
        yield "sliding window", f"{windows[0].window} tokens ({count(sum(group.layers for group in windows), 'layer')})"
    if report.trained_context is not None:
        yield "trained context", f"{report.trained_context} tokens"
    yield "file", f"{size_text(report.file_bytes)}, of which weights {size_text(report.weight_bytes)}"
    if report.tokenizer:
        yield "tokenizer", _tokenizer(report)
    found = ["values rotated in the weights"] * report.values_rotated + ["keys calibrated"] * report.keys_calibrated
    yield "turboquant", ", ".join(found) or "none"
    for key, value in report.turboquant.items():
        many = isinstance(value, list) and len(value) > _SHOWN_ELEMENTS
        yield "", f"{key} = {f'{len(value)} numbers' if many else value}"


def _layers_apart(report: Report) -> str:
    with_attention = sum(group.layers for group in report.attention)
    sharing = sum(group.layers for group in report.attention if group.shares)
    apart = f", {with_attention} with attention" if 0 < with_attention < report.layers else ""
    return apart + (f", {sharing} of which read the keys and values of others" if sharing else "")


def _by_layer(attention: Iterable[AttentionGroup], name: str) -> str:
    """One number where all layers agree, otherwise each with its layers, such as "256 (5 layers), 512 (1 layer)"."""
    counts: Counter[int] = Counter()
    for group in attention:
        counts[getattr(group, name)] += group.layers
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} ({count(layers, 'layer')})" for value, layers in counts.items())


def _tokenizer(report: Report) -> str:
    tokenizer = report.tokenizer
    model = f"{tokenizer.model} ({tokenizer.pre})" if tokenizer.pre else tokenizer.model
    return f"{model}, {tokenizer.tokens} tokens, {'a' if tokenizer.chat_template else 'no'} chat template"


def tensors(report: Report) -> RenderableType:
    """The types of the tensors."""
    rows = [[group.type, str(group.tensors), size_text(group.bytes), f"{group.share:.1%}"] for group in report.tensors]
    return _shown(tables.columns("tensor type", "tensors", "size", "share"), rows)


def caches(report: Report) -> Group:
    """What caches take, and which contexts fit, as matrices (rows: keys, columns: values) and for equal types."""
    found = report.caches
    parts: list[RenderableType] = []
    fit = found.memory is not None and found.weights < found.memory
    if not found.together:
        parts += ["[bold]Bytes of cache for a token[/] (rows: keys, columns: values)"]
        parts += [_matrix(found, lambda pair: str(pair.bytes_per_token)), ""]
    if fit and not found.together:
        parts += [f"[bold]Longest context in {size_text(found.memory)}, in tokens[/] (rows: keys, columns: values)"]
        parts += [_matrix(found, lambda pair: _tokens(pair.longest_context, _short)), ""]
    parts += [_equal_types(found, report.trained_context, fit), "", *_notes(found, report.trained_context)]
    if found.memory is not None and not fit:
        needed, given = size_text(found.weights), size_text(found.memory)
        parts += [f"[bold red]The weights alone take {needed}: they do not fit in {given}.[/]"]
    return Group(*parts)


def _matrix(found: Caches, cell: Callable[[Pair], str]) -> RenderableType:
    pairs = {(pair.type_k, pair.type_v): pair for pair in found.pairs}
    rows = [[k, *("-" if pairs[k, v].refusal else cell(pairs[k, v]) for v in found.types)] for k in found.types]
    return _shown([Column("", words=True, style="bold"), *map(Column, found.types)], rows)


def _equal_types(found: Caches, trained: int | None, fit: bool) -> RenderableType:
    """Keys and values of the same type."""
    headings = ["keys and\nvalues", "bytes for\na token", "smaller\nthan f16"]
    headings += [f"cache for\n{trained} tokens"] if trained else []
    headings += ["longest\ncontext", "times\nf16"] if fit else []
    rows = []
    for pair in found.pairs:
        if pair.type_k != pair.type_v:
            continue
        if pair.refusal:
            rows.append([pair.type_k, *["-"] * (len(headings) - 1)])
            continue
        cells = [pair.type_k, str(pair.bytes_per_token), _times(pair.smaller_than_f16)]
        cells += [size_text(pair.trained_bytes)] if trained else []
        cells += [_tokens(pair.longest_context, str), _times(pair.times_f16)] if fit else []
        rows.append(cells)
    return _shown(tables.columns(*headings), rows)


def _shown(columns: list[Column], rows: list[list[str]]) -> RenderableType:
    return tables.Shown(Table("", columns, {"": rows}))


def _notes(found: Caches, trained: int | None) -> Iterator[str]:
    """What the numbers mean, and why some are missing."""
    refused: dict[str, list[str]] = {}
    for pair in found.pairs:
        if pair.type_k == pair.type_v and pair.refusal:
            refused.setdefault(pair.refusal, []).append(pair.type_k)
    for reason, types in refused.items():
        yield f"No {', '.join(types)}: {escape(reason)}"
    if found.together:
        yield "This model keeps keys and values as one, so they must have the same type."
    fixed = next((pair for pair in found.pairs if pair.fixed_bytes), None)
    if fixed:
        types = CacheTypes(fixed.type_k, fixed.type_v)
        more = size_text(fixed.fixed_bytes)
        where = f"at {trained} tokens" if trained else "in long contexts"
        yield f"Recent or sliding windows and recurrent states take {more} more {where} ({types})."
    if found.memory is not None:
        yield (
            f"Counted by llama.cpp for {found.sequences} sequence, batches of {found.ubatch} and the CPU: the weights "
            f"({size_text(found.weights)}), the cache, and buffers ({size_text(found.compute)} and more)."
        )
    if found.memory is not None and trained and any((pair.longest_context or 0) > trained for pair in found.pairs):
        yield f"The model was trained for {trained} tokens. Beyond them it needs RoPE scaling (llama-server --help)."


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _tokens(count: int, write: Callable[[int], str]) -> str:
    return "any" if count == MOST_TOKENS else write(count)


def _short(tokens: int) -> str:
    """Rounded down, since more would not fit."""
    if tokens >= 1_000_000:
        return f"{tokens // 10_000 / 100:.2f}M"
    return f"{tokens // 1000}k" if tokens >= 10_000 else str(tokens)
