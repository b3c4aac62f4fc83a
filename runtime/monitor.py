"""Did an answer leave the region in which the linear model was checked?

A controller may carry that region: two sizes per layer and concept, in the residual stream's units. `checked_error` is
the |alpha_k| up to which block k was linear to within 10 % for steps along v_k; `checked_push` is the |u_k| up to which
block k + 1 was, for steps along g_k. Inside the region the gains rest on a sound model; outside it nothing is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlx_lqr.lqr.controller import Controller


@dataclass(frozen=True)
class Excess:
    """The layer and token at which an answer came closest to leaving the region, or went furthest beyond it."""

    ratio: float
    """size / checked: above 1 it is outside"""
    layer: int
    token: int
    """0 is the prompt's last token, i the answer's i-th"""
    quantity: Literal["alpha", "push"]
    size: float
    """|alpha_k| or |u_k|, in the residual stream's units"""
    checked: float
    concept: str
    outside: float
    """The share of tokens at which some layer was outside, 0 to 1"""

    def __str__(self) -> str:
        name = {"alpha": "|alpha_k|", "push": "|u_k|"}[self.quantity]
        where = "the prompt's last token" if self.token == 0 else f"token {self.token}"
        return (
            f"{name} of {self.concept} at layer {self.layer}, {where}, is {self.size:.3g}, {self.ratio:.1f} times what "
            f"was checked; {self.outside:.0%} of the tokens left the linear region"
        )


def largest_excess(controller: Controller, error: np.ndarray, push: np.ndarray) -> Excess | None:
    """The largest ratio of alpha_k (n, T, m) and |u_k| (n, T), at n tokens, to the controller's checked region.

    With several concepts |u_k| is compared with the smallest of their regions, leaving out concepts that are off at a
    token (alpha_k NaN). None without a region or a token.
    """
    if controller.checked_error is None or controller.checked_push is None or not len(error):
        return None
    m = len(controller.concepts)
    pushes = np.where(np.isnan(error), np.nan, push[..., None])
    sizes = np.concatenate([np.abs(error), pushes], axis=2)
    region = np.concatenate([controller.checked_error, controller.checked_push], axis=1)
    with np.errstate(divide="ignore"):
        ratios = np.nan_to_num(sizes / region, nan=0.0)  # (n, T, 2m)
    token, layer, column = (int(i) for i in np.unravel_index(np.argmax(ratios), ratios.shape))
    return Excess(
        ratio=float(ratios[token, layer, column]),
        layer=layer,
        token=token,
        quantity="alpha" if column < m else "push",
        size=float(sizes[token, layer, column]),
        checked=float(region[layer, column]),
        concept=controller.concepts[column % m],
        outside=float(np.mean((ratios > 1).any(axis=(1, 2)))),
    )
