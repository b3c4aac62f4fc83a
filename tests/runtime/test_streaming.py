"""Streamed text is what all of its tokens decode to after their prompt, byte for byte."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.every_tokenizer import BYTES, KINDS, SPECIAL, TEXTS, beyond, folder_of, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mlx_lqr.backends.text.detokenizer import Decoding
from mlx_lqr.backends.text.tokenizer import Tokenizer

CLEANED = ("unigram", "word-piece", "word-level")
"""Kinds whose texts transformers cleans up where tokenizer_config.json asks for it"""


@functools.cache
def loaded(kind: str, clean_up: bool = False) -> Tokenizer:
    folder = folder_of(kind, Path(tempfile.mkdtemp()), clean_up_tokenization_spaces=clean_up)
    return Tokenizer(folder, {})


@functools.cache
def transformers_own(kind: str, clean_up: bool) -> AutoTokenizer:
    folder = folder_of(kind, Path(tempfile.mkdtemp()), clean_up_tokenization_spaces=clean_up)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return AutoTokenizer.from_pretrained(folder)


def sequences(kind: str) -> st.SearchStrategy[list[int]]:
    """Ids of any tokens: words, bytes and parts of characters, special tokens, spaces, and ids of no token."""
    tokenizer = tokenizer_of(kind)
    vocabulary = tokenizer.get_vocab()
    hard = [*SPECIAL, "<think>", *BYTES[0x20:0x60:7], *BYTES[0x80::5], "▁", "▁▁", ".", "'", "s", ",", "##s", "?", "!"]
    hard += list("ÂâðĠŁĻĤçĬ¬é\ufffd")  # what byte-level tokenizers spell parts of characters with
    some = [vocabulary[token] for token in hard if token in vocabulary]
    texts = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    anything = st.integers(0, tokenizer.get_vocab_size() + 1)
    runs = st.lists(st.one_of(st.sampled_from(some or [0]), anything), max_size=12)
    parts = st.builds(
        lambda ids, at, n: ids[at : at + n], st.sampled_from(texts), st.integers(0, 40), st.integers(1, 9)
    )
    return st.lists(st.one_of(runs, parts), max_size=4).map(lambda lists: [token for part in lists for token in part])


def streamed(tokenizer: Tokenizer, prompt: Sequence[int], answer: Sequence[int]) -> list[str]:
    stream = tokenizer.stream(prompt)
    return [*(stream.add(token) for token in answer), stream.finish()]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_together_are_what_the_tokens_decode_to(kind: str) -> None:
    tokenizer, plain = loaded(kind), tokenizer_of(kind)

    @settings(max_examples=120, deadline=None, database=None, derandomize=True)
    @given(sequences(kind), sequences(kind))
    def check(prompt: list[int], answer: list[int]) -> None:
        assert "".join(streamed(tokenizer, (), answer)) == plain.decode(answer)
        whole, before = plain.decode([*prompt, *answer]), plain.decode(prompt)
        assert "".join(streamed(tokenizer, prompt, answer)) == beyond(before, whole)

    check()


@pytest.mark.parametrize("kind", CLEANED)
def test_a_clean_up_reaches_across_pieces(kind: str) -> None:
    tokenizer, theirs = loaded(kind, True), transformers_own(kind, True)

    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(sequences(kind))
    def check(answer: list[int]) -> None:
        assert "".join(streamed(tokenizer, (), answer)) == theirs.decode(answer, skip_special_tokens=True)

    check()
    text = "It's what we've said, isn't it?"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert len([piece for piece in streamed(tokenizer, (), ids) if piece]) > 3, "it is not all held back"


def test_byte_pair_tokenizers_are_not_cleaned_up() -> None:
    text = "so , what ' s it ?"
    for kind in ("byte-level", "llama"):
        ids = loaded(kind, True).encode(text, add_special_tokens=False)
        assert loaded(kind, True).decode(ids) == text == transformers_own(kind, True).decode(ids)


def test_bytes_that_are_no_character_and_words_after_a_prompt() -> None:
    llama = loaded("llama")
    ids = tokenizer_of("llama").get_vocab()
    assert streamed(llama, (), [ids["<0x40>"], ids["<0xE2>"], ids["x"]]) == ["", "", "\ufffd\ufffdx", ""]
    assert streamed(llama, (), [ids["<0xE2>"]]) == ["", "\ufffd"]
    emoji = [ids[f"<0x{byte:02X}>"] for byte in "🙂".encode()]
    assert streamed(llama, (), [*emoji, ids["x"]]) == ["", "", "", "", "🙂x", ""]
    # a prompt that ends within a character, or within a run of bytes that is only then told to be valid
    assert streamed(llama, emoji[:2], [*emoji[2:], ids["x"]])[-2:] == ["🙂x", ""]
    assert streamed(llama, [ids["<0x0A>"]], [ids["x"]]) == ["x", ""]
    hello, world = (llama.encode(text, add_special_tokens=False) for text in ("Hello", "world"))
    assert "".join(streamed(llama, (), world)) == "world"
    assert "".join(streamed(llama, hello, world)) == " world"
    assert "".join(streamed(llama, hello, [ids["w"], ids["o"]])) == "wo"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "changing"])
def test_a_token_costs_the_same_however_long_the_text_is(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = loaded(kind)
    space = tokenizer_of(kind).token_to_id("▁") or 0
    tokens = 40 * [token for text in TEXTS for token in tokenizer.encode(text)] + 300 * [space]
    stream = tokenizer.stream(tokens)
    lengths, pieces = [], []
    decode = Decoding.text
    monkeypatch.setattr(Decoding, "text", lambda self, ids: lengths.append(len(ids)) or decode(self, ids))
    for token in tokens:
        pieces.append(stream.add(token))
    assert max(lengths) <= 100
    assert len(lengths) <= 4 * len(tokens)
    assert sum(map(bool, pieces)) > len(tokens) / 8, "pieces come as they are known"
