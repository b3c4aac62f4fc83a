"""PCA contrast vectors, as repeng fits them (after Zou et al. 2023, representation engineering, arXiv 2310.01405).

y + s v_k, where v_k (d,), of length 1, is the first principal component of the last-token outputs of block k under
pairs of prompts: the main axis along which positive[i] and negative[i] differ. "pca_diff", repeng's default, takes it
of the differences p_i - n_i, less their mean; "pca_center" of both members of each pair, less the pair's middle. Its
sign is the one with which more pairs have the larger projection on the positive side.

"pca_diff" is for pairs that differ in nothing but the concept. What all differences have in common goes with their
mean, so that of sentences that are no pairs, such as the bundled ones, it finds something else and "pca_center" the
concept.

A strength is a length in the residual stream, which says nothing of how far apart the sets are: in SmolLM2, where
activations are 150 to 900 long from layer 15 on, 10 to 20 brings dogs in and 40 leaves no language.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_lqr.backends.protocol import Float32
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.controller import Positions
from mlx_lqr.methods.addition import Addition
from mlx_lqr.methods.baseline import Baseline, BaselineMethod
from mlx_lqr.methods.contrasted import contrasted
from mlx_lqr.methods.method import DefaultLayers, Option, Paper, Problem, StrengthScale


class PCA(BaselineMethod):
    name = "pca"
    title = "PCA contrast vectors, as in repeng"
    papers = (Paper("Zou et al.", 2023, "2310.01405"),)
    formula = "`y + s v`, `v` the first principal component of what pairs of prompts differ by"
    options = (
        Option(
            "rows",
            ("pca_diff", "pca_center"),
            "pca_diff",
            "Of what the principal component is taken: the pairs' differences, or both of each pair about its middle.",
            tries=("pca_diff", "pca_center"),
        ),
    )
    positions: Positions = "all"
    layers: DefaultLayers = "auto"
    layers_to_try = ("auto", "last third", "all")
    strengths = StrengthScale("s is the length of what is added", span=(0.0, 40.0), suggested=20.0, beyond=1000.0)
    tensors: Mapping[str, str] = {"shift": "Tdm"}

    def fit(self, problem: Problem, options: Mapping[str, Any]) -> Baseline:
        pairs = len(problem.positive)
        if pairs != len(problem.negative):
            raise InputError(
                f"pca compares pairs of prompts, not {pairs} positive with {len(problem.negative)} negative ones: give "
                "as many of each, in the same order"
            )
        if pairs < 2:
            raise InputError("pca needs at least two pairs of prompts to find what they have in common: give more")
        sets = contrasted(problem, self.layers)
        shift = np.zeros_like(sets.outputs)
        for k in sets.layers:
            shift[k] = component(sets.positive[:, k + 1], sets.negative[:, k + 1], options["rows"])
        tensors = {"shift": shift[:, :, None]}
        return replace(self.blank(problem, options), tensors=tensors, active_layers=sets.layers)

    def law(self, steering: Baseline, strength: float | Sequence[float]) -> Addition:
        return Addition(steering, strength)


def component(positive: Float32, negative: Float32, rows: str) -> np.ndarray:
    """The unit vector (d,) of pairs of activations (n, d) each; zero where all rows are the same."""
    p, n = positive.astype(np.float64), negative.astype(np.float64)
    middle = (p + n) / 2
    taken = p - n if rows == "pca_diff" else np.concatenate([p - middle, n - middle])
    centred = taken - taken.mean(axis=0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    if sizes[0] <= 1e-9 * np.linalg.norm(taken):
        return np.zeros(len(axes[0]))
    axis = axes[0] * np.sign(axes[0][np.argmax(np.abs(axes[0]))])
    larger = (p - n) @ axis
    return axis if (larger > 0).sum() >= (larger < 0).sum() else -axis
