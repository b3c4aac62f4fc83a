"""Directions from prompts, and prompts from files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny import FAMILY, tiny

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends.protocol import Model
from mlx_lqr.lqr.contrast import contrast_of
from mlx_lqr.lqr.layers import authority, choose_layers


@pytest.mark.parametrize("family", sorted(FAMILY))
def test_a_padded_batch_gives_what_single_prompts_give(family: str) -> None:
    model = tiny(family)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9], [7], [2, 7, 1, 8, 2, 8], [1, 6, 1, 8]]
    together = model.residuals(prompts)
    for row, prompt in zip(together, prompts, strict=True):
        assert np.allclose(row, model.residuals([prompt])[0], atol=1e-5)
        assert np.allclose(row, model.trace(prompt).residual, atol=1e-5)


def test_direction_is_the_difference_of_means() -> None:
    model = tiny("llama")
    positive, negative = [[1, 2, 3], [4, 5]], [[6, 7, 8, 9], [10], [11, 12]]
    contrast = mlx_lqr.contrast(model, positive, negative)
    expected = np.mean([model.residuals([p])[0] for p in positive], 0) - np.mean(
        [model.residuals([p])[0] for p in negative], 0
    )
    assert np.allclose(contrast.direction, expected[:-1], atol=1e-5)
    assert np.allclose(contrast.output_direction, expected[-1], atol=1e-5)
    assert np.allclose(np.linalg.norm(contrast.unit_direction, axis=-1), 1)
    assert contrast.prompt_counts == (2, 3)


def test_separation_is_the_magnitude_over_the_std_within_the_sets() -> None:
    model = tiny("llama")
    positive, negative = [[1, 2, 3], [4, 5], [7, 7]], [[6, 7, 8, 9], [10], [11, 12], [9]]
    contrast = mlx_lqr.contrast(model, positive, negative)
    unit = np.vstack([contrast.unit_direction, contrast.output_direction / contrast.output_magnitude])
    sets = [np.stack([model.residuals([prompt])[0] for prompt in prompts]) for prompts in (positive, negative)]
    for k, v in enumerate(unit):
        a, b = (residuals[:, k].astype(np.float64) @ v for residuals in sets)
        pooled = np.sqrt((2 * np.var(a, ddof=1) + 3 * np.var(b, ddof=1)) / 5)
        assert contrast.separation[k] == pytest.approx((a.mean() - b.mean()) / pooled, rel=1e-4)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (4, 7), (12, 11)])  # one of each left out, and five folds
def test_held_out_separation_is_that_of_directions_from_the_other_folds(n: int, m: int) -> None:
    random = np.random.default_rng(n)
    sets = random.normal(1, 1, (n, 4, 6)).astype(np.float32), random.normal(0, 1, (m, 4, 6)).astype(np.float32)
    found = contrast_of(tiny("llama"), *sets).held_out
    folds = 5 if min(n, m) >= 10 else min(n, m)
    for k in range(4):
        features: list[list[float]] = [[], []]
        for fold in range(folds):
            kept = [[row for i, row in enumerate(one[:, k]) if i % folds != fold] for one in sets]
            means = [np.mean(rows, axis=0) for rows in kept]
            v = (means[0] - means[1]) / np.linalg.norm(means[0] - means[1])
            for feature, one in zip(features, sets, strict=True):
                feature += [
                    v @ (row - (means[0] + means[1]) / 2) for i, row in enumerate(one[:, k]) if i % folds == fold
                ]
        pooled = np.sqrt(((n - 1) * np.var(features[0], ddof=1) + (m - 1) * np.var(features[1], ddof=1)) / (n + m - 2))
        assert found is not None
        assert found[k] == pytest.approx((np.mean(features[0]) - np.mean(features[1])) / pooled, rel=1e-4)


def test_held_out_separation_is_not_fooled_by_many_dimensions(random: np.random.Generator) -> None:
    """Sets that differ by chance alone are told apart in sample, and not where the prompts are held out."""
    positive, negative = (random.normal(0, 1, (20, 9, 500)).astype(np.float32) for _ in range(2))
    chance = contrast_of(tiny("llama"), positive, negative)
    assert chance.held_out is not None
    assert chance.separation.min() > 4
    assert abs(chance.held_out.mean()) < 0.5
    positive[:, :, 0] += 8
    real = contrast_of(tiny("llama"), positive, negative)
    assert real.held_out is not None
    assert real.held_out.min() > 2
    positive[:, 0] = negative[:, 0] = 1  # both sets end in the same token
    assert contrast_of(tiny("llama"), positive, negative).held_out[0] == 0  # type: ignore[index]
    assert contrast_of(tiny("llama"), positive[:1], negative).held_out is None


def contrast_with(held_out: list[float], counts: tuple[int, int] = (20, 20)) -> mlx_lqr.Contrast:
    """Of a model with one layer less than there are numbers; e_k is the first unit vector everywhere."""
    direction = np.eye(1, 4, dtype=np.float32).repeat(len(held_out) - 1, axis=0)
    held = np.array(held_out, np.float32)
    return mlx_lqr.Contrast(direction, direction * 0, direction, direction[0], counts, std=held, held_out=held)


def jacobians_with(kept: list[float]) -> mlx_lqr.Jacobians:
    """Block k keeps so much of what stands in the first component."""
    return mlx_lqr.Jacobians([np.diag([share, 1, 1, 1]).astype(np.float32) for share in kept], "", "", 1)


def test_auto_takes_the_layers_that_are_about_as_good_as_the_best() -> None:
    contrast = contrast_with([0, 0.5, 3, 4, 1, 90])  # the last is of the output
    assert choose_layers("auto", contrast) == (3,)
    assert choose_layers(None, contrast_with([0, 0.5, 3.3, 4, 3.4, 9])) == (2, 3, 4)
    assert choose_layers("all", contrast) == (0, 1, 2, 3, 4)
    assert choose_layers(iter([-1, 0]), contrast) == (0, 4)


def test_auto_weighs_separation_by_authority() -> None:
    """A push at the output of block k passes the blocks above it."""
    contrast, jacobians = contrast_with([2, 2, 2, 2, 2]), jacobians_with([1, 0.9, 0.3, 0.9])
    assert authority(contrast, jacobians.pull_back) == pytest.approx([0.243, 0.27, 0.9, 1])
    assert choose_layers("auto", contrast, jacobians) == (2, 3)
    assert choose_layers("auto", contrast_with([30, 2, 2, 2, 2]), jacobians) == (0,)
    assert choose_layers("auto", contrast_with([30, 2, 2, 2, 2], (20, 7)), jacobians) == (2, 3)  # too few to say
    assert choose_layers("auto", contrast_with([-1, -1, -2, 0, 0]), jacobians) == (2, 3)  # nothing is told apart
    single = replace(contrast, held_out=None, std=None, prompt_counts=(1, 1))
    assert choose_layers(None, single, jacobians) == (2, 3)
    with pytest.raises(InputError, match="more than one of each"):
        choose_layers("auto", single)


def test_authority_is_what_a_small_push_does_to_the_output() -> None:
    """Against finite differences through the model's own blocks."""
    model = tiny("llama")
    sets = [[1, 2, 3], [4, 5], [7, 7]], [[6, 7, 8, 9], [10], [11, 12]]
    contrast, prompt, step = mlx_lqr.contrast(model, *sets), [1, 2, 3], 1e-2
    trace, T = model.trace(prompt), model.num_layers
    directions = np.vstack([contrast.direction, contrast.output_direction[None]])
    by_hand = []
    for k in range(T):
        ends = []
        for sign in (1, -1):
            state = (trace.residual[k + 1] + sign * step * directions[k + 1])[None]
            for later in range(k + 1, T):
                state = model.block(trace, later, state)
            ends.append(state[0])
        by_hand.append((ends[0] - ends[1]) @ directions[T] / (2 * step * contrast.output_magnitude**2))
    jacobians = mlx_lqr.linearize(model, [prompt])
    assert authority(contrast, jacobians.pull_back) == pytest.approx(by_hand, rel=2e-2, abs=2e-3)


def test_auto_layers_everywhere_layers_are_named() -> None:
    model = tiny("llama", num_hidden_layers=8)
    sets = [[1, 2, 3], [4, 5], [7, 7]], [[6, 7, 8, 9], [10], [11, 12]]
    contrast = mlx_lqr.contrast(model, *sets)
    jacobians = mlx_lqr.linearize(model, sets[0][:2])
    chosen = choose_layers("auto", contrast, jacobians)
    assert 0 < len(chosen) < 8
    assert mlx_lqr.fit(model, *sets, layers="auto").active_layers == chosen
    assert mlx_lqr.fit(model, *sets, layers=np.array([0, 2])).active_layers == (0, 2)
    assert mlx_lqr.fit(model, *sets, layers="auto", cost="feature").active_layers == chosen
    assert mlx_lqr.fit(model, *sets, layers="auto", jacobians=jacobians).active_layers == chosen
    there = choose_layers("auto", contrast, mlx_lqr.linearize(model, [[1, 2]]))
    assert mlx_lqr.adapt(model, contrast, [1, 2], layers="auto").active_layers == there
    assert contrast.held_out is not None
    outputs = contrast.held_out[1:]
    assert mlx_lqr.fit_baseline(model, "actadd", *sets, layers="auto").active_layers == (int(outputs.argmax()),)
    expected = tuple(np.flatnonzero(outputs >= 0.8 * outputs.max()))
    assert mlx_lqr.fit_baseline(model, "proportional", *sets, layers="auto").active_layers == expected
    with pytest.raises(InputError, match="more than one of each"):
        mlx_lqr.fit_baseline(model, "actadd", [[1]], [[2]], layers="auto")
    for fit in (mlx_lqr.fit, lambda *given, **options: mlx_lqr.fit_baseline(given[0], "actadd", *given[1:], **options)):
        with pytest.raises(InputError, match="not 'best'"):
            fit(model, *sets, layers="best")


def test_the_defaults_of_fit_are_those_measured_to_do_best() -> None:
    model = tiny("llama", num_hidden_layers=8)
    sets = [[1, 2, 3], [4, 5], [7, 7]], [[6, 7, 8, 9], [10], [11, 12]]
    default = mlx_lqr.fit(model, *sets)
    weights = {"q": 10.0, "r": 1.0, "qf": 10.0}
    explicit = mlx_lqr.fit(
        model, *sets, layers="auto", **weights, setpoint="centred", cost="feature", feedback=0.03, push="concept"
    )
    assert default.active_layers == explicit.active_layers
    for name in ("gain", "setpoint", "offset"):
        assert np.array_equal(getattr(default, name), getattr(explicit, name))
    contrast = mlx_lqr.contrast(model, *sets)
    jacobians = mlx_lqr.linearize(model, sets[0])
    gains = mlx_lqr.solve(jacobians, layers=mlx_lqr.choose_layers("auto", contrast, jacobians))
    default = mlx_lqr.fit(model, *sets, cost="state", push="free", layers=default.active_layers)
    step_by_step = mlx_lqr.compile(gains, contrast)
    assert np.allclose(step_by_step.gain, default.gain, atol=1e-6)
    assert np.allclose(step_by_step.offset, default.offset, atol=1e-6)
    few = [[1, 2, 3]], [[6, 7, 8, 9]]  # whose separation says nothing
    reached = authority(mlx_lqr.contrast(model, *few), mlx_lqr.linearize(model, few[0]).pull_back)
    expected = tuple(np.flatnonzero(reached >= reached.max() / 3))
    assert mlx_lqr.fit(model, *few).active_layers == expected
    assert 0 < len(expected) < 8


def test_prompts_that_end_alike_have_no_direction_at_layer_0() -> None:
    model = tiny("llama")
    contrast = mlx_lqr.contrast(model, [[1, 2, 9], [3, 9], [7, 9]], [[4, 5, 9], [6, 9]])
    assert not contrast.direction[0].any()
    assert not contrast.unit_direction[0].any()
    assert contrast.direction[1:].any(axis=1).all()
    controller = mlx_lqr.fit(model, [[1, 2, 9], [3, 9]], [[4, 5, 9], [6, 9]], layers="all")
    assert 0 not in controller.active_layers
    assert np.isfinite(controller.gain).all()


@pytest.mark.parametrize(
    ("positive", "negative", "says"),
    [([], [[1]], "no positive"), ([[1]], [], "no negative"), ([[1, 2], [3]], [[3], [1, 2]], "the same"),
     ([[1], []], [[2]], "empty"), ("text", [[1]], "list of prompts"), ([[1, 99]], [[2]], "between 0 and 63")],
)  # fmt: skip
def test_unusable_sets_are_refused(positive: object, negative: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        mlx_lqr.contrast(tiny("llama"), positive, negative)  # type: ignore[arg-type]


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    model = tiny("llama", max_position_embeddings=8)
    with pytest.raises(InputError, match="9 tokens and the model's context 8"):
        mlx_lqr.contrast(model, [[1] * 9], [[2]])


def test_activations_that_overflow_are_refused() -> None:
    model = tiny("llama")
    model.blocks[0].mlp.down_proj.weight = model.blocks[0].mlp.down_proj.weight * mx.array(float("inf"))
    with pytest.raises(InputError, match="overflow at layer 0"):
        mlx_lqr.contrast(model, [[1, 2]], [[3, 4]])


def test_prompt_files(tmp_path: Path) -> None:
    plain, lines, mixed = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    plain.write_text("one\n\n  two  \n{not json\n", "utf-8")
    assert mlx_lqr.read_prompts(plain) == ["one", "  two  ", "{not json"]
    lines.write_text('{"prompt": "a\\nb"}\n{"prompt": "c", "x": 1}\n', "utf-8")
    assert mlx_lqr.read_prompts(lines) == ["a\nb", "c"]
    for text in ('{"text": "a"}\n', '{"prompt": 3}\n', "{prompt}\n"):
        mixed.write_text(text)
        with pytest.raises(InputError, match="line 1"):
            mlx_lqr.read_prompts(mixed)
    plain.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        mlx_lqr.read_prompts(plain)
    plain.write_text(" \n")
    with pytest.raises(InputError, match="no prompts"):
        mlx_lqr.read_prompts(plain)
    with pytest.raises(InputError, match="cannot read"):
        mlx_lqr.read_prompts(tmp_path / "missing.txt")


def test_bundled_sets_tell_themselves_apart_on_smollm2(smollm2: Model) -> None:
    """Held-out sentences fall on their own side of the direction that the others give, in the last third of layers."""
    for name in ("ocean", "refusal"):
        positive, negative = mlx_lqr.bundled_prompts(name)
        contrast = mlx_lqr.contrast(smollm2, positive[:20], negative[:20])
        held_out = [smollm2.tokenizer.encode(text) for text in positive[40:50] + negative[40:50]]
        middle = (contrast.mean_positive + contrast.mean_negative) / 2
        side = np.einsum("nkd,kd->nk", smollm2.residuals(held_out)[:, :-1] - middle, contrast.unit_direction)[:, 20:]
        right = np.concatenate([side[:10] > 0, side[10:] < 0]).mean()
        assert right > 0.8, (name, right)  # 0.5 is chance


def test_the_discriminant_is_that_of_the_shrunk_covariance() -> None:
    """Against the formula with the whole covariance matrix, for fewer prompts than dimensions and for more."""
    model, random = tiny("llama"), np.random.default_rng(3)
    for n, m in ((6, 5), (200, 150)):
        scale = random.uniform(0.1, 3, 16)
        positive = (random.standard_normal((n, 4, 16)) * scale + 0.7).astype(np.float32)
        negative = (random.standard_normal((m, 4, 16)) * scale).astype(np.float32)
        elsewhere = (random.standard_normal((n // 2, 4, 16)) + 5).astype(np.float32)
        assert contrast_of(model, positive, negative).discriminant is None
        contrast = contrast_of(model, positive, negative, elsewhere)
        assert contrast.discriminant is not None
        for k, w in enumerate(contrast.discriminant):
            groups = [one[:, k].astype(np.float64) for one in (positive, negative, elsewhere)]
            within = np.vstack([one - one.mean(0) for one in groups])
            S = within.T @ within / (n + m + n // 2 - 3)
            solved = np.linalg.solve(0.7 * S + 0.3 * np.trace(S) / 16 * np.eye(16), contrast.unit_direction[k])
            assert w == pytest.approx(solved / (contrast.unit_direction[k] @ solved), rel=1e-4, abs=1e-5)
    same = np.ones((3, 4, 16), np.float32)
    alike = contrast_of(model, same, np.concatenate([same[:, :, :8], -same[:, :, 8:]], axis=2), same[:0])
    assert alike.discriminant == pytest.approx(alike.unit_direction)  # nothing varies within the sets
    assert contrast_of(model, positive[:1], negative[:1], elsewhere).discriminant is None


def test_the_discriminant_tells_held_out_prompts_apart_better() -> None:
    """Where prompts vary along what is no part of the concept, which the direction picks up by chance."""
    model, random = tiny("llama"), np.random.default_rng(5)
    scale = np.where(np.arange(64) < 8, 5, 0.3)

    def draw(n: int, shift: float) -> np.ndarray:
        values = random.standard_normal((n, 2, 64)) * scale
        values[:, :, 60:] += shift
        return values.astype(np.float32)

    contrast = contrast_of(model, draw(40, 0.5), draw(40, 0.0), draw(40, 0.25))
    assert contrast.discriminant is not None
    new = draw(400, 0.5)[:, 0], draw(400, 0.0)[:, 0]
    separations = []
    for vector in (contrast.discriminant[0], contrast.unit_direction[0]):
        one, other = (rows @ vector for rows in new)
        separations.append((one.mean() - other.mean()) / np.sqrt((one.var() + other.var()) / 2))
    assert separations[0] > 1.5 * separations[1]
