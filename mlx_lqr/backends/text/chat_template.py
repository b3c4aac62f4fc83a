"""Chat templates in the environment that they are written for, which is that of transformers' `apply_chat_template`.

Templates come with models from strangers: they run in jinja2's sandbox, with bounds on time and memory, and whatever
goes wrong in one is an error of one line. Importing this needs jinja2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.utils import Namespace

from mlx_lqr.backends.text.bounded_template import BoundedEnvironment, limited_time
from mlx_lqr.errors import InputError, first_line


def rendered(
    source: str,
    messages: Sequence[Mapping[str, str]],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The text of a conversation, up to where the assistant's answer begins.

    Args:
        source: the template.
        special_tokens: their text by name, such as bos_token; a name that is not there is undefined for the template.

    Raises:
        InputError: no messages, or a template that refuses them or fails.
    """
    if not messages:
        raise InputError("a conversation needs at least one message")
    try:
        # a key without a value is left out, for templates ask whether it is there
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        with limited_time():
            return _compiled(source).render(
                messages=given,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
    except TemplateError as error:
        raise InputError(f"the model's chat template refuses the conversation: {first_line(error)}") from error
    except Exception as error:  # a template can bring about any
        raise InputError(f"the model's chat template fails: {type(error).__name__}: {first_line(error)}") from error


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` around what the assistant says, which marks it for training alone."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # a block with a scope of its own, as transformers has it
        return nodes.CallBlock(self.call_method("_unchanged"), [], [], body).set_lineno(line)

    def _unchanged(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """`dict`, but for the attributes of Python's own class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace`, without names that begin with an underscore, which could reach what Python keeps inside."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # without `self`, for a template may use that name
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no names that begin with an underscore, such as {name!r}")


@lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    environment = BoundedEnvironment(
        {"tojson": _to_json},  # jinja2's own escapes HTML
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
    )
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda layout: datetime.now().strftime(layout),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.bounded(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)
