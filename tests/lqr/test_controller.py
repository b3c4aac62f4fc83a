"""Compiling, combining, saving and refusing controllers."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.tiny import tiny
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import mlx_lqr
from mlx_lqr import Contrast, Controller, Gains, InputError
from mlx_lqr.backends.protocol import Model
from mlx_lqr.lqr.controller import CONVERSATION_FEEDBACK, STEERED_LEVEL
from mlx_lqr.lqr.riccati import Weights
from mlx_lqr.methods.alqr import LinearFeedback

T, D = 4, 12


def made_gains(random: np.random.Generator) -> Gains:
    return Gains([random.standard_normal((D, D)) for _ in range(T)], Weights(), tuple(range(T)), "f", "m", 3)


def made_contrast(random: np.random.Generator) -> Contrast:
    means = random.standard_normal((2, T, D)).astype(np.float32)
    return Contrast(means[0], means[1], means[0] - means[1], np.ones(D, np.float32), (5, 6), "f", "m")


def made(random: np.random.Generator, concept: str) -> Controller:
    return mlx_lqr.compile(made_gains(random), made_contrast(random), concept)


def test_compiled_law_equals_the_full_gain_law(random: np.random.Generator) -> None:
    gains, contrast = made_gains(random), made_contrast(random)
    law = LinearFeedback(mlx_lqr.compile(gains, contrast, setpoint="paper", feedback=1.0), 2.5)
    z = random.standard_normal((3, D)).astype(np.float32)
    for k in range(T):
        v, mu = contrast.unit_direction[k], contrast.magnitude[k]
        dz = -np.outer(2.5 * mu - z @ v, v)
        assert np.allclose(law(k, z, 0.0), -dz @ gains[k].T, atol=1e-4)


def test_joint_law_equals_the_full_gain_law_and_meets_both_setpoints(random: np.random.Generator) -> None:
    gains = made_gains(random)
    contrasts = [made_contrast(random), made_contrast(random)]
    # directions that overlap
    contrasts[1] = replace(contrasts[1], direction=(contrasts[1].direction + contrasts[0].direction).astype(np.float32))
    single = [
        mlx_lqr.compile(gains, contrast, name, setpoint="paper", feedback=1.0)
        for contrast, name in zip(contrasts, "ab", strict=True)
    ]
    joint = Controller.combine(*single)
    law, strengths = LinearFeedback(joint, [2.0, -1.0]), np.array([2.0, -1.0])
    z = random.standard_normal(D).astype(np.float32)
    for k in range(T):
        V = np.stack([contrast.unit_direction[k] for contrast in contrasts], axis=1)
        mu = np.array([contrast.magnitude[k] for contrast in contrasts])
        wanted = strengths * mu
        dz = -V @ np.linalg.solve(V.T @ V, wanted - V.T @ z)
        assert np.allclose(law(k, z, 0.0), -gains[k] @ dz, rtol=1e-3, atol=1e-3)
        # with K = I the joint law reaches both setpoints in one step, and the sum of two feedbacks does not
        assert np.allclose(V.T @ (z - dz), wanted, atol=1e-3)
        added = V @ (wanted - V.T @ z)
        assert not np.allclose(V.T @ (z + added), wanted, atol=0.1)


class FullGainLaw:
    """u_k = -K_k dz_k with dz_k = -V_k (V_k'V_k)^-1 (wanted_k - V_k' z_k) and the whole gains, for comparison."""

    site = "block"

    def __init__(self, K: Any, V: Any, pseudoinverse: Any, wanted: Any, layers: Any) -> None:
        self.layers = layers
        self._parts = K, V, pseudoinverse, wanted

    def to(self, array: Any, add_product: Any, *, renew: Any = None) -> FullGainLaw:
        K, V, pseudoinverse, wanted = ([array(part) for part in parts] for parts in self._parts)
        return FullGainLaw(K, V, pseudoinverse, wanted, self.layers)

    def __call__(self, layer: int, z: Any, output: Any) -> Any:
        K, V, pseudoinverse, wanted = (parts[layer] for parts in self._parts)
        return output + (wanted - z @ V) @ pseudoinverse @ K.T


@pytest.mark.parametrize("weight", [0.1, 10.0])
def test_on_the_real_model_the_joint_law_is_the_full_gain_law(
    weight: float, smollm2: Model, jacobians: mlx_lqr.Jacobians, ocean: Contrast, golden: dict[str, Any]
) -> None:
    gains = mlx_lqr.solve(jacobians, weight, 1.0, weight)
    other = mlx_lqr.contrast(smollm2, golden["positive"][:6], golden["negative"][:6])  # overlaps with the first
    joint = Controller.combine(
        *(
            mlx_lqr.compile(gains, contrast, name, setpoint="paper", readout="direction", feedback=1.0)
            for contrast, name in ((ocean, "a"), (other, "b"))
        )
    )
    strengths = np.array([1.0, -2.0], np.float32)
    pseudoinverse = [np.linalg.pinv(V) for V in joint.direction]
    full = FullGainLaw(list(gains), joint.direction, pseudoinverse, joint.setpoint * strengths, joint.active_layers)
    tokens = smollm2.tokenizer.encode(golden["prompt"])
    residuals = smollm2.residuals([tokens], law=LinearFeedback(joint, strengths))[0]
    expected = smollm2.residuals([tokens], law=full)[0]
    assert (np.linalg.norm(residuals - expected, axis=1) < 1e-4 * np.linalg.norm(expected, axis=1)).all()


def test_combining_one_by_one_equals_combining_at_once(random: np.random.Generator) -> None:
    a, b, c = (made(random, name) for name in "abc")
    at_once = Controller.combine(a, b, c)
    one_by_one = Controller.combine(Controller.combine(a, b), c)
    assert at_once.concepts == one_by_one.concepts == ("a", "b", "c")
    assert np.allclose(at_once.gain, one_by_one.gain, rtol=1e-3, atol=1e-4)
    assert np.allclose(Controller.combine(a).gain, a.gain, atol=1e-6)


def test_a_concept_without_control_at_a_layer_leaves_the_other_alone_there(random: np.random.Generator) -> None:
    a, b = made(random, "a"), made(random, "b")
    gain = a.gain.copy()
    gain[1] = 0
    joint = Controller.combine(replace(a, gain=gain), b)
    assert not joint.gain[1, :, 0].any()
    assert np.allclose(joint.gain[1, :, 1:], b.gain[1])


def test_nearly_parallel_directions_are_refused_by_name(random: np.random.Generator) -> None:
    a, b = made(random, "dog"), made(random, "wolf")
    direction = b.direction.copy()
    direction[2] = a.direction[2]
    with pytest.raises(InputError, match=r"dog and wolf .* layers 2 .* degrees"):
        Controller.combine(a, replace(b, direction=direction))


def test_what_does_not_belong_together_is_not_combined(random: np.random.Generator) -> None:
    a, b = made(random, "a"), made(random, "b")
    with pytest.raises(InputError, match="twice"):
        Controller.combine(a, replace(b, concepts=("a",)))
    with pytest.raises(InputError, match="fitted on"):
        Controller.combine(a, replace(b, fingerprint="another"))
    with pytest.raises(InputError, match="positions"):
        Controller.combine(a, replace(b, positions="all"))
    with pytest.raises(InputError, match="at least one"):
        Controller.combine()


def test_a_saved_controller_comes_back_whole(tmp_path: Path, random: np.random.Generator) -> None:
    joint = Controller.combine(made(random, "a"), made(random, "b"))
    joint.save(tmp_path / "joint.safetensors")
    loaded = Controller.load(tmp_path / "joint.safetensors")
    for field in fields(Controller):
        value, expected = getattr(loaded, field.name), getattr(joint, field.name)
        if isinstance(expected, np.ndarray):
            assert np.array_equal(value, expected)
            assert value.dtype == np.float32
        else:
            assert value == expected, field.name


def _metadata(file: Path) -> dict[str, str]:
    header = file.read_bytes()
    length = int.from_bytes(header[:8], "little")
    return dict(json.loads(header[8 : 8 + length])["__metadata__"])


@pytest.mark.parametrize(
    "damage",
    ["truncated", "not finite", "wrong shape", "missing tensor", "another format", "bad json", "text", "negative r"],
)
def test_a_damaged_file_is_refused_in_one_line(damage: str, tmp_path: Path, random: np.random.Generator) -> None:
    file = tmp_path / "controller.safetensors"
    made(random, "a").save(file)
    tensors, metadata = load_file(file), _metadata(file)
    if damage == "not finite":
        tensors["gain"][0, 0, 0] = np.nan
    elif damage == "wrong shape":
        tensors["gain"] = tensors["gain"][:2].copy()
    elif damage == "missing tensor":
        del tensors["offset"]
    elif damage == "another format":
        metadata["format"] = "mlx-lqr controller 99"
    elif damage == "bad json":
        metadata["concepts"] = "[a"
    elif damage == "negative r":
        metadata["r"] = "-1"
    save_file(tensors, file, metadata)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "text":
        file.write_text("hello")
    with pytest.raises(InputError) as refusal:
        Controller.load(file)
    assert "\n" not in str(refusal.value)


def test_a_controller_of_another_model_is_refused(random: np.random.Generator) -> None:
    one, other, larger = tiny("llama"), tiny("llama", seed=1), tiny("llama", num_hidden_layers=4)
    prompts = [[1, 2, 3], [4, 5, 6]], [[7, 8, 9]]
    controller = mlx_lqr.fit(one, *prompts, concept="a", layers="all")
    assert one.fingerprint != other.fingerprint
    for model in (other, larger):
        with pytest.raises(InputError, match="fitted on"):
            mlx_lqr.stream(model, [1, 2], controller=controller)
        with pytest.raises(InputError, match="fitted on"), mlx_lqr.steer(model, controller):
            pass


def test_the_same_model_in_another_dtype_or_quantisation_is_recognised() -> None:
    fingerprint = tiny("llama").fingerprint
    assert tiny("llama", dtype=mx.bfloat16).fingerprint == fingerprint
    quantised = tiny("llama")
    nn.quantize(quantised.module, group_size=32, bits=4)
    assert quantised.fingerprint == fingerprint


def test_gains_and_contrast_of_different_models_are_not_compiled(random: np.random.Generator) -> None:
    with pytest.raises(InputError, match="different models"):
        mlx_lqr.compile(replace(made_gains(random), fingerprint="another"), made_contrast(random))


@pytest.mark.parametrize("strength", ["three", None, float("nan"), float("inf"), [1, 2], [[1]]])
def test_a_strength_that_is_no_number_is_refused(strength: object, random: np.random.Generator) -> None:
    with pytest.raises(InputError, match="strength"):
        LinearFeedback(made(random, "a"), strength)  # type: ignore[arg-type]


def test_strength_may_change_while_a_law_is_in_use(random: np.random.Generator) -> None:
    controller = made(random, "a")
    law = LinearFeedback(controller, 1.0)
    placed = law.to(lambda array: array * 1, lambda c, a, b: c + a @ b)
    z = random.standard_normal(D).astype(np.float32)
    before = placed(2, z, 0.0)
    law.strength = 3.0  # type: ignore[assignment]
    assert np.array_equal(placed(2, z, 0.0), LinearFeedback(controller, 3.0)(2, z, 0.0))
    assert not np.allclose(placed(2, z, 0.0), before)


def test_control_at_chosen_layers_only() -> None:
    model = tiny("llama", num_hidden_layers=5)
    controller = mlx_lqr.fit(model, [[1, 2, 3]], [[4, 5, 6]], layers=[2, -1], cost="state", push="free")
    assert controller.active_layers == (2, 4)
    whole = mlx_lqr.linearize(model, [[1, 2, 3]])
    gains = mlx_lqr.solve(whole, layers=[2, 4])
    contrast = mlx_lqr.contrast(model, [[1, 2, 3]], [[4, 5, 6]])
    assert np.allclose(controller.gain, mlx_lqr.compile(gains, contrast).gain, atol=1e-6)


def test_stored_jacobians_give_the_same_controller() -> None:
    model = tiny("qwen2")
    prompts = [[1, 2, 3], [9, 8]], [[4, 5, 6]]
    stored = mlx_lqr.linearize(model, prompts[0])
    fresh = mlx_lqr.fit(model, *prompts, layers="all")
    assert np.allclose(mlx_lqr.fit(model, *prompts, jacobians=stored, layers="all").gain, fresh.gain, atol=1e-7)
    with pytest.raises(InputError, match="Jacobians are of"):
        mlx_lqr.fit(tiny("qwen2", seed=1), *prompts, jacobians=stored, layers="all")


def made_reading(random: np.random.Generator, concept: str, weights: Gains, feedback: float = 0.5) -> Controller:
    """With a discriminant that is not the direction."""
    contrast = made_contrast(random)
    w = contrast.unit_direction + 0.3 * random.standard_normal((T, D)).astype(np.float32)
    w /= np.einsum("kd,kd->k", w, contrast.unit_direction)[:, None]
    return mlx_lqr.compile(weights, replace(contrast, discriminant=w), concept, feedback=feedback)


def test_a_share_of_the_feedback_takes_back_so_much_of_the_push(random: np.random.Generator) -> None:
    """u_k = (s mu_k - f (w_k . z - offset_k)) K_k v_k, alone, from a file and beside another concept."""
    gains, contrast, z = made_gains(random), made_contrast(random), random.standard_normal(D).astype(np.float32)
    whole, part = (mlx_lqr.compile(gains, contrast, "a", readout="direction", feedback=f) for f in (1.0, 0.3))
    assert np.allclose(part.magnitude, whole.setpoint)
    for k in range(T):
        v = contrast.unit_direction[k]
        alpha = 1.7 * contrast.magnitude[k] - 0.3 * v @ (z - contrast.mean_negative[k])
        assert np.allclose(LinearFeedback(part, 1.7)(k, z, 0.0), alpha * gains[k] @ v, atol=1e-3)
    joint = Controller.combine(part, mlx_lqr.compile(gains, made_contrast(random), "b", feedback=0.8))
    assert joint.shares == (0.3, 0.8)
    alone = joint.split()[0]
    assert (alone.shares, alone.gain) == ((0.3,), pytest.approx(part.gain, abs=1e-4))


def test_in_a_conversation_more_is_taken_back_about_the_level_of_steered_texts(random: np.random.Generator) -> None:
    """u_k = (s mu_k - f y - g (y - c s mu_k)) K_k v_k for y = w_k . z - offset_k, alone and beside another concept."""
    gains, contrast, z = made_gains(random), made_contrast(random), random.standard_normal(D).astype(np.float32)
    first = mlx_lqr.compile(gains, contrast, "a", readout="direction", feedback=0.03).recommending((0.6,))
    first = replace(first, checked_error=np.ones((T, 1), np.float32), checked_push=np.ones((T, 1), np.float32))
    later, s = first.in_conversation(), 1.7
    assert (later.shares, later.strength) == ((CONVERSATION_FEEDBACK,), (0.6,))
    laws = LinearFeedback(first, s), LinearFeedback(later, s)
    for k in range(T):
        v, mu = contrast.unit_direction[k], contrast.magnitude[k]
        level = STEERED_LEVEL * s * mu
        y = v @ (z - contrast.mean_negative[k])
        alpha = s * mu - 0.03 * y - (CONVERSATION_FEEDBACK - 0.03) * (y - level)
        assert np.allclose(laws[1](k, z, 0.0), alpha * gains[k] @ v, atol=1e-3)
        there = (z + (level - y) * v).astype(np.float32)
        assert np.allclose(laws[0](k, there, 0.0), laws[1](k, there, 0.0), atol=1e-3)
    # The region is of f |alpha_k| and of |u_k|.
    assert later.checked_error == pytest.approx(np.full((T, 1), 0.03 / CONVERSATION_FEEDBACK))
    assert later.checked_push == pytest.approx(first.checked_push)
    enough = mlx_lqr.compile(gains, made_contrast(random), "b", feedback=0.8)
    assert enough.in_conversation() is enough
    joint = Controller.combine(first, enough).in_conversation()
    assert joint.shares == (CONVERSATION_FEEDBACK, 0.8)
    for alone, expected in zip(joint.split(), (later, enough), strict=True):
        assert alone.gain == pytest.approx(expected.gain, abs=1e-4)
        assert alone.setpoint == pytest.approx(expected.setpoint)


@pytest.mark.parametrize("feedback", [0.0, -0.5, 1.5, float("nan")])
def test_what_is_no_share_of_the_feedback_is_refused(feedback: float, random: np.random.Generator) -> None:
    with pytest.raises(InputError, match="feedback must be above 0 and at most 1"):
        mlx_lqr.compile(made_gains(random), made_contrast(random), feedback=feedback)


def damaged_and_then_without(file: Path, name: str, *damaged: str) -> None:
    """Each of these values of an entry is refused; afterwards the file has no such entry, as older ones."""
    tensors = load_file(file)
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    for value in damaged:
        save_file(tensors, file, {**metadata, name: value})
        with pytest.raises(InputError, match="damaged controller file"):
            Controller.load(file)
    del metadata[name]
    save_file(tensors, file, metadata)


def test_files_keep_the_share_of_the_feedback_and_older_ones_have_all_of_it(
    tmp_path: Path, random: np.random.Generator
) -> None:
    file = tmp_path / "a.safetensors"
    mlx_lqr.compile(made_gains(random), made_contrast(random), feedback=0.3).save(file)
    assert Controller.load(file).shares == (0.3,)
    damaged_and_then_without(file, "feedback", "[0.0]", "[2.0]", "[NaN]", "[0.3, 0.3]", "0.3")
    assert Controller.load(file).shares == (1.0,)


def test_files_keep_where_each_gain_pushes_and_in_older_ones_all_are_free(tmp_path: Path) -> None:
    model, file = tiny("llama"), tmp_path / "a.safetensors"
    sets = [[1, 2, 3], [4, 5]], [[6, 7], [9]]
    along = mlx_lqr.fit(model, *sets, concept="along", layers="all", push="concept")
    outputs = np.vstack([along.direction[1:, :, 0], along.output_direction.T])
    outputs /= np.linalg.norm(outputs, axis=1, keepdims=True)
    gain = along.gain[:, :, 0]
    assert np.allclose(gain, (gain * outputs).sum(axis=1, keepdims=True) * outputs, atol=1e-6)
    free = mlx_lqr.fit(model, sets[1], [[8, 3, 1]], concept="free", layers="all", push="free")
    both = Controller.combine(along, free)
    assert both.pushes == ("concept", "free")
    assert [one.pushes for one in both.split()] == [("concept",), ("free",)]
    both.save(file)
    loaded = Controller.load(file)
    assert loaded.pushes == ("concept", "free")
    adapted = mlx_lqr.adapt(model, loaded, [1, 2]).split()  # which keeps to it
    gain = adapted[0].gain[:, :, 0]
    assert np.allclose(gain, (gain * outputs).sum(axis=1, keepdims=True) * outputs, atol=1e-5)
    damaged_and_then_without(
        file, "push", '["concept"]', '["concept", "sideways"]', '["concept", 1]', '"concept"', "[[], []]"
    )
    assert Controller.load(file).pushes == ("free", "free")
    with pytest.raises(InputError, match="push must be 'concept' or 'free', not 'sideways'"):
        mlx_lqr.fit(model, *sets, push="sideways")  # type: ignore[arg-type]


def test_a_readout_reads_and_the_gain_pushes(random: np.random.Generator) -> None:
    """u_k = (w_k . mean-_k + s mu_k - w_k . z) K_k v_k, which is 0 at strength 1 for the positive prompts' mean."""
    gains, contrast = made_gains(random), made_contrast(random)
    w = (contrast.unit_direction + random.standard_normal((T, D)) * 0.2).astype(np.float32)
    w /= np.einsum("kd,kd->k", w, contrast.unit_direction)[:, None]
    law = LinearFeedback(mlx_lqr.compile(gains, replace(contrast, discriminant=w), feedback=1.0), 1.7)
    by_direction = mlx_lqr.compile(gains, replace(contrast, discriminant=w), readout="direction")
    assert by_direction.readout is None
    z = random.standard_normal(D).astype(np.float32)
    for k in range(T):
        alpha = w[k] @ contrast.mean_negative[k] + 1.7 * contrast.magnitude[k] - w[k] @ z
        assert np.allclose(law(k, z, 0.0), alpha * gains[k] @ contrast.unit_direction[k], atol=1e-3)
    law.strength = 1.0
    assert np.allclose(law(0, contrast.mean_positive[0], 0.0), 0, atol=1e-3)


def test_joint_control_of_readouts_meets_all_setpoints(random: np.random.Generator) -> None:
    """With K = I the push takes each reading to its setpoint, whatever the angle between the directions is."""
    identity = Gains([np.eye(D)] * T, Weights(), tuple(range(T)), "f", "m", 3)
    single = [
        made_reading(random, "a", identity, 1.0),
        made_reading(random, "b", identity, 1.0),
        made(random, "c"),
    ]
    joint = Controller.combine(*single)
    law, z = LinearFeedback(joint, [2.0, -1.0, 0.0]), random.standard_normal(D).astype(np.float32)
    for k in range(T):
        reached = (z + law(k, z, 0.0)) @ joint.sensor[k]
        assert reached[:2] == pytest.approx((joint.offset + joint.setpoint * [2.0, -1.0, 0.0])[k][:2], abs=1e-3)
    for one, other in zip(joint.split(), single, strict=True):
        assert np.allclose(one.gain, other.gain, atol=1e-4)
        assert np.allclose(one.sensor, other.sensor)


def test_a_readout_is_kept_in_a_file_that_older_versions_refuse(tmp_path: Path, random: np.random.Generator) -> None:
    controller, file = made_reading(random, "a", made_gains(random)), tmp_path / "a.safetensors"
    controller.save(file)
    loaded = Controller.load(file)
    assert controller.readout is not None
    assert np.array_equal(loaded.sensor, controller.readout)
    tensors = load_file(file)
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "mlx-lqr controller 2"
    made(random, "b").save(tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", "np") as opened:
        assert opened.metadata()["format"] == "mlx-lqr controller 1"
    del tensors["readout"]
    save_file(tensors, file, metadata)
    with pytest.raises(InputError, match="damaged controller file"):
        Controller.load(file)
