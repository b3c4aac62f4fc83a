"""Steer calls that are not ours: mlx_lm's or transformers' own generation on a model that is steered for a while."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from mlx_lqr.backends.protocol import CarryingLaw
from mlx_lqr.errors import InputError
from mlx_lqr.loading import adopt
from mlx_lqr.methods.steering import Steering
from mlx_lqr.runtime.generate import Strength, adapts, feedback


def steer(model: Any, controller: Steering, strength: Strength = None) -> AbstractContextManager[None]:
    """Inside `with steer(...)`, calls of the model are steered; afterwards the model is as it was, also after an error.

    Args:
        model: what `mlx_lm.load`, `from_pretrained` of a transformers model, or `mlx_lqr.load` returned.
        controller: a controller, or the steering of any other method, fitted on this model.
        strength: as in `generate`, by default what the controller recommends, or 1.

    Steered are `mlx_lm.generate`, `stream_generate` (with a `draft_model` too), `batch_generate` and mlx_lm's server,
    at the prompt's last token and at every generated token, in whatever chunks the prompt is read. So is mlx_lm's
    evaluator (`mlx_lm.evaluate.MLXLM`, imported before the block), at a context's last token and at every token that is
    scored after it. Of a direct call `model(tokens)` the last position is steered. A controller for the positions "all"
    steers every position of every call. Several models may be steered at once, and one model from several threads.

    Of a transformers model, `generate` is steered in the same way, with padding on the left, a cache of any kind,
    chunked prefill and assisted decoding, and `generate_batch`, whose requests then share no keys and values; inside
    the block neither compiles its steps. A call whose tokens cannot be placed is refused. Texts packed in one row of a
    direct call, told apart by their `position_ids`, are steered each at its last position.

    A prompt cache keeps what was computed: tokens that were generated steered stay so where a later prompt goes on from
    them, also after the block. `mlx_lm.server` shares its cache between requests in this way; whoever wants an answer
    free of earlier steering gives it a new `LRUPromptCache`. The model of a server in this process is its
    `ModelProvider`'s `model` after `load_default()`; steer it while no request is under way.

    Where activations overflow, `mlx_lm.generate` and `stream_generate` and a transformers model's `generate` raise an
    `OverflowingError`, as our own functions do; batches of mlx_lm, its server and `generate_batch` are not checked.

    Raises:
        InputError: a controller of another model, S-PID with a derivative or an adaptive controller (the calls of
            others do not tell where a prompt begins), something that is no model, or, on entering the block, a model
            that is already steered, or a version of its library that lacks what this needs.
    """
    if adapts(controller):
        raise InputError(
            "this controller's gains are made anew at every prompt, which these calls do not tell of: use "
            "mlx_lqr.generate, or fit it at the cost 'feature'"
        )
    adopted = adopt(model)
    law = feedback(adopted, controller, strength)
    if isinstance(law, CarryingLaw):
        raise InputError(
            "S-PID's derivative goes from token to token, and these calls do not tell where another prompt begins: use "
            "mlx_lqr.generate, or fit it with kd = 0"
        )
    return adopted.steer(law, steer_all=controller.positions == "all")
