"""What steers a chat: controllers, their strengths, and what was turned off to come back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mlx_lqr.backends.protocol import Runner
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.strength import default_strength
from mlx_lqr.methods.law import check_strength
from mlx_lqr.methods.steering import Steering, combine
from mlx_lqr.runtime.generate import Strength


@dataclass
class ChatSteering:
    """The controllers in force for a model, and those that `off` has put aside."""

    model: Runner
    _controllers: list[Steering] = field(default_factory=list, init=False, repr=False)
    """Replaced, never changed in place: the same list object means the same controllers."""
    _strengths: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    _resting: list[Steering] = field(default_factory=list, init=False, repr=False)
    """What `off` has put aside."""
    _resting_strengths: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    @property
    def strengths(self) -> dict[str, float]:
        """The strength of every concept in force."""
        return dict(self._strengths)

    @property
    def resting(self) -> dict[str, float]:
        """The strength of every concept that `off` has put aside, which `on` gives it again."""
        return dict(self._resting_strengths)

    @property
    def controller(self) -> Steering | None:
        """All that steers, combined into one controller, or one steering of another method."""
        return combine(self._controllers) if self._controllers else None

    def add(self, controller: Steering, strength: Strength = None) -> None:
        """Steer with one more controller from the next answer on. It replaces any other controller of its concepts.

        Args:
            strength: one number, or one for each concept; by default the recommended strength, or 1.

        Raises:
            InputError: the controller is of another model or cannot be combined with the others, which stay as they
                are.
        """
        controller.check_model(self.model)
        chosen = default_strength(controller) if strength is None else strength
        strengths = check_strength(chosen, len(controller.concepts))
        kept = [c for c in self._controllers if not set(c.concepts) & set(controller.concepts)]
        combine([*kept, controller])
        self._steer_with([*kept, controller], dict(zip(controller.concepts, strengths, strict=True)))
        for concept in controller.concepts:
            self._rest(_taken_out(self._resting, concept)[1])

    def off(self, concept: str | None = None) -> None:
        """Stop steering from the next answer on, or stop steering towards one concept, until `on`.

        Raises:
            InputError: the concept is not loaded.
        """
        before = self._strengths
        taken, kept = self._controllers, list[Steering]()
        if concept is not None:
            self._check_loaded(concept)
            taken, kept = _taken_out(self._controllers, concept)
        self._steer_with(kept, {})
        self._rest([*self._resting, *taken], before)

    def on(self, concept: str | None = None) -> None:
        """Steer again with what `off` has put aside, or with one concept of it, at the strengths of then.

        Raises:
            InputError: nothing is put aside, or not this concept.
        """
        if not self._resting:
            raise InputError("nothing was turned off: /add FILE steers with a controller")
        if concept not in (None, *self._resting_strengths):
            raise InputError(f"no concept {concept!r} is off: {', '.join(self._resting_strengths)}")
        for controller in self._resting if concept is None else _taken_out(self._resting, concept)[0]:
            self.add(controller, [self._resting_strengths[name] for name in controller.concepts])

    def unload(self) -> None:
        """Steer no more, and forget what steered, also what `off` has put aside."""
        self._steer_with([], {})
        self._rest([])

    def set_strength(self, strength: float, concept: str | None = None) -> None:
        """Set the strength of one concept, or of all.

        Raises:
            InputError: the strength is not finite, the concept is not loaded, or there is no controller.
        """
        names = self._named(concept)
        (strength,) = check_strength(strength, 1)
        self._strengths.update(dict.fromkeys(names, strength))

    def steerings(self, concept: str | None = None) -> dict[str, Steering]:
        """What steers towards one concept, or towards each, alone.

        Raises:
            InputError: the concept is not loaded, or there is no controller.
        """
        names = self._named(concept)
        alone = {one.concepts[0]: one for controller in self._controllers for one in controller.split()}
        return {name: alone[name] for name in names}

    def _steer_with(self, controllers: list[Steering], strengths: dict[str, float]) -> None:
        """Steer with these controllers from now on. Concepts that are not in `strengths` keep their strength."""
        names = [name for controller in controllers for name in controller.concepts]
        self._controllers = controllers
        self._strengths = {name: strengths.get(name, self._strengths.get(name, 1.0)) for name in names}

    def _named(self, concept: str | None) -> list[str]:
        """This concept, or all."""
        if not self._strengths:
            raise InputError(
                "steering is off: /on first" if self._resting else "no controller is loaded: /add FILE first"
            )
        if concept is None:
            return list(self._strengths)
        self._check_loaded(concept)
        return [concept]

    def _check_loaded(self, concept: str) -> None:
        if concept not in self._strengths:
            loaded = ", ".join(self._strengths) or "none; /add FILE first"
            raise InputError(f"no concept {concept!r} is loaded: {loaded}")

    def _rest(self, controllers: list[Steering], strengths: Mapping[str, float] | None = None) -> None:
        """Put these controllers aside. Concepts that are not in `strengths` keep the one that is remembered."""
        known = {**self._resting_strengths, **(strengths or {})}
        self._resting = controllers
        self._resting_strengths = {name: known[name] for controller in controllers for name in controller.concepts}


def _taken_out(controllers: Sequence[Steering], concept: str) -> tuple[list[Steering], list[Steering]]:
    """What steers towards the concept, alone, and what steers towards the others."""
    taken: list[Steering] = []
    kept: list[Steering] = []
    for controller in controllers:
        parts: Sequence[Steering] = controller.split() if concept in controller.concepts else [controller]
        for part in parts:
            (taken if part.concepts == (concept,) else kept).append(part)
    return taken, kept
