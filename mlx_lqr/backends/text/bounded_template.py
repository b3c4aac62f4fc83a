"""jinja2's sandbox, in which a template can neither run for ever nor fill the memory.

Time: every line that runs is watched, so that a loop ends when its time is over. Memory: whatever could make much out
of little in one operation (`**`, `*`, `%`, joining, wide formats) is refused before it does. Ordinary templates come
nowhere near these limits.
"""

from __future__ import annotations

import functools
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

SECONDS = 5.0
"""How long a template may run; what people write takes some milliseconds."""
CHARACTERS = 10_000_000
"""Of a text or elements of a list, at most."""
NUMBER = 1_000_000
"""The largest number among the arguments of a filter or method: widths, counts, indentations."""
_LONG_NUMBER = re.compile(r"\d{7,}")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """See the module."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, filters: Mapping[str, Callable[..., Any]], **options: Any) -> None:
        super().__init__(finalize=_shown, **options)
        del self.globals["lipsum"]  # as much text as one asks for
        self.filters = {name: _checked(function) for name, function in {**self.filters, **filters}.items()}

    @staticmethod
    def concat(parts: Iterable[Any]) -> str:
        """What a template puts out, or keeps of a block."""
        taken, length = [], 0
        for part in parts:
            length += len(part)
            _check_size(length)
            taken.append(part)
        return "".join(taken)

    def bounded(self, source: str) -> Template:
        """The template of this text."""
        code = self.compile(_Added().visit(self.parse(source)))
        return Template.from_code(self, code, self.globals)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            _check_size(len(left) + len(right))
        elif operator == "*":
            _check_size(_repeated(left, right) or _repeated(right, left))
        elif operator == "**":
            _check_numbers((left, right), 100)
        elif operator == "%" and isinstance(left, str):
            _extent((left, right))
            _check_layout(left, right if isinstance(right, tuple) else (right,))
        if operator in ("+", "*") and isinstance(left, int) and isinstance(right, int):
            _check_digits(left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        method = getattr(__obj, "__wrapped__", __obj)  # jinja2 wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, list, tuple, dict)):
            _check_arguments((owner, *args, *kwargs.values()))
            if getattr(method, "__name__", "") in ("format", "format_map"):
                _check_layout(str(owner), (*args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)


class _Added(NodeTransformer):
    """`a ~ b` as the sum of two texts, which is checked as all sums are."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802 - jinja2's name
        self.generic_visit(node)
        texts = [nodes.Filter(part, "string", [], [], None, None).set_lineno(node.lineno) for part in node.nodes]
        return functools.reduce(lambda a, b: nodes.Add(a, b).set_lineno(node.lineno), texts)  # type: ignore[return-value]


@contextmanager
def limited_time() -> Iterator[None]:
    """Inside this context Python code of this thread is stopped after `SECONDS`.

    Raises:
        SecurityError: inside, at whatever line is running then.
    """
    end, before = time.monotonic() + SECONDS, sys.gettrace()

    def watch(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if time.monotonic() > end:
            raise SecurityError(f"it runs for longer than {SECONDS:g} s")
        return watch

    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def filter_(*args: Any, **kwargs: Any) -> Any:
        _check_arguments((*args, *kwargs.values()))
        if function.__name__ == "do_format":
            _check_layout(str(args[0]), args[1:])
        return function(*args, **kwargs)

    return filter_


def _check_arguments(arguments: tuple[Any, ...]) -> None:
    """Refuse what could make much of little: large numbers, and two long texts, one of which may be repeated."""
    _check_numbers(arguments, NUMBER)
    lengths = sorted(map(_extent, arguments), reverse=True)
    _check_size(lengths[0] * lengths[1] // 10 if len(lengths) > 1 else 0)


def _check_layout(layout: str, arguments: tuple[Any, ...]) -> None:
    """A format with a width, which may be among the arguments."""
    if _LONG_NUMBER.search(layout):
        raise SecurityError("a format is too wide")
    _check_numbers(arguments, NUMBER if "*" in layout or "{" in layout else sys.maxsize)


def _check_numbers(arguments: Iterable[Any], largest: int) -> None:
    for one in arguments:
        if isinstance(one, (int, float)) and abs(one) > largest:
            raise SecurityError(f"a number is larger than {largest}")


def _repeated(sequence: Any, times: Any) -> int:
    sized = isinstance(sequence, (str, list, tuple)) and isinstance(times, int)
    return len(sequence) * max(0, times) if sized else 0


def _shown(value: Any) -> Any:
    """A value that is to be put out."""
    _extent(value)
    return value


def _extent(value: Any) -> int:
    """How many characters and elements there are, in a list within another one too, as often as it is there."""
    total, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, (list, tuple, dict)):
            total += len(one)
            waiting += one if not isinstance(one, dict) else [*one.keys(), *one.values()]
        _check_size(total)
    return total


def _check_size(size: int) -> None:
    if size > CHARACTERS:
        raise SecurityError(f"it makes something longer than {CHARACTERS}")


def _check_digits(*numbers: int) -> None:
    if sum(number.bit_length() for number in numbers) > 10_000:
        raise SecurityError("a number is too long")
