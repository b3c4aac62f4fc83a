"""Text to token ids and back, whoever does it: what the library asks of a tokenizer, and what follows from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from mlx_lqr.errors import InputError
from mlx_lqr.files.text import is_unicode

Message = dict[str, str]
"""One chat message: {"role": "system" | "user" | "assistant", "content": text}."""
Continuations = tuple[list[int], list[list[int]]]
"""Token ids: what several texts have before them, and each text's own."""


def has_answer(messages: Sequence[Message]) -> bool:
    """Whether there is an answer before the last message, which is a question, or the answer that is being written."""
    return any(message["role"] == "assistant" for message in messages[:-1])


class TextStream(Protocol):
    """The text of a growing sequence, in pieces that never split a character."""

    def add(self, token: int) -> str:
        """The text that became certain with this token; empty while something that follows may change it."""

    def finish(self) -> str:
        """The text that was still uncertain, now that nothing follows."""


class TextTokenizer(ABC):
    """A model's tokenizer and its chat template."""

    end_tokens: frozenset[int]
    """Every id that ends a text"""
    special_tokens: Mapping[str, str]
    """Texts by name: bos_token, eos_token, ..."""

    @abstractmethod
    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `tokens`."""

    @abstractmethod
    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """A detokenizer for tokens that arrive one by one after a prompt's."""

    @property
    @abstractmethod
    def first_token(self) -> int | None:
        """What a text follows that nothing else is before: the token for a text's beginning, or else for its end."""

    @property
    @abstractmethod
    def _template(self) -> str | None:
        """The chat template."""

    @abstractmethod
    def _encoded(self, text: str, add_special_tokens: bool) -> tuple[list[int], int]:
        """Token ids, and how many of the last ones are special tokens that were added after the text."""

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the model's own beginning-of-sequence token where it has one.

        A text that begins with that token itself, such as a chat template's, does not get it twice.
        """
        return self._encoded(text, add_special_tokens)[0]

    def continuations(self, prompt: str | Sequence[int], texts: Sequence[str]) -> Continuations:
        """Token ids of texts that follow a prompt, as they are when prompt and text are read as one.

        Where a border's characters become one token, such as a prompt's last space and an answer's first word, that
        token belongs to the text, and for all of the texts alike: their probabilities are comparable. A prompt that is
        given as ids stays as it is.

        Raises:
            InputError: nothing is left before the texts, in a model without a token to begin with.
        """
        if isinstance(prompt, str):
            return self._continuations(prompt, texts, add_special_tokens=True)
        return list(prompt), [self._after(prompt, text) for text in texts]

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation in the model's own chat template, ready for the assistant's answer.

        Raises:
            InputError: the model has no chat template, or its template refuses these messages.
        """
        return self.encode(self.chat_text(messages), add_special_tokens=False)

    def chat_text(self, messages: Sequence[Message]) -> str:
        """The same as text."""
        if self._template is None:
            raise InputError("this model has no chat template (a base model?): use `generate`, which takes plain text")
        from mlx_lqr.backends.text.chat_template import rendered

        return rendered(self._template, messages, self.special_tokens)

    def chat_continuations(self, messages: Sequence[Message], texts: Sequence[str]) -> Continuations:
        """Token ids of answers to a conversation; see `continuations`."""
        return self._continuations(self.chat_text(messages), texts, add_special_tokens=False)

    def _continuations(self, prompt: str, texts: Sequence[str], add_special_tokens: bool) -> Continuations:
        def encoded(text: str) -> list[int]:
            ids, after = self._encoded(text, add_special_tokens)
            return ids[: len(ids) - after]  # the text goes on, so it has no end

        return at_border(encoded, prompt, texts, self.first_token)

    def _after(self, prompt: Sequence[int], text: str) -> list[int]:
        """Token ids of a text after a prompt of which only the ids are known."""

        def encoded(text: str) -> list[int]:
            return self.encode(text, add_special_tokens=False)

        for before in (self.decode(prompt, skip_special_tokens=False), "\n", ".", "a"):
            own, whole = encoded(before), encoded(before + text)
            if whole[: len(own)] == own:
                return whole[len(own) :]
        return encoded(text)


def check_text(text: str) -> None:
    """Raise `InputError` for a text that no tokenizer can read."""
    if not is_unicode(text):
        raise InputError("the text has half a surrogate pair, which is no character: leave it out")


def at_border(
    encode: Callable[[str], list[int]], prompt: str, texts: Sequence[str], first_token: int | None
) -> Continuations:
    """Where prompt and text are read as one, the tokens that all have in common with the prompt alone, and the others.

    Args:
        first_token: stands before everything else where they have none in common.

    Raises:
        InputError: none in common, and no first token.
    """
    own, wholes = encode(prompt), [encode(prompt + text) for text in texts]
    common = min((common_length(own, whole) for whole in wholes), default=len(own))
    if common:
        return own[:common], [whole[common:] for whole in wholes]
    if first_token is None:
        raise InputError(f"no token is left before what follows {prompt[:40]!r}: give a longer prompt")
    return [first_token], wholes


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many characters, or tokens, two sequences begin with in common."""
    differing = (i for i, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(differing, min(len(first), len(second)))
