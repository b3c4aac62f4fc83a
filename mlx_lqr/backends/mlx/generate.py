"""Which positions to steer when mlx_lm's own generation functions and evaluator, and not ours, call the model.

mlx_lm fills its cache in chunks. The last position of a chunk is not the last token of the prompt, and the model cannot
tell from a call which it sees; so while a model is steered, the places where mlx_lm works through a prompt announce it.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lqr.backends.mlx.library import Method, evaluated, generation, wrap_evaluator
from mlx_lqr.backends.steered import SteeredModules
from mlx_lqr.errors import OverflowingError


@dataclass
class Prompt:
    """A prompt that mlx_lm is working through."""

    left: float
    """Tokens still to come before its last one."""
    spoiled: mx.array | None = None
    """Zero while all activations of what has been run are finite, NaN afterwards."""
    asked: mx.array | None = None
    """What `spoiled` was a step ago, which is known without waiting for the step that is under way."""

    def add(self, output: mx.array) -> None:
        """Take note of the last block's output (B, L, d)."""
        now = mx.square(output[:, -1].astype(mx.float32)).sum() * 0  # as norms square
        self.spoiled = now if self.spoiled is None else self.spoiled + now

    def overflows(self) -> bool:
        """Whether activations had overflowed when this was asked before; the first time, whether they have."""
        before = self.spoiled if self.asked is None else self.asked
        self.asked = self.spoiled
        if self.asked is not None:
            mx.async_eval(self.asked)
        return before is not None and before.item() != 0


class Positions(threading.local):
    """From which position on the current call is steered; each thread has calls, and so values, of its own.

    mlx_lm's server calls the model in another thread than the one that steers it.
    """

    def __init__(self, steer_all: bool) -> None:
        self.first = 0
        """The first steered position of the call."""
        self._prompt: Prompt | None = None
        self._steer_all = steer_all

    def enter(self, z: mx.array) -> None:
        """A call has come to the first block, whose input is z (B, L, d)."""
        length = z.shape[1]
        if self._steer_all:
            self.first = 0
        elif self._prompt is None:  # called by nobody we know: take each call for a whole prompt, or for one step
            self.first = length - 1
        else:
            self.first = int(min(length, self._prompt.left))
            self._prompt.left -= self.first

    def end(self, output: mx.array) -> None:
        """The call has come to the end of the last block."""
        if self._prompt is not None:
            self._prompt.add(output)

    @contextmanager
    def working_through(self, prompt: Prompt) -> Iterator[None]:
        """Calls inside this context are of `prompt` and, after its last token, of generated tokens only."""
        before, self._prompt = self._prompt, prompt
        try:
            yield
        finally:
            self._prompt = before


def announcing_prompts(module: nn.Module, positions: Positions) -> AbstractContextManager[None]:
    """Inside this context, mlx_lm's generation functions and evaluator announce `module`'s prompts to `positions`.

    Raises:
        InputError: on entering it, the model is steered already.
    """
    return _steered.including(module, positions)


def _wrap_generation() -> Callable[[], None]:
    """Exchange mlx_lm's functions for ones that announce prompts; returns what puts them back."""
    library = generation()
    step, speculative, batch, process = library.step, library.speculative, library.batch, library.batch.prompt
    signature = inspect.signature(step)

    @functools.wraps(step)
    def generate_step(prompt: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Iterator[Any]:
        embeddings = signature.bind(prompt, model, *args, **kwargs).arguments.get("input_embeddings")
        before_last = len(prompt if embeddings is None else embeddings) - 1
        return _announced(step(prompt, model, *args, **kwargs), [(model, before_last)])

    @functools.wraps(speculative)
    def speculative_generate_step(
        prompt: Any, model: nn.Module, draft_model: nn.Module, *args: Any, **kwargs: Any
    ) -> Iterator[Any]:
        before_last = len(prompt) - 1
        readers = [(model, before_last), (draft_model, before_last)]
        if model is draft_model:  # and reads the prompt twice
            readers = [(model, 2 * before_last)]
        return _announced(speculative(prompt, model, draft_model, *args, **kwargs), readers)

    @functools.wraps(process)
    def prompt(self: Any, tokens: Any) -> None:
        with _working_through(self.model, float("inf")):  # the last tokens are left to the first generation step
            process(self, tokens)

    _exchange(step, generate_step)
    _exchange(speculative, speculative_generate_step)
    batch.prompt = prompt

    unwrap_evaluator = wrap_evaluator(_reading, _scoring)

    def put_back() -> None:
        _exchange(generate_step, step)
        _exchange(speculative_generate_step, speculative)
        batch.prompt = process
        unwrap_evaluator()

    return put_back


def _reading(read: Method) -> Method:
    """Of mlx_lm's evaluator, which runs a context and what it scores after it in calls of their own."""

    @functools.wraps(read)
    def process_prompt(self: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        with _working_through(evaluated(self), len(prompt) - 1):
            return read(self, prompt, *args, **kwargs)

    return process_prompt


def _scoring(score: Method) -> Method:
    """The latter, in one call of many positions."""

    @functools.wraps(score)
    def score_fn(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with _working_through(evaluated(self), 0):  # without a context, the first token is taken for one
            return score(self, inputs, *args, **kwargs)

    return score_fn


_steered: SteeredModules[Positions] = SteeredModules(_wrap_generation)


def _working_through(module: nn.Module, before_last: float) -> AbstractContextManager[None]:
    """Announce a prompt of `before_last` tokens and one to the model, if it is steered."""
    positions = _steered.get(module)
    return positions.working_through(Prompt(before_last)) if positions is not None else nullcontext()


def _announced(steps: Generator[Any, None, None], readers: Sequence[tuple[nn.Module, int]]) -> Iterator[Any]:
    """Hand on the steps; only while one is computed do the readers know of the prompt: so many tokens and a last one.

    So a generator that is suspended, or abandoned, has no part in what else calls the model.

    Raises:
        OverflowingError: activations that overflow.
    """
    steered = [(_steered.get(module), before_last) for module, before_last in readers]
    prompts = [(positions, Prompt(before_last)) for positions, before_last in steered if positions is not None]
    try:
        while True:
            with ExitStack() as announcements:
                for positions, prompt in prompts:
                    announcements.enter_context(positions.working_through(prompt))
                step = next(steps, None)
            overflowing = [prompt.overflows() for _, prompt in prompts]
            if any(overflowing):
                raise OverflowingError("the activations overflow at this strength: lower it")
            if step is None:
                return
            yield step
    finally:
        steps.close()


def _exchange(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Put a function in the place of another in every module that has it, for some import it by name."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            names = object.__getattribute__(module, "__dict__")  # in a way that does not load a lazy module
            if names.get(old.__name__) is old:
                names[new.__name__] = new
