"""Contrast prompts that are made from a word or a manner, and prompts put into the chat template."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.tiny_tokenizers import chatting

import mlx_lqr
from mlx_lqr import InputError, chat_prompts, concept_prompts, review_prompts, style_prompts
from mlx_lqr.backends.protocol import Model


def test_a_words_sentences_and_their_counterparts_differ_in_the_word_alone() -> None:
    positive, negative = concept_prompts(" black holes ")
    assert len(positive) == len(negative) == len({*positive}) == len({*negative}) >= 30
    for with_it, without in zip(positive, negative, strict=True):
        before, word, after = with_it.partition("black holes")
        assert word
        assert without.startswith(before)
        assert without.endswith(after)
        assert len(after) > 4  # the direction is not read right after the word
        assert "black holes" not in without


def test_a_manners_prompts_are_answers_that_begin_alike(smollm2: Model) -> None:
    positive, negative = style_prompts(smollm2, "like a pirate")
    assert len(positive) == len(negative) == len({*positive}) >= 30
    assert [text.replace("like a pirate", "plainly") for text in positive] == negative
    assert all("<|im_start|>assistant\n" in text and not text.endswith("\n") for text in positive)
    ids = smollm2.tokenizer.chat([{"role": "user", "content": "Answer like a pirate. What should I do this weekend?"}])
    assert smollm2.tokenizer.encode(positive[0]) == [*ids, *smollm2.tokenizer.encode("I", add_special_tokens=False)]


def test_prompts_become_answers_in_the_chat_template(smollm2: Model) -> None:
    first, second = chat_prompts(smollm2, ["The sea is calm.", "The pot is hot."])
    text = smollm2.tokenizer.decode(first, skip_special_tokens=False)
    assert text.endswith("<|im_start|>assistant\nThe sea is calm.")
    assert "<|im_start|>user\nWhat should I do this weekend?<|im_end|>" in text
    assert chat_prompts(smollm2, ["The pot is hot."])[0] != second  # which answers the second question


@pytest.mark.parametrize("text", ["", "  ", "a\nb", "x" * 81])
def test_a_text_is_no_word(text: str) -> None:
    with pytest.raises(InputError, match="expected a word such as chess"):
        concept_prompts(text)
    with pytest.raises(InputError, match="expected a manner"):
        style_prompts(chatting(), text)


def test_made_prompts_differ_in_nothing_else(smollm2: Model) -> None:
    assert review_prompts(smollm2, *concept_prompts("volcanoes")) == []
    assert review_prompts(smollm2, *style_prompts(smollm2, "like a pirate")) == []


def test_the_direction_of_made_prompts_is_that_of_written_ones(smollm2: Model) -> None:
    """Sentences of a bundled set, which are written by hand, fall on their own side of it."""
    direction = mlx_lqr.contrast(smollm2, *(side[:8] for side in concept_prompts("cats"))).unit_direction[24:]
    written = [smollm2.tokenizer.encode(text) for side in mlx_lqr.bundled_prompts("cat") for text in side[:8]]
    features = np.einsum("nkd,kd->nk", smollm2.residuals(written)[:, 24:-1], direction)
    assert (features[:8].mean(axis=0) - features[8:].mean(axis=0)).min() > features.std(axis=0).min() / 2
