"""Controllers stacked for the rows of a batch push each row as its own law does."""

from __future__ import annotations

from typing import Any

import numpy as np
from helpers.backends import BACKENDS, tiny_on
from helpers.controllers import controller_for

import mlx_lqr
from mlx_lqr.methods.alqr import LinearFeedback
from mlx_lqr.methods.feedback_rows import FeedbackRows
from mlx_lqr.methods.recording import RecordedFeedback, Recording


def test_every_row_is_pushed_as_alone_also_when_strengths_change(random: np.random.Generator) -> None:
    model = tiny_on(BACKENDS[0], "llama")
    a, b = (controller_for(model, concept) for concept in "ab")
    recorded, own = RecordedFeedback(b, 0.0, Recording()), RecordedFeedback(b, 0.0, Recording())
    laws: list[Any] = [
        LinearFeedback(a, 2.0),
        None,
        LinearFeedback(mlx_lqr.Controller.combine(a, b), [1.0, -1.5]),
        LinearFeedback(controller_for(model, layers=[1]), 3.0),
        recorded,
    ]
    alone = [*laws[:4], own]
    rows = FeedbackRows(laws).to(np.asarray, lambda c, x, y: c + x @ y)
    z, output = random.standard_normal((2, len(laws), 1, model.hidden_size)).astype(np.float32)

    def agrees() -> None:
        for k in rows.layers:
            steered = rows(k, z, output)
            for row, law in enumerate(alone):
                acts = law is not None and k in law.layers
                expected = law(k, z[row], output[row]) if acts else output[row]
                assert np.allclose(steered[row], expected, atol=1e-5), (row, k)

    assert not rows.replayable
    agrees()
    laws[0].strength, laws[2].strength = -1.0, (0.0, 2.0)  # and a concept that is off
    agrees()
    recorded.strength = own.strength = 1.0
    agrees()
    for law in (*laws, own):
        if law is not None:
            law.strength = 0.0
    agrees()
    assert not rows.acts
    for measured in (Recording.feature_error, Recording.push):
        assert np.allclose(measured(recorded.recording), measured(own.recording), atol=1e-5, equal_nan=True)
    assert np.isfinite(recorded.recording.feature_error()[2]).all()
