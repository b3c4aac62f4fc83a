"""What a steering method is: a class that names it, lists its options, fits it and makes a law of what was fitted.

A method is one file of this folder and one line of registry.py. Commands, tuning, the comparison and the documentation
ask the class; none of them knows a method by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np

from mlx_lqr.backends.protocol import Progress, Recorder
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.controller import Positions, check_choice
from mlx_lqr.lqr.layers import Layers, check_layers
from mlx_lqr.lqr.prompts import Prompt, tokenise_sets

if TYPE_CHECKING:
    from mlx_lqr.lqr.contrast import Contrast
    from mlx_lqr.methods.law import AdjustableLaw
    from mlx_lqr.methods.steering import Steering

Fitted = TypeVar("Fitted", bound="Steering")
"""What a method fits: a `Controller`, or for most methods a `Baseline`."""
Compared = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""For each row of the comparison's tables its settings by name, each the keywords of `fit_baseline`."""
DefaultLayers = Literal["auto", "all", "middle"]
"""Where a method acts if nothing is said: where the prompts are told apart, at every block, or at the middle one."""


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    authors: str
    year: int
    arxiv: str
    name: str = ""
    """What its authors call it, where the method's title does not say so."""

    @property
    def markdown(self) -> str:
        link = f"[{self.authors} {self.year}](https://arxiv.org/abs/{self.arxiv})"
        return f"{self.name}, {link}" if self.name else link


@dataclass(frozen=True)
class Option:
    """Something that a method can be told: a keyword of `fit_baseline`, and --NAME on the command line."""

    name: str
    kind: type[bool] | type[int] | type[float] | tuple[str, ...] | Callable[[str], Any]
    """A type; the words to choose from; or a function that reads a file, for an option that names one."""
    default: Any
    help: str
    tries: Sequence[Any] | Callable[[int], Sequence[Any]] = ()
    """The values that tune tries, where it starts first; may depend on the model's number of blocks."""
    least: float | None = None
    """The smallest value allowed."""
    off: str = ""
    """For a bool that is on by default: the flag that turns it off."""
    kept: bool = False
    """Whether the file keeps it, for the law to use and `show` to print: a number, in `Baseline.numbers`."""

    def values_to_try(self, num_layers: int) -> list[Any]:
        """What tune tries, each value once."""
        return list(dict.fromkeys(self.tries(num_layers) if callable(self.tries) else self.tries))

    @property
    def reader(self) -> Callable[[str], Any] | None:
        """What reads the file that is named, for an option that names one."""
        return None if isinstance(self.kind, tuple) or self.kind in (bool, int, float) else self.kind

    def check(self, value: Any) -> None:
        """Raise `InputError` for a value that the option cannot have."""
        if isinstance(self.kind, tuple):
            if value not in self.kind:
                raise InputError(f"{self.name} must be {' or '.join(map(repr, self.kind))}, not {value!r}")
        elif self.kind is bool:
            if not isinstance(value, bool):
                raise InputError(f"{self.name} must be True or False, not {value!r}")
        elif self.kind in (int, float) and value is not None:
            if not (isinstance(value, int | float | np.number) and np.isfinite(value)):
                raise InputError(f"{self.name} must be a finite number, not {value!r}")
            if self.least is not None and value < self.least:
                raise InputError(f"{self.name} must be at least {self.least:g}, not {value!r}")


@dataclass(frozen=True)
class StrengthScale:
    """What the strengths of a method mean, and which are worth a try. 0 is not steered, whatever the method."""

    meaning: str
    """What strength 1 does, or what strength s is: the end of a sentence that begins with "strength"."""
    span: tuple[float, float]
    """What tune searches, from no steering to the strongest that is sensible, in whichever direction that is."""
    suggested: float = 1.0
    """What `fit` suggests for a first look."""
    beyond: float = 100.0
    """Strengths above it, of either sign, are warned of."""
    period: float | None = None
    """For an angle: how far it goes until it is the same again."""

    def warning(self, strength: float) -> str:
        """Why a strength beyond `beyond` is of no use."""
        if self.period is not None:
            return f"it is an angle in degrees, the same as {strength % self.period:g}"
        useful = max(10.0, *map(abs, self.span))
        return f"useful ones are mostly below {useful:g}, and what is far above them leaves no language"


@dataclass(frozen=True, eq=False)
class Problem:
    """What to fit: the model, the prompts with and without the concept, and where to act."""

    model: Recorder
    positive: Sequence[Sequence[int]]
    """Token ids of the prompts with the concept."""
    negative: Sequence[Sequence[int]]
    concept: str
    layers: tuple[int, ...] | Literal["auto"] | None
    """None is the method's default."""
    positions: Positions
    progress: Progress | None = None
    on_contrast: Callable[[Contrast], None] | None = None
    """Called with the contrast of the prompts, by methods that start from it."""


@dataclass(frozen=True)
class Column:
    """One column of the table of layers that `show` prints."""

    header: str
    width: int
    values: np.ndarray
    """(T,)"""


@dataclass(frozen=True)
class Shown:
    """What `show` tells about a file besides what it tells about every file."""

    numbers: Mapping[str, str]
    """What the law goes by: label -> text."""
    fitted: str
    """How it was fitted, before "by mlx-lqr VERSION"."""
    columns: Sequence[Column]
    title: str | None = None
    """The method's, where it is to be named."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """More: label -> text."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The same for --json."""
    lines: Sequence[str] = ()
    """Printed after the table."""


@dataclass(frozen=True)
class Prepared:
    """A problem of which all is computed that does not depend on layers and options, for tune to fit many times."""

    fit: Callable[[Layers, Mapping[str, Any]], Steering]
    positions: Positions | None
    auto: tuple[int, ...] | Literal["auto"] | None
    """What layers="auto" stands for: these, what each fit finds, or nothing, where there are too few prompts."""
    origins: Mapping[str, Any]
    """What all fits depend on, as JSON."""
    given: Mapping[str, Any]
    """Options that are the same in all fits and leave no trace in `origins`."""


class Method(ABC, Generic[Fitted]):
    """A steering method. A subclass says what is below, and defines `fit` and `law`."""

    name: str
    """As users write it: `fit --method NAME`."""
    title: str
    papers: Sequence[Paper] = ()
    formula: str
    """What becomes of y, a block's output, at strength s: Markdown, for the documentation's table."""
    options: Sequence[Option] = ()
    """In the order of how much they matter, which is the order in which tune varies them."""
    positions: Positions = "last"
    """Which tokens it steers by default: those that its paper steers."""
    layers: DefaultLayers = "all"
    layers_to_try: Sequence[str] = ("all", "last third", "auto")
    """Where tune lets it act, by the names of `tasks.spaces`, where it starts first; empty: as by default."""
    strengths: StrengthScale
    removes_only: bool = False
    """Whether it can take a concept away, and not bring it in."""

    @abstractmethod
    def fit(self, problem: Problem, options: Mapping[str, Any]) -> Fitted:
        """Fit the method.

        Args:
            options: a value for each of `options`, checked.

        Raises:
            InputError: prompts, layers or options with which it cannot be fitted.
        """

    @abstractmethod
    def law(self, steering: Fitted, strength: float | Sequence[float]) -> AdjustableLaw:
        """The law that steers with what was fitted, at a strength for all concepts or one for each."""

    @abstractmethod
    def combine(self, steerings: Sequence[Fitted]) -> Fitted:
        """Several concepts as one.

        Raises:
            InputError: they do not go together.
        """

    @abstractmethod
    def show(self, steering: Fitted) -> Shown:
        """What `show` prints."""

    def check(self, steering: Fitted) -> None:
        """Raise `InputError` for numbers, layers and positions that do not go together."""

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A value for each option: what is given, and the default where nothing is.

        Raises:
            InputError: an option of another method, or a value that an option cannot have.
        """
        own = {option.name: option for option in self.options}
        for name in given:
            if name not in own:
                raise InputError(f"{self.name} has no {name}: {belongs_to(name)}")
            own[name].check(given[name])
        return {name: given.get(name, option.default) for name, option in own.items()}

    def fit_prompts(
        self,
        model: Recorder,
        positive: Sequence[Prompt],
        negative: Sequence[Prompt],
        given: Mapping[str, Any],
        *,
        concept: str,
        layers: Layers = None,
        positions: Positions | None = None,
        progress: Progress | None = None,
        on_contrast: Callable[[Contrast], None] | None = None,
    ) -> Fitted:
        """Fit the method on prompts as they are written; see `fit_baseline`, and `Problem` for `on_contrast`."""
        options = self.complete(given)
        if positions is not None:
            check_choice("positions", positions, Positions)
        if layers is not None and not (isinstance(layers, str) and layers == "auto"):
            layers = check_layers(layers, model.num_layers)
        sets = tokenise_sets(model, positive, negative)
        problem = Problem(model, *sets, concept, layers, positions or self.positions, progress, on_contrast)
        return self.fit(problem, options)

    def factors(self, num_layers: int, given: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The values of each option that tune searches, and the one of each that is given."""
        searched = {option.name: option.values_to_try(num_layers) for option in self.options}
        return {name: [given[name]] if name in given else values for name, values in searched.items() if values}

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
        """A problem to be fitted with many options."""

        def fit(layers: Layers, options: Mapping[str, Any]) -> Steering:
            chosen = {**given, **options}
            return self.fit_prompts(
                model, positive, negative, chosen, concept=concept, layers=layers, positions=positions
            )

        enough = len(positive) + len(negative) > 2  # to tell what separates them from chance
        prompts = [list(positive), list(negative)]
        return Prepared(fit, positions, "auto" if enough else None, {"prompts": prompts}, given)

    def compared(self, num_layers: int) -> Compared:
        """What benchmarks/comparison measures; a setting may have `method` among its keywords, for another one."""
        return {self.name: {"defaults": {}}}


def belongs_to(option: str) -> str:
    """Which methods have an option of this name, in words."""
    from mlx_lqr.methods.registry import METHODS  # which imports this module

    having = [name for name, method in METHODS.items() if any(one.name == option for one in method.options)]
    return f"it belongs to {', '.join(having)}" if having else "leave it out"
