"""ITI, inference-time intervention (Li et al. 2023, arXiv 2306.03341): shifts of the attention heads that know best.

For head h of block k, x_h is what it puts out at a prompt's last token, before the output projection O_k:

1. How well does a linear probe on x_h tell positive from negative prompts that it has not seen? The best heads of the
   whole model are chosen.
2. theta_h is the direction from the negative to the positive mean of x_h ("mass mean shift"), at length 1, and sigma_h
   the standard deviation of theta_h . x_h over all prompts.
3. At every token that is steered x_h becomes x_h + s sigma_h theta_h, with the strength s (alpha in the paper).

O_k is linear: what s = 1 adds to its output, b_k = O_k [sigma_h theta_h over the chosen heads, 0 over the others], is
all that the law needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mlx_lqr.backends.protocol import HeadRecorder, Progress
from mlx_lqr.errors import InputError
from mlx_lqr.methods.baseline import Baseline
from mlx_lqr.methods.probes import held_out

HEADS = 48 / 1024
"""The share of a model's heads that is moved: what the paper found best for a LLaMA of 7B."""


def intervention(
    model: HeadRecorder,
    blank: Baseline,
    layers: Sequence[int],
    positive: Sequence[Sequence[int]],
    negative: Sequence[Sequence[int]],
    heads: int | None = None,
    progress: Progress | None = None,
) -> Baseline:
    """Fit ITI: `blank` with the shifts of the best heads.

    Of heads with the same accuracy the one goes first whose probe gives the held-out labels more probability.

    Args:
        layers: the blocks from whose heads to choose.
        positive, negative: token ids of the prompts.
        heads: how many to choose; by default the share `HEADS` of the model's.

    Raises:
        InputError: fewer heads than are to be chosen, or too few prompts to hold some out.
    """
    outputs = model.head_outputs([*positive, *negative], progress=progress)  # (n, T, H, head_dim)
    _, T, H, _ = outputs.shape
    count = max(1, round(HEADS * T * H)) if heads is None else heads
    if heads is not None and heads > len(layers) * H:
        raise InputError(f"{heads} heads of {len(layers) * H}: these layers have no more, ask for fewer")
    accuracy, likelihood = np.zeros((T, H), np.float32), np.full((T, H), -np.inf)
    for done, k in enumerate(layers):
        accuracy[k], likelihood[k] = held_out(outputs[: len(positive), k], outputs[len(positive) :, k])
        if progress:
            progress("Probes", done + 1, len(layers))
    ranked = np.lexsort((-likelihood.ravel(), -accuracy.ravel()))
    spread, shift = np.zeros((T, H), np.float32), np.zeros((T, blank.hidden_size), np.float32)
    moved = np.zeros(outputs.shape[1:], np.float32)  # sigma_h theta_h
    for k, h in zip(*np.unravel_index(ranked[:count], (T, H)), strict=True):
        if k not in layers:
            continue
        direction, spread[k, h] = mass_mean_shift(outputs[: len(positive), k, h], outputs[len(positive) :, k, h])
        moved[k, h] = spread[k, h] * direction
    active = tuple(k for k in range(T) if moved[k].any())
    if not active:
        raise InputError("the best heads' outputs do not tell the prompts apart: choose other layers or prompts")
    for k in active:
        shift[k] = model.projected(k, moved[k].reshape(1, -1))[0]
    found = {"attention_shift": shift, "head_accuracy": accuracy, "head_spread": spread}
    return replace(blank, tensors={name: part[..., None] for name, part in found.items()}, active_layers=active)


def mass_mean_shift(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, float]:
    """theta (p,), the direction from the mean of `negative` (m, p) to that of `positive` (n, p), and the standard
    deviation of both sets along it; zero where the means are the same."""
    difference = positive.mean(axis=0, dtype=np.float64) - negative.mean(axis=0, dtype=np.float64)
    length = np.linalg.norm(difference)
    direction = difference / length if length > 0 else difference
    return direction, float((np.concatenate([positive, negative]) @ direction).std())
