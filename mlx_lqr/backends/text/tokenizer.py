"""Text to token ids and back: `tokenizers` for the ids, jinja2 for the chat template. transformers is not needed.

What the files say is read as transformers reads it, with one difference: tokenizer.json is taken as it is, where
transformers builds the tokenizers of some classes (LlamaTokenizer) anew from its vocabulary. SentencePiece, which these
models were trained with, gives the ids of the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from mlx_lqr.backends.text.detokenizer import Decoding, Detokenizer
from mlx_lqr.backends.text.library import opened, sound
from mlx_lqr.backends.text.text_tokenizer import TextTokenizer, check_text
from mlx_lqr.backends.text.tokenizer_files import chat_template, read_json, special_tokens
from mlx_lqr.errors import InputError, quoted


class Tokenizer(TextTokenizer):
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

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `tokens`."""
        if skip_special_tokens:
            return self._decoding.text(tokens)
        with sound():
            return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def stream(self, prompt: Sequence[int] = ()) -> Detokenizer:
        """A detokenizer for tokens that arrive one by one after a prompt's."""
        return Detokenizer(self._decoding, prompt)

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
