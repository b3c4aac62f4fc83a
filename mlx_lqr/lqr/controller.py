"""The compiled artifact: two vectors and two numbers per layer and concept, kilobytes in all.

The gains K_k (d, d) are needed once, to form G_k = K_k V_k (V_k' V_k)^-1; a running controller evaluates
u_k = G_k (offset_k + strength o setpoint_k - V_k' z_k) and never sees them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata as distribution
from os import PathLike
from typing import Any, Literal, Protocol, get_args

import numpy as np

from mlx_lqr.backends.protocol import ADAPTED, Float32, Runner
from mlx_lqr.errors import InputError, first_line
from mlx_lqr.files.atomic import writing
from mlx_lqr.files.json_text import LAYERS, WIDTH, Entries
from mlx_lqr.files.tensors import check_finite, check_shape, read_tensors, write_tensors
from mlx_lqr.lqr.contrast import Contrast
from mlx_lqr.lqr.gains import Push
from mlx_lqr.lqr.riccati import Gains, Weights
from mlx_lqr.lqr.strength import (
    Budget,
    Calibration,
    Calibrations,
    Strengths,
    calibrated_strength,
    combined_calibration,
    combined_strength,
    read_calibration,
    read_strength,
    strength_at,
    strength_metadata,
)

FORMAT = "mlx-lqr controller 1"
READING_FORMAT = "mlx-lqr controller 2"
"""Of a file with a readout, which versions that know only the first format would leave out and so steer wrongly."""
SMALLEST_ANGLE = 5.0
"""Degrees. Below it, joint control of two directions would need pushes of more than ten times each one's own."""

_TENSORS = {"direction": "Tdm", "gain": "Tdm", "setpoint": "Tm", "offset": "Tm", "output_direction": "dm"}
_OPTIONAL = {"readout": "Tdm", "checked_error": "Tm", "checked_push": "Tm"}

Cost = Literal["state", "feature", "adaptive"]
"""What is penalised: any error of the state (Q = qI), or the feature's relative error alone. "adaptive" is the feature
cost too, with gains that our own decoding recomputes for each prompt; the stored ones are those of the feature cost."""
Positions = Literal["last", "all"]
"""Where to steer: the last prompt token and every generated one (A-LQR), or every prompt token too (A-LQR+)."""
Setpoint = Literal["paper", "centred"]
"""What a strength asks of the feature: strength x mu_k, or the level of the negative prompts' mean + strength x mu_k,
which is that of the positive prompts at 1. Strength 0 itself does not steer."""
FEEDBACK = 0.03
"""The default share of the feedback. With the paper's 1 there is less of the concept at the same damage
(docs/comparison.md)."""
CONVERSATION_FEEDBACK = 0.25
"""The least share of it from the second answer of a conversation on: see `Controller.in_conversation`."""
STEERED_LEVEL = 1.8
"""c, how far above its offset the feature of steered texts is on average, in units of strength x mu_k: with a share of
0.25 the strength of the normal budget is 1 + 0.22 c times that with 0.03, for a c of 1.1 to 2.5 (SmolLM2; dog, ocean,
love, church, music, two words)."""
Readout = Literal["discriminant", "direction"]
"""What the feature is read by: Fisher's linear discriminant w_k of the two sets (`Contrast.discriminant`), or the
direction v_k itself, as in the paper."""


@dataclass(frozen=True, eq=False)
class Controller:
    """A controller of m concepts for one model of T blocks of width d. All arrays are float32."""

    direction: Float32
    """(T, d, m): the unit vectors v_k of each concept, zero where a layer does not tell it apart"""
    gain: Float32
    """(T, d, m): G_k = K_k V_k (W_k' V_k)^-1 for the sensors W_k, times `feedback`; zero at layers without control"""
    setpoint: Float32
    """(T, m): mu_k / `feedback`. The push ends where the feature is at offset_k + strength times this, which is the
    setpoint (`setpoint_at`) with the whole feedback, and beyond it with less"""
    offset: Float32
    """(T, m): what both go to as the strength goes to 0; at 0 itself nothing is steered"""
    output_direction: Float32
    """(d, m): e_T, the unnormalised direction at the last block's output; `adapt` needs it, steering does not"""
    concepts: tuple[str, ...]
    model_name: str
    fingerprint: str
    weights: Weights
    positions: Positions
    prompt_counts: tuple[tuple[int, int], ...]
    """Positive and negative prompts of each concept."""
    jacobian_prompts: int
    cost: Cost = "state"
    library_version: str = distribution.version("mlx-lqr")
    readout: Float32 | None = None
    """(T, d, m): what reads the features where it is not the direction, w_k with w_k . v_k = 1; see `sensor`"""
    checked_error: Float32 | None = None
    """(T, m): |alpha_k| up to which the linear model was found good; infinite: no limit. See `analysis.linearity`"""
    checked_push: Float32 | None = None
    """(T, m): the same for |u_k|, along each concept's own gain"""
    feedback: tuple[float, ...] = ()
    """Of each concept, the share f of the feedback: u_k = (s mu_k - f (w_k . z_k - offset_k)) K_k v_k, see `fit`. Empty
    where all have 1"""
    push: tuple[Push, ...] = ()
    """Of each concept, where its gain pushes; empty where all are free"""
    strength: Strengths | None = None
    """The strength recommended for each concept, which steers where no other is asked for; see `tasks.tune`"""
    calibration: Calibrations = ()
    """Of each concept, its strengths for the budgets; empty where none has any"""

    @property
    def method(self) -> str:
        """Its name among the methods."""
        return "alqr"

    @property
    def adaptive(self) -> bool:
        """Whether the gains are to be recomputed for each prompt."""
        return self.cost == "adaptive"

    @property
    def checked(self) -> bool:
        """Whether it knows the region in which its linear model was found good."""
        return self.checked_error is not None

    @property
    def sensor(self) -> Float32:
        """(T, d, m): W_k, what the law reads the residual stream with: alpha_k = setpoint - W_k' z_k"""
        return self.direction if self.readout is None else self.readout

    @property
    def magnitude(self) -> Float32:
        """(T, m): mu_k"""
        return self.setpoint * np.asarray(self.shares, np.float32)

    def setpoint_at(self, strength: Sequence[float]) -> Float32:
        """beta*_k = offset_k + strength mu_k (T, m), for one strength per concept (m,): where the features are to be.

        A share f of the feedback is taken about it, and the rest of the push is fixed: u_k = ((1 - f) strength mu_k +
        f (beta*_k - w_k . z_k)) K_k v_k.
        """
        return self.offset + self.magnitude * np.asarray(strength, np.float32)

    def ends_at(self, strength: Sequence[float]) -> Float32:
        """offset_k + strength mu_k / `feedback` (T, m), from which the law counts its errors alpha_k: there nothing is
        pushed any more. With the whole feedback it is the setpoint."""
        return self.offset + self.setpoint * np.asarray(strength, np.float32)

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of the feedback of each concept."""
        return self.feedback or (1.0,) * len(self.concepts)

    @property
    def pushes(self) -> tuple[Push, ...]:
        """Where the gain of each concept pushes."""
        return self.push or tuple("free" for _ in self.concepts)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All that the law is made of."""
        return {name: getattr(self, name) for name in (*_TENSORS, "readout") if getattr(self, name) is not None}

    @property
    def num_layers(self) -> int:
        return int(self.direction.shape[0])

    @property
    def hidden_size(self) -> int:
        return int(self.direction.shape[1])

    @property
    def active_layers(self) -> tuple[int, ...]:
        """The layers where this controller does something."""
        return tuple(int(k) for k in np.flatnonzero(np.abs(self.gain).max(axis=(1, 2)) > 0))

    def save(self, path: str | PathLike[str], *, force: bool = False) -> None:
        """Write one safetensors file, atomically; with `force` in place of a file of any kind."""
        tensors = {name: getattr(self, name) for name in (*_TENSORS, *_OPTIONAL) if getattr(self, name) is not None}
        metadata = {
            "format": FORMAT if self.readout is None else READING_FORMAT,
            "model": self.model_name,
            "fingerprint": self.fingerprint,
            "T": str(self.num_layers),
            "d": str(self.hidden_size),
            "q": repr(self.weights.q),
            "r": repr(self.weights.r),
            "qf": repr(self.weights.qf),
            "layers": json.dumps(self.active_layers),
            "positions": self.positions,
            "cost": self.cost,
            "concepts": json.dumps(self.concepts),
            "feedback": json.dumps(self.shares),
            "push": json.dumps(self.pushes),
            "prompt_counts": json.dumps(self.prompt_counts),
            "jacobian_prompts": str(self.jacobian_prompts),
            "library_version": self.library_version,
            **strength_metadata(self),
        }
        with writing(path, kind="controller", force=force) as temporary:
            write_tensors(temporary, tensors, metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Controller:
        """Read and check a controller file.

        Raises:
            InputError: missing, damaged, of another format, or with tensors of wrong shapes or values that are not
                finite.
        """
        tensors, metadata = read_tensors(path, (FORMAT, READING_FORMAT), "a controller")
        entries = Entries(metadata)
        try:
            concepts = entries.texts("concepts")
            sizes = {"T": entries.count("T", 1, LAYERS), "d": entries.count("d", 1, WIDTH), "m": len(concepts)}
            expected = _TENSORS | {name: axes for name, axes in _OPTIONAL.items() if name in tensors}
            positions = entries.one_of("positions", get_args(Positions))
            cost = entries.one_of("cost", get_args(Cost))
            if ("readout" in tensors) != (metadata["format"] == READING_FORMAT):
                raise ValueError(f"it has the format {metadata['format']!r}, and a readout or none")
            for name, axes in expected.items():
                check_shape(name, tensors[name], axes, sizes)
                if name in _TENSORS or name == "readout":
                    check_finite(name, tensors[name])
                elif np.isnan(tensors[name]).any() or tensors[name].min() < 0:
                    raise ValueError(f"{name} has values that are no sizes")
            return cls(
                **{name: tensors[name].astype(np.float32, copy=False) for name in expected},
                concepts=concepts,
                model_name=entries.text("model"),
                fingerprint=entries.text("fingerprint"),
                weights=Weights(entries.number("q"), entries.number("r"), entries.number("qf")),
                positions="all" if positions == "all" else "last",
                feedback=_feedback(entries, len(concepts)),
                push=_pushes(entries, len(concepts)),
                prompt_counts=entries.pairs("prompt_counts", len(concepts)),
                jacobian_prompts=entries.count("jacobian_prompts"),
                cost=next(known for known in get_args(Cost) if known == cost),
                library_version=entries.text("library_version"),
                strength=read_strength(entries, len(concepts)),
                calibration=read_calibration(entries, len(concepts)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is a damaged controller file ({first_line(error)}): fit it again") from error

    def check_model(self, model: Runner) -> None:
        """Raise `InputError` unless this controller was fitted on `model`."""
        check_fitted_on(self, model.name, model.fingerprint, model.num_layers, model.hidden_size)

    @classmethod
    def combine(cls, *controllers: Controller) -> Controller:
        """One controller of all the concepts, which meets all setpoints jointly; only the compiled parts are needed.

        At each layer the columns K_k v of the active concepts are put together and G_k = K_k V_k (W_k' V_k)^-1 is
        formed anew. Adding independent feedbacks instead would overshoot where directions overlap. It is adaptive where
        all of them are.

        Raises:
            InputError: controllers of different models or positions, a concept twice, or nearly parallel directions.
        """
        if not controllers:
            raise InputError("nothing to combine: give at least one controller")
        first = controllers[0]
        for other in controllers[1:]:
            check_fitted_on(other, first.model_name, first.fingerprint, first.num_layers, first.hidden_size)
            if other.positions != first.positions:
                raise InputError("controllers for the positions 'last' and 'all' cannot be combined: fit them alike")
        concepts = [name for controller in controllers for name in controller.concepts]
        if len(set(concepts)) < len(concepts):
            raise InputError(f"a concept appears twice among {', '.join(concepts)}: give each once, with one strength")
        direction = np.concatenate([controller.direction for controller in controllers], axis=2)
        sensor = np.concatenate([controller.sensor for controller in controllers], axis=2)
        uncoupled = np.concatenate([controller._uncoupled_gain() for controller in controllers], axis=2)
        return cls(
            direction=direction,
            gain=_couple(direction, sensor, uncoupled, concepts),
            readout=sensor if any(controller.readout is not None for controller in controllers) else None,
            setpoint=np.concatenate([controller.setpoint for controller in controllers], axis=1),
            offset=np.concatenate([controller.offset for controller in controllers], axis=1),
            output_direction=np.concatenate([controller.output_direction for controller in controllers], axis=1),
            concepts=tuple(concepts),
            model_name=first.model_name,
            fingerprint=first.fingerprint,
            weights=first.weights,
            positions=first.positions,
            feedback=tuple(share for controller in controllers for share in controller.shares),
            push=tuple(push for controller in controllers for push in controller.pushes),
            prompt_counts=tuple(count for controller in controllers for count in controller.prompt_counts),
            jacobian_prompts=min(controller.jacobian_prompts for controller in controllers),
            cost=next((one.cost for one in controllers if one.cost != "adaptive"), "adaptive"),
            checked_error=_checked([controller.checked_error for controller in controllers], controllers),
            checked_push=_checked([controller.checked_push for controller in controllers], controllers),
            strength=combined_strength(controllers),
            calibration=combined_calibration(controllers),
        )

    def recommending(self, strength: Strengths) -> Controller:
        """The same with a recommended strength for each concept."""
        return replace(self, strength=strength)

    def calibrated(self, calibration: Calibration, budget: Budget = "normal") -> Controller:
        """The same, of one concept, with its strength for each budget, one of which it recommends."""
        return replace(self, calibration=(calibration,), strength=calibrated_strength(self, calibration, budget))

    def strength_at(self, budget: Budget | None = None, times: float = 1.0) -> Strengths:
        """For each concept so many times the strength for a budget; without a budget, of the recommended strength.

        Raises:
            InputError: there is no recommended strength, or a concept was not calibrated.
        """
        return strength_at(self, budget, times)

    def in_conversation(self) -> Controller:
        """The controller for the answers of a conversation after the first, at the same strengths.

        Earlier answers have the concept already and each has more of it, until one says nothing else: so little
        feedback as is best for one text hardly notices. The share is `CONVERSATION_FEEDBACK` here, taken about the
        level c of steered texts (`STEERED_LEVEL`), where the push is what it was: u_k = (s mu_k - f y_k - g (y_k - c s
        mu_k)) K_k v_k for y_k = w_k . z_k - offset_k and the share f + g. That is the law of a controller with this
        share and 1 + g c times the mu_k. A concept with as much feedback stays as it is. docs/comparison.md has what
        this does.
        """
        if min(self.shares) >= CONVERSATION_FEEDBACK:
            return self
        return Controller.combine(*(one._with_feedback(CONVERSATION_FEEDBACK) for one in self.split()))

    def _with_feedback(self, least: float) -> Controller:
        """The same, of one concept, with at least this share of the feedback."""
        (share,) = self.shares
        if share >= least:
            return self
        more = np.float32(least / share)
        return replace(
            self,
            gain=self.gain * more,
            setpoint=self.setpoint * np.float32(1 + STEERED_LEVEL * (least - share)) / more,
            feedback=(least,),
            checked_error=self.checked_error / more if self.checked_error is not None else None,
        )

    def split(self) -> list[Controller]:
        """A controller for each concept alone; `combine` undoes it."""
        uncoupled = self._uncoupled_gain()
        return [
            replace(
                self,
                direction=self.direction[:, :, [i]],
                gain=uncoupled[:, :, [i]],
                readout=self.readout[:, :, [i]] if self.readout is not None else None,
                setpoint=self.setpoint[:, [i]],
                offset=self.offset[:, [i]],
                output_direction=self.output_direction[:, [i]],
                concepts=(name,),
                feedback=self.feedback[i : i + 1],
                push=self.push[i : i + 1],
                prompt_counts=(self.prompt_counts[i],),
                checked_error=self.checked_error[:, [i]] if self.checked_error is not None else None,
                checked_push=self.checked_push[:, [i]] if self.checked_push is not None else None,
                strength=self.strength[i : i + 1] if self.strength is not None else None,
                calibration=self.calibration[i : i + 1],
            )
            for i, name in enumerate(self.concepts)
        ]

    def _uncoupled_gain(self) -> Float32:
        """The columns K_k v_k, recovered from G_k = K_k V_k (W_k' V_k)^-1 over the concepts active at each layer."""
        gain = np.zeros_like(self.gain)
        for k in self.active_layers:
            active = _active(self.direction[k], self.gain[k])
            V, W = (vectors[k][:, active].astype(np.float64) for vectors in (self.direction, self.sensor))
            gain[k][:, active] = self.gain[k][:, active] @ (W.T @ V)
        return gain


def compile(
    gains: Gains,
    contrast: Contrast,
    concept: str = "concept",
    *,
    positions: Positions = "last",
    setpoint: Setpoint = "centred",
    readout: Readout = "discriminant",
    feedback: float = FEEDBACK,
) -> Controller:
    """Reduce gains and a contrast to a controller: v_k, g_k = K_k v_k and the linear feature setpoint (`Setpoint`).

    Args:
        gains, contrast: of one model.
        concept, positions, setpoint, readout, feedback: as in `fit`.

    Raises:
        InputError: gains and contrast of different models.
    """
    sizes = len(contrast.direction), contrast.direction.shape[1]
    if (len(gains), len(gains[0])) != sizes or gains.fingerprint != contrast.fingerprint:
        raise InputError("the gains and the contrast are of different models: make both with the same one")
    unit = contrast.unit_direction
    pushes = np.stack([gains.apply(k, v) for k, v in enumerate(unit)])
    weights, prompts = gains.weights, gains.jacobian_prompts
    return assemble(
        contrast, pushes, weights, prompts, concept, positions, "state", setpoint, readout, feedback, "free"
    )


def assemble(
    contrast: Contrast,
    gain_direction: np.ndarray,
    weights: Weights,
    jacobian_prompts: int,
    concept: str,
    positions: Positions,
    cost: Cost,
    setpoint: Setpoint,
    readout: Readout,
    feedback: float,
    push: Push,
) -> Controller:
    """A controller of one concept from g_k = K_k v_k (T, d) (zero at layers without control)."""
    check_feedback(feedback)
    check_choice("positions", positions, Positions)
    check_choice("setpoint", setpoint, Setpoint)
    check_choice("readout", readout, Readout)
    if not np.all(np.isfinite(gain_direction)):
        layer = int(np.argwhere(~np.isfinite(gain_direction))[0, 0])
        raise InputError(f"the gain at layer {layer} is not finite: raise r or lower q")
    magnitude, unit = contrast.magnitude, contrast.unit_direction
    read = contrast.discriminant if readout == "discriminant" else None
    level = np.einsum("kd,kd->k", unit if read is None else read, contrast.mean_negative)
    return Controller(
        direction=unit[:, :, None],
        gain=(feedback * gain_direction).astype(np.float32)[:, :, None],
        setpoint=(magnitude / feedback)[:, None].astype(np.float32),
        offset=(level if setpoint == "centred" else np.zeros_like(level))[:, None],
        output_direction=contrast.output_direction[:, None],
        readout=None if read is None else read[:, :, None],
        concepts=(concept,),
        model_name=contrast.model_name,
        fingerprint=contrast.fingerprint,
        weights=weights,
        positions=positions,
        feedback=(feedback,),
        push=(push,),
        prompt_counts=(contrast.prompt_counts,),
        jacobian_prompts=jacobian_prompts,
        cost=cost,
    )


def check_feedback(feedback: float) -> None:
    """Raise `InputError` unless this is a share of the feedback."""
    if not 0 < feedback <= 1:
        raise InputError(f"feedback must be above 0 and at most 1, the whole feedback, not {feedback!r}")


def _feedback(entries: Entries, concepts: int) -> tuple[float, ...]:
    """The share of each concept; all of it in files from before there was one."""
    shares = entries.numbers("feedback") if "feedback" in entries else (1.0,) * concepts
    if len(shares) != concepts or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"feedback is {list(shares)}")
    return shares


def _pushes(entries: Entries, concepts: int) -> tuple[Push, ...]:
    """Where each concept's gain pushes; anywhere in files from before there was a choice."""
    if "push" not in entries:
        return ()
    return tuple("concept" if one == "concept" else "free" for one in entries.choices("push", get_args(Push), concepts))


class Fitted(Protocol):
    """What was fitted on one model."""

    @property
    def model_name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...


def check_fitted_on(
    fitted: Fitted, name: str, fingerprint: str, num_layers: int, hidden_size: int, what: str = "this controller"
) -> None:
    """Raise `InputError` unless `fitted` belongs to the model of this name, fingerprint and size."""
    if (fitted.num_layers, fitted.hidden_size) != (num_layers, hidden_size) or fitted.fingerprint != fingerprint:
        raise InputError(
            f"{what} was fitted on {fitted.model_name} ({fitted.num_layers} layers of width {fitted.hidden_size}), "
            f"not on {name} ({num_layers} layers of width {hidden_size}): {_way_out(fitted.model_name, name)}"
        )


def _way_out(fitted_on: str, name: str) -> str:
    """What helps where a controller was fitted on the first model and is to run on the second."""
    if ADAPTED in fitted_on and fitted_on == name:
        return "the adapter is another one now, fit one with it"
    if ADAPTED in fitted_on:
        return "fit one on it, or load the model with that adapter (--adapter)"
    return "fit one on it, or load the model without the adapter" if ADAPTED in name else "fit one on it"


def check_choice(name: str, value: object, kind: Any) -> None:
    """Raise `InputError` unless the option `name` has one of the values of the `Literal` type `kind`."""
    if value not in get_args(kind):
        raise InputError(f"{name} must be {' or '.join(map(repr, get_args(kind)))}, not {value!r}")


def _checked(regions: Sequence[Float32 | None], controllers: Sequence[Controller]) -> Float32 | None:
    """The regions of several controllers side by side, infinite for those without one; None where none has one."""
    if all(region is None for region in regions):
        return None
    pairs = zip(regions, controllers, strict=True)
    parts = [np.full_like(one.setpoint, np.inf) if region is None else region for region, one in pairs]
    return np.concatenate(parts, axis=1)


def _active(direction: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """(m,): which concepts are controlled at a layer."""
    return np.asarray((np.abs(direction).max(axis=0) > 0) & (np.abs(gain).max(axis=0) > 0))


def _couple(direction: Float32, sensor: Float32, uncoupled: Float32, concepts: Sequence[str]) -> Float32:
    """G_k = K_k V_k (W_k' V_k)^-1 from the columns K_k v_k, over the concepts active at each layer.

    A displacement V_k c is read as W_k' V_k c, so that the error alpha_k is taken to be the displacement
    -V_k (W_k' V_k)^-1 alpha_k.
    """
    gain = np.zeros_like(uncoupled)
    too_close: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for k in range(len(direction)):
        active = np.flatnonzero(_active(direction[k], uncoupled[k]))
        if not active.size:
            continue
        V, W = (vectors[k][:, active].astype(np.float64) for vectors in (direction, sensor))
        gram, read = V.T @ V, W.T @ V
        for i in range(len(active)):
            for j in range(i):
                told_apart = 1 - read[i, j] * read[j, i]  # det W'V of the two, sin^2 of their angle where W = V
                angle = float(np.degrees(np.arcsin(np.sqrt(min(max(min(told_apart, 1 - gram[i, j] ** 2), 0.0), 1.0)))))
                if angle < SMALLEST_ANGLE:
                    too_close.setdefault((int(active[j]), int(active[i])), []).append((k, angle))
        if not too_close:
            gain[k][:, active] = np.linalg.solve(read.T, uncoupled[k][:, active].astype(np.float64).T).T
    if too_close:
        (i, j), places = next(iter(too_close.items()))
        layers = ", ".join(str(k) for k, _ in places)
        raise InputError(
            f"{concepts[i]} and {concepts[j]} point the same way at layers {layers} "
            f"({min(angle for _, angle in places):.1f} degrees apart): leave one out, or fit them at other layers"
        )
    return gain
