"""What the application serves: a model, its engine, its controllers, and the answers under way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_lqr.backends.protocol import Model, Sampling
from mlx_lqr.backends.text.text_tokenizer import Message, has_answer
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.prompts import Prompt, tokenise
from mlx_lqr.runtime.decode import room_after
from mlx_lqr.serving.bodies import DEFAULT_TOKENS, MAX_CHOICES, ChatBody, CompletionBody
from mlx_lqr.serving.controllers import Controllers, Wanted
from mlx_lqr.serving.engine import Engine, Request
from mlx_lqr.serving.failures import RequestError, unusable
from mlx_lqr.serving.fitting import Fitter
from mlx_lqr.serving.metrics import Metrics
from mlx_lqr.serving.replies import Reply


class Service:
    """A model that is served.

    Args:
        model: what `load` returned.
        folder: where controllers are kept.
        slots: how many answers are written at once.
        waiting: how many more requests may wait.
    """

    def __init__(self, model: Model, folder: Path, *, slots: int = 8, waiting: int = 64) -> None:
        self.model = model
        self.name = model.name
        self.created = int(time.time())
        self.controllers = Controllers(model, folder)
        self._engine = Engine(model, slots=slots, waiting=waiting)
        self._running: dict[str, Reply] = {}
        self.fitter = Fitter(model, self.controllers)
        self.counts = Metrics()

    def hurry(self) -> None:
        """End all that is under way; its clients are told."""
        self.fitter.cancel()
        for reply in list(self._running.values()):
            reply.cancel()

    def close(self) -> None:
        """End all that is under way, and the threads."""
        self.fitter.close()
        self._engine.close()

    @property
    def metrics(self) -> str:
        """What is counted, as Prometheus reads it."""
        return self.counts.text(self._engine.stats)

    def models(self) -> list[dict[str, Any]]:
        """The model, and the model with each controller, as OpenAI lists models."""
        names = [self.name, *(f"{self.name}@{one.concept}" for one in self.controllers.all())]
        return [{"id": name, "object": "model", "created": self.created, "owned_by": "mlx-lqr"} for name in names]

    def conversation(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation in the model's chat template."""
        if not self.model.tokenizer.has_chat_template:
            raise RequestError(
                400, f"{self.name} has no chat template (a base model?): use /v1/completions", param="messages"
            )
        try:
            return self.model.tokenizer.chat(messages)
        except InputError as error:
            raise unusable(error, "messages") from None

    def requests(
        self, body: ChatBody | CompletionBody, prompts: Sequence[Prompt]
    ) -> tuple[list[Request], dict[str, float]]:
        """The engine's requests, one a choice, and the strength of each concept that they are steered with."""
        n = body.n or 1
        if len(prompts) * n > MAX_CHOICES:
            raise RequestError(
                400, f"{len(prompts)} prompts and n = {n} are more than {MAX_CHOICES} answers", param="n"
            )
        answered = isinstance(body, ChatBody) and has_answer([one.message() for one in body.messages])
        steering, strengths = self.controllers.steering(self._wanted(body), answered=answered)
        shared = Request(
            prompt=(),
            steering=steering,
            strength=list(strengths.values()) if steering is not None else None,
            sampling=body.sampling(),
            stop=body.stops(),
            top_logprobs=body.top(),
            track=bool(body.track) and steering is not None,
        )
        requests: list[Request] = []
        for index, prompt in enumerate(prompts):
            tokens, limit, scores = tokenise(self.model, prompt), body.limit(), body.prompt_scores(index)
            if limit is None:
                limit = max(1, min(DEFAULT_TOKENS, room_after(self.model, len(tokens))))
            for _ in range(n):
                sampling = seeded(shared.sampling, len(requests))
                requests.append(replace(shared, prompt=tokens, sampling=sampling, max_tokens=limit, scores=scores))
        return requests, strengths

    def echoed(self, body: CompletionBody) -> list[str]:
        """The text of each choice's prompt, if it is to stand before the answer."""
        if not body.echo:
            return []
        decode = self.model.tokenizer.decode
        texts = [one if isinstance(one, str) else decode(one, skip_special_tokens=False) for one in body.prompt]
        return [text for text in texts for _ in range(body.n or 1)]

    def begin(self, id: str, requests: Sequence[Request], strengths: dict[str, float]) -> Reply:
        """Begin to answer; `end` has to follow."""
        reply = self._running[id] = Reply(self._engine, id, requests, strengths)
        return reply

    def running(self, id: str) -> Reply:
        """The answer under way that has this id."""
        reply = self._running.get(id)
        if reply is None or reply.ended:
            raise RequestError(404, "there is no such answer, or it has ended", code="not_found")
        return reply

    def end(self, reply: Reply) -> None:
        """The answer has ended, or nobody waits for it."""
        reply.cancel()
        if reply.first_token is not None:
            self.counts.first_token.observe(reply.first_token)
        if reply.rate is not None:
            self.counts.rate.observe(reply.rate)
        self._running.pop(reply.id, None)

    def _wanted(self, body: ChatBody | CompletionBody) -> Wanted:
        """How the answer is to be steered: as its body says, or else its model's name, or else the server's default."""
        rest = body.model.removeprefix(self.name)
        if not body.model.startswith(self.name) or rest[:1] not in ("", "@"):
            message = f"there is no model {body.model[:80]!r} here: use {self.name!r}"
            raise RequestError(404, message, param="model", code="model_not_found")
        if body.steering is not None:
            return body.steering
        return self.controllers.named(rest[1:]) if rest else self.controllers.default()


def seeded(sampling: Sampling, i: int) -> Sampling:
    """For choice i of a request: choices differ, and each is what a request with its own seed would get."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + i)
