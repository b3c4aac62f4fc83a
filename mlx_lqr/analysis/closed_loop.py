"""The linearised closed loop: its prediction, and one backward sweep that measures everything in Lyapunov weights.

certificate.py has the error system, lyapunov.py the weights. A `LinearModel` gives the Jacobians: averaged ones from a
file or from memory, or those of one prompt, computed when they are needed. Either way only a few (d, d) float64
matrices are in memory, however many layers there are. Where blocks hand on m numbers beside z_k, the states are s_k in
R^(d + m); v_k and g_k are then (v_k, 0) and (g_k, 0), and d stands for d + m.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mlx_lqr.analysis.lyapunov import (
    Float64,
    LyapunovStep,
    dual_norm,
    lyapunov_sweep,
    spectral_norm,
    transition_products,
    weighted_norm,
)
from mlx_lqr.analysis.rollout import Rollout
from mlx_lqr.backends.protocol import Differentiable, Float32, Trace
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.lqr.linearize import Jacobians
from mlx_lqr.lqr.riccati import cost_to_go

SAMPLES = ("steered", "concept", "random", "prompts")
"""Directions along which c_k and L_k are sampled, all at the length of the steered displacement: the displacement, v_k,
a random (isotropic) direction, and the difference to another prompt's state."""


class LinearModel(Protocol):
    """A_0..A_{T-1} of a model."""

    def matrix(self, layer: int) -> Float64:
        """A_k (d, d)"""

    def apply(self, layer: int, rows: Float64) -> Float64:
        """A_k x for the rows x of (n, d): (n, d)"""


@dataclass(frozen=True)
class Averaged:
    """Jacobians averaged over prompts, in a file or in memory."""

    jacobians: Jacobians

    def matrix(self, layer: int) -> Float64:
        return np.asarray(self.jacobians[layer], np.float64)

    def apply(self, layer: int, rows: Float64) -> Float64:
        return rows @ self.matrix(layer).T


@dataclass(frozen=True)
class AtPrompt:
    """Jacobians at one prompt."""

    model: Differentiable
    trace: Trace

    def matrix(self, layer: int) -> Float64:
        return self.model.jacobian(self.trace, layer).astype(np.float64)

    def apply(self, layer: int, rows: Float64) -> Float64:
        return self.model.jvp(self.trace, layer, rows.astype(np.float32)).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Contraction:
    """The closed loop F_k in its Lyapunov weights, from the first controlled layer on (NaN before it)."""

    spectral_norm: Float64
    """(T,): |F_k|_2, which may be above 1"""
    largest_weight: Float64
    """(T,): lambda_max(P_k)"""
    step_norm: Float64
    """(T,): |F_k| from P_k to P_{k+1}, exactly"""
    to_output: Float64
    """(T + 1,): |Phi(T, k)| from P_k to P_T, exactly"""

    @property
    def transition(self) -> Float64:
        """Bounds of |Phi(k, i)| (T + 1, T + 1): products of the steps' norms, the last row exact; 0 before control."""
        table = transition_products(np.nan_to_num(self.step_norm))
        table[-1] = np.where(np.isnan(self.to_output), 0.0, self.to_output)
        return table


@dataclass(frozen=True, eq=False)
class Swept:
    """What one sweep measured for n prompts at S strengths."""

    contraction: Contraction
    norm: Float64
    """(n, S, T + 1): |z0_k|"""
    constant: Float64
    """(n, S, T + 1, d): a in the prediction a + strength b of z_k - z0_k"""
    slope: Float64
    """(T + 1, d): b"""
    forms: Float64
    """(n, S, T + 1, 3): |p_k|^2_{P_k} as a quadratic in the strength, the constant first"""
    displacement: Float64
    """(n, S, T + 1): |e_k|_{P_k}"""
    deviation: Float64
    """(n, S, T + 1): |e_k - p_k|_{P_k}"""
    remainder: Float64
    """(n, S, T): |r_k|_{P_{k+1}}"""
    feature_norms: Float64
    """(T + 1, T + 1): |Phi(k, i)' w_k|_{P_i^-1}, entry [k, i]"""
    samples: dict[str, Float64]
    """direction -> (2, T, S, prompts): samples of c_k and of L_k"""


class ClosedLoop:
    """The linear model of the closed loop: sensors w_k, g_k and F_k = A_k - g_k w_k'; at the output w_T = v_T."""

    def __init__(
        self, model: Differentiable, controller: Controller, strengths: Sequence[float], linear: LinearModel
    ) -> None:
        self.model, self.controller, self.linear = model, controller, linear
        self.strengths = np.asarray(strengths, np.float64)
        self.T, self.d = model.num_layers, model.state_size
        side = ((0, 0), (0, model.state_size - model.hidden_size))
        self.first = controller.active_layers[0]
        output = controller.output_direction[:, 0].astype(np.float64)
        length = float(np.linalg.norm(output))
        directions = np.vstack([controller.sensor[:, :, 0], output / (length or 1.0)])
        self.sensor = np.pad(directions.astype(np.float64), side)
        self.gain = np.pad(controller.gain[:, :, 0].astype(np.float64), side)
        at_output = np.nan if controller.offset.any() else 0.0  # a controller has no offset at the output
        self.offset = np.append(controller.offset[:, 0], at_output).astype(np.float64)
        self.magnitude = np.append(controller.magnitude[:, 0], length).astype(np.float64)
        self.setpoint = np.append(controller.setpoint[:, 0], length).astype(np.float64)  # mu_k / feedback

    def predict(self, unsteered: Float64) -> tuple[Float64, Float64]:
        """The prediction p_k = a_k + strength b_k of z_k - z0_k: a for every z0 (..., T + 1, d), and b (T + 1, d).

        u_k = (offset_k + strength setpoint_k - w_k' z0_k) g_k is affine in the strength, and so is p_k.
        """
        constant, slope = np.zeros(unsteered.shape), np.zeros((self.T + 1, self.d))
        for k in range(self.first, self.T):
            rows = np.vstack([constant[..., k, :].reshape(-1, self.d), slope[k]])
            carried = self.linear.apply(k, rows) - np.outer(rows @ self.sensor[k], self.gain[k])
            known = self.offset[k] - unsteered[..., k, :] @ self.sensor[k]
            constant[..., k + 1, :] = carried[:-1].reshape(constant[..., k, :].shape) + known[..., None] * self.gain[k]
            slope[k + 1] = carried[-1] + self.setpoint[k] * self.gain[k]
        return constant, slope

    def sweep(
        self,
        runs: Sequence[Rollout],
        calibration: Sequence[tuple[Rollout, Rollout]],
        seed: int = 0,
        report: Callable[[int], None] | None = None,
    ) -> Swept:
        """Measure the errors of `runs` and sample c_k and L_k at `calibration`, from the last layer to the first.

        Args:
            runs: n rollouts.
            calibration: pairs of rollouts: the one to sample at, and one of another prompt for the difference.
            seed: of the random directions.
            report: called with the number of layers done.
        """
        T, S = self.T, len(self.strengths)
        z0 = np.stack([run.unsteered for run in runs]).astype(np.float64)  # (n, S, T + 1, d)
        e = np.stack([run.steered for run in runs]) - z0
        constant, slope = self.predict(z0)
        deviating = e - constant - self.strengths[:, None, None] * slope
        shape = e.shape[:-1]
        displacement, deviation, remainder = np.zeros(shape), np.zeros(shape), np.zeros((*shape[:2], T))
        forms, feature_norms = np.zeros((*shape, 3)), np.zeros((T + 1, T + 1))
        samples = {name: np.full((2, T, S, len(calibration)), np.nan) for name in SAMPLES}
        random = np.random.default_rng(seed)
        responses = self.sensor[T][:, None]  # Phi(j, k)' w_j, the columns in the order j = k..T

        def weigh(k: int, factor: Float64) -> None:
            displacement[..., k] = weighted_norm(factor, e[..., k, :])
            deviation[..., k] = weighted_norm(factor, deviating[..., k, :])
            a, b = constant[..., k, :] @ factor, slope[k] @ factor
            forms[..., k, :] = np.stack([(a * a).sum(-1), 2 * (a @ b), np.full(a.shape[:-1], b @ b)], axis=-1)
            feature_norms[k:, k] = dual_norm(factor, responses)

        steps = []
        for step in lyapunov_sweep((k, self._closed(k)) for k in reversed(range(self.first, T))):
            k, F = step.layer, step.closed_loop
            if k == T - 1:
                weigh(T, step.next_factor)
            known = self.offset[k] + self.strengths * self.setpoint[k] - z0[..., k, :] @ self.sensor[k]
            r = e[..., k + 1, :] - e[..., k, :] @ F.T - known[..., None] * self.gain[k]
            remainder[..., k] = weighted_norm(step.next_factor, r)
            responses = np.column_stack([self.sensor[k], F.T @ responses])
            weigh(k, step.factor)
            if k > self.first:  # at the first controlled layer nothing is displaced yet
                for i, (run, other) in enumerate(calibration):
                    for name, constants in self._constants(run, step, other.unsteered[:, k], random).items():
                        samples[name][:, k, :, i] = constants
            steps.append(_summary(step))
            if report:
                report(T - k)
        contraction = _contraction(steps, T)
        norm = np.linalg.norm(z0, axis=-1)
        return Swept(
            contraction, norm, constant, slope, forms, displacement, deviation, remainder, feature_norms, samples
        )

    def full_state(self) -> Contraction:
        """The same for A_k - K_k, with the gains K_k of the controller's own cost and layers."""
        weights, layers = self.controller.weights, self.controller.active_layers
        descending = ((k, self.linear.matrix(k)) for k in reversed(range(self.first, self.T)))
        kept: list[Float64] = []  # the Jacobian of the next gain, which the recursion does not pass on

        def remembered() -> Iterator[tuple[int, Float64]]:
            for k, A in descending:
                kept[:] = [A]
                yield k, A

        width = self.model.hidden_size
        rest = ((0, self.d - width), (0, 0))
        steps = cost_to_go(remembered(), weights, layers, width=width)
        closed = ((k, kept[0] - np.pad(gain, rest)) for k, gain, _ in steps)
        return _contraction([_summary(step) for step in lyapunov_sweep(closed)], self.T)

    def _closed(self, k: int) -> Float64:
        return self.linear.matrix(k) - np.outer(self.gain[k], self.sensor[k])

    def _constants(
        self, run: Rollout, step: LyapunovStep, other: Float32, random: np.random.Generator
    ) -> dict[str, Float64]:
        """Samples of c_k and L_k (2, S) along each kind of direction, at the lengths of a prompt's displacements."""
        k, S = step.layer, len(self.strengths)
        A = step.closed_loop + np.outer(self.gain[k], self.sensor[k])
        z = run.unsteered[:, k]
        steered = run.steered[:, k] - z
        lengths = np.linalg.norm(steered, axis=1, keepdims=True)
        kinds = {"steered": steered, "random": random.standard_normal(z.shape), "prompts": other - z}
        v = np.pad(self.controller.direction[k, :, 0].astype(np.float64), (0, self.d - self.model.hidden_size))
        kinds["concept"] = np.outer(np.where(self.strengths < 0, -1.0, 1.0), v)
        constants = {}
        for name, directions in kinds.items():
            size = np.linalg.norm(directions, axis=1, keepdims=True)
            steps = directions * np.divide(lengths, size, out=np.zeros_like(lengths), where=size > 0)
            steps = steps.astype(np.float32)
            second, first = np.empty((2, S, self.d))
            for rows, trace in _shared_traces(run):
                values = self.model.block(trace, k, np.vstack([z[rows], z[rows] + steps[rows]])).astype(np.float64)
                own = self.model.jvp(trace, k, steps[rows]).astype(np.float64)
                half = len(values) // 2
                second[rows], first[rows] = values[half:] - values[:half] - own, own - steps[rows] @ A.T
            weight = weighted_norm(step.factor, steps.astype(np.float64))
            mismatch, curved = (weighted_norm(step.next_factor, part) for part in (first, second))
            with np.errstate(divide="ignore", invalid="ignore"):
                constants[name] = np.stack([mismatch / weight, 2 * curved / weight**2])
        return constants


def _shared_traces(run: Rollout) -> list[tuple[slice, Trace]]:
    """All strengths at once if they share a trace, otherwise one by one."""
    if len({id(trace) for trace in run.traces}) == 1:
        return [(slice(None), run.traces[0])]
    return [(slice(s, s + 1), trace) for s, trace in enumerate(run.traces)]


def _summary(step: LyapunovStep) -> tuple[int, float, float, float, float]:
    return step.layer, spectral_norm(step.closed_loop), step.largest_weight, step.step_norm, step.to_output


def _contraction(steps: Sequence[tuple[int, float, float, float, float]], T: int) -> Contraction:
    spectral, weight, step_norm = np.full((3, T), np.nan)
    to_output = np.append(np.full(T, np.nan), 1.0)
    for k, *norms in steps:
        spectral[k], weight[k], step_norm[k], to_output[k] = norms
    return Contraction(spectral, weight, step_norm, to_output)
