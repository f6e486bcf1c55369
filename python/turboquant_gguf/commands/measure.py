"""A subcommand for each kind of measurement, such as `turboquant-gguf ppl`: a sweep of that kind, and its table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from ..core import messages
from ..kinds import Kind
from ..kinds.base import Option
from ..measure.sweep import Outcome
from ..measure.sweep import measure as measure_kind
from ..report import plots, tables
from ..report.contents import Section
from . import options

KEPT = "What was measured is kept and not measured again: interrupt it, and the same command goes on where it stopped."


def parameter(one: Option, kind: type[Kind] | None = None) -> click.Option:
    """An option for a click command; kind: as `sweep` has it, which says what it is for."""
    more = dict(one.more)
    if kind:
        more.pop("required", None)
        more["help"] = f"For {kind.title.lower()}: {more['help'][0].lower()}{more['help'][1:]}"
        if one.sweep_default is not None:
            more["default"] = one.sweep_default
            more["help"] = more["help"].partition(" [default:")[0]
    return click.Option(one.names, **more)


def old_name(one: Option) -> click.Option:
    """The option under the name it once had, which is hidden and warns."""
    old = one.old_name

    def take(context: click.Context, _parameter: click.Parameter, value: Any) -> None:
        if value is not None:
            messages.say(f"[bold yellow]Note:[/] {old} is now called {one.names[0]}.")
            context.params[one.parameter] = value

    more = {key: value for key, value in one.more.items() if key in ("type", "metavar")}
    return click.Option([old], hidden=True, expose_value=False, callback=take, **more)


def parameters(of: Iterable[tuple[Option, type[Kind] | None]]) -> list[click.Option]:
    """The options for a click command, those of old names behind the new ones, which they set."""
    found = []
    for one, kind in of:
        found.append(parameter(one, kind))
        found += [old_name(one)] if one.old_name else []
    return found


def distinct(made: click.Command) -> click.Command:
    """The command. Raises TypeError if two of its options have the same name."""
    seen: set[str] = set()
    for one in made.params:
        if twice := seen & {*one.opts, *one.secondary_opts}:
            raise TypeError(f"{made.name}: two options are called {min(twice)}. One of them needs another name.")
        seen |= {*one.opts, *one.secondary_opts}
    return made


def command(kind: type[Kind]) -> click.Command:
    """The subcommand of a kind of measurement."""

    @click.pass_context
    def run(
        click_context: click.Context,
        /,
        model: Path | None,
        plot_file: Path | None,
        force: bool,
        as_json: bool,
        **settings: Any,
    ) -> None:
        if plot_file:
            plots.check()
        console = Console(stderr=as_json)
        outcome = measure_kind(kind.name, model, console=console, **settings)
        _show(kind, outcome, console)
        if as_json:
            found = [{"model": one.model, **one.as_json()} for one in outcome.findings]
            click.echo(json.dumps({"kind": kind.name, **outcome.as_json(), "findings": found}, indent=2))
        if plot_file and outcome.findings:
            plots.write(_sections(kind, outcome), plot_file, plot_file.suffix[1:].lower())
        end(click_context, outcome, Console(stderr=True))

    made = click.Command(
        kind.command,
        callback=run,
        params=[
            click.Argument(["model"], type=click.Path(path_type=Path), required=not kind.default_model),
            *parameters((one, None) for one in kind.options),
        ],
        help=f"{kind.help} {KEPT}",
        short_help=kind.summary,
        epilog=f"\b\nExamples:\n{kind.examples.strip(chr(10))}",
    )
    for add in (
        options.types(kind.default_types, f"{options.APART} What they are compared with is always measured."),
        options.window,
        options.placement,
        _results,
        options.cluster,
        options.plot_file("what was measured"),
        options.force,
        options.json("what was done and found"),
    ):
        made = add(made)
    return distinct(made)


_results = click.option(
    "-o",
    "--results",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where measurements are kept, and taken from if made before [default: in the user's cache folder]",
)


def _sections(kind: type[Kind], outcome: Outcome) -> list[Section]:
    return [Section(outcome.findings[0].model, {kind.name: outcome.findings})]


def _show(kind: type[Kind], outcome: Outcome, console: Console) -> None:
    if outcome.findings:
        console.print(tables.terminal(_sections(kind, outcome)), highlight=False)
        console.print(f"[dim]{escape(kind.note)}[/]", highlight=False)


def end(context: click.Context, outcome: Outcome, console: Console) -> None:
    """Say what was measured and what failed, and end with the exit code for that."""
    for failure in outcome.failures:
        messages.error(failure.message, failure.details, of=failure.what)
    before = f", and {outcome.known} were there" if outcome.known else ""
    messages.say(
        f"{escape(str(outcome.results))}: {outcome.added} of {outcome.asked} measurements added{before}.", console
    )
    if outcome.interrupted:
        messages.say("The same command goes on from there.")
        raise click.Abort
    context.exit(max((failure.exit_code for failure in outcome.failures), default=0))
