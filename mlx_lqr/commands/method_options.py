"""--method and the options of every method, from the registry: each option once, with the methods that have it.

They are looked up when a command is run or its help is shown, since other packages may add methods. A command that is
declared with `cls=MethodCommand` has them, and asks `method_choice` which method was chosen and what was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from mlx_lqr.commands.help import METHOD, Command, Decorator, option, together
from mlx_lqr.commands.options import layers_option, method_option, positions_option
from mlx_lqr.commands.values import Layers
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.controller import Positions
from mlx_lqr.methods.method import Method, Option, belongs_to
from mlx_lqr.methods.registry import METHODS

DEFAULT = "alqr"
_GIVEN = "mlx_lqr.method_options"


@dataclass(frozen=True)
class MethodChoice:
    """A method and all that a person has said about it."""

    method: Method[Any]
    options: dict[str, Any]
    """Those that were given."""
    layers: Layers | None
    positions: Positions | None


class MethodCommand(Command):
    """A command with --method, --layers, --positions and the options of every method."""

    _declared: list[click.Parameter]
    _all: list[click.Parameter]
    _methods: list[Method[Any]]

    @property
    def params(self) -> list[click.Parameter]:
        """click's own attribute, which it also changes: one list, as long as the methods are the same."""
        methods = list(METHODS.values())
        if methods != self._methods:
            self._methods, self._all = methods, [*_parameters(methods), *self._declared]
        return self._all

    @params.setter
    def params(self, declared: list[click.Parameter]) -> None:
        self._declared = declared
        self._methods = []


def method_choice() -> MethodChoice:
    """What was given to the command that is running.

    Raises:
        InputError: an option of another method, or a value that it cannot have.
    """
    given = dict(click.get_current_context().meta[_GIVEN])
    method = METHODS[given.pop("method")]
    layers, positions = given.pop("layers"), given.pop("positions")
    own = {one.name: one for one in method.options}
    options = {}
    for name, value in given.items():
        if value is None:
            continue
        if name not in own:
            raise InputError(f"{_flag(name)} is not for the method {method.name}: {belongs_to(name)}")
        reader = own[name].reader
        options[name] = value if reader is None else reader(value)
    method.complete(options)
    return MethodChoice(method, options, layers, positions)


def _parameters(methods: Sequence[Method[Any]]) -> list[click.Parameter]:
    having: dict[str, list[tuple[Method[Any], Option]]] = {}
    for method in methods:
        for one in method.options:
            having.setdefault(one.name, []).append((method, one))

    @together(
        method_option([method.name for method in methods], DEFAULT),
        layers_option(_layers_help(methods)),
        positions_option(_positions_help(methods)),
        *(_option(owners) for owners in having.values()),
    )
    def nothing() -> None: ...

    parameters = click.command()(nothing).params
    for parameter in parameters:
        parameter.expose_value = False
        parameter.callback = _remember
    return parameters


def _remember(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    ctx.meta.setdefault(_GIVEN, {})[parameter.name] = value
    return value


def _option(owners: Sequence[tuple[Method[Any], Option]]) -> Decorator:
    """An option as a click option, whose help says which methods have it and what it is for each by default.

    Raises:
        InputError: methods that mean different things by it.
    """
    one = owners[0][1]
    for method, other in owners[1:]:
        if other.kind != one.kind:
            raise InputError(
                f"the methods {owners[0][0].name} and {method.name} mean different things by {_flag(one.name)}: "
                "rename it in one of them"
            )
    if one.kind is bool:
        attributes: dict[str, Any] = {"is_flag": True}
        declaration = f"{_flag(one.name)}/{_flag(one.off or 'no-' + one.name)}"
    else:
        declaration = _flag(one.name)
        if isinstance(one.kind, tuple):
            attributes = {"type": click.Choice(one.kind)}
        elif one.reader is not None:
            attributes = {"type": click.Path(), "metavar": "FILE"}
        else:
            attributes = {"type": one.kind}
    defaults = ", ".join(_default(method, other) for method, other in owners)
    return option(declaration, heading=METHOD, help=f"{one.help} [{defaults}]", default=None, **attributes)


def _default(method: Method[Any], one: Option) -> str:
    if one.default is None or isinstance(one.default, bool):
        return method.name
    value = f"{one.default:g}" if isinstance(one.default, int | float) else one.default
    return f"{method.name}: {value}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _layers_help(methods: Sequence[Method[Any]]) -> str:
    return (
        "Where to steer, such as 20-29, all, or auto: where the prompts are told apart. By default "
        + _by_default({"auto": "auto", "middle": "the middle layer", "all": "all"}, {m.name: m.layers for m in methods})
        + "."
    )


def _positions_help(methods: Sequence[Method[Any]]) -> str:
    return (
        "Which tokens to steer: from the prompt's last one on, or every prompt token too. By default "
        + _by_default({"all": "all", "last": "last"}, {m.name: m.positions for m in methods})
        + "."
    )


def _by_default(words: dict[str, str], chosen: dict[str, str]) -> str:
    """ "auto for alqr, the middle layer for actadd, and all for the others" """
    parts = []
    for value, word in list(words.items())[:-1]:
        names = [name for name, own in chosen.items() if own == value]
        if names:
            parts.append(f"{word} for {', '.join(names)}")
    return f"{'; '.join(parts)}; and {list(words.values())[-1]} for the others"
