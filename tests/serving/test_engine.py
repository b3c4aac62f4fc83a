"""The engine: every request is answered as it would be alone, however many there are."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers.backends import BACKENDS, tiny_on
from helpers.controllers import controller_for
from helpers.decoding import decoded

from mlx_lqr.backends.protocol import GREEDY
from mlx_lqr.errors import InputError
from mlx_lqr.methods.running import law_on
from mlx_lqr.serving import Engine, Event, Request

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


class Listener:
    """Collects the events of one answer."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._queue: queue.Queue[Event] = queue.Queue()

    def __call__(self, event: Event) -> None:
        self._queue.put(event)

    def __iter__(self) -> Iterator[Event]:
        while not self.events or self.events[-1].finish is None:
            self.events.append(self._queue.get(timeout=60))
            yield self.events[-1]

    def wait(self) -> list[int]:
        """The tokens, once it has ended."""
        list(self)
        return [event.token for event in self.events if event.token is not None]


def answered(engine: Engine, **request: Any) -> Listener:
    listener = Listener()
    engine.submit(Request(**{"prompt": PROMPT, "sampling": GREEDY, "max_tokens": 12, **request}), listener)
    return listener


@pytest.fixture(params=BACKENDS)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = Engine(tiny_on(request.param, "llama"))
    yield engine
    engine.close()


def test_a_request_is_answered_as_the_decode_loop_does(engine: Engine) -> None:
    model = engine._model
    steering = controller_for(model)
    law = law_on(model, steering, 2.0)
    assert answered(engine).wait() == decoded(model, PROMPT, max_tokens=12)
    listener = answered(engine, steering=steering, strength=2.0)
    assert listener.wait() == decoded(model, PROMPT, law=law, max_tokens=12)
    assert listener.events[-1].finish == "length"
    assert "".join(event.text for event in listener.events).split() == [f"w{token}" for token in listener.wait()]


def test_log_probabilities_are_of_the_raw_logits(engine: Engine) -> None:
    model = engine._model
    tokens = list(PROMPT)
    listener = answered(engine, top_logprobs=3, max_tokens=4)
    for event in listener:
        logits = model.logits(tokens).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum())
        best = np.argsort(-logprobs)[:3]
        assert event.token is not None
        assert event.logprob == pytest.approx(logprobs[event.token], abs=1e-4)
        assert [token for token, _ in event.top] == best.tolist()
        assert [value for _, value in event.top] == pytest.approx(logprobs[best], abs=1e-4)
        tokens.append(event.token)


def test_what_cannot_be_answered_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(InputError, match="empty"):
        answered(engine, prompt=[])
    with pytest.raises(InputError, match="context"):
        answered(engine, max_tokens=10**6)
    with pytest.raises(InputError, match="nothing steers"):
        answered(engine, track=True)
