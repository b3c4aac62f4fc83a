"""ITI: which attention heads are chosen, what moving them is, and that every way through a model does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from helpers.backends import BACKENDS, smollm2_on, tiny_on
from helpers.decoding import prefill_chunks
from helpers.prompts import PROMPT
from helpers.tiny import FAMILY, tiny
from scipy.optimize import minimize

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends.protocol import Float32
from mlx_lqr.commands import main
from mlx_lqr.methods.baseline import Baseline
from mlx_lqr.methods.probes import held_out, logistic_regression
from mlx_lqr.methods.steering import combine, law_of
from mlx_lqr.runtime.decode import decode

POSITIVE, NEGATIVE = [[1, 2, 3], [4, 5], [9, 30, 7]], [[6, 7], [8], [12, 44]]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
families = pytest.mark.parametrize("family", sorted(FAMILY))


def fitted(model: Any, **options: Any) -> Baseline:
    return iti(model, POSITIVE, NEGATIVE, **{"heads": 4, **options})


def iti(model: Any, positive: Any, negative: Any, **options: Any) -> Baseline:
    steering = mlx_lqr.fit_baseline(model, "iti", positive, negative, **options)
    assert isinstance(steering, Baseline)
    return steering


def moved_heads(model: Any, steering: Baseline) -> Float32:
    """sigma_h theta_h of the chosen heads, from the definition: (T, heads * head_dim)"""
    positive, negative = model.head_outputs(POSITIVE), model.head_outputs(NEGATIVE)
    moved = np.zeros(positive.shape[1:], np.float32)
    for k, h in np.argwhere(steering.tensors["head_spread"][..., 0] > 0):
        theta = positive[:, k, h].mean(axis=0) - negative[:, k, h].mean(axis=0)
        theta /= np.linalg.norm(theta)
        moved[k, h] = theta * np.std([theta @ x for x in [*positive[:, k, h], *negative[:, k, h]]])
    return moved.reshape(len(moved), -1)


class Moved(nn.Module):
    """An output projection whose last input is moved."""

    def __init__(self, projection: nn.Module, shift: Float32) -> None:
        super().__init__()
        self.projection, self._shift = projection, mx.array(shift)

    def __call__(self, x: mx.array) -> mx.array:
        return self.projection(mx.concatenate([x[:, :-1], x[:, -1:] + self._shift], axis=1))


def logits_by_hand(model: Any, prompt: list[int], moved: Float32) -> Float32:
    """The logits (V,) of the framework's own forward pass, heads moved before their projection at the last token."""
    if isinstance(model.module, nn.Module):
        parts = [block.self_attn for block in model.blocks]
        originals = [part.o_proj for part in parts]
        for part, shift in zip(parts, moved, strict=True):
            part.o_proj = Moved(part.o_proj, shift)
        logits = model.module(mx.array([prompt]))[0, -1]
        for part, original in zip(parts, originals, strict=True):
            part.o_proj = original
        return np.asarray(logits.astype(mx.float32))
    import torch

    handles = []
    for block, shift in zip(model.blocks, moved, strict=True):

        def move(_: Any, args: Any, shift: Float32 = shift) -> Any:
            x = args[0].clone()
            x[:, -1] += torch.tensor(shift)
            return (x,)

        handles.append(block.self_attn.o_proj.register_forward_pre_hook(move))
    logits = model.module(torch.tensor([prompt])).logits[0, -1]
    for handle in handles:
        handle.remove()
    outputs: Float32 = logits.detach().numpy()
    return outputs


# Which heads.


def test_a_logistic_regression_is_the_minimum_of_its_loss(random: np.random.Generator) -> None:
    x = random.standard_normal((3, 40, 5)) * [1, 5, 0.2, 1, 1]
    y = np.where(x[0] @ [1, 0.3, 0, -1, 0] + random.standard_normal(40) > 0.3, 1.0, -1.0)
    weights, biases = logistic_regression(x, y, ridge=0.7)
    for features, weight, bias in zip(x, weights, biases, strict=True):

        def loss(solution: np.ndarray, features: np.ndarray = features) -> float:
            margin = y * (features @ solution[:-1] + solution[-1])
            return float(np.log1p(np.exp(-margin)).sum() + 0.35 * solution[:-1] @ solution[:-1])

        best = minimize(loss, np.zeros(6), tol=1e-10).x
        assert np.allclose([*weight, bias], best, atol=1e-3)


def test_a_probe_is_judged_by_prompts_that_it_has_not_seen(random: np.random.Generator) -> None:
    positive, negative = (random.standard_normal((n, 3, 60)).astype(np.float32) for n in (31, 27))
    positive[:, 1, 0] += 8  # a probe that can tell them apart; the others have more features than prompts
    positive[:, 2], negative[:, 2] = 1, 1
    accuracy, likelihood = held_out(positive, negative)
    assert accuracy[1] > 0.85
    assert 0.25 < accuracy[0] < 0.75
    assert likelihood[1] > likelihood[0]
    assert accuracy[2] == pytest.approx(31 / 58)  # nothing to go by but which set is larger
    assert np.array_equal(held_out(positive, negative)[0], accuracy)
    with pytest.raises(InputError, match="at least two"):
        held_out(positive[:1], negative)


@every_backend
def test_the_head_that_tells_the_prompts_apart_is_found_and_moved_by_its_spread(
    backend: str, monkeypatch: pytest.MonkeyPatch, random: np.random.Generator
) -> None:
    model = tiny_on(backend, "llama")
    outputs = random.standard_normal((60, 3, 4, 8)).astype(np.float32)
    outputs[:30, 1, 2, 5] += 6
    monkeypatch.setattr(model, "head_outputs", lambda prompts, progress=None: outputs)
    prompts = [[token, 7] for token in range(60)]
    steering = iti(model, prompts[:30], prompts[30:], heads=1)
    assert steering.active_layers == (1,)
    assert np.argwhere(steering.tensors["head_spread"][..., 0]).tolist() == [[1, 2]]
    accuracy = steering.tensors["head_accuracy"][..., 0]
    assert accuracy[1, 2] == accuracy.max() > 0.95
    theta = outputs[:30, 1, 2].mean(axis=0) - outputs[30:, 1, 2].mean(axis=0)
    theta /= np.linalg.norm(theta)
    weight = np.array(model.blocks[1].self_attn.o_proj.weight.tolist())[:, 16:24]
    expected = weight @ theta * (outputs[:, 1, 2] @ theta).std()
    assert np.allclose(steering.tensors["attention_shift"][1, :, 0], expected, atol=1e-5)
    elsewhere = iti(model, prompts[:30], prompts[30:], heads=3, layers=[0, 2])
    chosen = np.argwhere(elsewhere.tensors["head_spread"][..., 0])
    assert len(chosen) == 3
    assert set(chosen[:, 0]) <= {0, 2}


def test_forty_eight_of_a_thousand_heads_are_moved_where_nothing_is_said() -> None:
    model = tiny_on("mlx", "llama", num_hidden_layers=12, num_attention_heads=8, head_dim=4)
    steering = fitted(model, heads=None)
    assert (steering.tensors["head_spread"] > 0).sum() == round(96 * 48 / 1024) == 4
    assert (fitted(tiny_on("mlx", "llama"), heads=None).tensors["head_spread"] > 0).sum() == 1


# What moving them is.


@every_backend
@families
def test_the_law_is_a_forward_pass_whose_heads_are_moved_before_their_projection(backend: str, family: str) -> None:
    model = tiny_on(backend, family)
    steering = fitted(model)
    law, moved = law_of(steering, 3.0), 3 * moved_heads(model, steering)
    expected = logits_by_hand(model, PROMPT, moved)
    plain = model.logits(PROMPT)
    assert np.allclose(plain, logits_by_hand(model, PROMPT, 0 * moved), atol=1e-4)
    assert np.abs(expected - plain).max() > 0.01
    assert np.allclose(model.logits(PROMPT, law=law), expected, atol=1e-4 * np.abs(expected).max() + 1e-4)
    streams = model.residuals([PROMPT[:3], PROMPT], law=law)[1], model.residuals([PROMPT])[0]
    first = steering.active_layers[0]
    assert np.allclose(streams[0][: first + 1], streams[1][: first + 1], atol=1e-4)
    assert np.abs(streams[0][first + 1] - streams[1][first + 1]).max() > 1e-3
    token = int(expected.argmax())
    expected_score = expected[token] - np.log(np.exp(expected - expected.max()).sum()) - expected.max()
    assert model.log_probabilities([(PROMPT, [token])], law=law)[0][0] == pytest.approx(expected_score, abs=1e-3)


@every_backend
def test_a_bias_of_the_projection_is_not_added_again(backend: str) -> None:
    model = tiny_on(backend, "llama", attention_bias=True)
    steering = fitted(model)
    expected = logits_by_hand(model, PROMPT, 2 * moved_heads(model, steering))
    assert np.allclose(model.logits(PROMPT, law=law_of(steering, 2.0)), expected, atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_projection_is_steered_too(bits: int) -> None:
    model = tiny("gemma3_text", num_attention_heads=8)
    nn.quantize(model.module, group_size=32, bits=bits)
    steering = fitted(model)
    assert isinstance(model.blocks[0].self_attn.o_proj, nn.QuantizedLinear)
    expected = logits_by_hand(model, PROMPT, 3 * moved_heads(model, steering))
    assert np.abs(expected - model.logits(PROMPT)).max() > 0.01
    assert np.allclose(model.logits(PROMPT, law=law_of(steering, 3.0)), expected, atol=1e-3)


@every_backend
def test_strength_zero_is_the_model_itself_bit_for_bit(backend: str) -> None:
    model = tiny_on(backend, "gemma2")
    law = law_of(fitted(model), 0.0)
    assert np.array_equal(model.logits(PROMPT, law=law), model.logits(PROMPT))
    assert np.array_equal(model.residuals([PROMPT], law=law), model.residuals([PROMPT]))
    assert np.array_equal(
        model.log_probabilities([(PROMPT, [1, 2, 3])], law=law)[0], model.log_probabilities([(PROMPT, [1, 2, 3])])[0]
    )


# Every way through a model.


@every_backend
@pytest.mark.parametrize("positions", ["last", "all"])
def test_prompts_are_steered_alike_in_chunks_and_as_a_whole(
    backend: str, positions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_on(backend, "gemma3_text")
    law, steer_all = law_of(fitted(model, positions=positions), 3.0), positions == "all"
    whole = model.logits(PROMPT, law=law, steer_all=steer_all)
    continued = model.log_probabilities(
        [(PROMPT[:1] if steer_all else PROMPT, PROMPT[1:])], law=law, steer_all=steer_all
    )[0]
    prefill_chunks(3, monkeypatch)
    assert np.allclose(model.logits(PROMPT, law=law, steer_all=steer_all), whole, atol=1e-4)
    decoder, expected = model.decoder(law), []
    prompt = PROMPT[:1] if steer_all else PROMPT
    decoder.fill([prompt[:-1]], steered=steer_all)
    for token, following in zip([prompt[-1], *PROMPT[1:-1]], PROMPT[1:], strict=True):
        logits = np.array(decoder.step([token])[0].tolist())
        expected.append(logits[following] - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
    assert np.allclose(continued, expected, atol=1e-3)


def test_the_compiled_step_of_long_answers_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_on("mlx", "gemma2")
    steering, answers = fitted(model), []
    for after in (2, 1000):
        monkeypatch.setattr("mlx_lqr.backends.mlx.decoder.COMPILE_AFTER", after)
        law, tokens = law_of(steering, 3.0), []
        for _, token in decode(model, [PROMPT], law=law, max_tokens=40):
            tokens.append(token)
            law.strength = 3.0 if len(tokens) < 20 else -2.0
        answers.append(tokens)
    assert answers[0] == answers[1]
    assert answers[0] != [token for _, token in decode(model, [PROMPT], max_tokens=40)]


@every_backend
def test_a_model_being_steered_is_untouched_afterwards_and_refused_meanwhile(backend: str) -> None:
    model = tiny_on(backend, "olmo2")
    steering, before = fitted(model), model.logits(PROMPT)
    kinds = [type(block.self_attn.o_proj) for block in model.blocks]
    with mlx_lqr.steer(model.module, steering, 3.0):
        inside = logits_by_hand(model, PROMPT, np.zeros((3, 32), np.float32))
        with pytest.raises(InputError, match="being steered"):
            model.logits(PROMPT)
    assert np.allclose(inside, model.logits(PROMPT, law=law_of(steering, 3.0)), atol=1e-4)
    assert np.array_equal(model.logits(PROMPT), before)
    assert [type(block.self_attn.o_proj) for block in model.blocks] == kinds


@every_backend
def test_activations_that_overflow_are_reported_with_their_layer(backend: str) -> None:
    model = tiny_on(backend, "llama")
    with pytest.raises(InputError, match="overflow at layer"):
        list(decode(model, [PROMPT], law=law_of(fitted(model, layers=[1]), 1e38), max_tokens=3))


# Files, combinations, the command line.


def test_concepts_are_added_and_taken_apart_and_kept(tmp_path: Path) -> None:
    model = tiny_on("mlx", "llama")
    one = fitted(model, concept="a", layers=[0])
    two = iti(model, NEGATIVE, POSITIVE, concept="b", layers=[0, 2], heads=2)
    both = combine([one, two])
    assert isinstance(both, Baseline)
    both.save(tmp_path / "both")
    loaded = mlx_lqr.load_steering(tmp_path / "both")
    assert isinstance(loaded, Baseline)
    law, zero = law_of(loaded, [2.0, 0.5]), np.zeros((1, 1, 32), np.float32)
    shifts = [part.tensors["attention_shift"][0, :, 0] for part in (one, two)]
    assert np.allclose(law(0, zero, zero)[0, 0], 2 * shifts[0] + 0.5 * shifts[1], atol=1e-6)
    for part, original in zip(loaded.split(), (one, two), strict=True):
        assert part.concepts == original.concepts
        for name, tensor in original.tensors.items():
            assert np.array_equal(part.tensors[name], tensor)
    with pytest.raises(InputError, match="actadd, iti"):
        combine([one, mlx_lqr.fit_baseline(model, "actadd", POSITIVE, NEGATIVE, concept="c")])


def test_options_are_refused_where_they_mean_nothing() -> None:
    model = tiny_on("mlx", "llama")
    for options, reason in (
        ({"heads": 0}, "at least 1"),
        ({"heads": 5, "layers": [1]}, "5 heads of 4"),
        ({"numbers": {"kp": 1.0}}, "iti has no kp"),
        ({"source_layer": 1}, "belongs to ablation"),
    ):
        with pytest.raises(InputError, match=reason):
            fitted(model, **options)
    with pytest.raises(InputError, match="belongs to iti"):
        mlx_lqr.fit_baseline(model, "actadd", POSITIVE, NEGATIVE, heads=3)
    with pytest.raises(InputError, match="at least two"):
        mlx_lqr.fit_baseline(model, "iti", POSITIVE[:1], NEGATIVE)
    with pytest.raises(InputError, match="are the same"):
        mlx_lqr.fit_baseline(model, "iti", POSITIVE, POSITIVE[::-1])


@every_backend
def test_a_real_model_writes_of_dogs(backend: str) -> None:
    model = smollm2_on(backend)
    positive, negative = mlx_lqr.bundled_prompts("dog")
    steering = iti(model, positive[:20], negative[:20], concept="dog")
    assert (steering.tensors["head_spread"] > 0).sum() == 13  # of 270
    plain, steered = (
        mlx_lqr.generate(
            model, "Once upon a time,", controller=steering, strength=strength, max_tokens=30, temperature=0
        )
        for strength in (0.0, 5.0)
    )
    assert "dog" not in plain.lower()
    assert any(word in steered.lower() for word in ("dog", "puppy", "retriever", "pup"))


def test_the_command_line_chooses_heads_and_shows_them(tmp_path: Path) -> None:
    for name in ("positive", "negative"):
        text = "\n".join(mlx_lqr.bundled_prompts("dog")[name == "negative"][:6])
        (tmp_path / name).write_text(text)
    file, run = str(tmp_path / "dog.safetensors"), CliRunner().invoke
    base = ["fit", "demo", "-o", file, "--positive", str(tmp_path / "positive")]
    base += ["--negative", str(tmp_path / "negative"), "--method"]
    done = run(main, [*base, "iti", "--heads", "3", "--layers", "20-29"])
    assert done.exit_code == 0, done.output
    shown = json.loads(run(main, ["show", "--json", file]).output)
    assert len(shown["heads"]) == 3
    assert all(head["layer"] >= 20 and head["accuracy"] > 0.5 and head["spread"] > 0 for head in shown["heads"])
    assert f"{shown['heads'][0]['accuracy']:.3f}" in run(main, ["show", file]).output
    answer = run(main, ["generate", "demo", "-p", "Once", "-c", f"{file}:5", "-n", "3", "--seed", "1", "--json"])
    assert answer.exit_code == 0, answer.output
    for method, reason in (("alqr", "--heads is not for the method alqr"), ("actadd", "belongs to iti")):
        refused = run(main, [*base, method, "--heads", "3"])
        assert refused.exit_code == 2
        assert reason in refused.output
