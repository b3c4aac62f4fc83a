"""One answer of a chat: how it is decoded, and what is noted while it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np

from mlx_lqr.backends.protocol import Decoder, Law
from mlx_lqr.backends.text.text_tokenizer import Message
from mlx_lqr.errors import InputError
from mlx_lqr.methods.law import AdjustableLaw
from mlx_lqr.methods.recording import Recording
from mlx_lqr.methods.steering import Steering
from mlx_lqr.runtime.generate import Piece


@dataclass
class Turn:
    """How an answer was decoded: enough to run it again, and to continue from it."""

    prompt: list[int]
    reply: Message
    controllers: list[Steering]
    controller: Steering | None
    """All of them in one."""
    decoder: Decoder
    """Holds prompt and answer, so that the next prompt does not start from its first token."""
    rolling: bool
    recording: Recording | None
    tokens: list[int] = field(default_factory=list)
    strengths: list[tuple[float, ...]] = field(default_factory=list)
    """The strengths at the prompt's last token and then at each token of the answer."""
    law: Law | None = None
    """The law that steered; with adaptive gains, the one with this prompt's gains."""
    is_over: bool = False
    """Whether the next answer has begun."""
    intact: bool = False
    """False while the decoder works: an exception then, also Ctrl-C, leaves an incomplete cache."""

    def recorded(self, pieces: Iterator[Piece], alone: AbstractContextManager[object]) -> Iterator[Piece]:
        """Pass the pieces on, and note tokens, strengths and law.

        Args:
            alone: held while the decoder works.

        Raises:
            InputError: the next answer has begun, maybe with this decoder.
        """
        self.strengths.append(self._strength())
        while True:
            strength = self._strength()
            with alone:
                if self.is_over:
                    raise InputError("the next answer of this conversation has begun: this one ends here")
                self.intact = False
                piece = next(pieces, None)
                self.law = self.decoder.law
                self.intact = True
            if piece is None:
                return
            if piece.token is not None:
                self.tokens.append(piece.token)
                self.strengths.append(strength)  # of the step that began before this piece: see `decode`
            yield piece

    def measured(self) -> tuple[np.ndarray, np.ndarray]:
        """alpha_k (n, T, m) and |u_k| (n, T) at the prompt's last token and at every token of the answer run so far."""
        if self.recording is None or self.controller is None:
            return np.empty((0, 0, 0)), np.empty((0, 0))
        return self.recording.answer(self.controller, len(self.prompt), len(self.tokens))

    @property
    def clean(self) -> list[int]:
        """The tokens from the first on that the decoder ran without steering."""
        if not self.intact or (self.controller is not None and self.controller.positions == "all"):
            return []
        run = [*self.prompt, *self.tokens] if self.controller is None else self.prompt[:-1]
        return run[: self.decoder.position]

    def _strength(self) -> tuple[float, ...]:
        return self.decoder.law.strength if isinstance(self.decoder.law, AdjustableLaw) else ()
