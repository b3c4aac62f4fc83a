"""ITI, inference-time intervention (Li et al. 2023, arXiv 2306.03341): shift the heads that tell prompts apart best.

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

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_lqr.backends.capabilities import HEAD_RECORDER, require
from mlx_lqr.backends.protocol import Site
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.layers import check_layers
from mlx_lqr.methods.addition import Addition
from mlx_lqr.methods.baseline import Baseline, BaselineMethod
from mlx_lqr.methods.method import Compared, Option, Paper, Problem, Shown, StrengthScale
from mlx_lqr.methods.probes import held_out

HEADS = 48 / 1024
"""The share of a model's heads that is moved: what the paper found best for a LLaMA of 7B."""


class ITI(BaselineMethod):
    name = "iti"
    title = "ITI"
    papers = (Paper("Li et al.", 2023, "2306.03341"),)
    formula = (
        "inside the block, the output of the attention heads `h` that a linear probe tells apart best: "
        "`x_h + s sigma_h theta_h`"
    )
    options = (Option("heads", int, None, "How many attention heads are moved; by default 48 of every 1024.", least=1),)
    layers_to_try = ("all", "last third")
    strengths = StrengthScale(
        "s moves a head's output by s of its standard deviations (the paper's alpha, 15 for a LLaMA of 7B)",
        span=(0.0, 15.0),
        suggested=5.0,
    )
    tensors: Mapping[str, str] = {"attention_shift": "Tdm", "head_accuracy": "THm", "head_spread": "THm"}

    def fit(self, problem: Problem, options: Mapping[str, Any]) -> Baseline:
        """Shift the best of the heads of the chosen layers; layers "auto" are all, since the probes choose.

        Of heads with the same accuracy the one goes first whose probe gives the held-out labels more probability.
        """
        model = require(problem.model, HEAD_RECORDER, "record attention heads, as iti does")
        heads, progress = options["heads"], problem.progress
        layers = problem.layers if isinstance(problem.layers, tuple) else check_layers("all", model.num_layers)
        positive = len(problem.positive)
        outputs = model.head_outputs([*problem.positive, *problem.negative], progress=progress)  # (n, T, H, head_dim)
        _, T, H, _ = outputs.shape
        count = max(1, round(HEADS * T * H)) if heads is None else heads
        if heads is not None and heads > len(layers) * H:
            raise InputError(f"{heads} heads of {len(layers) * H}: these layers have no more, ask for fewer")
        accuracy, likelihood = np.zeros((T, H), np.float32), np.full((T, H), -np.inf)
        for done, k in enumerate(layers):
            accuracy[k], likelihood[k] = held_out(outputs[:positive, k], outputs[positive:, k])
            if progress:
                progress("Probes", done + 1, len(layers))
        ranked = np.lexsort((-likelihood.ravel(), -accuracy.ravel()))
        spread, shift = np.zeros((T, H), np.float32), np.zeros((T, model.hidden_size), np.float32)
        moved = np.zeros(outputs.shape[1:], np.float32)  # sigma_h theta_h
        for k, h in zip(*np.unravel_index(ranked[:count], (T, H)), strict=True):
            if k not in layers:
                continue
            direction, spread[k, h] = mass_mean_shift(outputs[:positive, k, h], outputs[positive:, k, h])
            moved[k, h] = spread[k, h] * direction
        active = tuple(k for k in range(T) if moved[k].any())
        if not active:
            raise InputError("the best heads' outputs do not tell the prompts apart: choose other layers or prompts")
        for k in active:
            shift[k] = model.projected(k, moved[k].reshape(1, -1))[0]
        kept = {"attention_shift": shift, "head_accuracy": accuracy, "head_spread": spread}
        tensors = {name: part[..., None] for name, part in kept.items()}
        return replace(self.blank(problem, options), tensors=tensors, active_layers=active)

    def law(self, steering: Baseline, strength: float | Sequence[float]) -> AttentionAddition:
        return AttentionAddition(steering, strength)

    def show(self, steering: Baseline) -> Shown:
        """The heads too: how well their probes did, and the standard deviation they are moved by."""
        shown, heads = super().show(steering), moved_heads(steering)
        lines = ["", "layer  head  accuracy  spread  concept"]
        lines += ["{layer:5d}{head:6d}{accuracy:10.3f}{spread:8.3f}  {concept}".format(**head) for head in heads]
        return replace(shown, fields={**shown.fields, "heads": heads}, lines=lines)

    def compared(self, num_layers: int) -> Compared:
        half = list(range(num_layers // 2, num_layers))
        return {self.name: {"heads of all layers": {}, "heads of the last half": {"layers": half}}}


class AttentionAddition(Addition):
    """sum_i s_i b_ki added to what the attention's projection puts out, b_k = O_k [sigma_h theta_h] over its heads h.

    The projection O_k is linear, so that this moves every head's output x_h to x_h + s sigma_h theta_h.
    """

    site: Site = "attention"

    def _aimed(self, strength: np.ndarray) -> Any:
        return self._tensors["attention_shift"] @ strength


def moved_heads(steering: Baseline) -> list[dict[str, Any]]:
    """The attention heads that are moved, for each concept."""
    accuracy, spread = steering.tensors["head_accuracy"], steering.tensors["head_spread"]
    return [
        {
            "layer": int(k),
            "head": int(h),
            "concept": steering.concepts[i],
            "accuracy": float(accuracy[k, h, i]),
            "spread": float(spread[k, h, i]),
        }
        for k, h, i in np.argwhere(spread > 0)
    ]


def mass_mean_shift(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, float]:
    """theta (p,), the direction from the mean of `negative` (m, p) to that of `positive` (n, p), and the standard
    deviation of both sets along it; zero where the means are the same."""
    difference = positive.mean(axis=0, dtype=np.float64) - negative.mean(axis=0, dtype=np.float64)
    length = np.linalg.norm(difference)
    direction = difference / length if length > 0 else difference
    return direction, float((np.concatenate([positive, negative]) @ direction).std())
