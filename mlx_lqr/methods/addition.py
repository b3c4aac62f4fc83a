"""The law of the methods that add a constant vector to a block's output: y + sum_i s_i b_ki."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_lqr.backends.protocol import Affine, Array
from mlx_lqr.methods.baseline import BaselineLaw


class Addition(BaselineLaw):
    """y + sum_i s_i b_ki with the `shift` b_k (d,) of each concept, whatever y is."""

    def _steered(self, layer: int, z: Array, output: Array) -> Array:
        return output + self._target[layer]

    def _affine(self, layer: int, aimed: np.ndarray) -> Affine:
        return Affine(np.ones(1, np.float32), aimed[:, None])

    def _fixed(self, layer: int) -> tuple[np.ndarray, ...]:
        return ()

    def _aimed(self, strength: np.ndarray) -> Any:
        return self._tensors["shift"] @ strength
