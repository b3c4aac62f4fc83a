"""One request on its way to its last token: what steers it, its text so far, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from mlx_lqr.backends.capabilities import DIFFERENTIABLE, RECORDER, require
from mlx_lqr.backends.protocol import Differentiable, Law, Runner, Scored, Trace
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.adapt import adapt_at
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.lqr.prompts import tokenise
from mlx_lqr.lqr.strength import Strengths, default_strength
from mlx_lqr.methods.law import AdjustableLaw, check_strength
from mlx_lqr.methods.recording import Recording
from mlx_lqr.methods.running import adapts, law_on
from mlx_lqr.methods.steering import only_controller
from mlx_lqr.runtime.decode import room_after
from mlx_lqr.runtime.generate import Strength
from mlx_lqr.runtime.stopping import StopStrings
from mlx_lqr.serving.requests import Event, Finish, OnEvent, PromptScores, Request, Tracking
from mlx_lqr.serving.scoring import score_prompt


class Answer:
    """The answer to one request.

    Args:
        model: what answers.
        request: checked here.
        on_event: takes each token.

    Raises:
        InputError: the request cannot be answered: an unusable prompt, steering or option, or more tokens than the
            model's context holds.
    """

    def __init__(self, model: Runner, request: Request, on_event: OnEvent) -> None:
        self.prompt = tokenise(model, request.prompt)
        least = 1 if request.scores is None else 0
        if request.max_tokens < least:
            raise InputError(f"max_tokens must be at least {least}, not {request.max_tokens}")
        if request.max_tokens > room_after(model, len(self.prompt)):
            raise InputError(
                f"{len(self.prompt)} prompt tokens and {request.max_tokens} new ones do not fit the model's context of "
                f"{model.context_length}: ask for at most {room_after(model, len(self.prompt))} (max_tokens)"
            )
        if request.top_logprobs is not None and not 0 <= request.top_logprobs <= model.vocab_size:
            raise InputError(f"top_logprobs must be between 0 and {model.vocab_size}, not {request.top_logprobs}")
        self.request = request
        if request.scores is not None:
            self._check_scored(model, request.scores)
        if request.track and request.steering is None:
            raise InputError("nothing steers, so there is nothing to track: give steering")
        self.law: AdjustableLaw | None = None
        """What steers, not placed; of an adaptive controller from `adapt` on."""
        self.ended = False
        self.finish: Finish | None = None
        self.failure: Exception | None = None
        """Why it cannot go on"""
        self.drawn = 0
        """Tokens that have been drawn, of which the last need not have been told"""
        self.count = 0
        """Tokens that have been told"""
        self.cached = 0
        """Tokens of the prompt that were not run, since an earlier request's states were reused"""
        self.strength: Strengths | None = None
        """To be in force from the next pass on; may be set by any thread"""
        self._tokens: list[int] = []
        """Those told, and the end token"""
        self._model, self._on_event = model, on_event
        self._recording = Recording() if request.track else None
        self._controller: Controller | None = None
        """Whose gains are recomputed for this prompt, or whose error is told."""
        self.adaptive = adapts(request.steering)
        if request.steering is not None:
            if self.adaptive:
                require(model, DIFFERENTIABLE, "adapt gains to a prompt")
            if self.adaptive or request.track:
                self._controller = only_controller(request.steering, "tracked" if request.track else "adaptive")
            self.law = law_on(model, request.steering, request.strength, self._recording)
        self._detokenizer = model.tokenizer.stream(self.prompt)
        self._stops = StopStrings(StopStrings.check(request.stop))

    @property
    def steers_all(self) -> bool:
        """Whether every token of the prompt is steered, and not its last alone."""
        return self.request.steering is not None and self.request.steering.positions == "all"

    @property
    def penalises(self) -> bool:
        """Whether its decoder has to have seen every token of the prompt."""
        return self.request.sampling.repetition_penalty != 1

    @property
    def room(self) -> int:
        """Tokens that it may come to, with its prompt."""
        return len(self.prompt) + self.request.max_tokens

    @property
    def unsteered(self) -> list[int]:
        """The tokens from the first on that have been run without steering."""
        if self.steers_all:
            return []
        if self.request.steering is not None:
            return self.prompt[:-1]
        return [*self.prompt, *self._tokens][: len(self.prompt) + self.drawn - 1]

    def checked(self, strength: Strength) -> Strengths:
        """A strength for each concept of this answer.

        Raises:
            InputError: it is no number for each of them, or nothing steers.
        """
        steering = self.request.steering
        if steering is None:
            raise InputError("this answer has no steering whose strength could change: begin another with some")
        return check_strength(default_strength(steering) if strength is None else strength, len(steering.concepts))

    def scored(self, size: int) -> Iterator[int]:
        """Score the prompt and tell of it, in parts of this `size`; yields how many tokens each part has."""
        wanted = self.request.scores
        assert wanted is not None
        law: Law | None = None
        if self.request.steering is not None:
            law = law_on(self._model, self.request.steering, self.request.strength)
        first = 0 if self.steers_all else wanted.steered_from
        scores: list[Scored | None] = [None]
        for part in score_prompt(self._model, self.prompt, law, steered_from=first, top=wanted.top, size=size):
            scores += part
            yield len(part)
            if self.ended:
                return
        self._say(Event("", scores=tuple(scores), finish=None if self.request.max_tokens else "length"))

    def _check_scored(self, model: Runner, wanted: PromptScores) -> None:
        """Raise `InputError` where the prompt cannot be scored as it is asked for."""
        require(model, RECORDER, "score prompts")
        if not 0 <= wanted.top <= model.vocab_size:
            raise InputError(f"top must be between 0 and {model.vocab_size}, not {wanted.top}")
        if not 0 <= wanted.steered_from < len(self.prompt):
            raise InputError(
                f"scores are steered from one of the prompt's {len(self.prompt)} positions on (the first is 0), not "
                f"from {wanted.steered_from}"
            )
        if adapts(self.request.steering):
            raise InputError("adaptive gains are made for one prompt's end: they cannot score a whole prompt")

    def adapt(self, trace: Trace) -> AdjustableLaw:
        """The law with gains for this prompt, from the trace of its last token."""
        assert self._controller is not None
        assert self.law is not None
        adapted = adapt_at(cast(Differentiable, self._model), self._controller, trace)
        self.law = law_on(self._model, adapted, self.law.strength, self._recording)
        return self.law

    def aim(self) -> None:
        """Take over a strength that has been set since the last pass."""
        if self.strength is None or self.law is None:
            return
        self.law.strength, self.strength = self.strength, None
        try:
            self.law.aim()  # here, where it fails alone: to form gains for other concepts may fail
        except Exception as error:
            self.failure = error

    def taken(self) -> tuple[Recording, Strengths] | None:
        """What has been recorded since the last call, and the strengths in force; None where nothing is tracked."""
        if self._recording is None:
            return None
        assert self.law is not None
        return self._recording.take(), self.law.strength

    def add(
        self,
        token: int,
        logprob: float | None = None,
        top: tuple[tuple[int, float], ...] = (),
        taken: tuple[Recording, Strengths] | None = None,
    ) -> None:
        """Go on with a token, and tell of it; an end token, a stop string or the last token that may be ends it."""
        self._tokens.append(token)
        if token in self._model.tokenizer.end_tokens:
            if self.request.scores is None:
                self.end("stop")
            else:  # one entry for each token that was asked for: clients that score a prompt count them
                self._say(Event(self._rest()[0], token, logprob, top, finish="stop"))
            return
        self.count += 1
        text, stopped = self._stops.add(self._detokenizer.add(token))
        if not stopped and self.is_at_end:
            rest, stopped = self._rest()
            text += rest
        finish: Finish | None = "stop" if stopped else "length" if self.is_at_end else None
        self._say(Event(text, token, logprob, top, self._tracking(taken), finish))

    @property
    def is_at_end(self) -> bool:
        """Whether it has as many tokens as it may have."""
        return self.count == self.request.max_tokens

    def end(self, finish: Finish, error: str | None = None) -> None:
        """End it without a further token."""
        if not self.ended:
            self._say(Event(self._rest()[0], finish=finish, error=error))

    def _rest(self) -> tuple[str, bool]:
        """The text that was uncertain or held back, now that nothing follows, and whether a stop string ends it."""
        text, stopped = self._stops.add(self._detokenizer.finish())
        return (text, True) if stopped else (text + self._stops.rest(), False)

    def _say(self, event: Event) -> None:
        self.ended, self.finish = event.finish is not None, event.finish
        try:
            self._on_event(event)
        except Exception:  # whoever listens has gone: nobody is left to be told why
            self.ended, self.finish = True, self.finish or "cancelled"

    def _tracking(self, taken: tuple[Recording, Strengths] | None) -> Tracking | None:
        """Of the last token in a recording. Waits for what is still being computed."""
        if taken is None:
            return None
        assert self._controller is not None
        controller, (recording, strength) = self._controller, taken
        layers = list(controller.active_layers)
        alpha, push = recording.feature_error()[-1, layers], recording.push()[-1, layers]
        feature, setpoint = controller.ends_at(strength)[layers] - alpha, controller.setpoint_at(strength)[layers]
        return Tracking(tuple(layers), controller.concepts, setpoint - feature, push, feature, setpoint)
