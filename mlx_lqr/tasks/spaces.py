"""What `tune` searches through: where a method acts, and the options that it says are worth a search.

The order of a method's options is that in which they have mattered on SmolLM2: where to steer, then how hard, then the
rest. The first value of each is a good start. What is given is held fixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlx_lqr.backends.protocol import Differentiable, Progress, Recorder
from mlx_lqr.lqr.contrast import Contrast
from mlx_lqr.lqr.controller import Positions
from mlx_lqr.lqr.layers import Layers, check_layers
from mlx_lqr.lqr.linearize import Jacobians
from mlx_lqr.lqr.prompts import Prompt
from mlx_lqr.methods.alqr import ALQR, prepared
from mlx_lqr.methods.method import Method, Prepared
from mlx_lqr.methods.registry import METHODS
from mlx_lqr.methods.steering import Steering
from mlx_lqr.tasks.records import digest
from mlx_lqr.tasks.search import FIRST_DOSE, Values
from mlx_lqr.tasks.tuning import Candidate, Space


def alqr_space(
    model: Differentiable,
    contrast: Contrast,
    jacobians: Jacobians,
    *,
    concept: str = "concept",
    positions: Positions = "last",
    strengths: tuple[float, float] = ALQR.strengths.span,
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
    fits = prepared(model, contrast, jacobians, {}, concept=concept, positions=positions)
    return _space(METHODS[ALQR.name], fits, model.num_layers, None, concept, strengths)


def baseline_space(
    model: Recorder,
    method: str,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    concept: str = "concept",
    layers: Layers = None,
    positions: Positions | None = None,
    options: Mapping[str, Any] | None = None,
    strengths: tuple[float, float] | None = None,
    progress: Progress | None = None,
) -> Space:
    """Any of `METHODS`: its layers, and the options of its own.

    Args:
        model: what `load` returned.
        method, positive, negative, concept, positions, progress: see `fit_baseline`.
        layers, options: what is held fixed and not searched.
        strengths: see `alqr_space`; by default what is sensible for the method.

    Raises:
        InputError: no such method, or an option that it does not have.
    """
    chosen, given = METHODS[method], dict(options or {})
    chosen.complete(given)
    fits = chosen.prepare(model, positive, negative, given, concept=concept, positions=positions, progress=progress)
    return _space(chosen, fits, model.num_layers, layers, concept, strengths or chosen.strengths.span)


def _space(
    method: Method[Any],
    fits: Prepared,
    num_layers: int,
    layers: Layers,
    concept: str,
    strengths: tuple[float, float],
) -> Space:
    """The candidates of a problem that is prepared."""
    places = _places(method, fits, num_layers) if layers is None else _place(layers, num_layers)
    factors: dict[str, list[Any]] = {"layers": list(places)} if places else {}
    factors |= method.factors(num_layers, fits.given)

    def candidate(values: Values) -> Candidate:
        own = {name: value for name, value in values.items() if name != "layers"}

        def fit() -> Steering:
            return fits.fit(places[values["layers"]] if places else None, own)

        return Candidate(_name(values) or method.name, values, fit, strengths)

    fixed = {name: value for name, value in fits.given.items() if name not in factors}
    settings = {
        "method": method.name,
        "concept": concept,
        "positions": fits.positions,
        "strengths": list(strengths),
        **{name: digest(origin) for name, origin in fits.origins.items()},
        **({"fixed": fixed} if fixed else {}),
    }
    return Space(factors, candidate, settings, _first_dose(method, strengths))


def _first_dose(method: Method[Any], strengths: tuple[float, float]) -> float:
    """Where between these strengths, on whichever side of 0, the one is that `fit` suggests for a first look."""
    mild, strong = strengths
    way = strong - mild
    dose = (math.copysign(method.strengths.suggested, way) - mild) / way if way else 0.0
    return dose if 0 < dose <= 1 else FIRST_DOSE


def _places(method: Method[Any], fits: Prepared, T: int) -> dict[str, Layers]:
    """The layers that a method tries, by name, without those that are the same as some before."""
    known: dict[str, Layers] = {
        "auto": fits.auto,
        "all": tuple(range(T)),
        "last third": check_layers(range(2 * T // 3, T), T),
        "middle third": check_layers(range(T // 3, 2 * T // 3) or (T // 3,), T),
        "middle": (T // 2,),
        "two thirds": (2 * T // 3,),
        "a third": (T // 3,),
    }
    places: dict[str, Layers] = {}
    for name in method.layers_to_try:
        if known[name] is not None and known[name] not in places.values():
            places[name] = known[name]
    return places


def _place(layers: Iterable[int] | str, T: int) -> dict[str, Layers]:
    """The layers that are given, by a name that can be read in a table."""
    if isinstance(layers, str) and layers == "auto":
        return {"auto": "auto"}
    chosen = check_layers(layers, T)
    single = ",".join(map(str, chosen))
    in_a_row = chosen == tuple(range(chosen[0], chosen[-1] + 1)) and len(chosen) > 1
    return {f"{chosen[0]}-{chosen[-1]}" if in_a_row else single: chosen}


def _name(values: Values) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )
