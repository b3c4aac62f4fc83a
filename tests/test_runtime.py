"""The decode loop: which positions are steered, what a chunk changes (nothing), sampling, and where it stops."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny import FAMILY, tiny

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends import mlx_decoder as backend
from mlx_lqr.backends.base import Model, Sampling
from mlx_lqr.backends.mlx import MLXModel
from mlx_lqr.laws import LinearFeedback
from mlx_lqr.runtime.decode import decode
from mlx_lqr.runtime.stopping import StopStrings
from mlx_lqr.synthesis import readapted

PROMPT = [5, 17, 3, 42, 8, 29, 11, 60, 2, 33, 21, 40]


class NoEnd:
    """A tokenizer for models that have none: nothing ends a text."""

    end_tokens: frozenset[int] = frozenset()


def with_tokenizer(family: str = "llama", **changes: object) -> MLXModel:
    model = tiny(family, **changes)
    model._tokenizer = NoEnd()  # type: ignore[assignment]
    return model


def decoded(model: Model, prompt: list[int], **options: Any) -> list[int]:
    """The tokens that follow one prompt."""
    return [token for _, token in decode(model, [prompt], **options)]


def law_for(model: Model, strength: float = 2.0) -> LinearFeedback:
    return LinearFeedback(mlx_lqr.fit(model, [[1, 2, 3], [4, 5]], [[6, 7], [8]], q=1.0), strength)


def steered_step_by_step(model: MLXModel, law: LinearFeedback, tokens: list[int], first: int) -> list[np.ndarray]:
    """u_k applied by hand, block after block in NumPy, at positions from `first` on, in one pass without a cache."""
    from mlx_lqr.backends.base import BlockCall
    from mlx_lqr.backends.mlx_blocks import hooked

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
    found = decoded(model, PROMPT, law=law, steer_all=steer_all, max_tokens=5)
    tokens = list(PROMPT)
    for token in found:
        logits = steered_step_by_step(model, law, tokens, 0 if steer_all else len(PROMPT) - 1)[0]
        assert token == int(logits[-1].argmax())
        tokens.append(token)
    assert found != decoded(model, PROMPT, max_tokens=5)


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
        decoder.fill([PROMPT[:4]], steered=False)
        logits = [decoder.step([token])[0] for token in PROMPT[4:-1]]
        expected = [float((row - mx.logsumexp(row))[token]) for row, token in zip(logits, PROMPT[5:], strict=True)]
        assert np.allclose(found, expected, atol=1e-4)


def test_a_suspended_stream_leaves_the_model_alone() -> None:
    model = with_tokenizer()
    plain = decoded(model, PROMPT, max_tokens=6)
    law = law_for(model)
    steered = decoded(model, PROMPT, law=law, max_tokens=6)
    one, other = decode(model, [PROMPT], law=law, max_tokens=6), decode(model, [PROMPT], max_tokens=6)
    taken = [(next(one)[1], next(other)[1]) for _ in range(6)]
    assert [a for a, _ in taken] == steered
    assert [b for _, b in taken] == plain


def test_sampling_repeats_with_its_seed_and_keeps_to_its_limits() -> None:
    model = with_tokenizer()

    def sample(**options: float) -> list[int]:
        return decoded(model, PROMPT, sampling=Sampling(temperature=2.0, **options), max_tokens=20)  # type: ignore[arg-type]

    greedy = decoded(model, PROMPT, max_tokens=20)
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
    draws = [decoded(model, PROMPT, sampling=Sampling(temperature=1.0, seed=s), max_tokens=1)[0] for s in range(400)]
    likeliest = int(share.argmax())
    spread = np.sqrt(share[likeliest] * (1 - share[likeliest]) / 400)
    assert abs(np.mean(np.array(draws) == likeliest) - share[likeliest]) < 4 * spread


def test_decoding_stops_at_an_end_token() -> None:
    model = with_tokenizer()
    free = decoded(model, PROMPT, max_tokens=20)
    model._tokenizer.end_tokens = frozenset({free[2]})  # type: ignore[misc, union-attr]
    assert decoded(model, PROMPT, max_tokens=20) == free[: free.index(free[2])]


def test_what_does_not_fit_the_context_is_an_error_or_rolls() -> None:
    model, wide = with_tokenizer(max_position_embeddings=16), with_tokenizer()
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


def test_memory_does_not_grow_with_the_tokens() -> None:
    model = with_tokenizer(max_position_embeddings=64)
    used = []
    for count, _ in enumerate(decode(model, [PROMPT], law=law_for(model), max_tokens=2500, overflow="roll")):
        if count in (500, 2499):
            mx.synchronize()
            used.append(mx.get_active_memory())
    assert used[1] <= used[0] + 20_000


BATCH = [PROMPT, PROMPT[:1], PROMPT[4:9], PROMPT[::-1], PROMPT[2:4]]


@pytest.mark.parametrize("steer_all", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILY))
def test_a_batch_gets_the_tokens_that_each_prompt_gets_alone(
    family: str, steer_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_tokenizer(family)
    law = law_for(model)
    alone = [decoded(model, prompt, law=law, steer_all=steer_all, max_tokens=8) for prompt in BATCH]
    monkeypatch.setattr(backend, "PREFILL_CHUNK", 3 * len(BATCH))  # chunks shorter than most prompts
    found: list[list[int]] = [[] for _ in BATCH]
    for i, token in decode(model, BATCH, law=law, steer_all=steer_all, max_tokens=8):
        found[i].append(token)
    assert found == alone


def test_a_batch_goes_on_without_those_that_have_ended() -> None:
    model = with_tokenizer("gemma3_text")
    options = {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.3}
    free = [
        decoded(model, prompt, sampling=Sampling(seed=7 + i, **options), max_tokens=12)
        for i, prompt in enumerate(BATCH)
    ]
    model._tokenizer.end_tokens = frozenset({free[0][3], free[2][6]})  # type: ignore[misc, union-attr]
    expected = [
        decoded(model, prompt, sampling=Sampling(seed=7 + i, **options), max_tokens=12)
        for i, prompt in enumerate(BATCH)
    ]
    found: list[list[int]] = [[] for _ in BATCH]
    ended: set[int] = set()
    for i, token in decode(model, BATCH, sampling=Sampling(seed=7, **options), max_tokens=12, ended=ended):
        found[i].append(token)
        if i == 1 and len(found[i]) == 5:
            ended.add(i)
    expected[1] = expected[1][:5]
    assert len(expected[0]) <= 3
    assert found == expected


def test_the_repetition_penalty_is_that_of_its_definition() -> None:
    model = with_tokenizer()
    penalised = decoded(model, PROMPT, sampling=Sampling(repetition_penalty=1.8), max_tokens=10)
    tokens = list(PROMPT)
    for token in penalised:
        logits = model.logits(tokens)
        seen = np.unique(tokens)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.8, logits[seen] * 1.8)
        assert token == int(logits.argmax())
        tokens.append(token)
    assert penalised != decoded(model, PROMPT, max_tokens=10)


def test_activations_that_overflow_end_with_the_layer_and_the_strength() -> None:
    model = with_tokenizer()
    law = law_for(model, 1e25)
    with np.errstate(over="ignore"):
        energy = (model.residuals([PROMPT], law=law)[0, 1:] ** 2).sum(axis=1)
    layer = int(np.flatnonzero(~np.isfinite(energy))[0])
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


def test_a_controller_that_is_not_finite_is_refused_before_the_first_token() -> None:
    model = with_tokenizer()
    controller = mlx_lqr.fit(model, [[1, 2, 3]], [[6, 7]])
    gain = controller.gain.copy()
    gain[2, 3] = np.nan
    with pytest.raises(InputError, match="gain has values that are not finite"):
        mlx_lqr.stream(model, PROMPT, controller=replace(controller, gain=gain))


def test_adaptive_generation_linearises_during_prefill() -> None:
    model = with_tokenizer("gemma3_text")
    controller = mlx_lqr.fit(model, [[1, 2, 3], [4, 5]], [[6, 7], [8]], q=1.0)
    prompt = PROMPT * 2  # longer than the sliding window
    adapted = mlx_lqr.adapt(model, controller, prompt)
    law = LinearFeedback(adapted, 2.0)
    expected = decoded(model, prompt, law=law, max_tokens=8)
    passes: list[int] = []
    original = type(model.module).__call__

    def counted(self: Any, tokens: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        passes.append(tokens.shape[1])
        return original(self, tokens, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.module), "__call__", counted)
        adapt = partial(readapted, model, controller)
        found = decoded(model, prompt, max_tokens=8, adapted=lambda trace: LinearFeedback(adapt(trace), 2.0))
    assert found == expected
    assert passes.count(len(prompt) - 1) == 1, "the prompt was run more than once"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [("fox", "the quick brown "), (["jumps", "brown fox j"], "the quick "), ("never", "the quick brown fox jumps nev")],
)
def test_stop_strings_end_the_text_across_pieces(stop: str | list[str], expected: str) -> None:
    stops = StopStrings(StopStrings.check(stop))
    said = ""
    for piece in ["the qui", "ck b", "rown f", "o", "x ju", "mps", " nev"]:
        text, found = stops.add(piece)
        said += text
        assert not any(text in said for text in StopStrings.check(stop))
        if found:
            break
    assert said + stops.rest() == expected
    with pytest.raises(InputError, match="stop"):
        StopStrings.check(["a", ""])


def test_generation_ends_at_a_stop_string(smollm2: Model) -> None:
    prompts = ["The capital of France is", "Once upon a time,"]
    whole = [mlx_lqr.generate(smollm2, prompt, max_tokens=16) for prompt in prompts]
    stop = whole[0][12:18]
    expected = [text.split(stop)[0] for text in whole]
    assert mlx_lqr.batch_generate(smollm2, prompts, stop=stop, max_tokens=16) == expected
    assert mlx_lqr.generate(smollm2, prompts[0], stop=stop, max_tokens=16) == expected[0]


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
    pieces = list(mlx_lqr.stream(smollm2, "The capital of France is", max_tokens=12))
    assert "".join(piece.text for piece in pieces) == mlx_lqr.generate(
        smollm2, "The capital of France is", max_tokens=12
    )
