"""What a backend must do, and no more. A further backend is one new file that satisfies `Model`.

Shapes: T blocks, width d, vocabulary V. Residual stream: z_0 is the (scaled) embedding, z_k the input of block k, z_T
the output of the last block before the final norm. `Array` stands for the backend's own tensor type, which crosses this
interface only from one call of the backend to the next; results meant for others are NumPy arrays in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_lqr.backends.tokenizer import Tokenizer
from mlx_lqr.errors import InputError

Array = Any
Float32 = NDArray[np.float32]
Progress = Callable[[str, int, int], None]
"""progress(stage, done, total): how the library reports long work; it prints nothing itself."""


class Law(Protocol):
    """A control law, written once for every backend in operators that MLX arrays and torch tensors share."""

    layers: Sequence[int]
    """The layers where the law acts."""

    def place(self, array: Callable[[np.ndarray], Array]) -> Law:
        """The same law with its arrays made by `array`, the backend's constructor."""

    def __call__(self, layer: int, z: Array) -> Array:
        """u_k (..., d) for the residual stream z_k (..., d) at the input of block k = `layer`."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits. Temperature 0 takes the most likely token."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature must be zero or above, not {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, not {self.top_p!r}")
        if not 0 <= self.min_p < 1:
            raise InputError(f"min_p must be at least 0 and below 1, not {self.min_p!r}")
        if self.top_k < 0:
            raise InputError(f"top_k must be zero (off) or above, not {self.top_k!r}")
        if self.seed is not None and self.seed < 0:
            raise InputError(f"seed must be zero or above, not {self.seed!r}")


GREEDY = Sampling()


class Trace(Protocol):
    """One prompt run up to its last token: all that the Jacobians at that token depend on, opaque but for z."""

    @property
    def residual(self) -> Float32:
        """z_0..z_T at the last token: (T + 1, d)."""


class Decoder(Protocol):
    """One sequence being decoded: a KV cache and, maybe, a law. Nothing else of the model is touched between calls."""

    position: int
    """How many tokens the cache holds."""

    def prefill(self, tokens: Sequence[int], *, steer_from: int) -> Array:
        """Run `tokens` and return the next token's logits (V,); positions below `steer_from` (an index into `tokens`)
        are not steered."""

    def step(self, token: Array) -> Array:
        """Append one token (as `sample` returned it), steered, and return the next token's logits (V,)."""

    def sample(self, logits: Array) -> Array:
        """Draw a token from logits (V,) and start computing it; `int(token)` waits for it."""


class Model(Protocol):
    """A language model with one dense residual stream."""

    name: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    context_length: int

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def fingerprint(self) -> str:
        """Tells models apart by their trained norm weights; the same for every dtype and quantisation of one model."""

    def residuals(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        law: Law | None = None,
        steer_all: bool = False,
        progress: Progress | None = None,
    ) -> Float32:
        """z_0..z_T at the last token of each prompt: (n, T + 1, d)."""

    def logits(self, tokens: Sequence[int], *, law: Law | None = None, steer_all: bool = False) -> Float32:
        """Next-token logits (V,) after `tokens`, steered at the last position or at all of them."""

    def log_probability(
        self, prompt: Sequence[int], continuation: Sequence[int], *, law: Law | None = None, steer_all: bool = False
    ) -> Float32:
        """log p of each token of `continuation` after `prompt` and the tokens before it: (len(continuation),)."""

    def trace(self, tokens: Sequence[int]) -> Trace:
        """Run a prompt and keep what the Jacobians at its last token need."""

    def jacobian(self, trace: Any, layer: int) -> Float32:
        """A_k = d phi_k / d z_k at the trace's last token, k = `layer`: (d, d)."""

    def jvp(self, trace: Any, layer: int, tangents: Float32) -> Float32:
        """A_k w for each row w of `tangents` (n, d), without forming A_k: (n, d)."""

    def vjp(self, trace: Any, layer: int, cotangents: Float32) -> Float32:
        """A_k' w for each row w of `cotangents` (n, d), without forming A_k: (n, d)."""

    def decoder(self, law: Law | None = None, sampling: Sampling = GREEDY) -> Decoder:
        """An empty sequence to decode."""

    def steer(self, law: Law, *, steer_all: bool) -> AbstractContextManager[None]:
        """Inside the block, calls of the framework's own model object and of its generation functions are steered."""
