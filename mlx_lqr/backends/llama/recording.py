"""Residual streams read out of llama.cpp, at a few rows of each batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_lqr.backends.llama.hook import FIRST, Part, PythonHook, Rows, output_stage
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
        for stage in range(FIRST, self._last + 1, 2):
            self._wanted |= self._named(stage)
        self.streams = np.full((len(outputs), *self.streams.shape[1:]), np.nan, np.float32)

    def _shown(self, k: int, stream: Float32, part: Part) -> None:
        rows = self._computed_rows(part, output_stage(k))
        wanted = np.isin(rows, self._outputs)
        self.streams[np.searchsorted(self._outputs, rows[wanted]), k + 1] = stream[wanted]
