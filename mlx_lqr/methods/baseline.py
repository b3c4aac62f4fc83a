"""Fitted steering of the methods that A-LQR is compared with, in one kind of file: a few vectors per layer.

What a method keeps is a row of the table `METHODS`; fitting.py makes it and laws/baselines.py acts upon it. Layer k of
a tensor belongs to block k, and what is added there goes to the block's output z_{k+1} (ITI's to its attention's).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata as distribution
from os import PathLike
from typing import Literal

import numpy as np

from mlx_lqr.backends.protocol import Float32, Runner
from mlx_lqr.concepts import bundled_concepts
from mlx_lqr.errors import InputError
from mlx_lqr.files.atomic import writing
from mlx_lqr.files.tensors import check_finite, check_shape, read_format, read_tensors, write_tensors
from mlx_lqr.lqr.controller import Controller, Positions, check_choice, check_fitted_on
from mlx_lqr.lqr.strength import Strengths, combined_strength, read_strength, strength_metadata

FORMAT = "mlx-lqr baseline 1"

MethodName = Literal[
    "actadd",
    "proportional",
    "ablation",
    "spid",
    "mean-act",
    "linear-act",
    "pid-act",
    "iti",
    "odesteer",
    "angular",
    "adaptive-angular",
]


@dataclass(frozen=True)
class Method:
    """What a method is called and what it keeps."""

    title: str
    tensors: Mapping[str, str]
    """Their axes: T layers, width d, m concepts, H attention heads a layer, n prompts."""
    numbers: Mapping[str, float]
    """The method's own numbers and what they are where nothing is said."""
    positions: Positions
    """Where its paper steers."""

    @property
    def additive(self) -> bool:
        """Whether it does nothing but add vectors, so that several concepts are a sum."""
        return all("m" in axes for axes in self.tensors.values())


_SHIFT = {"shift": "Tdm"}
_HEADS = {"attention_shift": "Tdm", "head_accuracy": "THm", "head_spread": "THm"}
_BARRIER = {"anchors": "nd", "weights": "n", "distance": "T"}
_SETPOINT = {"direction": "Td", "setpoint": "T"}
_PID = {"kp": 0.5, "ki": 0.05, "kd": 0.01}

METHODS: Mapping[MethodName, Method] = {
    "actadd": Method("ActAdd / CAA", _SHIFT, {}, "last"),
    "proportional": Method("proportional feedback (ActAdd with the setpoint)", _SETPOINT, {"kp": 1.0}, "last"),
    "ablation": Method("directional ablation", {"direction": "Td"}, {}, "all"),
    "spid": Method("S-PID", {**_SETPOINT, "kept": "T"}, _PID, "last"),
    "mean-act": Method("Mean-AcT", _SHIFT, {}, "all"),
    "linear-act": Method("Linear-AcT", {"scale": "Td", "shift": "Td"}, {}, "all"),
    "pid-act": Method("PID-AcT", _SHIFT, {"kp": 1.0, "ki": 0.05, "kd": 0.01}, "all"),
    "iti": Method("ITI", _HEADS, {}, "last"),
    "odesteer": Method("ODESteer", _BARRIER, {}, "last"),
    "angular": Method("angular steering", {"plane": "d2"}, {}, "all"),
    "adaptive-angular": Method("adaptive angular steering", {"plane": "d2"}, {}, "all"),
}


def known_method(name: str) -> MethodName | None:
    """The method of this name, None where there is none."""
    return next((known for known in METHODS if known == name), None)


@dataclass(frozen=True, eq=False)
class Baseline:
    """Steering of one of `METHODS`, fitted on a model of T blocks of width d. All tensors are float32.

    Raises:
        InputError: no such method, or numbers, layers and positions that do not go together.
    """

    method: MethodName
    tensors: Mapping[str, Float32]
    """What the method keeps (see `METHODS`), zero at layers where it does nothing."""
    numbers: Mapping[str, float]
    active_layers: tuple[int, ...]
    """The blocks whose output, or whose attention's, it changes."""
    concepts: tuple[str, ...]
    positions: Positions
    model_name: str
    fingerprint: str
    num_layers: int
    hidden_size: int
    prompt_counts: tuple[tuple[int, int], ...]
    """Positive and negative prompts of each concept."""
    library_version: str = distribution.version("mlx-lqr")
    strength: Strengths | None = None
    """The strength recommended for each concept, which steers where no other is asked for."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"there is no method {self.method!r}: choose one of {', '.join(METHODS)}")
        check_choice("positions", self.positions, Positions)
        for name, number in self.numbers.items():
            if not np.isfinite(number):
                raise InputError(f"{name} must be a finite number, not {number!r}")
        if self.carries and self.positions == "all":
            raise InputError(
                "the derivative of S-PID goes from one token to the next, while a prompt's tokens are run together: "
                "use positions 'last', or kd = 0"
            )

    @property
    def carries(self) -> bool:
        """Whether what is done at a token depends on what was done at the one before."""
        return self.method == "spid" and self.numbers["kd"] != 0

    def save(self, path: str | PathLike[str], *, force: bool = False) -> None:
        """Write one safetensors file, atomically; with `force` in place of a file of any kind."""
        metadata = {
            "format": FORMAT,
            "method": self.method,
            "model": self.model_name,
            "fingerprint": self.fingerprint,
            "T": str(self.num_layers),
            "d": str(self.hidden_size),
            "numbers": json.dumps(dict(self.numbers)),
            "layers": json.dumps(self.active_layers),
            "positions": self.positions,
            "concepts": json.dumps(self.concepts),
            "prompt_counts": json.dumps(self.prompt_counts),
            "library_version": self.library_version,
            **strength_metadata(self.strength),
        }
        with writing(path, kind="controller", force=force) as temporary:
            write_tensors(temporary, self.tensors, metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Baseline:
        """Read and check a file that `save` wrote.

        Raises:
            InputError: missing, damaged, of another format, or with tensors of wrong shapes or values that are not
            finite.
        """
        tensors, metadata = read_tensors(path, FORMAT, "steering of a baseline method")
        try:
            name = known_method(metadata["method"])
            if name is None:
                raise ValueError(f"method {metadata['method']!r}")
            method = METHODS[name]
            concepts = tuple(str(concept) for concept in json.loads(metadata["concepts"]))
            sizes = {"T": int(metadata["T"]), "d": int(metadata["d"]), "m": len(concepts), "2": 2}
            layers = tuple(int(k) for k in json.loads(metadata["layers"]))
            numbers = {key: float(number) for key, number in json.loads(metadata["numbers"]).items()}
            if numbers.keys() != method.numbers.keys() or not all(0 <= k < sizes["T"] for k in layers):
                raise ValueError("its numbers or layers are not those of its method and model")
            if not concepts or (len(concepts) > 1 and not method.additive):
                raise ValueError(f"{len(concepts)} concepts")
            sizes["H"] = tensors["head_accuracy"].shape[-2] if "head_accuracy" in method.tensors else 0
            sizes["n"] = tensors["weights"].shape[0] if "weights" in method.tensors else 0
            for tensor, axes in method.tensors.items():
                check_shape(tensor, tensors[tensor], axes, sizes)
                check_finite(tensor, tensors[tensor])
            return cls(
                method=name,
                tensors={tensor: tensors[tensor].astype(np.float32, copy=False) for tensor in method.tensors},
                numbers=numbers,
                active_layers=layers,
                concepts=concepts,
                positions="all" if metadata["positions"] == "all" else "last",
                model_name=metadata["model"],
                fingerprint=metadata["fingerprint"],
                num_layers=sizes["T"],
                hidden_size=sizes["d"],
                prompt_counts=tuple((int(p), int(n)) for p, n in json.loads(metadata["prompt_counts"])),
                library_version=metadata["library_version"],
                strength=read_strength(metadata, len(concepts)),
            )
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"{path} is a damaged file of a baseline method ({error}): fit it again") from error

    def check_model(self, model: Runner) -> None:
        """Raise `InputError` unless this was fitted on `model`."""
        check_fitted_on(self, model.name, model.fingerprint, model.num_layers, model.hidden_size, "this")

    def split(self) -> list[Baseline]:
        """One for each concept alone; `combine` undoes it."""
        if len(self.concepts) == 1:
            return [self]
        return [
            replace(
                self,
                tensors={tensor: part[..., [i]] for tensor, part in self.tensors.items()},
                concepts=(concept,),
                prompt_counts=(self.prompt_counts[i],),
                strength=self.strength[i : i + 1] if self.strength is not None else None,
            )
            for i, concept in enumerate(self.concepts)
        ]


Steering = Controller | Baseline
"""Whatever can steer: `law_of` makes a law of it."""


def load_steering(path: str | PathLike[str], model: str = "MODEL") -> Steering:
    """Read a controller, or the steering of any other method, whichever the file holds.

    Args:
        path: the file.
        model: what the model is called where a command to fit one is named.

    Raises:
        InputError: see `Controller.load` and `Baseline.load`; or the name of a bundled concept instead of a file.
    """
    name = os.fspath(path)
    if name in bundled_concepts() and not os.path.exists(name):
        file = f"{name}.safetensors"
        if os.path.exists(file):
            raise InputError(f"{name} is a bundled concept and no file: did you mean {file}?")
        raise InputError(
            f"{name} is a bundled concept and no file: mlx-lqr fit {model} --concept {name} -o {file} makes one, then "
            f"steer with {file}"
        )
    return Baseline.load(path) if read_format(path).startswith("mlx-lqr baseline") else Controller.load(path)


def combine(steerings: Sequence[Steering]) -> Steering:
    """Several as one: controllers jointly (see `Controller.combine`), methods that only add vectors by adding.

    Raises:
        InputError: of different models, positions or methods, a concept twice, or a method of one concept alone.
    """
    first = steerings[0]
    if len(steerings) == 1:
        return first
    controllers = [steering for steering in steerings if isinstance(steering, Controller)]
    if len(controllers) == len(steerings):
        return Controller.combine(*controllers)
    baselines = [steering for steering in steerings if isinstance(steering, Baseline)]
    methods = sorted({steering.method for steering in baselines} | ({"alqr"} if controllers else set()))
    if len(methods) > 1 or not METHODS[baselines[0].method].additive:
        raise InputError(
            f"steering of the methods {', '.join(methods)} cannot be combined: use one file at a time"
            if len(methods) > 1
            else f"two files of the method {methods[0]} cannot be combined: use one at a time"
        )
    one = baselines[0]
    for other in baselines[1:]:
        if other.fingerprint != one.fingerprint:  # which the sizes are a part of
            raise InputError(f"steering fitted on {one.model_name} and on {other.model_name} cannot be combined")
        if other.positions != one.positions:
            raise InputError("steering for the positions 'last' and 'all' cannot be combined: fit them alike")
    concepts = tuple(concept for baseline in baselines for concept in baseline.concepts)
    if len(set(concepts)) < len(concepts):
        raise InputError(f"a concept appears twice among {', '.join(concepts)}: give each once, with one strength")
    return replace(
        one,
        tensors={
            name: np.concatenate([baseline.tensors[name] for baseline in baselines], axis=-1) for name in one.tensors
        },
        active_layers=tuple(sorted({k for baseline in baselines for k in baseline.active_layers})),
        concepts=concepts,
        prompt_counts=tuple(count for baseline in baselines for count in baseline.prompt_counts),
        strength=combined_strength(baselines),
    )
