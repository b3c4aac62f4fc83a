"""Which positions to steer when transformers' own `generate`, and not ours, calls the model.

A forward call does not tell whether its last position is the last of the prompt: a prompt may be read in chunks, and
assisted decoding checks several generated tokens at once. So while a model is steered, its `generate` announces the
length of the prompt, and the cache that a call comes with says where the call's tokens stand.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mlx_lqr.errors import InputError


class Positions(threading.local):
    """How many leading positions of the current call are not steered; each thread has calls, and so values, of its own.

    transformers' streamers are mostly used with `generate` in another thread than the one that steers the model.
    """

    def __init__(self, steer_all: bool) -> None:
        self.unsteered = 0
        self._steer_all = steer_all
        self._prompt: int | None = None

    def begin(self, length: int, before: int) -> None:
        """A call of the model with `length` positions starts, after `before` that the cache holds."""
        if self._steer_all:
            self.unsteered = 0
        elif self._prompt is None:  # called by nobody we know: take each call for a whole prompt, or for one step
            self.unsteered = length - 1
        else:
            self.unsteered = min(length, max(0, self._prompt - 1 - before))

    @contextmanager
    def answering(self, prompt: int) -> Iterator[None]:
        """Calls inside this context are of a prompt of this many tokens, padding included, and of what follows it."""
        before = self._prompt
        if before is None:  # else a model that drafts for itself: what it calls a prompt is half of it an answer
            self._prompt = prompt
        try:
            yield
        finally:
            self._prompt = before


_steered: set[int] = set()
"""The modules steered at present, by id."""
_lock = threading.Lock()


@contextmanager
def announcing_prompts(module: Any, positions: Positions) -> Iterator[None]:
    """Inside this context, `module.generate` and every call of the module announce themselves to `positions`.

    Raises:
        InputError: the model is steered already.
    """
    with _lock:
        if id(module) in _steered:
            raise InputError("the model is already steered: combine the controllers (Controller.combine)")
        _steered.add(id(module))
    own = module.__dict__.get("generate")
    original = module.generate

    @functools.wraps(original)
    def generate(inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Compiled, a step would keep the steering of the moment it was compiled in, or its absence.
        kwargs.setdefault("disable_compile", True)
        with positions.answering(_length(inputs, kwargs)):
            return original(inputs, *args, **kwargs)

    def before_call(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        cache = kwargs.get("past_key_values")
        positions.begin(tokens.shape[1], int(cache.get_seq_length()) if cache is not None else 0)

    handle = module.base_model.register_forward_pre_hook(before_call, with_kwargs=True)
    module.__dict__["generate"] = generate
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["generate"]
        else:
            module.__dict__["generate"] = own
        handle.remove()
        with _lock:
            _steered.discard(id(module))


def _length(inputs: Any, options: dict[str, Any]) -> int:
    """How long the prompt of a call of `generate` is, padding and what the cache holds of it included."""
    given = [inputs, options.get("input_ids"), options.get("inputs_embeds")]
    prompt = next((tensor for tensor in given if isinstance(tensor, torch.Tensor)), None)
    length = 1 if prompt is None else prompt.shape[1]
    # With a cache, the prompt may be given without what the cache holds; the mask is always of the whole.
    mask = options.get("attention_mask")
    if options.get("past_key_values") is not None and isinstance(mask, torch.Tensor):
        return max(length, mask.shape[-1])
    return length
