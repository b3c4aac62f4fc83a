"""What most methods fit: a few vectors for each layer, in one kind of file, and the law that is made of them.

Layer k of a tensor belongs to block k, and what is added there goes to the block's output z_{k+1}. A method whose file
this is derives from `BaselineMethod`, says which tensors it keeps, and has a law derived from `BaselineLaw`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata as distribution
from os import PathLike
from typing import Any, get_args

import numpy as np

from mlx_lqr.backends.protocol import Float32, Runner
from mlx_lqr.errors import InputError, first_line
from mlx_lqr.files.atomic import writing
from mlx_lqr.files.json_text import LAYERS, WIDTH, Entries
from mlx_lqr.files.tensors import check_finite, check_shape, read_tensors, write_tensors
from mlx_lqr.lqr.controller import Positions, check_choice, check_fitted_on
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
from mlx_lqr.methods.law import AdjustableLaw
from mlx_lqr.methods.method import Column, Method, Problem, Shown
from mlx_lqr.methods.registry import METHODS

FORMAT = "mlx-lqr baseline 1"


@dataclass(frozen=True, eq=False)
class Baseline:
    """Steering of one of `METHODS`, fitted on a model of T blocks of width d. All tensors are float32.

    Raises:
        InputError: no such method, or numbers, layers and positions that do not go together.
    """

    method: str
    tensors: Mapping[str, Float32]
    """What the method keeps (`BaselineMethod.tensors`), zero at layers where it does nothing."""
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
    calibration: Calibrations = ()
    """Of each concept, its strengths for the budgets; empty where none has any."""

    def __post_init__(self) -> None:
        method = METHODS[self.method]
        check_choice("positions", self.positions, Positions)
        for name, number in self.numbers.items():
            if not np.isfinite(number):
                raise InputError(f"{name} must be a finite number, not {number!r}")
        method.check(self)

    @property
    def adaptive(self) -> bool:
        """Whether it is recomputed for each prompt."""
        return False

    @property
    def checked(self) -> bool:
        """Whether it knows where its linear model is good: it has none."""
        return False

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All that the law is made of."""
        numbers = {name: np.asarray(number) for name, number in self.numbers.items()}
        return {**self.tensors, **numbers, "layers": np.array(self.active_layers)}

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
            **strength_metadata(self),
        }
        with writing(path, kind="controller", force=force) as temporary:
            write_tensors(temporary, self.tensors, metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Baseline:
        """Read and check a file that `save` wrote.

        Raises:
            InputError: missing, damaged, of another format, of a method that is not installed, or with tensors of wrong
            shapes or values that are not finite.
        """
        tensors, metadata = read_tensors(path, FORMAT, "steering of a baseline method")
        entries = Entries(metadata)
        try:
            name = entries.text("method")
            if name not in METHODS:
                raise InputError(
                    f"{path} is of the method {name!r}, which is not installed: install the package that adds it, or "
                    f"fit it again by one of {', '.join(METHODS)}"
                )
            method = METHODS[name]
            if not isinstance(method, BaselineMethod):
                raise ValueError(f"method {name!r}")
            concepts = entries.texts("concepts")
            sizes = {"T": entries.count("T", 1, LAYERS), "d": entries.count("d", 1, WIDTH), "m": len(concepts)}
            layers = entries.layers("layers", sizes["T"])
            numbers = entries.named_numbers("numbers")
            if numbers.keys() != method.numbers.keys():
                raise ValueError("its numbers are not those of its method")
            if len(concepts) > 1 and not method.additive:
                raise ValueError(f"{len(concepts)} concepts")
            for tensor, axes in method.tensors.items():
                check_shape(tensor, tensors[tensor], axes, _sizes(axes, tensors[tensor], sizes))
                check_finite(tensor, tensors[tensor])
            return cls(
                method=name,
                tensors={tensor: tensors[tensor].astype(np.float32, copy=False) for tensor in method.tensors},
                numbers=numbers,
                active_layers=layers,
                concepts=concepts,
                positions="all" if entries.one_of("positions", get_args(Positions)) == "all" else "last",
                model_name=entries.text("model"),
                fingerprint=entries.text("fingerprint"),
                num_layers=sizes["T"],
                hidden_size=sizes["d"],
                prompt_counts=entries.pairs("prompt_counts", len(concepts)),
                library_version=entries.text("library_version"),
                strength=read_strength(entries, len(concepts)),
                calibration=read_calibration(entries, len(concepts)),
            )
        except InputError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} is a damaged file of a baseline method ({first_line(error)}): fit it again"
            ) from error

    def check_model(self, model: Runner) -> None:
        """Raise `InputError` unless this was fitted on `model`."""
        method: BaselineMethod = METHODS[self.method]  # type: ignore[assignment]
        method.check_model(self, model)

    def recommending(self, strength: Strengths) -> Baseline:
        """The same with a recommended strength."""
        return replace(self, strength=strength)

    def calibrated(self, calibration: Calibration, budget: Budget = "normal") -> Baseline:
        """The same, of one concept, with its strength for each budget, one of which it recommends."""
        return replace(self, calibration=(calibration,), strength=calibrated_strength(self, calibration, budget))

    def strength_at(self, budget: Budget | None = None, times: float = 1.0) -> Strengths:
        """For each concept so many times the strength for a budget; without a budget, of the recommended strength.

        Raises:
            InputError: there is no recommended strength, or a concept was not calibrated.
        """
        return strength_at(self, budget, times)

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
                calibration=self.calibration[i : i + 1],
            )
            for i, concept in enumerate(self.concepts)
        ]


class BaselineLaw(AdjustableLaw):
    """What laws made of a `Baseline` have in common: its tensors and numbers.

    Args:
        steering: what was fitted.
        strength: for each concept, or one for all.
    """

    def __init__(self, steering: Baseline, strength: float | Sequence[float] = 1.0) -> None:
        for name, tensor in steering.tensors.items():
            if not np.all(np.isfinite(tensor)):
                raise InputError(f"the {name} has values that are not finite: fit it again")
        self._tensors, self._numbers = steering.tensors, steering.numbers
        scale = METHODS[steering.method].strengths
        super().__init__(steering.active_layers, len(steering.concepts), strength, scale)


class BaselineMethod(Method[Baseline]):
    """A method that fits a `Baseline`."""

    tensors: Mapping[str, str]
    """What is kept -> its axes, a letter each: T layers, width d, m concepts (last), a digit for that size, and any
    other letter for a size of the method's own, the same in all of its tensors."""

    @property
    def additive(self) -> bool:
        """Whether it does nothing but add vectors, so that several concepts are a sum."""
        return all("m" in axes for axes in self.tensors.values())

    @property
    def numbers(self) -> dict[str, float]:
        """The numbers that a file keeps, with their defaults."""
        return {option.name: option.default for option in self.options if option.kept}

    def check_model(self, steering: Baseline, model: Runner) -> None:
        """Raise `InputError` unless it was fitted on `model`."""
        sizes = model.num_layers, model.hidden_size
        check_fitted_on(steering, model.name, model.fingerprint, *sizes, "this")

    def blank(self, problem: Problem, options: Mapping[str, Any]) -> Baseline:
        """Steering of this method before anything is fitted."""
        return Baseline(
            method=self.name,
            tensors={},
            numbers={name: options[name] for name in self.numbers},
            active_layers=(),
            concepts=(problem.concept,),
            positions=problem.positions,
            model_name=problem.model.name,
            fingerprint=problem.model.fingerprint,
            num_layers=problem.model.num_layers,
            hidden_size=problem.model.hidden_size,
            prompt_counts=((len(problem.positive), len(problem.negative)),),
        )

    def combine(self, steerings: Sequence[Baseline]) -> Baseline:
        """The sum of several, for methods that do nothing but add vectors."""
        if not self.additive:
            raise InputError(f"two files of the method {self.name} cannot be combined: use one at a time")
        first = steerings[0]
        for other in steerings[1:]:
            if other.fingerprint != first.fingerprint:  # which the sizes are a part of
                raise InputError(f"steering fitted on {first.model_name} and on {other.model_name} cannot be combined")
            if other.positions != first.positions:
                raise InputError("steering for the positions 'last' and 'all' cannot be combined: fit them alike")
        concepts = tuple(concept for steering in steerings for concept in steering.concepts)
        if len(set(concepts)) < len(concepts):
            raise InputError(f"a concept appears twice among {', '.join(concepts)}: give each once, with one strength")
        return replace(
            first,
            tensors={name: np.concatenate([one.tensors[name] for one in steerings], axis=-1) for name in first.tensors},
            active_layers=tuple(sorted({k for one in steerings for k in one.active_layers})),
            concepts=concepts,
            prompt_counts=tuple(count for one in steerings for count in one.prompt_counts),
            strength=combined_strength(steerings),
            calibration=combined_calibration(steerings),
        )

    def show(self, steering: Baseline) -> Shown:
        """The length of what is kept for each layer, tensor by tensor."""
        layered = {name: steering.tensors[name] for name, axes in self.tensors.items() if axes in ("T", "Td", "Tdm")}
        norms = {name: np.linalg.norm(part.reshape(len(part), -1), axis=1) for name, part in layered.items()}
        gains = ", ".join(f"{name} = {number:g}" for name, number in steering.numbers.items())
        return Shown(
            title=self.title,
            numbers={"gains": gains} if gains else {},
            fitted="fitted",
            columns=[Column(f"|{name}|", max(13, len(name) + 4), norm) for name, norm in norms.items()],
            fields={
                "numbers": dict(steering.numbers),
                "norms": {name: norm.tolist() for name, norm in norms.items()},
            },
        )


def _sizes(axes: str, tensor: np.ndarray, sizes: dict[str, int]) -> dict[str, int]:
    """`sizes` with those of `axes`: digits as they are, and a letter met for the first time as this tensor has it."""
    for axis, size in zip(axes, tensor.shape, strict=False):
        sizes.setdefault(axis, int(axis) if axis.isdigit() else size)
    return sizes
