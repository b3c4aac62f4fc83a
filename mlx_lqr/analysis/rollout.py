"""The steered last token of a prompt beside the same token left alone: z_{k+1} = phi_k(z_k) + u_k from the same z_0.

Both run through the same frozen prefix, layer by layer and in the backend's own arithmetic, so that their difference
e_k = z_k - z0_k is what this token's control has done and nothing else. Where a controller steers every position, the
prefix is the steered one, in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_lqr.backends.protocol import Float32, Model, Trace
from mlx_lqr.concepts import bundled_concepts, bundled_prompts
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.lqr.linearize import MAX_TOKENS
from mlx_lqr.lqr.prompts import Prompt, tokenise
from mlx_lqr.methods.alqr import LinearFeedback


@dataclass(frozen=True, eq=False)
class Rollout:
    """The last token of one prompt at S strengths, for a controller of one concept."""

    traces: tuple[Trace, ...]
    """S traces; the same one again and again where the prefix is not steered"""
    unsteered: Float32
    """(S, T + 1, d): z0_0..z0_T, without control at the last token"""
    steered: Float32
    """(S, T + 1, d): z_0..z_T under the law"""
    feature_error: Float32
    """(S, T): alpha_k = beta*_k - v_k . z_k of the steered token, in the residual stream's units"""
    push: Float32
    """(S, T): |u_k|, in the same units"""


def roll_out(model: Model, prompt: Prompt, controller: Controller, strengths: Sequence[float]) -> Rollout:
    """Run the last token of a prompt (at most 32 tokens of it) at every strength; 0 is not steered.

    Raises:
        InputError: an unusable prompt, or activations that overflow at a strength.
    """
    tokens = tokenise(model, prompt)[:MAX_TOKENS]
    if controller.positions == "all":
        traces = tuple(_trace_after_steered_prefix(model, tokens, controller, s) for s in strengths)
    else:
        traces = (model.trace(tokens),) * len(strengths)
    if controller.positions == "all":
        runs = [_run(model, trace, controller, [s]) for trace, s in zip(traces, strengths, strict=True)]
    else:
        runs = [_run(model, traces[0], controller, strengths)]
    unsteered, steered, error, push = (np.concatenate(parts) for parts in zip(*runs, strict=True))
    return Rollout(traces, unsteered, steered, error, push)


def _run(
    model: Model, trace: Trace, controller: Controller, strengths: Sequence[float]
) -> tuple[Float32, Float32, Float32, Float32]:
    """Unsteered and steered residual streams (S, T + 1, d), alpha (S, T) and |u| (S, T) of one trace."""
    S, T, d = len(strengths), model.num_layers, model.hidden_size
    direction, gain = controller.direction[:, :, 0], controller.gain[:, :, 0]
    with np.errstate(over="ignore"):  # reported below
        target = controller.offset[:, 0] + np.asarray(strengths, np.float32)[:, None] * controller.setpoint[:, 0]
    z = np.empty((S + 1, T + 1, d), np.float32)
    error = np.empty((S, T), np.float32)
    acts = np.asarray(strengths) != 0
    z[:, 0] = trace.residual[0]
    for k in range(T):
        z[:, k + 1] = model.block(trace, k, z[:, k])
        with np.errstate(over="ignore", invalid="ignore"):
            error[:, k] = target[:, k] - z[1:, k] @ direction[k]
            z[1:, k + 1] += np.where(acts, error[:, k], 0)[:, None] * gain[k]
        if not np.all(np.isfinite(z[:, k + 1])):
            raise InputError(f"the activations overflow at layer {k}: lower the strengths")
    unsteered = np.broadcast_to(z[0], (S, T + 1, d))
    push = np.where(acts[:, None], np.abs(error), 0) * np.linalg.norm(gain, axis=1)
    return unsteered, z[1:], error, push.astype(np.float32)


def _trace_after_steered_prefix(model: Model, tokens: list[int], controller: Controller, strength: float) -> Trace:
    decoder = model.decoder(LinearFeedback(controller, strength))
    decoder.fill([tokens[:-1]], steered=True)
    return decoder.trace(tokens[-1])


def check_steering(strengths: Sequence[float]) -> None:
    """Raise `InputError` unless every strength is finite and one at which something is steered."""
    if not len(strengths) or not np.all(np.isfinite(strengths)):
        raise InputError("at least one finite strength is needed")
    if not np.all(strengths):
        raise InputError("strength 0 is not steered, so that there is nothing to look at: leave it out")


def check_seed(seed: int) -> None:
    """Raise `InputError` for a seed of which no random numbers can be made."""
    if seed < 0:
        raise InputError(f"seed must be zero or above, not {seed}")


def check_single(controller: Controller, model: Model) -> None:
    """Raise `InputError` unless the controller is of this model and of one concept."""
    controller.check_model(model)
    if len(controller.concepts) > 1:
        raise InputError(
            f"this looks at one concept at a time, and the controller has {', '.join(controller.concepts)}: "
            "give the file of one of them"
        )
    if not controller.active_layers:
        raise InputError("the controller does nothing at any layer: fit it again")


def default_prompts(count: int, without: Sequence[str] = ()) -> list[str]:
    """Bundled sentences of concepts other than those named, cut in the middle, so that their last tokens differ."""
    names = [name for name in bundled_concepts() if name not in without]
    sentences = [
        sentence for pair in zip(*(bundled_prompts(name)[1] for name in names), strict=False) for sentence in pair
    ]
    cut = []
    for i, sentence in enumerate(dict.fromkeys(sentences)):
        words = sentence.split()
        cut.append(" ".join(words[: max(2, len(words) // 2 + i % 3)]))
    return list(dict.fromkeys(cut))[:count]
