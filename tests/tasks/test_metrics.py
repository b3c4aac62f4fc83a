"""The numbers of `mlx_lqr.tasks` against numbers worked out by hand, and how often its intervals hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlx_lqr.tasks.bootstrap import Metric, difference, differences, estimate, exponential_ratio, mean
from mlx_lqr.tasks.metrics import distinct, multiple_choice, repetition, unigram_f1, words


def test_words_are_lower_case_and_punctuation_counts() -> None:
    assert words("The dog's  café, OK?") == ["the", "dog's", "café", ",", "ok", "?"]


def test_distinct_and_repetition() -> None:
    text = ["a", "b", "a", "b", "a", "b"]  # bigrams: ab ba ab ba ab; 4-grams: abab baba abab
    assert [distinct(text, n) for n in (1, 2, 3)] == [2 / 6, 2 / 5, 2 / 4]
    assert repetition(text) == pytest.approx(1 / 3)
    assert math.isnan(distinct(["a"], 2))
    assert math.isnan(repetition(["a", "b", "c"]))


def test_multiple_choice_by_its_definition() -> None:
    true, false = np.log([0.1, 0.3]), np.log([0.2, 0.2])
    assert multiple_choice(true, false, true[0]) == (0.0, pytest.approx(0.5))
    assert multiple_choice(true, false, true[1]) == (1.0, pytest.approx(0.5))
    mc1, mc2 = multiple_choice(true - 2000, false - 2000, true[1] - 2000)  # of which no float holds the exponential
    assert (mc1, mc2) == (1.0, pytest.approx(0.5))
    assert multiple_choice([-1.0], [-1.0], -1.0)[0] == 0  # no better than a false one is not best


def test_word_overlap() -> None:
    assert unigram_f1("the cat sat.", "The cat, the dog") == pytest.approx(2 * 2 / (3 + 4))
    assert unigram_f1("!", "?") == 0


def test_estimate_of_a_mean_and_of_a_ratio() -> None:
    estimated = estimate(mean([1.0, 2.0, math.nan, 6.0], [0, 1, 2, 3]))
    assert estimated.value == 3.0
    assert estimated.rows == 4
    assert estimated.low < 3 < estimated.high
    perplexity = Metric(np.array([[2.0, 1], [4.0, 3]]), np.array([0, 1]), exponential_ratio)
    assert estimate(perplexity).value == pytest.approx(math.exp(6 / 4))
    assert math.isnan(estimate(mean([math.nan], [0])).value)


def test_intervals_hold_the_truth_as_often_as_they_say(random: np.random.Generator) -> None:
    held = 0
    for trial in range(300):
        interval = estimate(mean(random.exponential(1.0, 60), range(60)), seed=trial, resamples=400)
        held += interval.low <= 1.0 <= interval.high
    assert 0.90 <= held / 300 <= 0.98


def test_samples_of_one_prompt_are_resampled_together(random: np.random.Generator) -> None:
    """Eight copies of each value are no more evidence than one, and an interval that ignored it would be too short."""
    values = random.normal(size=40)
    once = estimate(mean(values, range(40)))
    copied = estimate(mean(np.repeat(values, 8), np.repeat(np.arange(40), 8).tolist()))
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))


def test_a_share_on_which_all_agree_is_not_certain() -> None:
    none, every = (estimate(mean([value] * 20, range(20), share=True)) for value in (0.0, 1.0))
    margin = 1 - 0.025 ** (1 / 20)  # Clopper and Pearson
    assert (none.low, none.high) == (0, pytest.approx(margin))
    assert (every.low, every.high) == (pytest.approx(1 - margin), 1)
    assert 0.16 < margin < 0.17


def test_a_paired_difference_forgets_what_prompts_explain(random: np.random.Generator) -> None:
    base = 10 * random.normal(size=50)
    groups = list(range(50))
    change = difference(mean(base + 1, groups), mean(base, groups))
    assert (change.value, change.low, change.high) == pytest.approx((1, 1, 1))
    assert estimate(mean(base, groups)).high - estimate(mean(base, groups)).low > 1
    with pytest.raises(ValueError, match="same groups"):
        difference(mean(base, groups), mean(base[:49], groups[:49]))


def test_differences_are_resampled_together_each_as_alone() -> None:
    random = np.random.default_rng(4)
    groups = np.arange(40) // 2
    first, second = (Metric(random.uniform(1, 2, (40, 2)), groups, exponential_ratio) for _ in range(2))
    third, fourth = (mean(random.normal(size=40), groups) for _ in range(2))
    alone = [difference(first, second), difference(third, fourth)]
    for one, other in zip(differences([(first, second), (third, fourth)]), alone, strict=True):
        assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high))
    (wider,) = differences([(third, fourth)], level=0.999)
    assert wider.low < alone[1].low < alone[1].high < wider.high
