"""What the library asks of a language model: capabilities, from what every backend has to what only some have.

    Runner          tokenises, decodes, is steered in place                     generate, chat, serve, steer
    Recorder        also gives residual streams and log-probabilities           contrast, evaluation, most methods
    HeadRecorder    also gives what attention heads put out                     fitting ITI
    Differentiable  also gives traces, Jacobians and products with them         linearize, fit, adapt, certify

A function names the least that it needs; where a caller may come with less, it asks `capabilities.require` first. A
further backend is one folder with the capabilities it has, and its name in `registry.py`. A backend that runs a model's
own modules, as MLX and torch do, inherits most of them (`hooked_model.py`).

Shapes: T blocks, width d, vocabulary V. Residual stream: z_0 is the (scaled) embedding, z_k the input of block k, z_T
the output of the last block before the final norm. In some models blocks hand on more at a token, as keys and values
that later layers attend to as well; the state of the linear system is then s_k = (z_k, side_k) in R^(d + m), with zeros
in side_k where nothing is handed on. Elsewhere m = 0 and s_k = z_k.

`Array` stands for the backend's own tensor type, which crosses this interface only from one call of the backend to the
next; results meant for others are NumPy arrays in float32.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mlx_lqr.backends.description import Description
from mlx_lqr.backends.measurement import Measurement
from mlx_lqr.backends.text.text_tokenizer import TextTokenizer
from mlx_lqr.errors import InputError, OverflowingError

Array = Any
Matrix = NDArray[np.floating]
Float32 = NDArray[np.float32]
AddProduct = Callable[[Array, Array, Array], Array]
"""(c, a, b) -> c + a @ b, in one operation where the backend has one."""
Continued = tuple[Sequence[int], Sequence[int]]
"""Token ids: a prompt, and what follows it."""
Scored = tuple[float, tuple[tuple[int, float], ...]]
"""log p of a token, and the likeliest tokens with theirs, likeliest first."""
Renew = Callable[[Array, np.ndarray], Array]
"""(array, values) -> an array of these values, maybe the same one with its values exchanged."""
Progress = Callable[[str, int, int], None]
"""progress(stage, done, total): how the library reports long work; it prints nothing itself."""
ADAPTED = " + adapter "
"""Between the name of a model and that of the adapter that it runs with"""
Site = Literal["block", "attention"]
"""What a law changes: a block's output, or that of its attention's output projection, before a norm or the sum with the
residual stream."""


class Law(Protocol):
    """A control law, written once for every backend in operators that MLX arrays and torch tensors share."""

    layers: Sequence[int]
    """The layers where the law acts."""
    site: Site
    """What it acts upon there."""
    replayable: bool
    """Whether a call does nothing but compute, so that its operations may be recorded once and replayed."""

    def to(self, array: Callable[[np.ndarray], Array], add_product: AddProduct, *, renew: Renew | None = None) -> Law:
        """The same law with its arrays made by `array`, the backend's constructor, and its way to form c + a @ b.

        It asks for all its arrays at once, always in the same order. An array that changes is made again by `array`, or
        by `renew` from the one before it.
        """

    @property
    def acts(self) -> bool:
        """Whether a call changes anything at present. Operations recorded while it does are not replayed while it does
        not, nor the other way round."""

    def aim(self) -> None:
        """Take over what has been set since the last call; for backends that replay the operations of a call."""

    def __call__(self, layer: int, z: Array, output: Array) -> Array:
        """output + u_k (..., d) for the residual stream z_k (..., d) at the input of block k = `layer`.

        At the site "attention", z is what its heads put out side by side, (..., heads * head_dim), and output (..., d)
        their projection.
        """


@runtime_checkable
class CarryingLaw(Law, Protocol):
    """A law that carries something from one token to the next, a row for each sequence decoded side by side.

    It is not replayable, and a pass of several positions is of one token each (only the last of them is steered).
    """

    def restart(self) -> None:
        """The next pass is the first of another prompt."""

    def keep(self, rows: Array) -> None:
        """Go on with these rows, given as an index array of the backend."""


@runtime_checkable
class StackableLaw(Law, Protocol):
    """A law that can steer sequences decoded side by side in one operation, each with other numbers."""

    def stacked(self, laws: Sequence[Any]) -> Law:
        """The law for a batch that steers row i as `laws[i]` does, a law with this very method, or None for not.

        It follows the strengths of these laws.
        """


@dataclass(frozen=True)
class Affine:
    """What an affine law does at one layer: u = (target - z R - y S) G' is added, with z and y the law's arguments.

    At the site "block" these are the block's input and output, both (d,).

    All arrays are float32, for the m numbers that are measured.
    """

    target: Float32
    """(m,)"""
    gain: Float32
    """G: (d, m)"""
    read_input: Float32 | None = None
    """R: (d, m); None where z plays no part"""
    read_output: Float32 | None = None
    """S: (d, m); None where y plays no part"""


@runtime_checkable
class AffineLaw(Law, Protocol):
    """A law whose numbers an engine can take over, to evaluate it without calling it."""

    def affine(self) -> Mapping[int, Affine] | None:
        """By layer what it does at present, nothing where it does not act; None where only a call can tell.

        The very same mapping as before as long as nothing has been set.
        """


def restart(law: Law | None) -> None:
    """Tell a law, if it is of the kind that has to know, that another prompt begins."""
    if isinstance(law, CarryingLaw):
        law.restart()


RECENT = 64
"""Tokens that the frequency and presence penalties look back on, as llama.cpp does."""
FREQUENCY_PENALTY = 0.3
"""Keeps long steered answers out of loops and costs no facts (docs/guide/generate.md)."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    These defaults are those of everything that writes text: commands, runtime, Python functions and tasks.
    """

    temperature: float = 0.8
    """0 takes the most likely token, whatever the filters are."""
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Divides the positive logits of every token that has been seen, in the prompt too, and multiplies the negative."""
    frequency_penalty: float | None = None
    """Subtracted from a token's logit for each time that it is among the last `RECENT` drawn (-2 to 2); the prompt does
    not count. None: `FREQUENCY_PENALTY`, and nothing at temperature 0."""
    presence_penalty: float = 0.0
    """Subtracted once where it is among them at all (-2 to 2)."""
    seed: int | None = None
    """Sequence i of a batch is drawn with `seed` + i, as it would be alone. None: with a new one each time."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature must be zero or above, not {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, not {self.top_p!r}")
        if not 0 <= self.min_p < 1:
            raise InputError(f"min_p must be at least 0 and below 1, not {self.min_p!r}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise InputError(f"repetition_penalty must be above zero (1 is none), not {self.repetition_penalty!r}")
        for name, penalty in (("frequency_penalty", self.frequency), ("presence_penalty", self.presence_penalty)):
            if not -2 <= penalty <= 2:
                raise InputError(f"{name} must be between -2 and 2 (0 is none), not {penalty!r}")
        if self.top_k < 0:
            raise InputError(f"top_k must be zero (off) or above, not {self.top_k!r}")
        if self.seed is not None and self.seed < 0:
            raise InputError(f"seed must be zero or above, not {self.seed!r}")

    @property
    def frequency(self) -> float:
        """The frequency penalty that holds: the one that is given, or the default for this temperature."""
        if self.frequency_penalty is not None:
            return self.frequency_penalty
        return FREQUENCY_PENALTY if self.temperature > 0 else 0.0


GREEDY = Sampling(temperature=0.0)
LEAST_TEMPERATURE = 1e-30
"""Lower ones draw as this one does, the most likely token; float32 has no such small numbers."""


def fresh_seed() -> int:
    """A seed that no other call gives, for draws that need not be repeated."""
    return secrets.randbits(32)


class LinearAlgebra(Protocol):
    """Square matrices of some array library, which has the operators `@ + - * .T` in common with NumPy."""

    def computing(self) -> AbstractContextManager[None]:
        """Around all that is done with matrices: a failure to get memory for them leaves it as an `InputError`."""

    def matrix(self, values: Matrix, dtype: DTypeLike) -> Any:
        """The values (d, d) as a matrix of this library, in float64 or float32."""

    def numpy(self, matrix: Any) -> Matrix:
        """A matrix as a NumPy array."""

    def is_finite(self, matrix: Any) -> bool:
        """Whether every value is finite."""

    def add_to_diagonal(self, matrix: Any, value: float) -> None:
        """Add a number to every diagonal element, in place."""

    def inverse(self, matrix: Any) -> tuple[Any, float]:
        """The inverse of a symmetric positive definite matrix, and its reciprocal condition number in the 1-norm.

        The latter is 0 where the matrix is not positive definite; then the former means nothing. The matrix itself may
        be overwritten.
        """


class Trace(Protocol):
    """One prompt run up to its last token: all that the Jacobians at that token depend on, opaque but for z."""

    @property
    def residual(self) -> Float32:
        """z_0..z_T at the last token: (T + 1, d)."""

    @property
    def state(self) -> Float32:
        """s_0..s_T at the last token: (T + 1, d + m)."""


class Decoder(Protocol):
    """B sequences decoded side by side: a KV cache and, maybe, a law. Between calls nothing of the model is changed.

    A prompt is all but its last token through `fill`, then its last token through `step`, like every token after it.
    """

    law: Law | None
    """What steers; it may be exchanged between two calls."""
    sampling: Sampling
    """How tokens are drawn; setting it restarts the random numbers."""

    @property
    def position(self) -> int:
        """How many tokens the cache holds, of the longest sequence."""

    def fill(self, prompts: Sequence[Sequence[int]], *, steered: bool) -> None:
        """Append tokens to the sequences, as many prompts as there are sequences; the first call says how many.

        A decoder of a single sequence may be filled again.
        """

    def step(self, tokens: Array | Sequence[int]) -> Array:
        """Append one token (B,) to each sequence, steered, and return the next tokens' logits (B, V)."""

    def logits_along(self, tokens: Sequence[int], *, steered: bool) -> Float32:
        """Append tokens to a single sequence, all of them steered or none, and return the next token's logits after
        each of them: (L, V), NaN where activations or logits have overflowed.

        One token at a time for a `CarryingLaw` that steers.
        """

    def sample(self, logits: Array) -> Array:
        """Draw tokens (B,) from a step's logits (B, V) and start computing them; `.tolist()` waits for them.

        A sequence whose activations or logits have overflowed gets `OVERFLOWED` for a token.
        """

    def log_probabilities(self, logits: Array, tokens: Array, top: int) -> list[Scored]:
        """log p of each drawn token (B,), and the `top` likeliest tokens with theirs, by a step's logits (B, V) as the
        model gives them, whatever the sampling is. Waits for them."""

    def keep(self, rows: Sequence[int], tokens: Array | Sequence[int]) -> Array:
        """Go on with these sequences alone; returns their `tokens`."""

    def join(self, other: Any, tokens: Array | Sequence[int], others: Array | Sequence[int]) -> Array:
        """Append the sequences of another decoder of this model, each with its own law and sampling; returns the
        `tokens` of these sequences and of the `others`. The other decoder is of no use any more.

        Raises:
            InputError: one of them rolls its context, or several sequences share a `CarryingLaw`.
        """

    def apart(self, row: int) -> Any:
        """A decoder with a copy of what is held of one sequence, without law; this one stays as it is."""

    @property
    def failures(self) -> Mapping[int, Exception]:
        """By sequence, why its own law has failed in the last step, which has left it unsteered; others go on."""

    @property
    def shares_passes(self) -> bool:
        """Whether sequences that join run in one pass of the model; else each has passes of its own."""

    @property
    def fills_in_parts(self) -> bool:
        """Whether to fill a single sequence bit by bit takes no longer than at once."""

    def rewind(self, position: int) -> bool:
        """Forget what a single sequence holds beyond its first `position` tokens; False where this cannot be done."""

    def overflow(self, tokens: Sequence[int], first: int) -> OverflowingError:
        """Run a single sequence, steered from position `first` on, and name the first layer whose output overflows.

        For a new decoder, and for a sequence that is known to overflow.
        """


class TracingDecoder(Decoder, Protocol):
    """A decoder of a `Differentiable` model."""

    def trace(self, token: int) -> Trace:
        """What the Jacobians at `token` depend on, after what a single sequence holds; it is not appended."""


OVERFLOWED = -1


class Runner(Protocol):
    """A language model with one dense residual stream, which decodes text and is steered while it does."""

    backend: str
    """The name under which its backend is registered."""
    name: str
    family: str
    """Its architecture, by the name that its config.json has for it (`model_type`) or its GGUF file."""
    num_layers: int
    hidden_size: int
    vocab_size: int
    context_length: int

    @property
    def tokenizer(self) -> TextTokenizer: ...

    @property
    def fingerprint(self) -> str:
        """Tells models apart by their trained norm weights; the same for every dtype and quantisation of one model."""

    @property
    def description(self) -> Description:
        """The device, the dtype and the size."""

    def decoder(self, law: Law | None = None, sampling: Sampling = GREEDY, *, rolling: bool = False) -> Decoder:
        """A decoder without any tokens. A `rolling` one forgets the oldest but a few where the context is full."""

    def leave_thread(self) -> None:
        """Let go of what is kept for the calling thread, which has computed with the model and is about to end."""

    def steer(self, law: Law, *, steer_all: bool) -> AbstractContextManager[None]:
        """Inside the block, calls of the framework's own model object and of its generation functions are steered."""


@dataclass(frozen=True, eq=False)
class Kept:
    """What a `Recorder` keeps between calls with the same pairs, whatever steers from block `layer` on."""

    layer: int
    inputs: dict[Any, Array] = field(default_factory=dict)
    """The residual streams at the input of that block, by what was read"""
    beginning: list[tuple[Any, Any]] = field(default_factory=list)
    """Tokens that all sequences begin with, and what all blocks keep of them, unsteered; then, where the last pass had
    several beginnings, these, and what blocks keep of them"""


class Recorder(Runner, Protocol):
    """A model that shows what it computes on the way from tokens to logits.

    No number that it returns is infinite or NaN: every method raises `OverflowingError`, which names the layer, where
    activations or logits overflow.
    """

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

    def log_probabilities(
        self,
        pairs: Sequence[Continued],
        *,
        law: Law | None = None,
        steer_all: bool = False,
        kept: Kept | None = None,
    ) -> list[Float32]:
        """log p of each token of a continuation after its prompt and the tokens before it: (n,) for n tokens each.

        Args:
            kept: as for `logits_along`.
        """

    def logits_along(
        self,
        pairs: Sequence[Continued],
        *,
        law: Law | None = None,
        steer_all: bool = False,
        kept: Kept | None = None,
    ) -> list[Float32]:
        """Next-token logits at a prompt's last token and at each of its continuation's n tokens: (1 + n, V) each.

        Args:
            kept: of calls with the same pairs, which run the blocks before its layer once. A law that acts earlier, and
                a model that cannot, leave it as it is.
        """


class HeadRecorder(Recorder, Protocol):
    """A model that shows the heads of its attention too.

    `head_outputs` raises `OverflowingError` as the methods of a `Recorder` do.
    """

    def head_outputs(self, prompts: Sequence[Sequence[int]], *, progress: Progress | None = None) -> Float32:
        """What each attention head of each block puts out at the last token of each prompt, before the projection:
        (n, T, heads, head_dim)."""

    def projected(self, layer: int, heads: Float32) -> Float32:
        """Block `layer`'s output projection, without its bias, of rows of `heads` (n, heads * head_dim): (n, d)."""


class Differentiable(Recorder, Protocol):
    """A model whose blocks can be differentiated at a prompt's last token."""

    @property
    def algebra(self) -> LinearAlgebra | None:
        """Where the Riccati recursion is to run for this model; None for NumPy."""

    @property
    def state_size(self) -> int:
        """d + m: the hidden size, and how many numbers blocks hand on beside the residual stream."""

    def trace(self, tokens: Sequence[int]) -> Trace:
        """Run a prompt and keep what the Jacobians at its last token need."""

    def traces(self, prompts: Iterable[Sequence[int]]) -> Iterator[Trace]:
        """`trace` of each prompt. What one begins with as the one before it did is not read again."""

    def measure(self) -> Measurement:
        """How right its derivatives are, by the model's own response. Takes as long as a few dozen tokens."""

    def block(self, trace: Any, layer: int, s: Float32) -> Float32:
        """phi_k(s) for each row of s (n, d + m), in place of s_k at the trace's last token, the past frozen:
        (n, d + m)."""

    def jacobian(self, trace: Any, layer: int) -> Float32:
        """A_k = d phi_k / d s_k at the trace's last token, k = `layer`: (d + m, d + m)."""

    def jvp(self, trace: Any, layer: int, tangents: Float32) -> Float32:
        """A_k w for each row w of `tangents` (n, d + m), without forming A_k: (n, d + m)."""

    def vjp(self, trace: Any, layer: int, cotangents: Float32) -> Float32:
        """A_k' w for each row w of `cotangents` (n, d + m), without forming A_k: (n, d + m)."""

    def decoder(self, law: Law | None = None, sampling: Sampling = GREEDY, *, rolling: bool = False) -> TracingDecoder:
        """See `Runner`."""


class Model(Differentiable, HeadRecorder, Protocol):
    """A model with every capability, as those of MLX and torch are."""
