"""Text of tokens that arrive one by one, equal to what all of them decode to together.

A tokenizer's decoder does not work token by token: characters are spelled over several tokens, a run of byte tokens
that is not valid UTF-8 becomes one U+FFFD for each of its bytes, and the first token of a text loses its space. So text
is handed out only where nothing that may follow can change it, and each piece is decoded behind the tokens before it.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers

from mlx_lqr.backends.text.library import sound
from mlx_lqr.backends.text.text_tokenizer import common_length
from mlx_lqr.errors import InputError

_TOKENWISE = {"Metaspace", "WordPiece", "BPEDecoder", "CTC", "ByteFallback", "ByteLevel", "Fuse", "Replace", "Strip"}
"""Decoders that treat one token after the other, or that are known here"""
_JOINING = {"Fuse", "ByteLevel"}
"""Those after which there is one text, and no tokens any more"""
_LOOK_BACK = 16
"""Tokens of a prompt that are more than enough to decode what follows it"""
_CLEANED = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
_CLEANED_CHARACTERS = frozenset("".join(before for before, _ in _CLEANED))


class Decoding:
    """How a tokenizer's ids become text, special tokens left out, and where a text may be cut."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, clean_up: bool = False) -> None:
        """
        Args:
            clean_up: remove the spaces before punctuation, as transformers does where a tokenizer asks for it.
        """
        self._tokenizer = tokenizer
        self._clean_up = clean_up
        steps = list(_steps(tokenizer))
        kinds = [step["type"] for step in steps]
        self.in_bytes = "ByteLevel" in kinds
        self.byte_fallback = "ByteFallback" in kinds
        self.whole = not all(_is_local(step, kinds[:i]) for i, step in enumerate(steps))
        """Whether nothing is certain before the end, since a later token may change any earlier one's text"""
        self._tokens: dict[int, str | None] = {}

    def text(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`."""
        with sound():
            text = str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
        if self._clean_up:
            for before, after in _CLEANED:
                text = text.replace(before, after)
        return text

    def token(self, index: int) -> str | None:
        """How a token is spelled; None for one that has no part in the text."""
        if index not in self._tokens:
            with sound():
                spelled = self._tokenizer.id_to_token(index)
                shown = self._tokenizer.decode([index], skip_special_tokens=True)
                special = not shown and bool(self._tokenizer.decode([index], skip_special_tokens=False))
            self._tokens[index] = None if special else spelled
        return self._tokens[index]

    def is_settled(self, tokens: Sequence[int]) -> bool:
        """Whether a clean-up leaves the end of the text of `tokens` as it is, whatever follows.

        A clean-up's pattern is a space and at most three characters after it, and all it removes are spaces.
        """
        if not self._clean_up:
            return True
        end = self._tokenizer.decode(list(tokens), skip_special_tokens=True)[-3:]
        return bool(end) and (end[-1] not in _CLEANED_CHARACTERS or (len(end) == 3 and " " not in end))


class Detokenizer:
    """The text of a growing sequence, in pieces that never split a character.

    All pieces together, `finish` included, are what prompt and tokens decode to, less what the prompt alone decodes to.
    """

    def __init__(self, decoding: Decoding, prompt: Sequence[int] = ()) -> None:
        """
        Args:
            prompt: what comes before; a word that goes on after it keeps its space, or has none.
        """
        self._decoding = decoding
        self._before: list[list[int]] = []
        """The last tokens whose text is out, in pieces; together they have a text, unless nothing has one yet"""
        self._pending: list[int] = []
        self._said = ""
        """What the prompt's own pending tokens decode to"""
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        for token in self._end_of(prompt):
            self.add(token)
        self._said = self._text(self._pending) if self._pending else ""

    def add(self, token: int) -> str:
        """The text that became certain with this token; empty while something that follows may change it."""
        spelled = self._decoding.token(token)
        if spelled is None:
            return ""
        self._pending.append(token)
        return "" if self._may_change(spelled) else self._piece()

    def finish(self) -> str:
        """The text that was still uncertain, now that nothing follows."""
        return self._piece() if self._pending else ""

    def _piece(self) -> str:
        text = self._text(self._pending)
        piece = text[common_length(self._said, text) :]
        self._said = ""
        segments = [*self._before, self._pending]
        kept = next((n for n in range(1, len(segments)) if self._decoding.text(_joined(segments[-n:]))), len(segments))
        self._before, self._pending = segments[-kept:], []
        return piece

    def _text(self, tokens: Sequence[int]) -> str:
        """The text of `tokens` after those before them."""
        before = _joined(self._before)
        known, whole = self._decoding.text(before) if before else "", self._decoding.text([*before, *tokens])
        return whole[common_length(known, whole) :]

    def _may_change(self, spelled: str) -> bool:
        if self._decoding.whole or (self._decoding.byte_fallback and _is_byte(spelled)):
            return True
        if self._decoding.in_bytes:
            self._bytes.decode(_as_bytes(spelled))
            if self._bytes.getstate()[0]:
                return True
        return not self._decoding.is_settled([*_joined(self._before), *self._pending][-_LOOK_BACK:])

    def _end_of(self, prompt: Sequence[int]) -> Sequence[int]:
        """The last tokens of a prompt, from a place where its text may be cut."""
        if self._decoding.whole:
            return prompt
        visible = [token for token in prompt[-8 * _LOOK_BACK :] if self._decoding.token(token) is not None]
        start = max(0, len(visible) - _LOOK_BACK)
        while start > 0 and _is_byte(self._decoding.token(visible[start]) or ""):
            start -= 1
        return visible[start:] if start > 0 else prompt


def _steps(tokenizer: tokenizers.Tokenizer) -> Iterator[dict[str, Any]]:
    """The decoder's settings, step by step; the library hands them out when a decoder is pickled, and only then."""
    if tokenizer.decoder is None:
        return
    try:
        waiting = [json.loads(tokenizer.decoder.__getstate__())]
    except (TypeError, ValueError):  # Python's own pickling, for one
        raise InputError(
            f"tokenizers {tokenizers.__version__} hands out no settings of decoders: install another version of it"
        ) from None
    while waiting:
        step = waiting.pop(0)
        if step["type"] == "Sequence":
            waiting = [*step["decoders"], *waiting]
        else:
            yield step


def _is_local(step: dict[str, Any], before: Sequence[str]) -> bool:
    """Whether a decoder's step leaves text as it is once more tokens follow, or changes its very end in known ways."""
    joined = bool(_JOINING & set(before))
    if step["type"] == "Strip":
        return not joined or step["stop"] == 0  # what it strips at the beginning is stripped for good
    return step["type"] in _TOKENWISE and (not joined or step["type"] == "Fuse")


def _is_byte(spelled: str) -> bool:
    return len(spelled) == 6 and spelled.startswith("<0x") and spelled.endswith(">")


def _joined(segments: Sequence[Sequence[int]]) -> list[int]:
    return [token for segment in segments for token in segment]


def _as_bytes(spelled: str) -> bytes:
    """The bytes behind the characters of a byte-level token; one that has others stands for itself."""
    if all(character in _BYTES for character in spelled):
        return bytes(_BYTES[character] for character in spelled)
    return spelled.encode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are spelled as themselves, the others as the characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_characters()
