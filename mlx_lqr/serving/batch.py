"""The answers whose next tokens are decoded in one pass. The next pass already runs while a token is told.

An answer's first pass is the one that appends its prompt's last token, in the batch already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lqr.backends.protocol import OVERFLOWED, Array, Decoder, Runner
from mlx_lqr.errors import OverflowingError, first_line
from mlx_lqr.lqr.strength import Strengths
from mlx_lqr.methods.recording import Recording
from mlx_lqr.serving.answer import Answer

Leaving = Callable[[Answer, Decoder, int], None]
"""Told of an answer that has ended while its row is still in the decoder."""


@dataclass(frozen=True)
class _Pass:
    """A pass of the model, maybe still being computed."""

    answers: Sequence[Answer]
    tokens: Array
    """(B,): what was drawn for each answer"""
    logits: Array | None
    """(B, V), where an answer tells log-probabilities"""
    recordings: Sequence[tuple[Recording, Strengths] | None]


class Batch:
    """Answers side by side; each joins when its prompt has been read, and leaves when it has ended.

    Args:
        leaving: called before an answer's row is given up.
    """

    def __init__(self, model: Runner, leaving: Leaving) -> None:
        self.answers: list[Answer] = []
        self._model, self._leaving = model, leaving
        self._decoder: Any = None
        self._tokens: Array = None
        """(B,): the last token of each of `answers`, which the next pass appends"""
        self._ahead: _Pass | None = None
        """The pass that drew them, where it has not been told of"""

    def begin(self, answer: Answer, decoder: Decoder) -> None:
        """Let an answer join; the decoder holds its prompt but for the last token, which goes into the next pass."""
        last: Any = answer.prompt[-1:]
        if self.answers and decoder.position == 0:  # what holds nothing cannot join
            alone = Batch(self._model, self._leaving)
            alone.begin(answer, decoder)
            alone.step()
            alone.tell()
            if not alone.answers:
                return
            last = alone._tokens
        if not self.answers:
            self._decoder, self._tokens = decoder, last
        else:
            try:
                self._tokens = self._decoder.join(decoder, self._tokens, last)
            except Exception as error:  # what is left of the batch is of no use
                self.fail(error)
                raise
        self.answers.append(answer)

    def step(self) -> None:
        """Start another pass, and tell of the tokens that the one before it has drawn."""
        self._leave()
        before, self._ahead = self._ahead, None
        if self.answers and all(answer.drawn < answer.request.max_tokens for answer in self.answers):
            self._ahead = self._launched()
        self._tell(before)

    def tell(self) -> None:
        """Tell of the tokens that have been drawn, before anything that would keep them waiting."""
        before, self._ahead = self._ahead, None
        self._tell(before)

    def fail(self, error: Exception) -> None:
        """End all answers with an error."""
        for answer in self.answers:
            answer.end("error", first_line(error))
        self.answers, self._decoder, self._ahead = [], None, None

    def _launched(self) -> _Pass:
        """Start a pass."""
        for answer in self.answers:
            answer.aim()
        decoder = self._decoder
        logits = decoder.step(self._tokens)
        self._tokens = decoder.sample(logits)
        recordings = []
        for row, answer in enumerate(self.answers):
            answer.drawn += 1
            recordings.append(answer.taken())
            if row in decoder.failures:
                answer.failure = decoder.failures[row]
        scored = any(answer.request.top_logprobs is not None for answer in self.answers)
        return _Pass(list(self.answers), self._tokens, logits if scored else None, recordings)

    def _tell(self, drawn: _Pass | None) -> None:
        """Tell each answer of its token, and let those leave that have ended or failed."""
        if drawn is not None:
            self._add(drawn)
        self._leave()

    def _add(self, drawn: _Pass) -> None:
        values = drawn.tokens.tolist()
        asked = [answer.request.top_logprobs for answer in drawn.answers]
        scores: Sequence[Any] = [(None, ())] * len(values)
        if drawn.logits is not None:
            scores = self._decoder.log_probabilities(drawn.logits, drawn.tokens, max(top or 0 for top in asked))
        for i, (answer, token) in enumerate(zip(drawn.answers, values, strict=True)):
            if answer.ended:
                continue
            if token == OVERFLOWED:
                answer.end("error", str(self._overflow(answer)))
                continue
            top, (logprob, likeliest) = asked[i], scores[i]
            answer.add(token, None if top is None else logprob, likeliest[: top or 0], drawn.recordings[i])

    def _leave(self) -> None:
        """Give up the rows of answers that have ended."""
        rows = []
        for row, answer in enumerate(self.answers):
            if answer.failure is not None:
                answer.end("error", first_line(answer.failure))
            if answer.ended:
                self._leaving(answer, self._decoder, row)
            else:
                rows.append(row)
        if not rows:
            self.answers, self._decoder, self._tokens, self._ahead = [], None, None, None
        elif len(rows) < len(self.answers):
            self._tokens = self._decoder.keep(rows, self._tokens)
            self.answers = [self.answers[row] for row in rows]

    def _overflow(self, answer: Answer) -> OverflowingError:
        """Without the layer: to find it would take another run of the whole answer."""
        strength = answer.law.strength if answer.law is not None else ()
        return OverflowingError.at(None, self._model.num_layers, self._model.description.dtype, strength)
