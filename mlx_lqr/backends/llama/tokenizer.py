"""llama.cpp's own tokenizer, and the chat template of the GGUF file."""

from __future__ import annotations

import codecs
import ctypes
from collections.abc import Sequence
from functools import cached_property

from mlx_lqr.backends.llama.library import llama
from mlx_lqr.backends.llama.load import Loaded
from mlx_lqr.backends.text.text_tokenizer import TextTokenizer, check_text
from mlx_lqr.convert.ends import END_OF_TURN
from mlx_lqr.errors import InputError

_SENTENCEPIECE = 1
"""LLAMA_VOCAB_TYPE_SPM"""
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_DEFAULT_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}
"""Of SentencePiece, where the file does not say"""


class LlamaTokenizer(TextTokenizer):
    """The tokenizer of a loaded model.

    Args:
        loaded: the model.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._library, self._loaded, self._metadata = llama(), loaded, loaded.metadata
        self._vocab = self._library.llama_model_get_vocab(loaded.pointer)
        self.size: int = self._library.llama_vocab_n_tokens(self._vocab)
        is_sentencepiece = self._library.llama_vocab_type(self._vocab) == _SENTENCEPIECE
        self.strips_space = is_sentencepiece and self._metadata.get("tokenizer.ggml.add_space_prefix", "true") == "true"
        """Whether a text's first token is spelled with a space that is not the text's"""
        defaults = _DEFAULT_IDS if is_sentencepiece else {}
        stated = {role: self._stated(key, defaults.get(role)) for role, key in _SPECIAL.items()}
        self._ids = {role: token for role, token in stated.items() if token is not None}
        self.special_tokens = {role: self._spelled(token) for role, token in self._ids.items()}
        self.end_tokens = frozenset(self._ends())
        self._pieces: dict[tuple[int, bool], bytes] = {}

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """See `TextTokenizer`."""
        pieces = [self.piece(token, special=not skip_special_tokens) for token in tokens]
        text = b"".join(pieces).decode("utf-8", "replace")
        return text[1:] if self.strips_space and text.startswith(" ") else text

    def stream(self, prompt: Sequence[int] = ()) -> PieceStream:
        """See `TextTokenizer`."""
        return PieceStream(self, prompt)

    @property
    def first_token(self) -> int | None:
        """See `TextTokenizer`."""
        return self._ids.get("bos_token", self._ids.get("eos_token"))

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """A token's part of a text in UTF-8, which may be half a character; nothing for a special token.

        Args:
            special: special tokens have their own text.
        """
        key = (token, special)
        if key not in self._pieces:
            buffer = ctypes.create_string_buffer(64)
            length = self._library.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
            if length < 0:
                buffer = ctypes.create_string_buffer(-length)
                length = self._library.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
            self._pieces[key] = buffer.raw[: max(length, 0)]
        return self._pieces[key]

    @cached_property
    def _template(self) -> str | None:
        template: bytes | None = self._library.llama_model_chat_template(self._loaded.pointer, None)
        if template is None:
            return None
        try:
            return template.decode()
        except UnicodeDecodeError:
            raise InputError("the model's chat template is not UTF-8 text: download the model again") from None

    def _encoded(self, text: str, add_special_tokens: bool) -> tuple[list[int], int]:
        check_text(text)
        ids = self._tokenised(text, add_special_tokens)
        library, vocab = self._library, self._vocab
        before = add_special_tokens and library.llama_vocab_get_add_bos(vocab)
        after = add_special_tokens and library.llama_vocab_get_add_eos(vocab)
        if before and ids[1:2] == ids[:1] == [library.llama_vocab_bos(vocab)]:
            del ids[0]
        return ids, int(after)

    def _tokenised(self, text: str, add_special: bool) -> list[int]:
        """Token ids of a text; special tokens in it are read as such."""
        encoded = text.encode()
        room = len(encoded) + 2
        buffer = (ctypes.c_int32 * room)()
        count = self._library.llama_tokenize(self._vocab, encoded, len(encoded), buffer, room, add_special, True)
        if count < 0:
            room = -count
            buffer = (ctypes.c_int32 * room)()
            count = self._library.llama_tokenize(self._vocab, encoded, len(encoded), buffer, room, add_special, True)
        if count < 0:
            raise InputError("llama.cpp cannot tokenise this text: it is too long")
        return list(buffer[:count])

    def _stated(self, key: str, default: int | None) -> int | None:
        """A special token's number, if it is in range."""
        text = self._metadata.get(f"tokenizer.ggml.{key}")
        number = default if text is None else int(text) if text.isdecimal() else None
        return number if number is not None and number < self.size else None

    def _spelled(self, token: int) -> str:
        text: bytes = self._library.llama_vocab_get_text(self._vocab, token)
        return text.decode("utf-8", "replace")

    def _ends(self) -> set[int]:
        named = [self._tokenised(text, add_special=False) for text in END_OF_TURN]
        library, vocab = self._library, self._vocab
        candidates = {library.llama_vocab_eos(vocab), library.llama_vocab_eot(vocab)}
        candidates |= {ids[0] for ids in named if len(ids) == 1}
        return {token for token in candidates if token >= 0 and library.llama_vocab_is_eog(vocab, token)}


class PieceStream:
    """The text of tokens that arrive one by one after a prompt's.

    All pieces together, `finish` included, are what prompt and tokens decode to, less what the prompt alone decodes to.
    """

    def __init__(self, tokenizer: LlamaTokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = tokenizer.strips_space
        self._said = ""
        """What the prompt alone decodes to of a character that it begins"""
        for token in prompt:
            self.add(token)
        if self._bytes.getstate()[0]:
            self._said = self._bytes.getstate()[0].decode("utf-8", "replace")

    def add(self, token: int) -> str:
        """See `TextStream`."""
        return self._fresh(self._bytes.decode(self._tokenizer.piece(token)))

    def finish(self) -> str:
        """See `TextStream`."""
        return self._fresh(self._bytes.decode(b"", final=True))

    def _fresh(self, text: str) -> str:
        if text and self._at_start:
            self._at_start = False
            text = text.removeprefix(" ")
        if text and self._said:
            text, self._said = text.removeprefix(self._said), ""
        return text
