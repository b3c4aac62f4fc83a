"""Metrics of texts and of answers; NumPy only.

distinct-n: the share of distinct n-grams of a text, |set| / count (Li et al. 2016; here of each text alone and then
    averaged, so that it does not depend on how many texts there are).
repetition: the share of a text's 4-grams that repeat an earlier one, 1 - distinct-4.
perplexity: exp of the mean negative log-likelihood of a text's tokens (generations.py says under which model).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from mlx_lqr.lqr.divergence import log_softmax

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")


def words(text: str) -> list[str]:
    """Lower-case words and single punctuation marks, the same for every model's tokenizer."""
    return _WORD.findall(text.lower())


def distinct(tokens: Sequence[str], n: int) -> float:
    """distinct-n of one text; NaN if it has no n-gram."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(tokens: Sequence[str], n: int = 4) -> float:
    """The share of n-grams that repeat an earlier one; NaN if the text has no n-gram."""
    return 1 - distinct(tokens, n)


def multiple_choice(true: ArrayLike, false: ArrayLike, best: float) -> tuple[float, float]:
    """MC1 and MC2 of one question (Lin et al. 2022) from the total log-probabilities of its answers.

    MC1 is 1 if the best answer is likelier than every false one; MC2 is the probability of the true answers, normalised
    over the true and the false ones.
    """
    true, false = np.asarray(true, np.float64), np.asarray(false, np.float64)
    mass = np.exp(log_softmax(np.concatenate([true, false])))
    return float(best > false.max()), float(mass[: len(true)].sum())


def unigram_f1(text: str, reference: str) -> float:
    """F1 of the words two texts share, counted with multiplicity (ROUGE-1 without stemming)."""
    own, theirs = (_counts(words(part)) for part in (text, reference))
    shared = sum(min(count, theirs.get(word, 0)) for word, count in own.items())
    total = sum(own.values()) + sum(theirs.values())
    return 2 * shared / total if total else 0.0


def _counts(tokens: Sequence[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for token in tokens:
        if token[0].isalnum():
            counts[token] = counts.get(token, 0) + 1
    return counts
