"""The bundled contrast sets: the two sides differ in the concept and in little else."""

from __future__ import annotations

import re
from collections import Counter

import pytest

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.tasks.concept import word_family, word_pattern

TOPICS = (
    *("cat", "church", "cloud", "dog", "fantasy", "food", "football", "love", "money", "music", "ocean"),
    *("space", "winter"),
)
FEELINGS = ("anger", "joy", "sadness")
STYLES = ("archaic", "childlike", "formal", "pirate", "poetic", "polite")
OTHERS = ("refusal", "truth")
ALL = (*TOPICS, *FEELINGS, *STYLES, *OTHERS)


def having(name: str, texts: list[str]) -> float:
    """The share of the texts with a word of the concept's family."""
    pattern = word_pattern(word_family(name))
    return sum(bool(pattern.search(text)) for text in texts) / len(texts)


def test_these_sets_are_bundled() -> None:
    assert mlx_lqr.bundled_concepts() == sorted(ALL)
    with pytest.raises(InputError, match="choose one of"):
        mlx_lqr.bundled_prompts("../dog")


@pytest.mark.parametrize("name", ALL)
def test_the_sides_are_large_and_alike_in_form(name: str) -> None:
    positive, negative = mlx_lqr.bundled_prompts(name)
    assert len(positive) == len(negative) >= 60
    texts = positive + negative
    assert len({text.lower() for text in texts}) == len(texts)
    assert all(text == text.strip() and text.isascii() and text[-1] in ".!?" for text in texts)
    assert not [text for text in texts if "  " in text or "|" in text]
    assert Counter(text[-1] for text in positive) == Counter(text[-1] for text in negative)
    lengths = [sum(len(text.split()) for text in side) for side in (positive, negative)]
    assert max(lengths) < 1.2 * min(lengths)


@pytest.mark.parametrize("name", ALL)
def test_the_negative_side_lacks_the_words_of_the_concept(name: str) -> None:
    words = word_family(name)
    assert len(words) == len(set(words)) >= 5
    assert having(name, mlx_lqr.bundled_prompts(name)[1]) < 0.1


@pytest.mark.parametrize(("names", "least"), [(TOPICS, 0.75), (FEELINGS, 0.3), (STYLES, 0.2)])
def test_positive_prompts_have_words_of_the_family(names: tuple[str, ...], least: float) -> None:
    """A topic nearly always; a feeling and a style have more ways to show."""
    shares = {name: having(name, mlx_lqr.bundled_prompts(name)[0]) for name in names}
    assert not {name: share for name, share in shares.items() if share < least}


@pytest.mark.parametrize("name", ["archaic", "childlike", "pirate"])
def test_words_of_a_style_are_its_own(name: str) -> None:
    """Or its share in a text would be that of another concept."""
    pattern = word_pattern(word_family(name))
    for other in {*TOPICS, "polite", "truth"} - {"fantasy"}:
        texts = [text for side in mlx_lqr.bundled_prompts(other) for text in side]
        assert sum(bool(pattern.search(text)) for text in texts) / len(texts) < 0.05, other


def test_no_prompt_stands_in_two_sets() -> None:
    seen = Counter(
        re.sub(r"\W+", " ", text.lower())
        for name in ALL
        for side in mlx_lqr.bundled_prompts(name)
        for text in set(side)
    )
    assert [text for text, times in seen.items() if times > 1] == []
