"""Tiny models that speak: a tokenizer of single letters, and one that ends nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from helpers.tiny import tiny
from mlx_lqr.backends.mlx.model import MLXModel
from mlx_lqr.backends.text.text_tokenizer import Message


class NoEnd:
    """A tokenizer for models that have none: nothing ends a text."""

    end_tokens: frozenset[int] = frozenset()


class Letters:
    """A tokenizer of single letters with a chat template: a token for the role, then the text."""

    end_tokens: frozenset[int] = frozenset()
    has_chat_template = True
    roles = ("system", "user", "assistant")

    def chat(self, messages: list[Message]) -> list[int]:
        tokens: list[int] = []
        for message in messages:
            tokens += [60 + self.roles.index(message["role"]), *(ord(letter) % 59 for letter in message["content"])]
        return [*tokens, 62]

    def chat_text(self, messages: list[Message]) -> str:
        return "".join(f"<{message['role']}> {message['content']}" for message in messages)

    def chat_continuations(self, messages: list[Message], texts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        return self.chat(messages), [[ord(letter) % 59 for letter in text] for text in texts]

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(self.add(token) for token in tokens)

    def stream(self, prompt: Sequence[int] = ()) -> Letters:
        return self

    def add(self, token: int) -> str:
        return chr(59 + token) if token < 59 else ""

    def finish(self) -> str:
        return ""


def with_tokenizer(family: str = "llama", **changes: Any) -> MLXModel:
    """A tiny model that can generate until it is told to stop."""
    model = tiny(family, **changes)
    model._tokenizer = NoEnd()  # type: ignore[assignment]
    return model


def chatting(family: str = "llama", **changes: Any) -> MLXModel:
    """A tiny model that can hold a conversation."""
    model = tiny(family, **changes)
    model._tokenizer = Letters()  # type: ignore[assignment]
    return model
