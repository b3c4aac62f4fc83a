"""`mlx_lqr.steer`: mlx_lm's own generation under a controller, and the model afterwards."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from helpers.controllers import controller_for
from helpers.prompts import PROMPT
from helpers.tiny_tokenizers import with_tokenizer
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends.mlx.model import MLXModel
from mlx_lqr.methods.running import law_on
from mlx_lqr.runtime.decode import decode

FAMILIES = ["llama", "gemma3_text"]  # the latter's sliding window is shorter than the prompts
LETTERS = {chr(0x100 + token): token for token in range(64)}
library = importlib.import_module("mlx_lm.generate")  # the attribute mlx_lm.generate is a function


@pytest.fixture(scope="module")
def letters() -> TokenizerWrapper:
    """A tokenizer of one letter a token, none of which ends a text, so that a text tells its tokens."""
    tokenizer = Tokenizer(models.WordLevel(LETTERS, unk_token=next(iter(LETTERS))))
    tokenizer.decoder = decoders.Fuse()
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=tokenizer), eos_token_ids=[len(LETTERS)])


def small(family: str = "llama", **changes: Any) -> MLXModel:
    """Untied, or a llama this small says one token again and again, and that would hide much."""
    untied = {"tie_word_embeddings": False} if family == "llama" else {}
    return with_tokenizer(family, **untied, **changes)


def tokens_of(text: str) -> list[int]:
    return [LETTERS[letter] for letter in text]


def ours(model: MLXModel, prompt: Sequence[int], controller: mlx_lqr.Controller, max_tokens: int = 8) -> list[int]:
    law, steer_all = law_on(model, controller, 2.0), controller.positions == "all"
    return [token for _, token in decode(model, [prompt], law=law, steer_all=steer_all, max_tokens=max_tokens)]


def theirs(model: MLXModel, prompt: list[int], **options: Any) -> list[int]:
    steps = library.generate_step(mx.array(prompt), model.module, **{"max_tokens": 8, **options})
    return [int(token) for token, _ in steps]


@pytest.mark.parametrize("chunk", [1, 3, 10, 11, 2048])
@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_generates_what_our_loop_generates(family: str, positions: Any, chunk: int, letters: Any) -> None:
    model = small(family)
    controller = controller_for(model, positions=positions)
    expected = ours(model, PROMPT, controller)
    options = {"max_tokens": 8, "prefill_step_size": chunk}
    with mlx_lqr.steer(model.module, controller, 2.0):
        text = mlx_lm.generate(model.module, letters, PROMPT, **options)
        pieces = list(mlx_lm.stream_generate(model.module, letters, PROMPT, **options))
    assert tokens_of(text) == [piece.token for piece in pieces] == expected
    assert expected != theirs(model, PROMPT)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_prompt_of_batch_generate_is_steered_as_if_alone(family: str, letters: Any) -> None:
    model = small(family)
    controller = controller_for(model)
    prompts = [PROMPT, PROMPT[:3], PROMPT[2:9], PROMPT[::-1], PROMPT[:1]]
    # three at a time, so that prompts are read while others are being answered
    sizes = {"prefill_step_size": 4, "prefill_batch_size": 2, "completion_batch_size": 3}
    with mlx_lqr.steer(model, controller, 2.0):
        answers = mlx_lm.batch_generate(model.module, letters, prompts, max_tokens=[6, 3, 5, 6, 4], **sizes).texts
    expected = [
        ours(model, prompt, controller, length) for prompt, length in zip(prompts, [6, 3, 5, 6, 4], strict=True)
    ]
    assert [tokens_of(answer) for answer in answers] == expected


@pytest.mark.parametrize("chunk", [2, 2048])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_from_a_prompt_cache_equals_that_from_the_whole_prompt(
    family: str, chunk: int, letters: Any
) -> None:
    model = small(family)
    controller = controller_for(model)

    def beginning() -> list[Any]:
        cache: list[Any] = make_prompt_cache(model.module)
        assert theirs(model, PROMPT[:7], prompt_cache=cache, max_tokens=0, prefill_step_size=3) == []
        return cache

    caches = [beginning(), beginning()]
    with mlx_lqr.steer(model, controller, 2.0):
        options = {"max_tokens": 8, "prefill_step_size": chunk}
        one = mlx_lm.generate(model.module, letters, PROMPT[7:], prompt_cache=caches[0], **options)
        many = mlx_lm.batch_generate(model.module, letters, [PROMPT[7:]], prompt_caches=[caches[1]], **options).texts
    assert tokens_of(one) == tokens_of(many[0]) == ours(model, PROMPT, controller)


@pytest.mark.parametrize("chunk", [5, 2048])
def test_exactly_the_last_prompt_token_and_the_generated_tokens_are_steered(chunk: int, letters: Any) -> None:
    """In the last block's keys one sees which positions the blocks before it steered."""
    model = small()
    controller = controller_for(model)
    last = len(PROMPT) - 1

    def keys(tokens: list[int], **options: Any) -> np.ndarray:
        cache: list[Any] = make_prompt_cache(model.module)
        theirs(model, tokens, prompt_cache=cache, prefill_step_size=chunk, **options)
        return np.array(cache[-1].keys[0, :, : cache[-1].offset])

    with mlx_lqr.steer(model, controller, 2.0):
        steered = keys(PROMPT)
        (cache,) = mlx_lm.batch_generate(
            model.module, letters, [PROMPT], max_tokens=8, prefill_step_size=chunk, return_prompt_caches=True
        ).caches
    plain = keys([*PROMPT, *ours(model, PROMPT, controller)], max_tokens=0)
    batched = np.array(cache[-1].keys[0, :, : plain.shape[1]])
    for keys_of_run in (steered, batched):
        moved = np.abs(keys_of_run - plain[:, : keys_of_run.shape[1]]).max(axis=(0, 2))
        assert moved[:last].max() < 1e-5
        assert moved[last:].min() > 1e-2


@pytest.mark.parametrize("draft", ["another", "steered", "itself"])
def test_speculative_decoding_changes_no_token(draft: str, letters: Any) -> None:
    model, other = small(), small(seed=2)
    controller = controller_for(model)
    with ExitStack() as steered:
        steered.enter_context(mlx_lqr.steer(model, controller, 2.0))
        if draft == "steered":
            steered.enter_context(mlx_lqr.steer(other, controller_for(other)))
        drafting = model.module if draft == "itself" else other.module
        pieces = list(
            mlx_lm.stream_generate(
                model.module, letters, PROMPT, max_tokens=12, draft_model=drafting, prefill_step_size=4
            )
        )
    assert [piece.token for piece in pieces] == ours(model, PROMPT, controller, 12)
    if draft == "itself":  # with itself for a draft, steered alike, every guess is right
        assert sum(piece.from_draft for piece in pieces) == 8


def test_the_steered_text_on_the_real_model(smollm2: Any, controller: mlx_lqr.Controller) -> None:
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    from mlx_lqr.convert.sources import demo_model

    prompt = "Once upon a time,"
    expected = mlx_lqr.generate(smollm2, prompt, controller=controller, strength=3.0, max_tokens=20, temperature=0)
    tokenizer = load_tokenizer(demo_model())
    with mlx_lqr.steer(smollm2.module, controller, strength=3.0):
        steered = mlx_lm.generate(smollm2.module, tokenizer, prompt, max_tokens=20)
    plain = mlx_lm.generate(smollm2.module, tokenizer, prompt, max_tokens=20)
    # mlx_lm's detokenizer drops a leading space
    assert steered == expected.lstrip()
    assert plain == mlx_lqr.generate(smollm2, prompt, max_tokens=20, temperature=0).lstrip()


def test_a_direct_call_is_steered_at_its_last_position() -> None:
    model = small()
    controller = controller_for(model)
    plain = np.array(model.module(mx.array([PROMPT]))[0])
    with mlx_lqr.steer(model, controller, 2.0):
        for _ in theirs_unfinished(model):  # also while a generator of mlx_lm is suspended
            logits = np.array(model.module(mx.array([PROMPT]))[0])
    assert np.abs(logits[-1] - model.logits(PROMPT, law=law_on(model, controller, 2.0))).max() < 1e-4
    assert np.abs(logits[:-1] - plain[:-1]).max() == 0


def theirs_unfinished(model: MLXModel) -> list[int]:
    """The first token alone, of a generator that is kept suspended as long as the list."""

    class Kept(list[int]):
        steps: Any

    kept = Kept()
    kept.steps = library.generate_step(mx.array(PROMPT), model.module, max_tokens=8, prefill_step_size=3)
    kept.append(next(kept.steps)[0])
    return kept


def test_generators_that_take_turns_do_not_disturb_each_other() -> None:
    model = small()
    controller = controller_for(model)
    with mlx_lqr.steer(model, controller, 2.0):
        prompts = [PROMPT, PROMPT[::-1]]
        steps = [
            library.generate_step(mx.array(prompt), model.module, max_tokens=8, prefill_step_size=5)
            for prompt in prompts
        ]
        turns = [[int(token) for token, _ in turn] for turn in zip(*steps, strict=True)]
    assert [list(tokens) for tokens in zip(*turns, strict=True)] == [ours(model, p, controller) for p in prompts]


def test_generate_step_is_steered_for_those_who_import_it_by_name() -> None:
    model = small()
    controller = controller_for(model)
    before = generate_step
    with mlx_lqr.steer(model, controller, 2.0):
        steps = generate_step(mx.array(PROMPT), model.module, max_tokens=8, prefill_step_size=5)
        tokens = [int(token) for token, _ in steps]
    assert tokens == ours(model, PROMPT, controller)
    assert generate_step is before


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_other_threads_are_steered_too(dtype: mx.Dtype) -> None:
    model = small(dtype=dtype)
    controller = controller_for(model)
    expected = ours(model, PROMPT, controller)
    with mlx_lqr.steer(model, controller, 2.0), ThreadPoolExecutor() as pool:
        assert pool.submit(theirs, model, PROMPT, prefill_step_size=3).result() == expected


def test_a_thread_does_not_disturb_the_calls_of_another() -> None:
    model = small()

    def direct() -> np.ndarray:
        return np.array(model.module(mx.array([PROMPT])))

    with mlx_lqr.steer(model, controller_for(model), 2.0), ThreadPoolExecutor() as pool:
        from_the_thread: list[np.ndarray] = []
        theirs(model, PROMPT, prompt_progress_callback=lambda *_: from_the_thread.append(pool.submit(direct).result()))
        assert all(np.array_equal(logits, direct()) for logits in from_the_thread)


@pytest.mark.parametrize("left", ["by itself", "unfinished", RuntimeError, KeyboardInterrupt])
def test_the_model_is_as_before_afterwards(left: Any) -> None:
    model = small()
    controller = controller_for(model)
    before = np.array(model.module(mx.array([PROMPT])))
    classes = [type(block) for block in model.blocks]
    weights = {name: np.array(weight) for name, weight in tree_flatten(model.module.parameters())}
    functions = mlx_lm_functions()
    try:
        with mlx_lqr.steer(model.module, controller, 2.0):
            assert not np.array_equal(before, np.array(model.module(mx.array([PROMPT]))))
            unfinished = theirs_unfinished(model) if left == "unfinished" else None
            if isinstance(left, type):
                raise left
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert np.array_equal(before, np.array(model.module(mx.array([PROMPT]))))
    assert [type(block) for block in model.blocks] == classes
    after = dict(tree_flatten(model.module.parameters()))
    assert all(np.array_equal(weight, np.array(after[name])) for name, weight in weights.items())
    assert mlx_lm_functions() == functions
    del unfinished


def mlx_lm_functions() -> list[Any]:
    return [library.generate_step, library.speculative_generate_step, library.PromptProcessingBatch.prompt]


def test_only_the_steered_model_is_steered() -> None:
    model, other = small(), small(seed=2)
    controller = controller_for(model)
    plain = theirs(other, PROMPT)
    with mlx_lqr.steer(model, controller, 2.0):
        assert theirs(other, PROMPT) == plain


@pytest.mark.parametrize("left_first", [0, 1])
def test_two_models_steered_at_once_are_left_in_any_order(left_first: int) -> None:
    pair = [small(), small(seed=2)]
    controllers = [controller_for(model) for model in pair]
    expected = [ours(model, PROMPT, controller) for model, controller in zip(pair, controllers, strict=True)]
    plain = [theirs(model, PROMPT) for model in pair]
    functions = mlx_lm_functions()
    blocks = [mlx_lqr.steer(model, controller, 2.0) for model, controller in zip(pair, controllers, strict=True)]
    for block in blocks:
        block.__enter__()
    assert [theirs(model, PROMPT, prefill_step_size=5) for model in pair] == expected
    blocks[left_first].__exit__(None, None, None)
    expected[left_first] = plain[left_first]
    assert [theirs(model, PROMPT, prefill_step_size=5) for model in pair] == expected
    blocks[1 - left_first].__exit__(None, None, None)
    assert [theirs(model, PROMPT) for model in pair] == plain
    assert mlx_lm_functions() == functions


def test_steering_a_steered_model_is_refused_and_leaves_it_steered() -> None:
    model = small()
    controller = controller_for(model)
    expected, plain = ours(model, PROMPT, controller), theirs(model, PROMPT)
    with mlx_lqr.steer(model, controller, 2.0):
        with pytest.raises(InputError, match="already steered: combine"), mlx_lqr.steer(model.module, controller):
            raise AssertionError("the block was entered")
        assert theirs(model, PROMPT, prefill_step_size=5) == expected
    assert theirs(model, PROMPT) == plain


def test_what_is_no_model_is_refused() -> None:
    controller = controller_for(small())
    with pytest.raises(InputError, match="cannot steer a str"):
        mlx_lqr.steer("model", controller)


def test_our_own_functions_are_refused_inside_the_block() -> None:
    model = with_tokenizer()
    controller = controller_for(model)
    with mlx_lqr.steer(model, controller):
        for call in (
            lambda: mlx_lqr.generate(model, PROMPT, max_tokens=3, temperature=0),
            lambda: model.residuals([PROMPT]),
            lambda: controller_for(model),
        ):
            with pytest.raises(InputError, match="being steered"):
                call()
