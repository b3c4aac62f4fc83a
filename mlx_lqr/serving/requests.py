"""What is asked of the engine, and what it says while it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mlx_lqr.backends.protocol import Float32, Sampling, Scored
from mlx_lqr.methods.steering import Steering
from mlx_lqr.runtime.generate import Strength

Finish = Literal["stop", "length", "cancelled", "error"]
"""Why an answer ended: an end token or a stop string; `max_tokens`; `Ticket.cancel` or `Engine.close`; a failure."""


class Full(Exception):  # noqa: N818 - it says so itself
    """As many requests are waiting as may wait."""


@dataclass(frozen=True)
class PromptScores:
    """That the prompt's own tokens are to be scored, before it is answered. The answer is the same without it."""

    top: int = 0
    """How many of the likeliest tokens are told at each position"""
    steered_from: int = 0
    """The first position that is steered while they are scored; with positions "all", every one is."""


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be answered."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    steering: Steering | None = None
    """What steers, several controllers combined already; None: nothing does."""
    strength: Strength = None
    """One number for all concepts, or one for each; 0 does not steer. None is the recommended strength, or 1."""
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 256
    """0 where the prompt is scored alone."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    top_logprobs: int | None = None
    """With how many of the likeliest tokens each token's log-probability is told; None: it is not."""
    scores: PromptScores | None = None
    """Whether and how the prompt is scored"""
    track: bool = False
    """Whether the errors and |u_k| are told at each token; of A-LQR controllers alone."""


@dataclass(frozen=True)
class Tracking:
    """What a controller measured and did at one token, at its L active layers, for m concepts, in the residual stream's
    units."""

    layers: tuple[int, ...]
    concepts: tuple[str, ...]
    error: Float32
    """setpoint - feature: (L, m), NaN for a concept at strength 0"""
    push: Float32
    """|u_k|, of all concepts together: (L,)"""
    feature: Float32
    """beta_k at the input of block k: (L, m), NaN as above"""
    setpoint: Float32
    """See `Controller.setpoint_at`: (L, m)"""


@dataclass(frozen=True)
class Event:
    """One token of an answer. The last event has `finish`, and may have no token."""

    text: str
    """What the token completes; text that may begin a stop string is held back."""
    token: int | None = None
    logprob: float | None = None
    """log p of the token by the model's logits, before temperature and filters."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with theirs, likeliest first."""
    tracking: Tracking | None = None
    """At the pass that gave this token."""
    finish: Finish | None = None
    error: str | None = None
    """One line, with finish="error"."""
    scores: tuple[Scored | None, ...] | None = None
    """Of the prompt's tokens, None for the first: an event of its own, before those of tokens"""


OnEvent = Callable[[Event], None]
"""Called on the engine's thread; it must return at once."""


@dataclass(frozen=True)
class Stats:
    """What an engine is doing and has done so far."""

    running: int
    waiting: int
    prompt_tokens: int
    """Of all requests that have been started."""
    generated_tokens: int
    cached_tokens: int
    """Prompt tokens that need not be run, since an earlier request's states were reused."""
    finished: int
    cancelled: int
    failed: int
    side_by_side: bool
    """Whether the running answers share each pass of the model; else every one has passes of its own."""
