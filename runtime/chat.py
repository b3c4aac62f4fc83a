"""A conversation with a steered model: messages, controllers and their strengths, and the transcript."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from os import PathLike

from mlx_lqr.atomic import writing
from mlx_lqr.backends.base import Model
from mlx_lqr.backends.tokenizer import Message
from mlx_lqr.controller import Controller
from mlx_lqr.errors import InputError
from mlx_lqr.laws import check_strength
from mlx_lqr.runtime.generate import Piece, stream
from mlx_lqr.synthesis import adapt


@dataclass
class Chat:
    """The state of one conversation. Everything in it may change between two answers."""

    model: Model
    messages: list[Message] = field(default_factory=list)
    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    adaptive: bool = False
    """Compute the gains anew at each prompt (see `synthesis.adapt`)."""
    _controllers: list[Controller] = field(default_factory=list)
    _strengths: dict[str, float] = field(default_factory=dict)

    @property
    def strengths(self) -> dict[str, float]:
        """The strength of every concept in force."""
        return dict(self._strengths)

    def add(self, controller: Controller, strength: float = 1.0) -> None:
        """Steer with one more controller from the next answer on; one of a concept already there takes its place.

        Raises:
            InputError: of another model, or not to be combined with those in force, which then stay as they are.
        """
        controller.check_model(self.model)
        (strength,) = check_strength(strength, 1)
        kept = [c for c in self._controllers if not set(c.concepts) & set(controller.concepts)]
        Controller.combine(*kept, controller)
        self._controllers = [*kept, controller]
        names = [name for c in self._controllers for name in c.concepts]
        self._strengths = {name: self._strengths.get(name, strength) for name in names}
        self._strengths.update(dict.fromkeys(controller.concepts, strength))

    def set_strength(self, strength: float, concept: str | None = None) -> None:
        """Set the strength of one concept, or of all.

        Raises:
            InputError: not a finite number, no such concept, or nothing to steer with.
        """
        if not self._strengths:
            raise InputError("no controller is loaded: /add FILE first")
        if concept is not None and concept not in self._strengths:
            raise InputError(f"no concept {concept!r} is loaded: {', '.join(self._strengths)}")
        (strength,) = check_strength(strength, 1)
        self._strengths.update(dict.fromkeys([concept] if concept else self._strengths, strength))

    def off(self) -> None:
        """Steer no more."""
        self._controllers, self._strengths = [], {}

    def answer(self, text: str) -> Iterator[Piece]:
        """The model's answer, piece by piece. What has been said of it stays in the conversation if it is cut short."""
        self.messages.append({"role": "user", "content": text})
        controller = Controller.combine(*self._controllers) if self._controllers else None
        try:
            prompt = self.model.tokenizer.chat(self.messages)
            if controller and self.adaptive:
                controller = adapt(self.model, controller, prompt)
            pieces = stream(
                self.model,
                prompt,
                controller=controller,
                strength=[self._strengths[name] for name in controller.concepts] if controller else 1.0,
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                seed=self.seed,
            )
        except InputError:
            self.messages.pop()
            raise
        tokens: list[int] = []
        try:
            for piece in pieces:
                tokens.append(piece.token)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": self.model.tokenizer.decode(tokens)})

    def save(self, path: str | PathLike[str]) -> None:
        """Write the transcript as JSON: the model, the strengths in force and every message."""
        transcript = {"model": self.model.name, "strengths": self._strengths, "messages": self.messages}
        with writing(path) as temporary:
            temporary.write_text(json.dumps(transcript, indent=2, ensure_ascii=False) + "\n", "utf-8")
