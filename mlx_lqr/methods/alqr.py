"""Activation LQR (Skifstad et al. 2026, arXiv 2604.19018): feedback on a feature, with gains from the linearised model.

u_k = (offset_k + s mu_k - w_k . z_k) g_k is added to the output of block k. v_k and mu_k are the direction and the
length of the mean difference at its input; w_k reads the feature, which is v_k in the paper and the linear discriminant
here (lqr/contrast.py); g_k = K_k v_k comes from the Riccati recursion over the Jacobians of the blocks
(lqr/riccati.py), which weighs the error of the feature, or of the whole state, against the size of the push.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from mlx_lqr.backends.capabilities import DIFFERENTIABLE, require
from mlx_lqr.backends.protocol import Affine, Array, Differentiable, Float32, Progress, Recorder
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.contrast import Contrast, contrast
from mlx_lqr.lqr.controller import FEEDBACK, Controller, Cost, Positions, Readout, Setpoint, check_feedback
from mlx_lqr.lqr.fit import fit, solve_controller
from mlx_lqr.lqr.gains import PUSH, Push
from mlx_lqr.lqr.layers import Layers, choose_layers
from mlx_lqr.lqr.linearize import Jacobians, linearize
from mlx_lqr.lqr.prompts import Prompt
from mlx_lqr.lqr.riccati import WEIGHT, Weights
from mlx_lqr.methods.feedback_rows import FeedbackRows
from mlx_lqr.methods.law import AdjustableLaw
from mlx_lqr.methods.method import (
    Column,
    Compared,
    DefaultLayers,
    Method,
    Option,
    Paper,
    Prepared,
    Problem,
    Shown,
    StrengthScale,
)

STRENGTHS = StrengthScale(
    "1 pushes by the way from the negative prompts' level to the positive ones' (by `mu` with the paper's setpoint)",
    span=(0.0, 4.0),
    suggested=0.7,
)


class ALQR(Method[Controller]):
    name = "alqr"
    title = "A-LQR, activation LQR"
    papers = (Paper("Skifstad et al.", 2026, "2604.19018"),)
    formula = "`y + (offset_k + s mu_k - w_k . z_k) g_k`"
    options = (
        Option(
            "q",
            float,
            WEIGHT,
            "Weight of the state. Only q/r and qf/r matter; a larger q/r steers harder.",
            tries=(10.0, 3.0, 1.0),
        ),
        Option("r", float, 1.0, "Weight of the control."),
        Option("qf", float, WEIGHT, "Weight of the last layer's output."),
        Option(
            "setpoint",
            get_args(Setpoint),
            "centred",
            "Where strengths count from: the feature's level in the negative prompts (centred), or zero (paper).",
            tries=("centred", "paper"),
        ),
        Option(
            "cost",
            get_args(Cost),
            "feature",
            "Penalise the error of the concept's feature, or any error of the state, which takes far longer to fit; "
            "adaptive: the feature's, recomputed for each prompt.",
            tries=("feature", "state", "adaptive"),
        ),
        Option(
            "readout",
            get_args(Readout),
            "discriminant",
            "What the feature is read by: the linear discriminant of the two sets, or the direction (the paper's).",
            tries=("discriminant", "direction"),
        ),
        Option(
            "feedback",
            float,
            FEEDBACK,
            "How much of the push is taken back as the feature rises (0 to 1); 1: the paper's regulator.",
        ),
        Option(
            "push",
            get_args(Push),
            PUSH,
            "Push along the concept's own direction alone, or in whatever costs least (the paper's).",
        ),
        Option("jacobians", Jacobians.load, None, "Jacobians stored by `mlx-lqr linearize`."),
        Option("jacobian_prompts", int, 8, "How many positive prompts to linearise at, without --jacobians.", least=1),
    )
    layers: DefaultLayers = "auto"
    layers_to_try = ("auto", "last third", "all", "middle third")
    strengths = STRENGTHS

    def fit(self, problem: Problem, options: Mapping[str, Any]) -> Controller:
        return fit(
            require(problem.model, DIFFERENTIABLE, "fit controllers"),
            problem.positive,
            problem.negative,
            concept=problem.concept,
            layers=problem.layers,
            positions=problem.positions,
            progress=problem.progress,
            on_contrast=problem.on_contrast,
            **options,
        )

    def law(self, steering: Controller, strength: float | Sequence[float]) -> LinearFeedback:
        return LinearFeedback(steering, strength)

    def combine(self, steerings: Sequence[Controller]) -> Controller:
        """All setpoints met jointly."""
        return Controller.combine(*steerings)

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        options = super().complete(given)
        Weights(options["q"], options["r"], options["qf"])  # refuses what are no weights
        check_feedback(options["feedback"])
        return options

    def factors(self, num_layers: int, given: Mapping[str, Any]) -> dict[str, list[Any]]:
        """qf goes with q: what is searched is their ratio."""
        factors = super().factors(num_layers, given)
        return factors if "qf" in given else {**factors, "qf/q": [1.0, 10.0, 0.1]}

    def prepare(
        self,
        model: Recorder,
        positive: Sequence[Prompt],
        negative: Sequence[Prompt],
        given: Mapping[str, Any],
        *,
        concept: str,
        positions: Positions | None,
        progress: Progress | None,
    ) -> Prepared:
        """One contrast and one set of Jacobians serve all fits: each is a Riccati sweep."""
        differentiable = require(model, DIFFERENTIABLE, "fit controllers")
        options = self.complete(given)
        jacobians = options["jacobians"]
        if jacobians is None:
            jacobians = linearize(differentiable, positive[: options["jacobian_prompts"]], progress=progress)
        difference = contrast(model, positive, negative, progress=progress)
        positions = positions or self.positions
        return prepared(differentiable, difference, jacobians, given, concept=concept, positions=positions)

    def show(self, steering: Controller) -> Shown:
        """Each concept's setpoint and the length of its gain, layer by layer."""
        weights, gain_norm = steering.weights, np.linalg.norm(steering.gain, axis=1)
        centred = "counted from the negative prompts' level (centred)"
        columns = []
        for i, concept in enumerate(steering.concepts):
            columns.append(Column(f"setpoint {concept}", 24, steering.magnitude[:, i]))
            columns.append(Column("gain", 9, gain_norm[:, i]))
        kept = {"push": ", ".join(steering.pushes)} if "concept" in steering.pushes else {}
        return Shown(
            numbers={
                "weights": f"q = {weights.q:g}, r = {weights.r:g}, qf = {weights.qf:g}, {steering.cost} cost",
                "feedback": ", ".join(f"{share:g}" for share in steering.shares),
                **kept,
            },
            notes={"setpoint": centred} if steering.offset.any() else {},
            fitted=f"linearised at {steering.jacobian_prompts} prompts",
            columns=columns,
            fields={
                "q": weights.q,
                "r": weights.r,
                "qf": weights.qf,
                "cost": steering.cost,
                "jacobian_prompts": steering.jacobian_prompts,
                "feedback": list(steering.shares),
                "push": list(steering.pushes),
                "setpoint": steering.magnitude.tolist(),
                "offset": steering.offset.tolist(),
                "gain_norm": gain_norm.tolist(),
            },
        )

    def compared(self, num_layers: int) -> Compared:
        """What `fit` takes where nothing is said, and the paper's own defaults."""
        return {
            self.name: {"defaults": {}},
            "alqr (paper's defaults)": {
                "all layers, q/r 0.1": {
                    "layers": "all",
                    "q": 0.1,
                    "qf": 0.1,
                    "cost": "state",
                    "setpoint": "paper",
                    "readout": "direction",
                    "feedback": 1.0,
                    "push": "free",
                }
            },
        }


def prepared(
    model: Differentiable,
    difference: Contrast,
    jacobians: Jacobians,
    given: Mapping[str, Any],
    *,
    concept: str,
    positions: Positions,
) -> Prepared:
    """The fits with one contrast and one set of Jacobians.

    Args:
        given: options that are the same in all fits.

    Raises:
        InputError: a contrast or Jacobians of another model.
    """
    if not difference.fingerprint == jacobians.fingerprint == model.fingerprint:
        raise InputError(f"contrast and Jacobians are not of {model.name}: make them with this model")
    fixed = {name: value for name, value in given.items() if name not in ("jacobians", "jacobian_prompts")}

    def solve(layers: Layers, options: Mapping[str, Any]) -> Controller:
        chosen = {**fixed, **options}
        ratio = chosen.pop("qf/q", None)
        if ratio is not None:
            chosen["qf"] = chosen["q"] * ratio
        return solve_controller(
            difference,
            jacobians,
            concept=concept,
            layers=layers,
            positions=positions,
            algebra=model.algebra,
            **chosen,
        )

    origins = {
        "contrast": difference.direction.tolist(),
        "jacobians": [jacobians.prompt_count, np.asarray(jacobians[len(jacobians) - 1])[0].tolist()],
    }
    auto = choose_layers("auto", difference, jacobians)
    return Prepared(solve, positions, auto, origins, fixed)


class LinearFeedback(AdjustableLaw):
    """Activation LQR: u_k = (offset_k + strength o setpoint_k - z_k W_k) G_k', W_k the controller's sensor.

    With one concept, offset 0, W_k = V_k and setpoint mu_k this is u_k = (strength mu_k - v_k . z_k) g_k (arXiv
    2604.19018, linear feature setpoint; see riccati.py for g_k).

    A concept at strength 0 is off: G_k is then formed from the others alone. With a centred setpoint the smallest
    strengths steer to the level of the negative prompts, and 0 does not steer at all.

    Args:
        controller: the compiled directions V_k (d, m), gains G_k (d, m), setpoints and offsets (m,) of every layer.
        strength: one number for all m concepts, or m numbers. It may be set again at any time, also between two tokens.
    """

    def __init__(self, controller: Controller, strength: float | Sequence[float] = 1.0) -> None:
        for name in ("sensor", "gain", "setpoint", "offset"):
            if not np.all(np.isfinite(getattr(controller, name))):
                raise InputError(f"the controller's {name} has values that are not finite: fit it again")
        self._controller = controller
        self._gains: dict[tuple[bool, ...], Float32] = {(True,) * len(controller.concepts): controller.gain}
        """By which concepts are on; shared with the laws placed from this one."""
        self._gain_for: tuple[bool, ...] = ()
        super().__init__(controller.active_layers, len(controller.concepts), strength, STRENGTHS)

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

    def stacked(self, laws: Sequence[LinearFeedback | None]) -> FeedbackRows:
        """See `StackableLaw`."""
        return FeedbackRows(laws)

    @property
    def target(self) -> Float32:
        """offset + strength o setpoint of every layer, at the strength in force: (T, m)"""
        return np.asarray(self._aimed(np.asarray(self.strength, np.float32)), np.float32)

    def note(self, layer: int, error: Array) -> None:
        """Told alpha_k (..., m) by the law of a batch that this one is part of."""

    def _steered(self, layer: int, z: Array, output: Array) -> Array:
        return self._add_product(output, self._error(layer, z), self._gain[layer])

    def _error(self, layer: int, z: Array) -> Array:
        """alpha_k: (..., m)"""
        return self._add_product(self._target[layer], z, self._constant[layer][0])

    def _affine(self, layer: int, aimed: np.ndarray) -> Affine:
        return Affine(aimed, self.gain[layer], read_input=self._controller.sensor[layer])

    def _arrange(self) -> None:
        super()._arrange()
        self._gain_for, gain = self.on, self.gain
        self._gain: dict[int, Array] = {k: self._array(np.ascontiguousarray(gain[k].T)) for k in self.layers}

    def _fixed(self, layer: int) -> tuple[np.ndarray, ...]:
        return (-self._controller.sensor[layer],)

    def _aimed(self, strength: np.ndarray) -> np.ndarray:
        return self._controller.offset + strength * self._controller.setpoint
