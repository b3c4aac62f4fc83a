"""The decode loop: which positions are steered, what it leaves alone, where it stops. test_backends.py has the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers.controllers import law_for
from helpers.decoding import decoded
from helpers.prompts import PROMPT
from helpers.tiny import FAMILY, tiny
from helpers.tiny_tokenizers import with_tokenizer

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends.mlx.model import MLXModel
from mlx_lqr.backends.mlx.sampling import nucleus
from mlx_lqr.backends.protocol import Model, Sampling
from mlx_lqr.backends.sampling import LIKELIEST
from mlx_lqr.backends.torch.framework import TorchFramework
from mlx_lqr.backends.torch.sampling import TorchSampler, outside_top_p
from mlx_lqr.lqr.adapt import adapt_at
from mlx_lqr.methods.alqr import LinearFeedback
from mlx_lqr.runtime.decode import decode
from mlx_lqr.runtime.stopping import StopStrings


def steered_step_by_step(model: MLXModel, law: LinearFeedback, tokens: list[int], first: int) -> list[np.ndarray]:
    """u_k applied by hand, block after block in NumPy, at positions from `first` on, in one pass without a cache."""
    from mlx_lqr.backends.hooks import BlockCall
    from mlx_lqr.backends.mlx.blocks import hooked

    seen: list[np.ndarray] = []

    def hook(k: int, z: mx.array, call: BlockCall) -> mx.array:
        output = np.array(call(z))
        control = law(k, np.array(z), np.zeros_like(output)) if k in law.layers else np.zeros_like(output)
        control[:, :first] = 0
        seen.append(output + control)
        return mx.array(output + control)

    with hooked(model.blocks, hook, range(model.num_layers)):
        logits = model.module(mx.array([tokens]))
    return [np.array(logits)[0]]


@pytest.mark.parametrize("steer_all", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILY))
def test_steered_decoding_equals_the_law_applied_by_hand(family: str, steer_all: bool) -> None:
    model = with_tokenizer(family)
    law = law_for(model)
    steered = decoded(model, PROMPT, law=law, steer_all=steer_all, max_tokens=5)
    tokens = list(PROMPT)
    for token in steered:
        logits = steered_step_by_step(model, law, tokens, 0 if steer_all else len(PROMPT) - 1)[0]
        assert token == int(logits[-1].argmax())
        tokens.append(token)
    assert steered != decoded(model, PROMPT, max_tokens=5)


def test_residuals_under_a_law_are_those_of_the_decoder() -> None:
    model = tiny("llama")
    law = law_for(model)
    for steer_all in (False, True):
        last = mx.array(model.residuals([PROMPT], law=law, steer_all=steer_all)[0, -1])
        logits = model.module.model.embed_tokens.as_linear(model.module.model.norm(last))
        assert np.abs(np.array(logits) - model.logits(PROMPT, law=law, steer_all=steer_all)).max() < 1e-4


def test_sampling_leaves_the_callers_random_state_alone() -> None:
    model = with_tokenizer()  # whose weights are drawn from it
    before = np.array(mx.random.state[0])
    decoded(model, PROMPT, sampling=Sampling(temperature=2.0, seed=1), max_tokens=20)
    assert np.array_equal(before, np.array(mx.random.state[0]))


@pytest.mark.parametrize("options", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1},
                                     {"top_k": -1}, {"min_p": 1}, {"seed": -1}])  # fmt: skip
def test_sampling_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Sampling(**options)  # type: ignore[arg-type]


def test_decoding_stops_at_an_end_token() -> None:
    model = with_tokenizer()
    free = decoded(model, PROMPT, max_tokens=20)
    model._tokenizer.end_tokens = frozenset({free[2]})  # type: ignore[misc, union-attr]
    assert decoded(model, PROMPT, max_tokens=20) == free[: free.index(free[2])]


def test_memory_does_not_grow_with_the_tokens() -> None:
    model = with_tokenizer(max_position_embeddings=64)
    used = []
    for count, _ in enumerate(decode(model, [PROMPT], law=law_for(model), max_tokens=2500, overflow="roll")):
        if count in (500, 2499):
            mx.synchronize()
            used.append(mx.get_active_memory())
    assert used[1] <= used[0] + 20_000


def test_a_controller_that_is_not_finite_is_refused_before_the_first_token() -> None:
    model = with_tokenizer()
    controller = mlx_lqr.fit(model, [[1, 2, 3]], [[6, 7]], layers="all")
    gain = controller.gain.copy()
    gain[2, 3] = np.nan
    with pytest.raises(InputError, match="gain has values that are not finite"):
        mlx_lqr.stream(model, PROMPT, controller=replace(controller, gain=gain))


def test_adaptive_generation_runs_the_prompt_once() -> None:
    model = with_tokenizer("gemma3_text")
    controller = mlx_lqr.fit(model, [[1, 2, 3], [4, 5]], [[6, 7], [8]], q=1.0, layers="all")
    passes: list[int] = []
    original = type(model.module).__call__

    def counted(self: Any, tokens: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        passes.append(tokens.shape[1])
        return original(self, tokens, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.module), "__call__", counted)
        adapt = partial(adapt_at, model, controller)
        decoded(model, PROMPT, max_tokens=8, adapted=lambda trace: LinearFeedback(adapt(trace), 2.0))
    assert passes.count(len(PROMPT) - 1) == 1


@pytest.mark.parametrize(
    ("stop", "expected"),
    [("fox", "the quick brown "), (["jumps", "brown fox j"], "the quick "), ("never", "the quick brown fox jumps nev")],
)
def test_stop_strings_end_the_text_across_pieces(stop: str | list[str], expected: str) -> None:
    stops = StopStrings(StopStrings.check(stop))
    said = ""
    for piece in ["the qui", "ck b", "rown f", "o", "x ju", "mps", " nev"]:
        text, stopped = stops.add(piece)
        said += text
        assert not any(text in said for text in StopStrings.check(stop))
        if stopped:
            break
    assert said + stops.rest() == expected
    with pytest.raises(InputError, match="stop"):
        StopStrings.check(["a", ""])


def test_generation_ends_at_a_stop_string(smollm2: Model) -> None:
    prompts = ["The capital of France is", "Once upon a time,"]
    whole = [mlx_lqr.generate(smollm2, prompt, max_tokens=16, temperature=0) for prompt in prompts]
    stop = whole[0][12:18]
    expected = [text.split(stop)[0] for text in whole]
    assert mlx_lqr.batch_generate(smollm2, prompts, stop=stop, max_tokens=16, temperature=0) == expected
    assert mlx_lqr.generate(smollm2, prompts[0], stop=stop, max_tokens=16, temperature=0) == expected[0]


def test_unusable_requests_are_refused_at_the_call() -> None:
    model = with_tokenizer(max_position_embeddings=8)
    with pytest.raises(InputError, match="12 tokens and the model's context 8"):
        mlx_lqr.stream(model, PROMPT)
    with pytest.raises(InputError, match="empty"):
        mlx_lqr.stream(model, [])
    with pytest.raises(TypeError, match="no option warmth"):
        mlx_lqr.generate(model, [1], warmth=1.0)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="max_tokens"):
        mlx_lqr.stream(model, [1], max_tokens=0)
    with pytest.raises(InputError, match="temperature"):
        mlx_lqr.stream(model, [1], temperature=-1)


def test_a_stream_never_splits_a_character(smollm2: Model) -> None:
    text = "naïve 🦙👩‍👩‍👧 日本語 ✓"
    detokenizer = smollm2.tokenizer.stream()
    tokens = smollm2.tokenizer.encode(text)
    pieces = [detokenizer.add(token) for token in tokens]
    assert "".join(pieces) == text
    assert "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)


def test_pieces_of_a_stream_make_the_text(smollm2: Model) -> None:
    pieces = list(mlx_lqr.stream(smollm2, "The capital of France is", max_tokens=12, temperature=0))
    assert "".join(piece.text for piece in pieces) == mlx_lqr.generate(
        smollm2, "The capital of France is", max_tokens=12, temperature=0
    )


def mlx_nucleus(logprobs: np.ndarray, top_p: float) -> np.ndarray:
    return np.isfinite(np.asarray(nucleus(mx.array(logprobs), top_p)))


def torch_nucleus(logprobs: np.ndarray, top_p: float) -> np.ndarray:
    return ~outside_top_p(torch.from_numpy(logprobs), top_p).numpy()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.97])
@pytest.mark.parametrize("kept_by", [mlx_nucleus, torch_nucleus])
def test_the_nucleus_is_the_likeliest_tokens_with_the_mass_asked_for(
    kept_by: Callable[[np.ndarray, float], np.ndarray], flat: bool, top_p: float
) -> None:
    """Against float64, for rows whose nucleus is among the tokens looked at first, and for rows where it is not."""
    logits = np.random.default_rng(0).normal(size=(3, 20 * LIKELIEST)) * (0.5 if flat else 6.0)
    probability = np.exp(logits - logits.max(axis=1, keepdims=True))
    probability /= probability.sum(axis=1, keepdims=True)
    kept = kept_by(np.log(probability).astype(np.float32), top_p)
    assert (kept.sum(axis=1) > LIKELIEST).all() == flat
    for own, chosen in zip(probability, kept, strict=True):
        assert own[chosen].min() >= own[~chosen].max()
        assert own[chosen].sum() == pytest.approx(top_p, abs=own[chosen].min() + 1e-4)
        assert own[chosen].sum() >= top_p - 1e-4


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    "filters", [{"top_p": 0.9}, {"top_p": 1.0, "min_p": 0.02}, {"top_p": 0.95, "top_k": 3000, "min_p": 1e-3}]
)
def test_draws_by_rank_have_the_frequencies_of_the_filtered_distribution(filters: dict[str, Any], flat: bool) -> None:
    """Against float64, where the likeliest tokens looked at first have all that the filters leave, and where not."""
    logits = np.random.default_rng(1).normal(size=8 * LIKELIEST) * (0.4 if flat else 4.0)
    probability = np.sort(np.exp(logits - logits.max()))[::-1] / np.exp(logits - logits.max()).sum()
    sampling = Sampling(temperature=0.7, frequency_penalty=0.0, seed=0, **filters)
    left = probability.cumsum() - probability < sampling.top_p
    left &= probability >= sampling.min_p * probability[0]
    left &= np.arange(len(left)) < (sampling.top_k or len(left))
    assert (left.sum() > LIKELIEST) == flat
    tempered = np.where(left, probability, 0.0) ** (1 / 0.7)
    share = tempered.cumsum() / tempered.sum()
    rows = torch.from_numpy(logits).float().expand(1000, -1)
    sampler = TorchSampler(cast(TorchFramework, SimpleNamespace(device=torch.device("cpu"))), sampling)
    rank = np.argsort(np.argsort(-logits))
    drawn = rank[np.concatenate([sampler.draw(rows, None).numpy() for _ in range(2)])]
    assert left[drawn].all()
    for tenth in np.linspace(0.1, 0.9, 9):
        bound = int(np.searchsorted(share, tenth))
        expected = share[bound]
        spread = np.sqrt(expected * (1 - expected) / len(drawn))
        assert abs(np.mean(drawn <= bound) - expected) < 4 * spread + 1e-3
