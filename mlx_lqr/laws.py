"""Control laws, each written once for every backend.

A law is an expression in `@ * + -`, which NumPy, MLX and torch arrays share; a backend only places the arrays (`place`)
and calls the law with each block's input and output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

import numpy as np

from mlx_lqr.backends.base import AddProduct, Array, Renew
from mlx_lqr.controller import Controller
from mlx_lqr.errors import InputError


class LinearFeedback:
    """Activation LQR: u_k = (offset_k + strength o setpoint_k - z_k V_k) G_k'.

    With one concept, offset 0 and setpoint mu_k this is u_k = (strength mu_k - v_k . z_k) g_k (arXiv 2604.19018, linear
    feature setpoint; see riccati.py for g_k).

    Args:
        controller: the compiled directions V_k (d, m), gains G_k (d, m), setpoints and offsets (m,) of every layer.
        strength: one number for all m concepts, or m numbers. It may be set again at any time, also between two tokens.
    """

    def __init__(self, controller: Controller, strength: float | Sequence[float] = 1.0) -> None:
        for name in ("direction", "gain", "setpoint", "offset"):
            if not np.all(np.isfinite(getattr(controller, name))):
                raise InputError(f"the controller's {name} has values that are not finite: fit it again")
        self.layers: Sequence[int] = controller.active_layers
        self.replayable = True
        self._controller = controller
        self._array: Callable[[np.ndarray], Array] = np.asarray
        self._add_product: AddProduct = lambda c, a, b: c + a @ b
        self._renew: Renew = lambda _, values: values
        self._target: dict[int, Array] = {}
        self._shared = [check_strength(strength, len(controller.concepts))]
        """The strength, in a list that this law and those placed from it have in common."""
        self._arrange()

    def place(
        self, array: Callable[[np.ndarray], Array], add_product: AddProduct, *, renew: Renew | None = None
    ) -> LinearFeedback:
        placed = copy(self)
        placed._array, placed._add_product = array, add_product
        placed._renew = renew or (lambda _, values: array(values))
        placed._arrange()
        return placed

    @property
    def controller(self) -> Controller:
        return self._controller

    @property
    def strength(self) -> tuple[float, ...]:
        return self._shared[0]

    @strength.setter
    def strength(self, value: float | Sequence[float]) -> None:
        self._shared[0] = check_strength(value, len(self._controller.concepts))

    def __call__(self, layer: int, z: Array, output: Array) -> Array:
        self.aim()
        error = self._add_product(self._target[layer], z, self._minus_direction[layer])
        return self._add_product(output, error, self._gain_transposed[layer])

    def aim(self) -> None:
        """Take over a strength that has been set since the last call."""
        if self._aimed_at is self._shared[0]:
            return
        targets = self._targets()
        self._target = {k: self._renew(self._target[k], targets[k]) for k in self.layers}

    def _arrange(self) -> None:
        """Hand every layer's arrays to the constructor once, so that a call is two small products and no slicing."""
        controller = self._controller
        self._minus_direction = {k: self._array(-controller.direction[k]) for k in self.layers}
        self._gain_transposed = {k: self._array(np.ascontiguousarray(controller.gain[k].T)) for k in self.layers}
        targets = self._targets()
        self._target = {k: self._array(targets[k]) for k in self.layers}

    def _targets(self) -> np.ndarray:
        """offset + strength o setpoint of every layer, for the strength of this moment: (T, m)"""
        self._aimed_at = self._shared[0]
        with np.errstate(over="ignore"):  # what overflows is reported by whoever decodes
            return self._controller.offset + np.asarray(self._aimed_at, np.float32) * self._controller.setpoint


class Recording:
    """alpha_k and |u_k| of every layer and token that a law has steered; one sequence. Give it to `stream(record=...)`.

    In the order in which tokens were run: for a controller of the positions "last" the prompt's last token, then every
    generated one that was run on; for "all" every token of the prompt first.
    """

    def __init__(self) -> None:
        self._passed: list[tuple[int, Array, Controller]] = []

    def feature_error(self) -> np.ndarray:
        """alpha_k = beta*_k - v_k . z_k in the residual stream's units: (tokens, T, m), NaN where there is no control.

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
        T, _, m = self._passed[0][2].gain.shape
        passes: list[tuple[np.ndarray, np.ndarray]] = []  # alpha (L, T, m) and |u| (L, T) of L tokens run together
        above = T
        for layer, passed, controller in self._passed:
            error = np.array(passed.tolist(), np.float32).reshape(-1, m)
            if layer <= above:
                passes.append((np.full((len(error), T, m), np.nan, np.float32), np.full((len(error), T), np.nan)))
            passes[-1][0][:, layer] = error
            passes[-1][1][:, layer] = np.linalg.norm(error @ controller.gain[layer].T, axis=1)
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
        error = self._add_product(self._target[layer], z, self._minus_direction[layer])
        self.recording._passed.append((layer, error, self._controller))
        return self._add_product(output, error, self._gain_transposed[layer])


def check_strength(value: float | Sequence[float], concepts: int) -> tuple[float, ...]:
    """`value` as one finite number per concept.

    Raises:
        InputError: not a number, not finite, or another count than the controller's concepts.
    """
    try:
        numbers = np.atleast_1d(np.asarray(value, dtype=np.float64))
    except (TypeError, ValueError):
        raise InputError(f"strength must be a number, not {value!r}") from None
    if not np.all(np.isfinite(numbers)):
        raise InputError(f"strength must be a finite number, not {value!r}")
    if numbers.ndim != 1 or numbers.size not in (1, concepts):
        raise InputError(f"{numbers.size} strengths for {concepts} concepts: give one for all, or one for each")
    return tuple(float(x) for x in np.broadcast_to(numbers, (concepts,)))
