"""Text to token ids and back: `tokenizers` for the ids, jinja2 for the chat template. transformers is not needed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream

from mlx_lqr.errors import InputError

Message = dict[str, str]
"""One chat message: {"role": "system" | "user" | "assistant", "content": text}."""


class Tokenizer:
    """The tokenizer of a model folder: its tokenizer.json, its settings, and its chat template."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise InputError(f"{folder} has no tokenizer.json: convert the model with `mlx-lqr convert` first")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{file} cannot be read: {error}") from error
        self._folder = folder
        self._settings = _read_json(folder / "tokenizer_config.json")
        self.end_tokens = frozenset(self._end_tokens(config))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the model's own beginning-of-sequence token where it has one."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `tokens`."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def stream(self) -> Detokenizer:
        """A detokenizer for tokens that arrive one by one."""
        return Detokenizer(self._tokenizer)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation in the model's own chat template, ready for the assistant's answer.

        Raises:
            InputError: the model has no chat template, or its template refuses these messages.
        """
        from jinja2 import TemplateError

        try:
            text = self._template.render(
                messages=list(messages),
                add_generation_prompt=True,
                bos_token=self._special("bos_token"),
                eos_token=self._special("eos_token"),
            )
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses the conversation: {error}") from error
        return self.encode(text, add_special_tokens=False)

    @property
    def has_chat_template(self) -> bool:
        return self._template_source is not None

    @cached_property
    def _template_source(self) -> str | None:
        file = self._folder / "chat_template.jinja"
        source = file.read_text("utf-8") if file.is_file() else self._settings.get("chat_template")
        if isinstance(source, list):  # named templates: [{"name": ..., "template": ...}]
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        return source

    @cached_property
    def _template(self) -> Any:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self._template_source is None:
            raise InputError("this model has no chat template (a base model?): use `generate`, which takes plain text")
        # The environment that Hugging Face chat templates are written for.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        return environment.from_string(self._template_source)

    def _special(self, name: str) -> str:
        token = self._settings.get(name) or ""
        return str(token["content"]) if isinstance(token, dict) else str(token)

    def _end_tokens(self, config: dict[str, Any]) -> set[int]:
        """Every id that ends a text, from whichever of the model's files says so."""
        found: set[int] = set()
        for source in (config, _read_json(self._folder / "generation_config.json")):
            ids = source.get("eos_token_id")
            found.update(ids if isinstance(ids, list) else [ids] if ids is not None else [])
        named = self._tokenizer.token_to_id(self._special("eos_token"))
        return found | ({named} if named is not None else set())


class Detokenizer:
    """Text of a growing sequence, in pieces that never split a character."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        """The text that became certain with this token; empty while a character is incomplete."""
        return self._stream.step(self._tokenizer, token) or ""


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}
