"""Text to token ids and back: `tokenizers` for the ids, jinja2 for the chat template. transformers is not needed.

What the files say is read as transformers reads it, with one difference: tokenizer.json is taken as it is, where
transformers builds the tokenizers of some classes (LlamaTokenizer) anew from its vocabulary. SentencePiece, which these
models were trained with, gives the ids of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from mlx_lqr.backends.text.detokenizer import Decoding, Detokenizer, common_length
from mlx_lqr.backends.text.library import check_text, opened, sound
from mlx_lqr.backends.text.tokenizer_files import chat_template, read_json, special_tokens
from mlx_lqr.errors import InputError, quoted

Message = dict[str, str]
"""One chat message: {"role": "system" | "user" | "assistant", "content": text}."""
Continuations = tuple[list[int], list[list[int]]]
"""Token ids: what several texts have before them, and each text's own."""


class Tokenizer:
    """The tokenizer of a model folder: its tokenizer.json, its settings, and its chat template."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise InputError(f"{folder} has no tokenizer.json: convert the model with `mlx-lqr convert` first")
        self._tokenizer = opened(file)
        self._folder = folder
        self._settings = read_json(folder / "tokenizer_config.json")
        self._tokenizer.encode_special_tokens = bool(self._settings.get("split_special_tokens", False))
        with sound(f"the special tokens of {folder} cannot be added"):
            self.special_tokens = special_tokens(folder, self._settings, self._tokenizer)
        """Texts by name: bos_token, eos_token, ..."""
        self.end_tokens = frozenset(self._end_tokens(config))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the model's own beginning-of-sequence token where it has one.

        A text that begins with that token itself, such as a chat template's, does not get it twice.
        """
        return self._encoded(text, add_special_tokens)[0]

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `tokens`."""
        if skip_special_tokens:
            return self._decoding.text(tokens)
        with sound():
            return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def stream(self, prompt: Sequence[int] = ()) -> Detokenizer:
        """A detokenizer for tokens that arrive one by one after a prompt's."""
        return Detokenizer(self._decoding, prompt)

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

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def first_token(self) -> int | None:
        """What a text follows that nothing else is before: the token for a text's beginning, or else for its end."""
        names = (self.special_tokens.get(name) for name in ("bos_token", "eos_token"))
        return next((self._tokenizer.token_to_id(name) for name in names if name is not None), None)

    @cached_property
    def _template(self) -> str | None:
        return chat_template(self._folder, self._settings)

    @cached_property
    def _decoding(self) -> Decoding:
        asked = bool(self._settings.get("clean_up_tokenization_spaces", False))
        forced = bool(self._settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"))
        is_bpe = isinstance(self._tokenizer.model, tokenizers.models.BPE)  # which spells its spaces itself
        return Decoding(self._tokenizer, clean_up=asked and (forced or not is_bpe))

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

    def _encoded(self, text: str, add_special_tokens: bool) -> tuple[list[int], int]:
        """Token ids, and how many of the last ones are special tokens that were added after the text."""
        check_text(text)
        with sound():
            encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
            ids, added = list(encoding.ids), list(encoding.special_tokens_mask)
        before = next((i for i, mark in enumerate(added) if not mark), len(added))
        after = next((i for i, mark in enumerate(reversed(added)) if not mark), 0)
        if before and ids[before : 2 * before] == ids[:before]:
            del ids[:before]
        return ids, after

    def _end_tokens(self, config: Mapping[str, Any]) -> set[int]:
        """Every id that ends a text, from whichever of the model's files says so."""
        inner = config.get("text_config")
        sources = (config, inner if isinstance(inner, dict) else {}, read_json(self._folder / "generation_config.json"))
        tokens: set[int] = set()
        for source in sources:
            ids = source.get("eos_token_id")
            given = ids if isinstance(ids, list) else [ids] if ids is not None else []
            if not all(isinstance(token, int) and not isinstance(token, bool) for token in given):
                raise InputError(
                    f"{self._folder} says eos_token_id {quoted(ids)}, which is no token: download it again"
                )
            tokens.update(given)
        named = self.special_tokens.get("eos_token")
        ending = self._tokenizer.token_to_id(named) if named is not None else None
        return tokens | ({ending} if ending is not None else set())


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
