"""A record of what a controller measures and does while it steers: the feature's error and the size of the push."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_lqr.backends.protocol import Array, Float32
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.methods.alqr import LinearFeedback
from mlx_lqr.methods.steering import Steering


class Recording:
    """alpha_k and |u_k| of every layer and token that a law has passed; one sequence. Give it to `stream(record=...)`.

    In the order in which tokens were run: for a controller of the positions "last" the prompt's last token, then every
    generated one that was run on; for "all" every token of the prompt first.
    """

    def __init__(self) -> None:
        self._passed: list[tuple[int, Array, Float32, tuple[bool, ...]]] = []
        """Layer, alpha_k, the gains (T, d, m) in force, and which concepts were on"""

    def feature_error(self) -> np.ndarray:
        """alpha_k = beta*_k - v_k . z_k in the residual stream's units: (tokens, T, m), NaN where there is no control
        and for a concept at strength 0.

        Waits for what is still being computed.
        """
        return self._read()[0]

    def push(self) -> np.ndarray:
        """|u_k| in the same units: (tokens, T), NaN where nothing is controlled."""
        return self._read()[1]

    def answer(self, controller: Steering, prompt_length: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Both at the prompt's last token and at those of the answer's `tokens` that were run on, and at no other."""
        before = prompt_length - 1 if controller.positions == "all" else 0
        kept = slice(before, before + 1 + tokens)  # an end token is run too, but is no part of the answer
        error, push = self._read()
        return error[kept], push[kept]

    def take(self) -> Recording:
        """A recording of what has been recorded so far, which leaves this one empty; nothing is waited for."""
        taken = Recording()
        taken._passed, self._passed = self._passed, []
        return taken

    def _read(self) -> tuple[np.ndarray, np.ndarray]:
        if not self._passed:
            return np.empty((0, 0, 0), np.float32), np.empty((0, 0), np.float32)
        T, _, m = self._passed[0][2].shape
        passes: list[tuple[np.ndarray, np.ndarray]] = []  # alpha (L, T, m) and |u| (L, T) of L tokens run together
        above = T
        for layer, passed, gain, on in self._passed:
            error = np.array(passed.tolist(), np.float32).reshape(-1, m)
            if layer <= above:
                passes.append((np.full((len(error), T, m), np.nan, np.float32), np.full((len(error), T), np.nan)))
            passes[-1][0][:, layer] = np.where(on, error, np.nan)
            passes[-1][1][:, layer] = np.linalg.norm(error @ gain[layer].T, axis=1)
            above = layer
        return np.concatenate([alpha for alpha, _ in passes]), np.concatenate([u for _, u in passes]).astype(np.float32)


class RecordedFeedback(LinearFeedback):
    """`LinearFeedback` that keeps what it measures. It is another class so that, where nobody asks, nothing is kept."""

    def __init__(
        self, controller: Controller, strength: float | Sequence[float] = 1.0, recording: Recording | None = None
    ) -> None:
        super().__init__(controller, strength)
        self.replayable = False
        self.recording = recording if recording is not None else Recording()

    def silent(self) -> LinearFeedback:
        """The same law without the recording."""
        return LinearFeedback(self._controller, self.strength)

    def note(self, layer: int, error: Array) -> None:
        self.recording._passed.append((layer, error, self.gain, self.on))

    def __call__(self, layer: int, z: Array, output: Array) -> Array:
        self.aim()
        error = self._error(layer, z)
        self.note(layer, error)
        return self._add_product(output, error, self._gain[layer]) if self.acts else output
