"""A prompt's last token, steered and unsteered: z_{k+1} = phi_k(z_k) + u_k and z0_{k+1} = phi_k(z0_k), z_0 = z0_0.

Both run through the same fixed prefix, layer by layer and in the backend's own arithmetic, so that their difference
e_k = z_k - z0_k comes from the control of this token alone. If a controller steers every position, the prefix is
steered in both.

Where blocks hand on more than z at a token, the states are s_k = (z_k, side_k), and control acts on z_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_lqr.backends.protocol import Differentiable, Float32, Trace
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.lqr.linearize import MAX_TOKENS
from mlx_lqr.lqr.prompts import Prompt, tokenise
from mlx_lqr.methods.alqr import LinearFeedback


@dataclass(frozen=True, eq=False)
class Rollout:
    """The last token of one prompt at S strengths, for a controller of one concept."""

    traces: tuple[Trace, ...]
    """S traces; all the same one if the prefix is not steered"""
    unsteered: Float32
    """(S, T + 1, d + m): s0_0..s0_T, without control at the last token"""
    steered: Float32
    """(S, T + 1, d + m): s_0..s_T under the law"""
    feature_error: Float32
    """(S, T): alpha_k = beta*_k - v_k . z_k of the steered token, in the residual stream's units"""
    push: Float32
    """(S, T): |u_k|, in the same units"""


def roll_out(model: Differentiable, prompt: Prompt, controller: Controller, strengths: Sequence[float]) -> Rollout:
    """Run the last token of a prompt (at most 32 tokens of it) at every strength; 0 is not steered.

    Raises:
        InputError: an unusable prompt, or activations overflow at a strength.
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
    model: Differentiable, trace: Trace, controller: Controller, strengths: Sequence[float]
) -> tuple[Float32, Float32, Float32, Float32]:
    """Unsteered and steered states (S, T + 1, d + m), alpha (S, T) and |u| (S, T) of one trace."""
    S, T, d = len(strengths), model.num_layers, model.hidden_size
    sensor, gain = controller.sensor[:, :, 0], controller.gain[:, :, 0]
    with np.errstate(over="ignore"):  # reported below
        target = controller.offset[:, 0] + np.asarray(strengths, np.float32)[:, None] * controller.setpoint[:, 0]
    s = np.empty((S + 1, T + 1, model.state_size), np.float32)
    z = s[..., :d]
    error = np.empty((S, T), np.float32)
    acts = np.asarray(strengths) != 0
    s[:, 0] = trace.state[0]
    for k in range(T):
        s[:, k + 1] = model.block(trace, k, s[:, k])
        with np.errstate(over="ignore", invalid="ignore"):
            error[:, k] = target[:, k] - z[1:, k] @ sensor[k]
            z[1:, k + 1] += np.where(acts, error[:, k], 0)[:, None] * gain[k]
        if not np.all(np.isfinite(s[:, k + 1])):
            raise InputError(f"the activations overflow at layer {k}: lower the strengths")
    unsteered = np.broadcast_to(s[0], s[1:].shape)
    push = np.where(acts[:, None], np.abs(error), 0) * np.linalg.norm(gain, axis=1)
    return unsteered, s[1:], error, push.astype(np.float32)


def _trace_after_steered_prefix(
    model: Differentiable, tokens: list[int], controller: Controller, strength: float
) -> Trace:
    decoder = model.decoder(LinearFeedback(controller, strength))
    decoder.fill([tokens[:-1]], steered=True)
    return decoder.trace(tokens[-1])
