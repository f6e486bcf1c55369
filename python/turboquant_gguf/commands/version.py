"""`turboquant-gguf version`, and `turboquant-gguf --version`."""

from __future__ import annotations

import json

import click
from rich.console import Console

from ..core import tables
from ..llamacpp import provenance
from . import options


@click.command(short_help="Tell the versions of this package and of the llama.cpp in it.")
@options.json("the versions")
def version(as_json: bool) -> None:
    """Tell the versions of this package and of the llama.cpp in it, its back ends and instruction set.

    A report of a fault should have this in it.
    """
    found = provenance.versions()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(f"turboquant-gguf {found['turboquant_gguf']}")
    facts = [
        ("llama.cpp", f"{found['llama_cpp']}, from {found['llama_cpp_source']}"),
        ("ggml", found["ggml"]),
        ("compiler", found["compiler"]),
        ("back ends", ", ".join(found["backends"])),
        ("instruction set", found["instruction_set"]),
    ]
    Console(highlight=False).print(tables.facts(facts))


def show(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    """A callback: for the option --version, instead of any command."""
    if wanted:
        context.invoke(version, as_json=False)
        context.exit()
