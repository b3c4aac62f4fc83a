"""Prompts are scored part by part, and the scores are those of the whole prompt at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.backends import BACKENDS, tiny_on
from helpers.controllers import NEGATIVE, POSITIVE, controller_for

import mlx_lqr
from mlx_lqr.backends.protocol import Law, Model
from mlx_lqr.errors import OverflowingError
from mlx_lqr.methods.running import law_on
from mlx_lqr.serving.scoring import score_prompt

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]


def law_of(model: Model, kind: str | None) -> Law | None:
    """None, a law that is of each token alone, or one that carries something on."""
    if kind is None:
        return None
    if kind == "alqr":
        return law_on(model, controller_for(model), 2.0)
    return law_on(model, mlx_lqr.fit_baseline(model, kind, POSITIVE, NEGATIVE, numbers={"kd": 0.5}), 2.0)


def scored(model: Model, law: Law | None, steered_from: int, size: int) -> list[list[Any]]:
    return list(score_prompt(model, TOKENS, law, steered_from=steered_from, top=3, size=size))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "steered_from"), [(None, 0), ("alqr", 0), ("alqr", 5), ("spid", 5)])
def test_scores_are_those_of_the_whole_prompt(backend: str, kind: str | None, steered_from: int) -> None:
    model = tiny_on(backend, "llama")
    first = steered_from if kind else len(TOKENS) - 1
    (logits,) = model.logits_along([(TOKENS[:1], TOKENS[1:first])]) if first else (np.empty((0, model.vocab_size)),)
    if kind:
        pair = TOKENS[: first + 1], TOKENS[first + 1 : -1]
        steered = model.logits_along([pair], law=law_of(model, kind))
        logits = np.concatenate([logits, *steered])
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    parts = scored(model, law_of(model, kind), steered_from, 4)
    assert max(map(len, parts)) == 4 if kind != "spid" else [len(part) for part in parts] == [4, *[1] * 9]
    scores = [score for part in parts for score in part]
    assert len(scores) == len(TOKENS) - 1
    for row, token, (logprob, top) in zip(expected, TOKENS[1:], scores, strict=True):
        assert logprob == pytest.approx(row[token], abs=1e-4)
        assert [value for _, value in top] == pytest.approx(np.sort(row)[:-4:-1].tolist(), abs=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_that_overflow_anywhere_in_a_part_are_told(backend: str) -> None:
    model = tiny_on(backend, "llama")
    huge = law_on(model, controller_for(model), 1e30)
    with pytest.raises(OverflowingError, match="layer"):
        scored(model, huge, 5, 4)
    decoder = model.decoder(huge)
    decoder.logits_along(TOKENS[:5], steered=False)
    assert np.isnan(decoder.logits_along(TOKENS[5:8], steered=True)).all()
