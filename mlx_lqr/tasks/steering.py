"""What steers, and a model under it at one strength: all that tasks know of controllers and laws."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from mlx_lqr.backends.capabilities import DIFFERENTIABLE, require
from mlx_lqr.backends.protocol import Continued, Float32, Law, Recorder, Runner
from mlx_lqr.errors import InputError
from mlx_lqr.loading import load_steering
from mlx_lqr.lqr.adapt import adapt_at
from mlx_lqr.lqr.prompts import Prompt, tokenise
from mlx_lqr.methods.running import adapts, law_on
from mlx_lqr.methods.steering import Steering, combine, only_controller
from mlx_lqr.runtime import Options, batch_stream


@dataclass(frozen=True, eq=False)
class NamedSteering:
    """A controller, or another method's steering, under a name, and what share of the strength each concept gets."""

    name: str
    controller: Steering
    shares: tuple[float, ...] = ()
    """One number for each concept; by default 1 for all. Strength s means s times the share."""

    @property
    def settings(self) -> dict[str, Any]:
        """What tells this steering from another: a digest of its numbers, whatever kind of controller it is."""
        digest = hashlib.sha256()
        for name, value in sorted(self.controller.arrays.items()):
            digest.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
        return {
            "method": self.controller.method,
            "concepts": list(self.controller.concepts),
            "positions": self.controller.positions,
            "shares": list(self._shares),
            "digest": digest.hexdigest()[:16],
            **self._recomputed,
        }

    @property
    def _recomputed(self) -> dict[str, Any]:
        """What gains are made from that are recomputed for each prompt."""
        if not self.controller.adaptive:
            return {}
        controller = only_controller(self.controller, "adaptive")
        return {"adaptive": asdict(controller.weights), "layers": list(controller.active_layers)}

    def strength(self, value: float) -> list[float]:
        """A strength for each concept."""
        return [value * share for share in self._shares]

    @property
    def _shares(self) -> tuple[float, ...]:
        return self.shares or (1.0,) * len(self.controller.concepts)


def named_steering(files: Sequence[tuple[str, float]], name: str | None = None) -> NamedSteering:
    """One steering of several files, each with its share of the strength.

    Args:
        files: (path, share).
        name: by default the files' names without their endings.

    Raises:
        InputError: a file that holds no steering, or files that cannot be combined (see `methods.steering.combine`).
    """
    loaded = [(load_steering(path), share) for path, share in files]
    controller = combine([one for one, _ in loaded])
    shares = tuple(share for one, share in loaded for _ in one.concepts)
    return NamedSteering(name or "+".join(Path(path).stem for path, _ in files), controller, shares)


def check_strengths(model: Runner, steering: NamedSteering | None, strengths: Sequence[float]) -> list[float]:
    """Each of the strengths once.

    Raises:
        InputError: a controller of another model, or a strength other than 0 without steering.
    """
    wanted = list(dict.fromkeys(float(strength) + 0.0 for strength in strengths))  # -0 is 0
    if steering is None and any(wanted):
        raise InputError("there is nothing to steer with: give a controller, or strength 0 alone")
    if steering is not None:
        steering.controller.check_model(model)
    return wanted


@dataclass(frozen=True, eq=False)
class Steered:
    """A model, steered at one strength or not at all."""

    model: Recorder
    steering: NamedSteering | None = None
    strength: float = 0.0

    @property
    def law(self) -> Law | None:
        if self.steering is None or self.strength == 0:
            return None
        return law_on(self.model, self.steering.controller, self.steering.strength(self.strength))

    @property
    def unsteered(self) -> Steered:
        return Steered(self.model)

    @property
    def steer_all(self) -> bool:
        return self.steering is not None and self.steering.controller.positions == "all"

    def texts(self, prompts: Sequence[Prompt], options: Options) -> list[tuple[str, int]]:
        """The text that follows each prompt, and of how many tokens it is. Prompt i is drawn with `seed` + i."""
        if self.steering is not None and self.strength != 0:
            strength = self.steering.strength(self.strength)
            options = {**options, "controller": self.steering.controller, "strength": strength}
        texts, counts = [""] * len(prompts), [0] * len(prompts)
        for i, piece in batch_stream(self.model, prompts, **options):
            texts[i] += piece.text
            counts[i] += piece.token is not None
        return list(zip(texts, counts, strict=True))

    def log_probabilities(self, pairs: Sequence[Continued]) -> list[np.ndarray]:
        """log p of each token of a continuation, steered at its prompt's last token and after it: (n,), float64, each.

        Raises:
            InputError: more tokens than the model's context holds.
        """
        for before, after in pairs:
            tokenise(self.model, [*before, *after])
        some = iter(self._of_each_law([pair for pair in pairs if pair[1]], self.model.log_probabilities))
        return [np.asarray(next(some), np.float64) if after else np.empty(0) for _, after in pairs]

    def scores(self, questions: Sequence[tuple[Prompt, Sequence[str]]]) -> list[list[float]]:
        """For (prompt, answers): the total log p of each answer, a space before it unless the prompt ends in one.

        Raises:
            OverflowingError: activations overflow at this strength.
        """
        pairs: list[Continued] = []
        for prompt, answers in questions:
            space = "" if isinstance(prompt, str) and prompt[-1:].isspace() else " "
            before, each = self.model.tokenizer.continuations(prompt, [space + answer for answer in answers])
            pairs += [(before, after) for after in each]
        totals = iter([float(each.sum()) for each in self.log_probabilities(pairs)])
        return [[next(totals) for _ in answers] for _, answers in questions]

    def logits_along(self, pairs: Sequence[Continued]) -> list[Float32]:
        """`Model.logits_along` as steered here."""
        return self._of_each_law(pairs, self.model.logits_along)

    def _of_each_law(self, pairs: Sequence[Continued], run: Callable[..., list[Float32]]) -> list[Float32]:
        """What `run` makes of the pairs side by side; with adaptive control of those of one prompt at a time."""
        steering = self.steering
        if steering is None or self.strength == 0 or not adapts(steering.controller):
            return run(pairs, law=self.law, steer_all=self.steer_all)
        controller = only_controller(steering.controller, "adaptive")
        model = require(self.model, DIFFERENTIABLE, "adapt gains to a prompt")
        results: list[Float32] = []
        for prompt, own in groupby(pairs, key=lambda pair: list(pair[0])):
            law = law_on(model, adapt_at(model, controller, model.trace(prompt)), steering.strength(self.strength))
            results += run(list(own), law=law, steer_all=self.steer_all)
        return results
