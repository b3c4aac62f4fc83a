"""Residual streams read out of llama.cpp, at a few rows of each batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_lqr.backends.llama.hook import EMBEDDINGS, PythonHook, Rows, output_name
from mlx_lqr.backends.protocol import Float32


class RecordingHook(PythonHook):
    """Steers, and keeps z_0..z_T of the rows whose logits are asked for; what the last block makes of others is not
    computed."""

    def __init__(self, num_layers: int, hidden_size: int) -> None:
        super().__init__(num_layers, hidden_size)
        self.streams = np.empty((0, num_layers + 1, hidden_size), np.float32)
        """(n, T + 1, d) of the n outputs of the last batch"""

    def prepare(self, steered: Sequence[Rows], tokens: int, outputs: Sequence[int]) -> None:
        """See `Hook`."""
        super().prepare(steered, tokens, outputs)
        self._wanted |= dict.fromkeys(EMBEDDINGS, -1) | {output_name(k): k for k in range(self._last + 1)}
        self.streams = np.full((len(outputs), *self.streams.shape[1:]), np.nan, np.float32)

    def _shown(self, k: int, stream: Float32, rows: np.ndarray) -> None:
        wanted = np.isin(rows, self._outputs)
        self.streams[np.searchsorted(self._outputs, rows[wanted]), k + 1] = stream[wanted]
