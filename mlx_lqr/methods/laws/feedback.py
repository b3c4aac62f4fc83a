"""Activation LQR as a law, and the same law with a record of what it measures and does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_lqr.backends.protocol import Array, Float32
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.methods.laws.adjustable import AdjustableLaw


class LinearFeedback(AdjustableLaw):
    """Activation LQR: u_k = (offset_k + strength o setpoint_k - z_k V_k) G_k'.

    With one concept, offset 0 and setpoint mu_k this is u_k = (strength mu_k - v_k . z_k) g_k (arXiv 2604.19018, linear
    feature setpoint; see riccati.py for g_k).

    A concept at strength 0 is off: G_k is then formed from the others alone. With a centred setpoint the smallest
    strengths steer to the level of the negative prompts, and 0 does not steer at all.

    Args:
        controller: the compiled directions V_k (d, m), gains G_k (d, m), setpoints and offsets (m,) of every layer.
        strength: one number for all m concepts, or m numbers. It may be set again at any time, also between two tokens.
    """

    def __init__(self, controller: Controller, strength: float | Sequence[float] = 1.0) -> None:
        for name in ("direction", "gain", "setpoint", "offset"):
            if not np.all(np.isfinite(getattr(controller, name))):
                raise InputError(f"the controller's {name} has values that are not finite: fit it again")
        self._controller = controller
        self._gains: dict[tuple[bool, ...], Float32] = {(True,) * len(controller.concepts): controller.gain}
        """By which concepts are on; shared with the laws placed from this one."""
        self._gain_for: tuple[bool, ...] = ()
        super().__init__(controller.active_layers, len(controller.concepts), strength)

    @property
    def controller(self) -> Controller:
        return self._controller

    @property
    def on(self) -> tuple[bool, ...]:
        """Which concepts are steered."""
        return tuple(strength != 0 for strength in self.strength)

    @property
    def gain(self) -> Float32:
        """(T, d, m): the gains in force; those of concepts that are off are zero."""
        on = self.on
        if on not in self._gains:
            gain = np.zeros_like(self._controller.gain)
            kept = np.flatnonzero(on)
            if kept.size:
                single = self._controller.split()
                gain[:, :, kept] = Controller.combine(*(single[i] for i in kept)).gain
            self._gains[on] = gain
        return self._gains[on]

    def aim(self) -> None:
        before, on = self._aimed_at, self.on
        super().aim()
        if before is self._aimed_at or self._gain_for == on:
            return
        self._gain_for, gain = on, self.gain
        for k in self.layers:
            self._gain[k] = self._renew(self._gain[k], np.ascontiguousarray(gain[k].T))

    def _steered(self, layer: int, z: Array, output: Array) -> Array:
        return self._add_product(output, self._error(layer, z), self._gain[layer])

    def _error(self, layer: int, z: Array) -> Array:
        """alpha_k: (..., m)"""
        return self._add_product(self._target[layer], z, self._constant[layer][0])

    def _arrange(self) -> None:
        super()._arrange()
        self._gain_for, gain = self.on, self.gain
        self._gain: dict[int, Array] = {k: self._array(np.ascontiguousarray(gain[k].T)) for k in self.layers}

    def _fixed(self, layer: int) -> tuple[np.ndarray, ...]:
        return (-self._controller.direction[layer],)

    def _aimed(self, strength: np.ndarray) -> np.ndarray:
        """offset + strength o setpoint of every layer: (T, m)"""
        return self._controller.offset + strength * self._controller.setpoint


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

    def answer(self, controller: Controller, prompt_length: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Both at the prompt's last token and at those of the answer's `tokens` that were run on, and at no other."""
        before = prompt_length - 1 if controller.positions == "all" else 0
        kept = slice(before, before + 1 + tokens)  # an end token is run too, but is no part of the answer
        error, push = self._read()
        return error[kept], push[kept]

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

    def __call__(self, layer: int, z: Array, output: Array) -> Array:
        self.aim()
        error = self._error(layer, z)
        self.recording._passed.append((layer, error, self.gain, self.on))
        return self._add_product(output, error, self._gain[layer]) if self.acts else output
