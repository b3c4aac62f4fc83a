"""Linear feedback of sequences decoded side by side, each with its own controller and strength, in one operation.

Row i of a batch has the arrays of `LinearFeedback` that it would have alone, padded with zeros to the largest number of
concepts: u_k = (target_k - z_k W_k) G_k'. Zeros leave a row as it is, where nothing steers it or steers another layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import TYPE_CHECKING

import numpy as np

from mlx_lqr.backends.protocol import AddProduct, Array, Float32, Renew, Site

if TYPE_CHECKING:
    from typing_extensions import Self

    from mlx_lqr.methods.alqr import LinearFeedback


class FeedbackRows:
    """Steers row i of a batch as `laws[i]` does (see `Law`).

    Args:
        laws: B of them, whose strengths it follows; None for a row that is not steered.
    """

    site: Site = "block"

    def __init__(self, laws: Sequence[LinearFeedback | None]) -> None:
        self._laws = [(row, law) for row, law in enumerate(laws) if law is not None]
        self._rows = len(laws)
        self._concepts = max(len(law.controller.concepts) for _, law in self._laws)
        self.layers: Sequence[int] = sorted({k for _, law in self._laws for k in law.layers})
        self.replayable = all(law.replayable for _, law in self._laws)
        self._renew: Renew = lambda _, values: values
        self._aimed_at: list[tuple[float, ...]] = []
        self._target: dict[int, Array] = {}
        """(B, 1, m) of each layer"""
        self._gain: dict[int, Array] = {}
        """(B, m, d)"""
        self._minus_sensor: dict[int, Array] = {}
        """(B, d, m)"""

    def to(self, array: Callable[[np.ndarray], Array], add_product: AddProduct, *, renew: Renew | None = None) -> Self:
        """See `Law`."""
        placed = copy(self)
        placed._renew = renew or (lambda _, values: array(values))
        placed._aimed_at = [law.strength for _, law in self._laws]
        placed._target = {k: array(self._targets(k)) for k in self.layers}
        placed._gain = {k: array(self._gains(k)) for k in self.layers}
        sensors = {k: -self._stack(k, [law.controller.sensor[k].T for _, law in self._laws]) for k in self.layers}
        placed._minus_sensor = {k: array(np.ascontiguousarray(part.swapaxes(1, 2))) for k, part in sensors.items()}
        return placed

    @property
    def acts(self) -> bool:
        return any(law.acts for _, law in self._laws)

    def aim(self) -> None:
        """Take over the strengths that have been set since the last call."""
        strengths = [law.strength for _, law in self._laws]
        if all(now is before for now, before in zip(strengths, self._aimed_at, strict=True)):
            return
        switched = [[s != 0 for s in one] for one in strengths] != [[s != 0 for s in one] for one in self._aimed_at]
        self._aimed_at = strengths
        for k in self.layers:
            self._target[k] = self._renew(self._target[k], self._targets(k))
            if switched:
                self._gain[k] = self._renew(self._gain[k], self._gains(k))

    def __call__(self, layer: int, z: Array, output: Array) -> Array:
        self.aim()
        error = self._target[layer] + z @ self._minus_sensor[layer]
        for row, law in self._laws:
            if layer in law.layers:
                law.note(layer, error[row : row + 1, :, : len(law.controller.concepts)])
        return output + error @ self._gain[layer] if self.acts else output

    def _targets(self, layer: int) -> Float32:
        """(B, 1, m)"""
        stacked = self._stack(layer, [law.target[layer][:, None] for _, law in self._laws])
        return np.ascontiguousarray(stacked.swapaxes(1, 2))

    def _gains(self, layer: int) -> Float32:
        """(B, m, d)"""
        return self._stack(layer, [law.gain[layer].T for _, law in self._laws])

    def _stack(self, layer: int, parts: Sequence[np.ndarray]) -> Float32:
        """What each law has for a layer (m_i, n), in its row: (B, m, n), zero where a law does not act."""
        stacked = np.zeros((self._rows, self._concepts, parts[0].shape[-1]), np.float32)
        for (row, law), part in zip(self._laws, parts, strict=True):
            if layer in law.layers:
                stacked[row, : len(part)] = part
        return stacked
