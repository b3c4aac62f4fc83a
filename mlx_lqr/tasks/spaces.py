"""What `tune` searches through: the options of A-LQR, and of each method that it is compared with.

The first value of an option is a good start (for A-LQR what `fit` takes where nothing is said), and the order of the
options that in which they have mattered on SmolLM2: where to steer, then how hard, then the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mlx_lqr.backends.protocol import Differentiable
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.contrast import Contrast
from mlx_lqr.lqr.controller import Controller, Positions
from mlx_lqr.lqr.fit import solve_controller
from mlx_lqr.lqr.layers import check_layers, choose_layers
from mlx_lqr.lqr.linearize import Jacobians
from mlx_lqr.lqr.prompts import Prompt
from mlx_lqr.methods.baseline import METHODS, Baseline, MethodName
from mlx_lqr.methods.fitting import MIDDLE_ALONE, fit_baseline
from mlx_lqr.tasks.records import digest
from mlx_lqr.tasks.search import Options
from mlx_lqr.tasks.tuning import Candidate, Space

STRENGTHS = (0.0, 6.0)
"""Of A-LQR: a useful strength is mostly between 1 and 4."""
_STRENGTHS: Mapping[MethodName, tuple[float, float]] = {
    "actadd": (0.0, 10.0),
    "proportional": (0.0, 8.0),
    "ablation": (0.0, 1.5),
    "spid": (0.0, 8.0),
    "mean-act": (0.0, 4.0),
    "linear-act": (0.0, 2.0),
    "pid-act": (0.0, 4.0),
    "iti": (0.0, 15.0),
    "odesteer": (0.0, 10.0),
    "angular": (110.0, 5.0),
    "adaptive-angular": (110.0, 5.0),
}


def alqr_space(
    model: Differentiable,
    contrast: Contrast,
    jacobians: Jacobians,
    *,
    concept: str = "concept",
    positions: Positions = "last",
    strengths: tuple[float, float] = STRENGTHS,
) -> Space:
    """A-LQR: layers, q/r, setpoint, cost and qf/r. A candidate costs a Riccati sweep.

    Args:
        model: what `load` returned.
        contrast, jacobians: of this model; they serve all candidates.
        concept, positions: see `fit`.
        strengths: from no steering to the strongest; the other way round for the opposite of the concept.

    Raises:
        InputError: a contrast or Jacobians of another model.
    """
    if not contrast.fingerprint == jacobians.fingerprint == model.fingerprint:
        raise InputError(f"contrast and Jacobians are not of {model.name}: make them with this model")
    T = model.num_layers
    layers = _ranges({"last third": range(2 * T // 3, T), "all": range(T)}, T)
    if contrast.std is not None:
        layers = _ranges({"auto": choose_layers("auto", contrast)}, T) | layers
    factors: dict[str, list[Any]] = {
        "layers": _distinct(layers),
        "q": [3.0, 1.0, 0.3],
        "setpoint": ["centred", "paper"],
        "cost": ["state", "feature", "adaptive"],
        "qf/q": [1.0, 10.0, 0.1],
    }

    def candidate(options: Options) -> Candidate:
        def fit() -> Controller:
            return solve_controller(
                contrast,
                jacobians,
                concept=concept,
                q=options["q"],
                qf=options["q"] * options["qf/q"],
                layers=layers[options["layers"]],
                cost=options["cost"],
                setpoint=options["setpoint"],
                positions=positions,
                algebra=model.algebra,
            )

        return Candidate(_name(options), options, fit, strengths)

    made = {"contrast": digest(contrast.direction.tolist()), "jacobians": digest(_sample(jacobians))}
    settings = {"method": "alqr", "concept": concept, "positions": positions, "strengths": list(strengths), **made}
    return Space(factors, candidate, settings)


def baseline_space(
    model: Differentiable,
    method: MethodName,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    concept: str = "concept",
    positions: Positions | None = None,
    strengths: tuple[float, float] | None = None,
) -> Space:
    """One of the methods that A-LQR is compared with: its layers, and the options of its own.

    Args:
        model: what `load` returned.
        method, positive, negative, concept, positions: see `fit_baseline`.
        strengths: see `alqr_space`; by default what is sensible for the method.

    Raises:
        InputError: no such method.
    """
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}: choose one of {', '.join(METHODS)}")
    T = model.num_layers
    chosen = strengths or _STRENGTHS[method]
    factors, layers = _baseline_factors(method, T)
    if len(positive) + len(negative) < 3:  # too few for what separates them
        factors = {name: [value for value in values if value != "auto"] for name, values in factors.items()}

    def candidate(options: Options) -> Candidate:
        def fit() -> Baseline:
            return fit_baseline(
                model,
                method,
                positive,
                negative,
                concept=concept,
                layers="auto" if options.get("layers") == "auto" else layers.get(options.get("layers", "")),
                positions=positions,
                source_layer=options.get("source_layer"),
                incremental=options.get("incremental", True),
                numbers={name: options[name] for name in METHODS[method].numbers if name in options},
            )

        return Candidate(_name(options) or method, options, fit, chosen)

    settings = {"method": method, "concept": concept, "positions": positions, "strengths": list(chosen)}
    return Space(factors, candidate, {**settings, "prompts": digest([list(positive), list(negative)])})


def _baseline_factors(method: MethodName, T: int) -> tuple[dict[str, list[Any]], dict[str, tuple[int, ...]]]:
    """The factors of a method, and the layers that their names stand for."""
    single = _ranges({"middle": [T // 2], "two thirds": [2 * T // 3], "a third": [T // 3]}, T)
    several = _ranges({"last third": range(2 * T // 3, T), "all": range(T)}, T)
    if method in MIDDLE_ALONE:
        return {"layers": [*_distinct(single), "auto"]}, single
    if method == "ablation":
        return {"source_layer": list(dict.fromkeys([3 * T // 5, T // 2, 2 * T // 5, 4 * T // 5]))}, {}
    if method == "iti":
        return {"layers": list(reversed(_distinct(several)))}, several
    if method in ("proportional", "spid"):
        factors: dict[str, list[Any]] = {"layers": ["auto", *_distinct(several)]}
        if method == "proportional":
            return {**factors, "kp": [0.3, 1.0, 0.15]}, several
        return {**factors, "kp": [0.5, 0.2, 1.0], "ki": [0.05, 0.0], "kd": [0.01, 0.0]}, several
    factors = {"layers": [*reversed(_distinct(several)), "auto"], "incremental": [True, False]}
    if method == "pid-act":
        factors |= {"kp": [1.0, 0.5], "ki": [0.05, 0.0], "kd": [0.01, 0.0]}
    return factors, several


def _ranges(named: Mapping[str, Iterable[int]], T: int) -> dict[str, tuple[int, ...]]:
    return {name: check_layers(layers, T) for name, layers in named.items()}


def _distinct(layers: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The names, without those that stand for the same layers as one before."""
    first = {own: name for name, own in reversed(list(layers.items()))}
    return [name for name, own in layers.items() if first[own] == name]


def _name(options: Options) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in options.items()
    )


def _sample(jacobians: Jacobians) -> list[Any]:
    """A little of the Jacobians, which tells them from others."""
    return [jacobians.prompt_count, np.asarray(jacobians[len(jacobians) - 1])[0].tolist()]
