"""Which positions to steer when transformers' own `generate` or `generate_batch`, and not ours, calls the model.

A forward call does not tell whether its last position is the last of the prompt: a prompt may be read in chunks, and
assisted decoding checks several generated tokens at once. So while a model is steered, its `generate` announces the
length of the prompt, and each call tells where its tokens stand (see calls.py).

`generate_batch` packs requests in one row, and asks for the logits of just those positions that are to be steered.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mlx_lqr.backends.borrowed import check_borrowed
from mlx_lqr.backends.steered import SteeredModules
from mlx_lqr.backends.torch.calls import Call, length_of, unknown_positions
from mlx_lqr.backends.torch.library import is_unshared, request_state, unshared
from mlx_lqr.errors import InputError, OverflowingError


@dataclass(frozen=True)
class Prompt:
    """A prompt that `generate` has been called with."""

    length: int
    """Tokens, padding included."""
    is_assumed: bool = False
    """Whether nothing was given, for which `generate` takes the one token that begins a text."""


class Positions(threading.local):
    """Which positions of the current call are steered; each thread has calls, and so values, of its own.

    transformers' streamers are mostly used with `generate` in another thread than the one that steers the model, and
    `generate_batch` calls the model in a thread of its own.
    """

    def __init__(self, steer_all: bool, refusals: list[InputError]) -> None:
        self.first: int | torch.Tensor = 0
        """The first steered position of the call, or a mask (B or 1, L, 1) of those that are steered."""
        self._steer_all = steer_all
        self._has_begun = False
        """Whether a call has told its positions and has not come to the first block yet."""
        self._prompt: Prompt | None = None
        self._spoiled: torch.Tensor | None = None
        """Zero while all activations of the answer are finite, NaN afterwards."""
        self._refusals = refusals

    def begin(self, call: Call) -> None:
        """A call of the model starts.

        Raises:
            InputError: it cannot be known which of its positions are to be steered.
        """
        _resumption.refusals = None
        self._has_begun = True
        if self._steer_all:
            self.first = 0
        elif self._prompt is not None:
            self.first = self._unsteered(call, self._prompt)
        elif call.is_paged:
            _resumption.refusals = self._refusals
            self.first = self._noted(call.last_of_each_request)
        else:  # called by nobody we know: take each call for a whole prompt, or for one step
            texts = call.last_of_each_text()
            self.first = call.length - 1 if texts is None else texts

    @staticmethod
    def _unsteered(call: Call, prompt: Prompt) -> int:
        before, length = call.before(), call.length
        if prompt.is_assumed and before == 0 and length > 1 and call.cache is not None:
            raise unknown_positions("was given a prompt under a name that is not known")
        return min(length, max(0, prompt.length - 1 - before))

    def _noted(self, place: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `place` returns; a refusal is kept for the thread that waits for the answers."""
        try:
            return place()
        except InputError as refusal:
            self._refusals.append(refusal)
            raise

    @contextmanager
    def answering(self, prompt: Prompt) -> Iterator[None]:
        """Calls inside this context are of this prompt, and of what follows it.

        Raises:
            OverflowingError: when the answer is done, of activations that have overflowed.
        """
        before = self._prompt
        if before is None:  # else a model that drafts for itself: what it calls a prompt is half of it an answer
            self._prompt, self._spoiled = prompt, None
        try:
            yield
        finally:
            self._prompt = before
        if before is None and self._spoiled is not None and self._spoiled.item() != 0:
            raise OverflowingError("the activations overflow at this strength: lower it")

    def enter(self, z: torch.Tensor) -> None:
        """The call has come to the first block; `begin` has told all that there is to know.

        Raises:
            InputError: it has not been called.
        """
        if not self._has_begun:
            raise unknown_positions("calls the blocks of this model in another way than through the model")
        self._has_begun = False

    def end(self, output: torch.Tensor) -> None:
        """The call has come to the end of the last block, whose output is (B, L, d)."""
        if self._prompt is not None:
            now = output[:, -1].float().square().sum() * 0  # as norms square
            self._spoiled = now if self._spoiled is None else self._spoiled + now


class _Resumption(threading.local):
    """In a thread that runs a batch steered at each request's last position, where its refusals go."""

    refusals: list[InputError] | None = None


_resumption = _Resumption()


@contextmanager
def announcing_prompts(module: Any, body: Any, positions: Positions, refusals: list[InputError]) -> Iterator[None]:
    """Inside this context, `module`'s generation functions and every call of it announce themselves to `positions`.

    Args:
        body: the module that every call goes through: `module` or a part of it.
        refusals: where `positions` leaves what other threads have refused.

    Raises:
        InputError: the model is steered already.
    """
    check_borrowed("torch steer")
    signature = inspect.signature(body.forward)

    def before_call(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions.begin(Call.of(signature, args, kwargs))

    with _steered.including(module, positions):
        own = {
            "generate": _announcing(module.generate, positions),
            "generate_batch": _reporting(module.generate_batch, refusals),
            "init_continuous_batching": _unshared(module),
        }
        before = {name: module.__dict__[name] for name in own if name in module.__dict__}
        handle = body.register_forward_pre_hook(before_call, with_kwargs=True)
        module.__dict__.update(own)
        try:
            yield
        finally:
            for name in own:
                del module.__dict__[name]
            module.__dict__.update(before)
            handle.remove()


def _announcing(original: Callable[..., Any], positions: Positions) -> Callable[..., Any]:
    """The model's `generate`, which tells the length of its prompt."""

    @functools.wraps(original)
    def generate(inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Compiled, a step would keep the steering of the moment it was compiled in, or its absence.
        kwargs.setdefault("disable_compile", True)
        with positions.answering(_prompt(inputs, kwargs)):
            return original(inputs, *args, **kwargs)

    return generate


def _prompt(inputs: Any, options: dict[str, Any]) -> Prompt:
    """The prompt of a call of `generate`, padding and what the cache holds of it included."""
    given = [options.get("inputs_embeds"), inputs, options.get("input_ids")]  # embeddings are read, whatever else is
    given = [value for value in given if value is not None]
    if not given:
        return Prompt(1, is_assumed=True)
    if not isinstance(given[0], torch.Tensor):
        raise InputError("give generate its prompts as a tensor (prompts, tokens): the model is steered")
    length = given[0].shape[1] if given[0].ndim > 1 else len(given[0])
    # With a cache, the prompt may be given without what the cache holds; the mask is always of the whole.
    mask = options.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and any(map(_holds_tokens, options.values())):
        return Prompt(max(length, mask.shape[-1]))
    return Prompt(length)


def _holds_tokens(value: Any) -> bool:
    return callable(getattr(value, "get_seq_length", None)) and length_of(value) > 0


def _reporting(original: Callable[..., Any], refusals: list[InputError]) -> Callable[..., Any]:
    """The model's `generate_batch`, which raises what was refused in the thread that calls the model."""

    @functools.wraps(original)
    def generate_batch(*args: Any, **kwargs: Any) -> Any:
        refusals.clear()
        answers = original(*args, **kwargs)
        if refusals:
            raise refusals[0]
        return answers

    return generate_batch


def _unshared(module: Any) -> Callable[..., Any]:
    """The model's `init_continuous_batching`, whose requests share no keys and values, in steps as they are written.

    A generated token's keys and values are steered, those of the same token in a prompt are not. What is compiled, or
    recorded as a CUDA graph, would keep the steering of that moment.
    """
    original = module.init_continuous_batching
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init_continuous_batching(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        options = call.arguments.get("continuous_batching_config")
        call.arguments["continuous_batching_config"] = unshared(options)
        config = call.arguments.get("generation_config") or module.generation_config
        if config.compile_config is not None:
            config = copy.copy(config)
            config.compile_config = None
        call.arguments["generation_config"] = config
        manager = original(*call.args, **call.kwargs)
        if not is_unshared(manager):
            raise InputError(
                "the model keeps a manager of generate_batch from before it was steered: call its "
                "destroy_cached_continuous_batching_manager() first"
            )
        return manager

    return init_continuous_batching


def _refuse_resumption() -> Callable[[], None]:
    """Keep requests that have lost their keys and values from going on; returns what allows it again.

    Their answers so far are read with their prompts, and then look alike.
    """
    RequestState = request_state()
    original = RequestState.create_equivalent_initial_request

    @functools.wraps(original)
    def create_equivalent_initial_request(self: Any) -> Any:
        if _resumption.refusals is not None and self.generated_tokens:
            refusal = InputError(
                "generate_batch has no room left for all its requests, and reads answers again as if they were "
                "prompts: give it fewer requests at once, or more blocks (ContinuousBatchingConfig.num_blocks)"
            )
            _resumption.refusals.append(refusal)
            raise refusal
        return original(self)

    def put_back() -> None:
        RequestState.create_equivalent_initial_request = original

    RequestState.create_equivalent_initial_request = create_equivalent_initial_request
    return put_back


_steered: SteeredModules[Positions] = SteeredModules(_refuse_resumption)
