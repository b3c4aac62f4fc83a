"""`mlx_lqr.steer`: mlx_lm's own generation under a controller, and the model afterwards."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_runtime import PROMPT, with_tokenizer

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends.base import Model
from mlx_lqr.backends.mlx import MLXModel
from mlx_lqr.runtime.decode import decode
from mlx_lqr.runtime.generate import feedback

library = importlib.import_module("mlx_lm.generate")  # the attribute mlx_lm.generate is a function


def fitted(model: Model, **options: Any) -> mlx_lqr.Controller:
    return mlx_lqr.fit(model, [[1, 2, 3], [4, 5]], [[6, 7], [8]], q=1.0, **options)


def theirs(model: MLXModel, prompt: list[int], **options: Any) -> list[int]:
    steps = library.generate_step(mx.array(prompt), model.module, max_tokens=8, **options)
    return [int(token) for token, _ in steps]


@pytest.mark.parametrize("chunk", [1, 3, 10, 11, 2048])
@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_mlx_lm_generates_what_our_loop_generates(family: str, positions: Any, chunk: int) -> None:
    model = with_tokenizer(family)
    controller = fitted(model, positions=positions)
    law = feedback(model, controller, 2.0)
    ours = list(decode(model, PROMPT, law=law, steer_all=positions == "all", max_tokens=8))
    with mlx_lqr.steer(model.module, controller, 2.0):
        steered = theirs(model, PROMPT, prefill_step_size=chunk)
    assert steered == ours
    assert steered != theirs(model, PROMPT)


def test_batches_of_mlx_lm_are_steered_each_by_its_own_positions() -> None:
    model = with_tokenizer()
    controller = fitted(model)
    prompts = [PROMPT, PROMPT[:3], PROMPT[2:9]]
    law = feedback(model, controller, 2.0)
    ours = [list(decode(model, prompt, law=law, max_tokens=6)) for prompt in prompts]
    with mlx_lqr.steer(model, controller, 2.0):
        batch = library.BatchGenerator(model.module, max_tokens=6, prefill_step_size=4)
        order = batch.insert(prompts)
        found: dict[int, list[int]] = {uid: [] for uid in order}
        while responses := batch.next_generated():
            for response in responses:
                found[response.uid].append(response.token)
        batch.close()
    assert [found[uid] for uid in order] == ours


def test_the_steered_text_on_the_real_model(smollm2: Any, controller: mlx_lqr.Controller) -> None:
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    from mlx_lqr.convert.sources import demo_model

    prompt = "Once upon a time,"
    expected = mlx_lqr.generate(smollm2, prompt, controller=controller, strength=3.0, max_tokens=20)
    tokenizer = load_tokenizer(demo_model())
    with mlx_lqr.steer(smollm2.module, controller, strength=3.0):
        steered = mlx_lm.generate(smollm2.module, tokenizer, prompt, max_tokens=20)
    plain = mlx_lm.generate(smollm2.module, tokenizer, prompt, max_tokens=20)
    # mlx_lm's detokenizer drops a leading space
    assert steered == expected.lstrip()
    assert plain == mlx_lqr.generate(smollm2, prompt, max_tokens=20).lstrip()


def test_a_direct_call_is_steered_at_its_last_position() -> None:
    model = with_tokenizer()
    controller = fitted(model)
    with mlx_lqr.steer(model, controller, 2.0):
        found = np.array(model.module(mx.array([PROMPT]))[0])
    assert np.abs(found[-1] - model.logits(PROMPT, law=feedback(model, controller, 2.0))).max() < 1e-4
    assert np.abs(found[:-1] - np.array(model.module(mx.array([PROMPT]))[0, :-1])).max() == 0


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_is_as_before_afterwards(error: type[BaseException] | None) -> None:
    model = with_tokenizer()
    controller = fitted(model)
    before = np.array(model.module(mx.array([PROMPT])))
    classes = [type(block) for block in model.blocks]
    weights = {name: np.array(weight) for name, weight in tree_flatten(model.module.parameters())}
    functions = library.generate_step, library.PromptProcessingBatch.prompt
    try:
        with mlx_lqr.steer(model.module, controller, 2.0):
            assert not np.array_equal(before, np.array(model.module(mx.array([PROMPT]))))
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert np.array_equal(before, np.array(model.module(mx.array([PROMPT]))))
    assert [type(block) for block in model.blocks] == classes
    after = dict(tree_flatten(model.module.parameters()))
    assert all(np.array_equal(weight, np.array(after[name])) for name, weight in weights.items())
    assert (library.generate_step, library.PromptProcessingBatch.prompt) == functions


def test_only_the_steered_model_is_steered() -> None:
    model, other = with_tokenizer(), with_tokenizer(seed=1)
    controller = fitted(model)
    plain = theirs(other, PROMPT)
    with mlx_lqr.steer(model, controller, 2.0):
        assert theirs(other, PROMPT) == plain


def test_what_is_no_model_is_refused() -> None:
    controller = fitted(with_tokenizer())
    with pytest.raises(InputError, match="cannot steer a str"):
        mlx_lqr.steer("model", controller)
