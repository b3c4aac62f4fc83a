"""Controllers fitted to be adaptive: whoever decodes or scores with them makes the gains anew at every prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.backends import BACKENDS, tiny_on
from helpers.controllers import mirrored

import mlx_lqr
from mlx_lqr import Controller, InputError, tasks
from mlx_lqr.backends.protocol import Model
from mlx_lqr.commands import main
from mlx_lqr.methods.steering import law_of

POSITIVE, NEGATIVE = [[1, 2, 3], [4, 5]], [[6, 7], [8]]
PROMPTS = [[5, 17, 3, 42, 8], [9, 30, 7]]


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest) -> Model:
    return tiny_on(request.param, "gemma3_text")


@pytest.fixture(scope="module")
def adaptive(model: Model) -> Controller:
    return mlx_lqr.fit(model, POSITIVE, NEGATIVE, concept="one", cost="adaptive", q=3.0, qf=3.0, layers="all")


def tokens(model: Model, prompt: list[int], controller: Controller, **gains: bool) -> list[int | None]:
    own: mlx_lqr.Options = {"controller": controller, "strength": 3.0, "max_tokens": 8, "temperature": 0}
    pieces = mlx_lqr.stream(model, prompt, **own, **gains)  # type: ignore[misc]
    return [piece.token for piece in pieces]


def test_the_stored_gains_are_those_of_the_feature_cost(model: Model, adaptive: Controller, tmp_path: Path) -> None:
    feature = mlx_lqr.fit(model, POSITIVE, NEGATIVE, concept="one", cost="feature", q=3.0, qf=3.0, layers="all")
    assert np.array_equal(adaptive.gain, feature.gain)
    adaptive.save(tmp_path / "one")
    assert Controller.load(tmp_path / "one").cost == "adaptive"
    other = replace(mirrored(feature), concepts=("two",), gain=feature.gain[:, ::-1])
    assert Controller.combine(adaptive, replace(other, cost="adaptive")).cost == "adaptive"
    assert Controller.combine(adaptive, other).cost == "feature"


def test_decoding_adapts_unless_it_is_told_not_to(model: Model, adaptive: Controller) -> None:
    stored = replace(adaptive, cost="feature")
    differing = 0
    for prompt in PROMPTS:
        made_for_it = mlx_lqr.adapt(model, adaptive, prompt)
        assert made_for_it.cost == "feature"
        assert tokens(model, prompt, adaptive) == tokens(model, prompt, made_for_it)
        assert tokens(model, prompt, adaptive) == tokens(model, prompt, stored, adaptive=True)
        assert tokens(model, prompt, adaptive, adaptive=False) == tokens(model, prompt, stored)
        differing += np.abs(made_for_it.gain - adaptive.gain).max() > 1e-3 * np.abs(adaptive.gain).max()
    assert differing == len(PROMPTS)


def test_tasks_score_under_the_gains_of_each_prompt(model: Model, adaptive: Controller) -> None:
    steered = tasks.Steered(model, tasks.NamedSteering("one", adaptive), 3.0)
    pairs = [(PROMPTS[0], [1, 2]), (PROMPTS[0], [3]), (PROMPTS[1], [4, 5, 6])]
    logits_along = steered.logits_along(pairs)
    for (prompt, continuation), logits in zip(pairs, logits_along, strict=True):
        law = law_of(mlx_lqr.adapt(model, adaptive, prompt), 3.0)
        assert np.allclose(logits, model.logits_along([(prompt, continuation)], law=law)[0], atol=1e-4)
    stored = replace(adaptive, cost="feature")
    plain = tasks.Steered(model, tasks.NamedSteering("one", stored), 3.0)
    assert max(np.abs(one - two).max() for one, two in zip(logits_along, plain.logits_along(pairs), strict=True)) > 1e-4
    assert steered.steering is not None
    assert plain.steering is not None
    assert steered.steering.settings != plain.steering.settings  # rows of one are not taken for the other's
    unsteered = tasks.Steered(model, steered.steering, 0.0).logits_along(pairs)
    assert all(np.array_equal(*both) for both in zip(unsteered, model.logits_along(pairs), strict=True))


def test_calls_that_do_not_tell_of_prompts_are_refused(model: Model, adaptive: Controller) -> None:
    with pytest.raises(InputError, match=r"recomputed for each prompt.*use mlx_lqr\.generate"):
        mlx_lqr.steer(model, adaptive)


def test_the_command_line_fits_and_decodes_adaptively(tmp_path: Path) -> None:
    file, prompt, run = str(tmp_path / "ocean.safetensors"), "The old sailor went down to", CliRunner().invoke
    for kind, texts in zip(("positive", "negative"), mlx_lqr.bundled_prompts("ocean"), strict=True):
        (tmp_path / kind).write_text("\n".join(texts[:24]))
    sets = ["--concept", "ocean", "--positive", str(tmp_path / "positive"), "--negative", str(tmp_path / "negative")]
    base = [
        "fit",
        "demo",
        *sets,
        "-o",
        file,
        "--q",
        "3",
        "--qf",
        "3",
        "--layers",
        "20-29",
        "--plain-prompts",
        "--no-calibration",
        "--readout",
        "direction",
        "--feedback",
        "1",
    ]
    assert run(main, [*base, "--cost", "adaptive", "--jacobian-prompts", "1"]).exit_code == 0
    answers = [
        run(
            main, ["generate", "demo", "-p", prompt, "-n", "16", "--temperature", "0", "-c", f"{file}:3", *option]
        ).output
        for option in ([], ["--adaptive"], ["--stored"])
    ]
    assert answers[0] == answers[1] != answers[2]
    assert "adaptive cost" in run(main, ["show", file]).output
