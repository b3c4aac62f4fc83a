"""The decode loop: which positions are steered, what a chunk changes (nothing), sampling, and where it stops."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from tiny import FAMILY, tiny

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends import mlx as backend
from mlx_lqr.backends.base import Model, Sampling
from mlx_lqr.backends.mlx import MLXModel
from mlx_lqr.laws import LinearFeedback
from mlx_lqr.runtime.decode import decode

PROMPT = [5, 17, 3, 42, 8, 29, 11, 60, 2, 33, 21, 40]


class NoEnd:
    """A tokenizer for models that have none: nothing ends a text."""

    end_tokens: frozenset[int] = frozenset()


def with_tokenizer(family: str = "llama", **changes: object) -> MLXModel:
    model = tiny(family, **changes)
    model._tokenizer = NoEnd()  # type: ignore[assignment]
    return model


def law_for(model: Model, strength: float = 2.0) -> LinearFeedback:
    return LinearFeedback(mlx_lqr.fit(model, [[1, 2, 3], [4, 5]], [[6, 7], [8]], q=1.0), strength)


def steered_step_by_step(model: MLXModel, law: LinearFeedback, tokens: list[int], first: int) -> list[np.ndarray]:
    """u_k applied by hand, block after block in NumPy, at positions from `first` on, in one pass without a cache."""
    from mlx_lqr.backends.mlx_blocks import BlockCall, hooked

    seen: list[np.ndarray] = []

    def hook(k: int, z: mx.array, call: BlockCall) -> mx.array:
        output = np.array(call(z))
        control = law(k, np.array(z)) if k in law.layers else np.zeros_like(output)
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
    found = list(decode(model, PROMPT, law=law, steer_all=steer_all, max_tokens=5))
    tokens = list(PROMPT)
    for token in found:
        logits = steered_step_by_step(model, law, tokens, 0 if steer_all else len(PROMPT) - 1)[0]
        assert token == int(logits[-1].argmax())
        tokens.append(token)
    assert found != list(decode(model, PROMPT, max_tokens=5))


@pytest.mark.parametrize("chunk", [1, 3, 4, 11, 12, 50])
@pytest.mark.parametrize("steer_all", [False, True])
def test_chunks_of_the_prompt_change_nothing(chunk: int, steer_all: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_tokenizer("gemma3_text")
    law = law_for(model)
    whole = model.logits(PROMPT, law=law, steer_all=steer_all)
    monkeypatch.setattr(backend, "PREFILL_CHUNK", chunk)
    assert np.abs(model.logits(PROMPT, law=law, steer_all=steer_all) - whole).max() < 1e-4


def test_residuals_under_a_law_are_those_of_the_decoder() -> None:
    model = tiny("llama")
    law = law_for(model)
    for steer_all in (False, True):
        last = mx.array(model.residuals([PROMPT], law=law, steer_all=steer_all)[0, -1])
        logits = model.module.model.embed_tokens.as_linear(model.module.model.norm(last))
        assert np.abs(np.array(logits) - model.logits(PROMPT, law=law, steer_all=steer_all)).max() < 1e-4


def test_log_probabilities_are_those_of_the_steps() -> None:
    model = tiny("qwen3")
    for law in (None, law_for(model)):
        found = model.log_probability(PROMPT[:5], PROMPT[5:], law=law)
        decoder = model.decoder(law)
        logits = [decoder.prefill(PROMPT[:5], steer_from=4)]
        logits += [decoder.step(mx.array(token)) for token in PROMPT[5:-1]]
        expected = [float((row - mx.logsumexp(row))[token]) for row, token in zip(logits, PROMPT[5:], strict=True)]
        assert np.allclose(found, expected, atol=1e-4)


def test_a_suspended_stream_leaves_the_model_alone() -> None:
    model = with_tokenizer()
    plain = list(decode(model, PROMPT, max_tokens=6))
    law = law_for(model)
    steered = list(decode(model, PROMPT, law=law, max_tokens=6))
    one, other = decode(model, PROMPT, law=law, max_tokens=6), decode(model, PROMPT, max_tokens=6)
    taken = [(next(one), next(other)) for _ in range(6)]
    assert [a for a, _ in taken] == steered
    assert [b for _, b in taken] == plain


def test_sampling_repeats_with_its_seed_and_keeps_to_its_limits() -> None:
    model = with_tokenizer()

    def sample(**options: float) -> list[int]:
        return list(decode(model, PROMPT, sampling=Sampling(temperature=2.0, **options), max_tokens=20))  # type: ignore[arg-type]

    greedy = list(decode(model, PROMPT, max_tokens=20))
    assert sample(seed=1) == sample(seed=1) != sample(seed=2)
    assert sample(seed=1, top_k=1) == sample(seed=2, top_p=1e-6) == sample(min_p=0.999999) == greedy
    before = np.array(mx.random.state[0])
    sample()
    assert np.array_equal(before, np.array(mx.random.state[0])), "the caller's random state was used"


@pytest.mark.parametrize("options", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1},
                                     {"top_k": -1}, {"min_p": 1}, {"seed": -1}])  # fmt: skip
def test_sampling_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Sampling(**options)  # type: ignore[arg-type]


def test_frequencies_follow_the_probabilities() -> None:
    model = with_tokenizer()
    logits = model.logits(PROMPT).astype(np.float64)
    share = np.exp(logits - logits.max())
    share /= share.sum()
    draws = [next(decode(model, PROMPT, sampling=Sampling(temperature=1.0, seed=s), max_tokens=1)) for s in range(400)]
    likeliest = int(share.argmax())
    spread = np.sqrt(share[likeliest] * (1 - share[likeliest]) / 400)
    assert abs(np.mean(np.array(draws) == likeliest) - share[likeliest]) < 4 * spread


def test_decoding_stops_at_an_end_token_and_at_the_context() -> None:
    model = with_tokenizer(max_position_embeddings=16)
    free = list(decode(model, PROMPT, max_tokens=100))
    assert len(PROMPT) + len(free) == 17  # the last token needs no place in the cache
    model._tokenizer.end_tokens = frozenset({free[2]})  # type: ignore[misc, union-attr]
    assert list(decode(model, PROMPT, max_tokens=100)) == free[: free.index(free[2])]


def test_unusable_requests_are_refused_at_the_call() -> None:
    model = with_tokenizer(max_position_embeddings=8)
    with pytest.raises(InputError, match="12 tokens and the model's context 8"):
        mlx_lqr.stream(model, PROMPT)
    with pytest.raises(InputError, match="empty"):
        mlx_lqr.stream(model, [])
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
    pieces = list(mlx_lqr.stream(smollm2, "The capital of France is", max_tokens=12))
    assert "".join(piece.text for piece in pieces) == mlx_lqr.generate(
        smollm2, "The capital of France is", max_tokens=12
    )
