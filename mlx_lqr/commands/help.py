"""`--help` that can be scanned: options under headings, commands under sections, and a line for every argument.

An option names its heading where it is declared. HEADINGS is the order in which they are printed, and the only list of
them. Declare options, arguments and commands with the functions below: they will not go without a help text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

TEXT = "Text"
CONCEPT = "Concept"
METHOD = "Method"
STEERING = "Steering"
TASK = "Task"
MEASURING = "Measuring"
SEARCH = "Search"
DECODING = "Decoding"
SERVER = "Server"
OUTPUT = "Output"
LOADING = "Loading the model"
OTHER = "Other"
HEADINGS = (TEXT, CONCEPT, METHOD, STEERING, TASK, MEASURING, SEARCH, DECODING, SERVER, OUTPUT, LOADING, OTHER)

WIDTH = 28
"""Of the column of names; the text of a longer name begins on the line below it"""

Decorator = Callable[[Any], Any]
C = TypeVar("C", bound=Callable[..., Any])


class Option(click.Option):
    """An option under a heading."""

    def __init__(self, *arguments: Any, heading: str, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        if heading not in HEADINGS:
            raise ValueError(f"no heading {heading!r}: add it to HEADINGS")
        self.heading = heading


class Argument(click.Argument):
    """An argument with a help text, which click has only from 8.5 on."""

    def __init__(self, *arguments: Any, help: str, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.help = help


class Command(click.Command):
    """A command whose options are listed under headings."""

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Nothing: `format_options` lists them, for every release of click alike."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_parameters(self, ctx, formatter)


class Group(click.Group):
    """A group whose commands are listed under sections."""

    command_class = Command

    def __init__(self, *arguments: Any, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.sections: dict[str, list[click.Command]] = {}

    def add_section(self, title: str, commands: Iterable[click.Command]) -> None:
        """Add commands, listed together and in this order."""
        for command in commands:
            self.add_command(command)
            self.sections.setdefault(title, []).append(command)

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Nothing: see `Command`."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_commands(ctx, formatter)
        _write_parameters(self, ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        listed = [command for commands in self.sections.values() for command in commands]
        others = [command for command in self.commands.values() if command not in listed]
        sections = {**self.sections, "Commands": others} if others else self.sections
        width = max((len(str(command.name)) for command in (*listed, *others)), default=0)
        for title, commands in sections.items():
            with formatter.section(title):
                formatter.write_dl([(str(one.name).ljust(width), one.get_short_help_str()) for one in commands])


def _write_parameters(command: click.Command, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """The arguments, and the options under their headings; those that click adds itself come last."""
    rows: dict[str, list[tuple[str, str]]] = {heading: [] for heading in ("Arguments", *HEADINGS)}
    for parameter in command.get_params(ctx):
        if isinstance(parameter, Argument):
            rows["Arguments"].append((parameter.make_metavar(ctx), str(parameter.help)))
        elif (record := parameter.get_help_record(ctx)) is not None:
            rows[getattr(parameter, "heading", OTHER)].append(record)
    widths = [len(name) for entries in rows.values() for name, _ in entries]
    width = min(max(widths, default=0), WIDTH)
    for heading, entries in rows.items():
        if entries:
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), text) for name, text in entries], col_max=WIDTH)


def option(*declarations: str, heading: str, help: str, **attributes: Any) -> Decorator:
    """`click.option` under a heading; a default is always shown."""
    attributes.setdefault("show_default", True)
    if isinstance(attributes.get("type"), click.IntRange):
        attributes.setdefault("metavar", "INTEGER")  # and not INTEGER RANGE: the range is shown beside the default
    return click.option(*declarations, cls=Option, heading=heading, help=help, **attributes)


def argument(name: str, *, help: str, **attributes: Any) -> Decorator:
    """`click.argument` with a line in `--help`."""
    return click.argument(name, cls=Argument, help=help, **attributes)


def command(
    name: str | None = None, cls: type[Command] = Command, **attributes: Any
) -> Callable[[Callable[..., Any]], Command]:
    """`click.command` whose help has headings. The docstring's first sentence is its line in the list of commands."""
    return click.command(name, cls=cls, **attributes)


def together(*options: Decorator) -> Callable[[C], C]:
    """Several options as one decorator, listed in this order."""

    def decorate(function: C) -> C:
        for one in reversed(options):
            function = one(function)
        return function

    return decorate
