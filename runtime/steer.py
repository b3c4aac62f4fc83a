"""Steer a model in place, so that mlx_lm's or transformers' own functions generate with it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from mlx_lqr.backends.protocol import CarryingLaw
from mlx_lqr.errors import InputError
from mlx_lqr.loading import adopt
from mlx_lqr.methods.running import adapts, law_on
from mlx_lqr.methods.steering import Steering
from mlx_lqr.runtime.generate import Strength


def steer(model: Any, controller: Steering, strength: Strength = None) -> AbstractContextManager[None]:
    """Inside `with steer(...)`, calls of the model are steered. Afterwards, or after an error, it is as it was before.

    Args:
        model: what `mlx_lm.load`, `from_pretrained` of a transformers model, or `mlx_lqr.load` returned.
        controller: a controller, or the steering of any other method, fitted on this model.
        strength: as in `generate`; by default the recommended strength, or 1.

    `mlx_lm.generate`, `stream_generate` (with a `draft_model` too), `batch_generate` and mlx_lm's server are steered at
    the prompt's last token and at every generated token, however the prompt is split into chunks. mlx_lm's evaluator
    (`mlx_lm.evaluate.MLXLM`, imported before the block) is steered at a context's last token and at every token scored
    after it. In a direct call `model(tokens)` the last position is steered. A controller for the positions "all" steers
    every position of every call. Several models may be steered at once, and one model from several threads.

    Of a transformers model, `generate` is steered in the same way, with padding on the left, any kind of cache, chunked
    prefill and assisted decoding. So is `generate_batch`; its requests then share no keys and values. Inside the block
    neither compiles its steps. A call is refused if the positions of its tokens cannot be known. If a row of a direct
    call packs several texts, marked by their `position_ids`, each is steered at its last position.

    A prompt cache keeps what was computed. Tokens that were generated with steering stay that way when a later prompt
    continues from them, even after the block. `mlx_lm.server` shares its cache between requests; to get an answer free
    of earlier steering, give it a new `LRUPromptCache`. The model of a server in this process is its `ModelProvider`'s
    `model` after `load_default()`; steer it while no request is running.

    If activations overflow, `mlx_lm.generate`, `stream_generate` and a transformers model's `generate` raise an
    `OverflowingError`, as our own functions do. Batches of mlx_lm, its server and `generate_batch` are not checked.

    Raises:
        InputError: a controller of another model; a method that carries something from token to token, as S-PID with a
            derivative does, or an adaptive controller (other libraries' calls do not say where a prompt begins); or
            something that is no model. On entering the block: a model that is already steered, or a version of its
            library that lacks what this needs.
    """
    if adapts(controller):
        raise InputError(
            "this controller's gains are recomputed for each prompt, and these calls do not say where a prompt begins: "
            "use mlx_lqr.generate, or fit it with cost 'feature'"
        )
    adopted = adopt(model)
    law = law_on(adopted, controller, strength)
    if isinstance(law, CarryingLaw):
        raise InputError(
            "this method carries something from token to token, and these calls do not say where a prompt begins: use "
            "mlx_lqr.generate, or for spid kd = 0"
        )
    return adopted.steer(law, steer_all=controller.positions == "all")
