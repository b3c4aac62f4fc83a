"""What every backend promises alike: the same numbers, the same tokens, the same controllers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.backends import BACKENDS, OTHERS, smollm2_on, tiny_on
from helpers.controllers import NEGATIVE, POSITIVE, controller_for, law_for
from helpers.decoding import decoded, decoded_together, prefill_chunks
from helpers.prompts import BATCH, PROMPT
from helpers.tiny import families, tiny

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends.protocol import Sampling
from mlx_lqr.lqr.adapt import adapt_at
from mlx_lqr.methods.alqr import LinearFeedback
from mlx_lqr.methods.steering import law_of
from mlx_lqr.runtime.decode import decode

every_backend = pytest.mark.parametrize("backend", BACKENDS)
other_backends = pytest.mark.parametrize("backend", OTHERS)


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@other_backends
@families
def test_numbers_agree(backend: str, family: str, random: np.random.Generator) -> None:
    expected, other = tiny_on("mlx", family), tiny_on(backend, family)
    assert other.fingerprint == expected.fingerprint
    assert (other.num_layers, other.hidden_size, other.vocab_size) == (3, 32, 64)
    assert other.context_length == expected.context_length
    law = law_for(expected)
    for steering in ({}, {"law": law}, {"law": law, "steer_all": True}):
        assert relative(other.residuals(BATCH, **steering), expected.residuals(BATCH, **steering)) < 1e-5
        assert np.abs(other.logits(PROMPT, **steering) - expected.logits(PROMPT, **steering)).max() < 1e-4
        logprobs = [model.log_probabilities([(PROMPT[:5], PROMPT[5:])], **steering)[0] for model in (other, expected)]
        assert np.abs(logprobs[0] - logprobs[1]).max() < 1e-4
    traces = other.trace(PROMPT), expected.trace(PROMPT)
    w = random.standard_normal((2, 32)).astype(np.float32)
    for k in range(3):
        A = expected.jacobian(traces[1], k)
        assert relative(other.jacobian(traces[0], k), A) < 1e-4
        assert relative(other.jvp(traces[0], k, w), w @ A.T) < 1e-4
        assert relative(other.vjp(traces[0], k, w), w @ A) < 1e-4
        z = traces[1].residual[k] + np.vstack([np.zeros(32, np.float32), w])
        outputs = expected.block(traces[1], k, z)
        assert relative(outputs[0], traces[1].residual[k + 1]) < 1e-5
        assert relative(other.block(traces[0], k, z), outputs) < 1e-4


@every_backend
@families
@pytest.mark.parametrize("steer_all", [False, True])
def test_logits_and_probabilities_along_texts_are_those_of_the_steps(
    backend: str, family: str, steer_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_lqr.backends.batching.BATCH_TOKENS", 20)  # two batches
    model = tiny_on(backend, family)
    pairs = [([5], [6, 7, 8, 9]), (PROMPT[:5], PROMPT[5:]), ([1, 2, 3], [4]), ([3, 1], [4, 1, 5])]
    laws = [None, law_for(model)]
    if not steer_all:  # carried from one token to the next
        spid = mlx_lqr.fit_baseline(model, "spid", [[1, 2, 3], [4, 5]], [[6, 7], [8]], numbers={"kd": 0.4})
        laws.append(law_of(spid, 2.0))
    for law in laws:
        logits = model.logits_along(pairs, law=law, steer_all=steer_all)
        scores = model.log_probabilities(pairs, law=law, steer_all=steer_all)
        for (prompt, continuation), along, scored in zip(pairs, logits, scores, strict=True):
            decoder = model.decoder(law)
            decoder.fill([prompt[:-1]], steered=steer_all)
            steps = [decoder.step([token]).tolist()[0] for token in (prompt[-1], *continuation)]
            assert np.allclose(along, steps, atol=1e-4)
            expected = [row[token] - np.log(np.exp(row).sum()) for row, token in zip(steps, continuation, strict=False)]
            assert np.allclose(scored, expected, atol=1e-4)


@other_backends
@families
@pytest.mark.parametrize("steer_all", [False, True])
def test_steered_tokens_agree(backend: str, family: str, steer_all: bool) -> None:
    expected, other = tiny_on("mlx", family), tiny_on(backend, family)
    law = law_for(expected)
    options = {"law": law, "steer_all": steer_all, "max_tokens": 12}
    assert decoded(other, PROMPT, **options) == decoded(expected, PROMPT, **options)


@other_backends
@pytest.mark.parametrize("cost", ["state", "feature"])
def test_a_controller_of_one_backend_is_that_of_another(backend: str, cost: Any, tmp_path: Path) -> None:
    models = tiny_on("mlx", "gemma3_text"), tiny_on(backend, "gemma3_text")
    controllers = [controller_for(model, cost=cost) for model in models]
    assert relative(controllers[1].gain, controllers[0].gain) < 1e-4
    assert relative(controllers[1].direction, controllers[0].direction) < 1e-4
    for fitted_on, used_on in ((0, 1), (1, 0)):
        controllers[fitted_on].save(tmp_path / "controller")
        loaded = mlx_lqr.Controller.load(tmp_path / "controller")
        pieces = mlx_lqr.stream(models[used_on], PROMPT, controller=loaded, strength=2.0, max_tokens=8, temperature=0)
        expected = mlx_lqr.stream(
            models[fitted_on], PROMPT, controller=controllers[fitted_on], strength=2.0, max_tokens=8, temperature=0
        )
        assert [piece.token for piece in pieces] == [piece.token for piece in expected]


@other_backends
def test_jacobians_of_one_backend_are_stored_for_another(backend: str, tmp_path: Path) -> None:
    model, other = tiny_on("mlx", "qwen3"), tiny_on(backend, "qwen3")
    stored = mlx_lqr.linearize(other, [PROMPT, PROMPT[:3]], store=tmp_path / "jacobians")
    controller = mlx_lqr.fit(
        model, POSITIVE, NEGATIVE, jacobians=mlx_lqr.Jacobians.load(tmp_path / "jacobians"), layers="all"
    )
    direct = mlx_lqr.fit(
        model, POSITIVE, NEGATIVE, jacobians=mlx_lqr.linearize(model, [PROMPT, PROMPT[:3]]), layers="all"
    )
    assert stored.prompt_count == 2
    assert relative(controller.gain, direct.gain) < 1e-4


@every_backend
def test_linearising_goes_on_where_it_was_interrupted(backend: str, tmp_path: Path) -> None:
    model, file, layers = tiny_on(backend, "llama"), tmp_path / "jacobians", []
    expected = mlx_lqr.linearize(model, [PROMPT])
    original = model.jacobian

    def interrupted(trace: Any, layer: int) -> np.ndarray:
        layers.append(layer)
        if len(layers) == 3:
            raise KeyboardInterrupt
        return original(trace, layer)

    model.jacobian = interrupted
    with pytest.raises(KeyboardInterrupt):
        mlx_lqr.linearize(model, [PROMPT], store=file)
    resumed = mlx_lqr.linearize(model, [PROMPT], store=file)
    assert layers == [2, 1, 0, 0]
    assert all(np.array_equal(a, b) for a, b in zip(resumed, expected, strict=True))


@every_backend
@pytest.mark.parametrize("steer_all", [False, True])
@families
def test_a_batch_gets_the_tokens_that_each_prompt_gets_alone(
    backend: str, family: str, steer_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_on(backend, family)
    options = {"law": law_for(model), "steer_all": steer_all, "max_tokens": 8}
    alone = [decoded(model, prompt, **options) for prompt in BATCH]
    prefill_chunks(3 * len(BATCH), monkeypatch)  # shorter than most prompts
    assert decoded_together(model, BATCH, **options) == alone


@every_backend
@pytest.mark.parametrize("steer_all", [False, True])
def test_chunks_of_the_prompt_change_nothing(backend: str, steer_all: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_on(backend, "gemma3_text")
    law = law_for(model)
    whole = model.logits(PROMPT, law=law, steer_all=steer_all)
    for chunk in (1, 3, 4, 11, 12, 50):
        prefill_chunks(chunk, monkeypatch)
        assert np.abs(model.logits(PROMPT, law=law, steer_all=steer_all) - whole).max() < 1e-4


@every_backend
def test_a_batch_goes_on_without_those_that_have_ended(backend: str) -> None:
    model = tiny_on(backend, "gemma3_text")
    filters = {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.3}

    def alone() -> list[list[int]]:
        return [
            decoded(model, prompt, sampling=Sampling(seed=7 + i, **filters), max_tokens=12)  # type: ignore[arg-type]
            for i, prompt in enumerate(BATCH)
        ]

    free = alone()
    model.tokenizer.end_tokens = frozenset({free[0][3], free[2][6]})
    expected = alone()
    sampling = Sampling(seed=7, **filters)  # type: ignore[arg-type]
    assert decoded_together(model, BATCH, sampling=sampling, max_tokens=12) == expected
    assert len(expected[0]) <= 3
    answers: list[list[int]] = [[] for _ in BATCH]
    ended: set[int] = set()  # where the caller says which sequences are done
    for i, token in decode(model, BATCH, sampling=sampling, max_tokens=12, ended=ended):
        answers[i].append(token)
        if i == 1 and len(answers[i]) == 5:
            ended.add(i)
    assert answers == [tokens[:5] if i == 1 else tokens for i, tokens in enumerate(expected)]


@every_backend
def test_sampling_repeats_with_its_seed_and_keeps_to_its_limits(backend: str) -> None:
    model = tiny_on(backend, "llama")

    def sample(**options: Any) -> list[int]:
        settings = {"temperature": 2.0, "top_p": 1.0, "frequency_penalty": 0.0, **options}
        return decoded(model, PROMPT, sampling=Sampling(**settings), max_tokens=20)

    greedy = decoded(model, PROMPT, max_tokens=20)
    assert sample(seed=1) == sample(seed=1) != sample(seed=2)
    assert sample(seed=1, top_k=1) == sample(seed=2, top_p=1e-6) == sample(seed=3, min_p=0.999999) == greedy


@every_backend
def test_frequencies_follow_the_probabilities(backend: str) -> None:
    model = tiny_on(backend, "llama")
    logits = model.logits(PROMPT).astype(np.float64)
    share = np.exp(logits - logits.max())
    share /= share.sum()
    sampling = Sampling(temperature=1.0, top_p=1.0, seed=0)
    draws = [row[0] for row in decoded_together(model, [PROMPT] * 300, sampling=sampling, max_tokens=1)]
    likeliest = int(share.argmax())
    spread = np.sqrt(share[likeliest] * (1 - share[likeliest]) / 300)
    assert abs(np.mean(np.array(draws) == likeliest) - share[likeliest]) < 4 * spread
    nucleus = np.flatnonzero(share >= np.sort(share)[::-1][np.searchsorted(np.sort(share)[::-1].cumsum(), 0.5)])
    limited = Sampling(temperature=1.0, top_p=0.5, seed=0)
    drawn = {row[0] for row in decoded_together(model, [PROMPT] * 100, sampling=limited, max_tokens=1)}
    assert drawn <= set(nucleus.tolist())


@every_backend
def test_what_does_not_fit_the_context_is_an_error_or_rolls(backend: str) -> None:
    model, wide = tiny_on(backend, "llama", max_position_embeddings=16), tiny_on(backend, "llama")
    fits = decoded(model, PROMPT, max_tokens=5)  # the last token needs no place in the cache
    with pytest.raises(InputError, match="ask for at most 5"):
        decode(model, [PROMPT], max_tokens=6)
    rolled = decoded(model, PROMPT, max_tokens=60, overflow="roll")
    assert len(rolled) == 60
    assert rolled[:5] == fits == decoded(wide, PROMPT, max_tokens=5)
    assert rolled != decoded(wide, PROMPT, max_tokens=60), "nothing was forgotten"
    assert len(decoded(model, PROMPT * 3, law=law_for(model), max_tokens=3, overflow="roll")) == 3
    with pytest.raises(InputError, match="overflow"):
        decode(model, [PROMPT], overflow="wrap")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="one prompt at a time"):
        list(decode(model, [PROMPT, PROMPT], overflow="roll"))


@other_backends
def test_a_rolling_context_forgets_alike(backend: str) -> None:
    """Filled token by token, so that no backend's way to chunk a prompt matters."""
    models = [tiny_on(name, "qwen3", max_position_embeddings=16) for name in ("mlx", backend)]
    expected, tokens = (decoded(model, PROMPT, max_tokens=700, overflow="roll") for model in models)
    assert tokens == expected  # long enough for the torch backend's buffer to come round


@every_backend
def test_a_decoder_is_rewound_and_filled_again(backend: str) -> None:
    model = tiny_on(backend, "qwen3")
    decoder = model.decoder(law_for(model))
    decoder.fill([PROMPT[:8]], steered=False)
    first = decoder.step([PROMPT[8]])
    for token in (1, 2, 3):
        decoder.step([token])
    assert decoder.position == 12
    assert decoder.rewind(5)
    assert decoder.position == 5
    decoder.fill([PROMPT[5:8]], steered=False)
    again = decoder.step([PROMPT[8]])
    assert np.abs(np.array(first.tolist()) - np.array(again.tolist())).max() < 1e-5


@every_backend
def test_a_strength_changes_between_two_tokens(backend: str) -> None:
    model = tiny_on(backend, "qwen3")
    controller = controller_for(model)
    law = LinearFeedback(controller, 0.0)
    decoder = model.decoder(law)
    decoder.fill([PROMPT[:-1]], steered=False)
    decoder.rewind(len(PROMPT) - 1)
    seen = []
    for strength in (0.0, 3.0, 0.0):
        law.strength = strength
        seen.append(np.array(decoder.step(PROMPT[-1:])[0].tolist()))
        decoder.rewind(len(PROMPT) - 1)
    for strength, logits in zip((0.0, 3.0, 0.0), seen, strict=True):
        expected = model.logits(PROMPT, law=LinearFeedback(controller, strength))
        assert np.abs(logits - expected).max() < 1e-4
    assert np.abs(seen[0] - seen[1]).max() > 1e-2


@every_backend
def test_a_suspended_stream_leaves_the_model_alone(backend: str) -> None:
    model = tiny_on(backend, "llama")
    law = law_for(model)
    plain, steered = decoded(model, PROMPT, max_tokens=6), decoded(model, PROMPT, law=law, max_tokens=6)
    one, other = decode(model, [PROMPT], law=law, max_tokens=6), decode(model, [PROMPT], max_tokens=6)
    taken = [(next(one)[1], next(other)[1]) for _ in range(6)]
    assert [a for a, _ in taken] == steered
    assert [b for _, b in taken] == plain


@every_backend
def test_the_repetition_penalty_is_that_of_its_definition(backend: str) -> None:
    model = tiny_on(backend, "llama")
    tokens = list(PROMPT)
    penalised = decoded(model, PROMPT, sampling=Sampling(temperature=0, repetition_penalty=1.8), max_tokens=10)
    assert penalised != decoded(model, PROMPT, max_tokens=10)
    for token in penalised:
        logits = model.logits(tokens)
        seen = np.unique(tokens)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.8, logits[seen] * 1.8)
        assert token == int(logits.argmax())
        tokens.append(token)


@every_backend
def test_frequency_and_presence_penalties_are_those_of_their_definition(backend: str) -> None:
    """Of the last 64 that have been drawn: the prompt does not count, nor what is longer ago."""
    model = tiny_on(backend, "llama")
    tokens = list(PROMPT)
    sampling = Sampling(temperature=0, frequency_penalty=0.4, presence_penalty=-0.15, repetition_penalty=1.1)
    drawn = decoded(model, PROMPT, sampling=sampling, max_tokens=90)
    assert len(drawn) == 90
    assert len(set(drawn[:16])) < 16
    for i, token in enumerate(drawn):
        logits, counts = model.logits(tokens), np.bincount(drawn[max(i - 64, 0) : i], minlength=model.vocab_size)
        seen = np.unique(tokens)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.1, logits[seen] * 1.1)
        assert token == int((logits - 0.4 * counts + 0.15 * (counts > 0)).argmax())
        tokens.append(token)


@every_backend
def test_activations_that_overflow_end_with_the_layer_and_the_strength(backend: str) -> None:
    model = tiny_on(backend, "llama")
    law = law_for(model, 1e25)
    energy = (model.residuals([PROMPT], law=law_for(model, 1e15))[0, 1:].astype(np.float64) ** 2).sum(axis=1)
    layer = int(np.flatnonzero(1e20 * energy > np.finfo(np.float32).max)[0])
    with pytest.raises(InputError, match=rf"overflow at layer {layer} at strength 1e\+25: lower the strength"):
        decoded(model, PROMPT, law=law, max_tokens=10)
    with pytest.raises(InputError, match="overflow at layer"):
        list(decode(model, BATCH, law=law, max_tokens=10))
    law = law_for(model)
    decoding = decode(model, [PROMPT], law=law, max_tokens=10)
    next(decoding)
    law.strength = 1e25
    with pytest.raises(InputError, match="overflow at layer"):
        list(decoding)


@every_backend
def test_adaptive_generation_linearises_during_prefill(backend: str) -> None:
    model = tiny_on(backend, "gemma3_text")
    controller = controller_for(model)
    prompt = PROMPT * 2  # longer than the sliding window
    law = LinearFeedback(mlx_lqr.adapt(model, controller, prompt), 2.0)
    expected = decoded(model, prompt, law=law, max_tokens=8)
    adapt = partial(adapt_at, model, controller)
    tokens = decoded(model, prompt, max_tokens=8, adapted=lambda trace: LinearFeedback(adapt(trace), 2.0))
    assert tokens == expected


@every_backend
def test_our_own_functions_are_refused_while_the_model_is_steered(backend: str) -> None:
    model = tiny_on(backend, "llama")
    controller, trace = controller_for(model), model.trace(PROMPT)
    plain = model.logits(PROMPT)
    with mlx_lqr.steer(model, controller):
        for call in (
            lambda: mlx_lqr.generate(model, PROMPT, max_tokens=3, temperature=0),
            lambda: model.residuals([PROMPT]),
            lambda: controller_for(model),
        ):
            with pytest.raises(InputError, match="being steered"):
                call()
        with pytest.raises(InputError, match="already steered: combine"), mlx_lqr.steer(model, controller):
            raise AssertionError("the block was entered")
    assert np.array_equal(model.logits(PROMPT), plain)
    del trace


@every_backend
def test_other_models_controllers_and_bad_dtypes_are_refused(backend: str, tmp_path: Path) -> None:
    model = tiny_on(backend, "llama")
    other = controller_for(tiny_on(backend, "qwen3"))
    with pytest.raises(InputError):
        mlx_lqr.stream(model, PROMPT, controller=other)
    with pytest.raises(InputError, match="dtype must be one of"):
        mlx_lqr.load("demo", backend=backend, dtype="int4")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"no config\.json"):
        mlx_lqr.load(tmp_path, backend=backend)  # type: ignore[arg-type]
    (tmp_path / "config.json").write_text('{"model_type": "florp", "hidden_size": 8}')
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="'florp' is not supported"):
        mlx_lqr.load(tmp_path, backend=backend)  # type: ignore[arg-type]


@other_backends
def test_the_real_model_agrees(backend: str, golden: dict[str, Any], controller: mlx_lqr.Controller) -> None:
    """SmolLM2: activations, probed Jacobians, and 40 greedy tokens with a controller that the other backend fitted."""
    expected, other = smollm2_on("mlx"), smollm2_on(backend)
    assert other.fingerprint == expected.fingerprint == controller.fingerprint
    prompts = [other.tokenizer.encode(text) for text in golden["positive"][:6]]
    scale = np.linalg.norm(expected.residuals(prompts), axis=-1)
    error = np.linalg.norm(other.residuals(prompts) - expected.residuals(prompts), axis=-1)
    assert (error / scale).max() < 1e-5
    traces = other.trace(prompts[0]), expected.trace(prompts[0])
    probes = golden["probe"][:, None].astype(np.float32)
    for k in range(0, other.num_layers, 5):
        for product in ("jvp", "vjp"):
            pair = [getattr(m, product)(t, k, probes[k]) for m, t in zip((other, expected), traces, strict=True)]
            assert np.linalg.norm(pair[0] - pair[1]) < 1e-4 * np.linalg.norm(pair[1])
    pieces = [
        [
            p.token
            for p in mlx_lqr.stream(
                m, golden["prompt"], controller=controller, strength=3.0, max_tokens=40, temperature=0
            )
        ]
        for m in (other, expected)
    ]
    assert pieces[0] == pieces[1]
    assert len(pieces[0]) == 40


def test_log_probabilities_over_a_vocabulary_are_those_of_float64() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 50_000)).astype(np.float32)
    logits[:, 7] += 3
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    framework = tiny("llama")._framework
    found = framework.log_probabilities(mx.array(logits), [7, 8, 49_999])
    assert np.abs(found - exact[[0, 1, 2], [7, 8, 49_999]]).max() < 1e-5
    numbers, values = framework.likeliest(mx.array(logits), 3)
    rows = np.arange(3)[:, None]
    assert np.abs(np.asarray(values) - exact[rows, np.asarray(numbers)]).max() < 1e-5
