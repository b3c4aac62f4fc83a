"""The few operations that MLX and torch name differently; all that both do is written once upon these.

Everything else that `hooked_model.py` and `hooked_decoder.py` need of an array, MLX's and torch's have in common:
arithmetic, comparison, indexing, `sum`, `shape`, `tolist`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import numpy as np

from mlx_lqr.backends.hooks import UNSTEERED, BlockHooks, Hook, LawHooks
from mlx_lqr.backends.protocol import Array, Float32, Law
from mlx_lqr.backends.turn import Turn


class Framework(ABC):
    """A tensor framework as one model uses it: on the model's device, in the dtype of its residual stream."""

    hooks: type[BlockHooks]
    """How hooks are placed on this framework's modules."""
    turn: ClassVar[Turn]
    """Held by the one thread that computes, one after another. For the time of a pass, hooks stand in
    modules that threads share, and settings that the framework has for the whole process are others."""

    @property
    @abstractmethod
    def device_name(self) -> str:
        """What computes, as a person would call it."""

    @property
    @abstractmethod
    def dtype_name(self) -> str:
        """Of the residual stream, as "bfloat16"."""

    @abstractmethod
    def floats(self, values: np.ndarray) -> Array:
        """An array in the dtype of the residual stream."""

    @abstractmethod
    def renewed(self, array: Array, values: np.ndarray) -> Array:
        """An array that `floats` has made, with other values."""

    def place(self, law: Law | None) -> Any:
        """The law with arrays that `floats` makes."""
        return None if law is None else law.to(self.floats, self.add_product, renew=self.renewed)

    @abstractmethod
    def integers(self, numbers: Any) -> Array:
        """An array of integers, such as token ids, from nested lists."""

    @abstractmethod
    def tokens(self, tokens: Array | Sequence[int]) -> Array:
        """Token ids (B,) to go on with. One may be `OVERFLOWED`, and stands for any: what follows it is not used."""

    @abstractmethod
    def arange(self, count: int) -> Array: ...

    @abstractmethod
    def none_seen(self, rows: int, vocabulary: int) -> Array:
        """False everywhere: (rows, vocabulary)."""

    @abstractmethod
    def added(self, array: Array, columns: Array, values: Array) -> Array:
        """The array (B, V), in float32, with values (B, n) added in these columns (B, n); a column may come twice."""

    @abstractmethod
    def float32(self, array: Array) -> Array: ...

    @abstractmethod
    def numpy(self, array: Array) -> Float32: ...

    @abstractmethod
    def stack(self, arrays: Sequence[Array], axis: int) -> Array: ...

    @abstractmethod
    def concatenate(self, arrays: Sequence[Array], axis: int) -> Array: ...

    @abstractmethod
    def where(self, condition: Array, a: Array, b: Array | int) -> Array: ...

    @abstractmethod
    def add_product(self, c: Array, a: Array, b: Array) -> Array:
        """c + a @ b, in one operation."""

    @abstractmethod
    def energy(self, z: Array) -> Array:
        """|z|^2 (...) of activations (..., d), in float32."""

    @abstractmethod
    def is_finite(self, array: Array) -> bool: ...

    @abstractmethod
    def log_probabilities(self, logits: Array, tokens: Sequence[int]) -> Float32:
        """log p (n,) of token i by logits (n, V)."""

    @abstractmethod
    def likeliest(self, logits: Array, count: int) -> tuple[Array, Array]:
        """The numbers (n, count) of the largest of logits (n, V), the largest first, and their log p."""

    @abstractmethod
    def compute(self, arrays: Iterable[Array]) -> None:
        """Compute now what a framework may have left for later, so that less is held in memory."""

    @abstractmethod
    def start(self, arrays: Iterable[Array]) -> None:
        """Start to compute, without waiting for it."""

    def leave_thread(self) -> None:  # noqa: B027 - most frameworks keep nothing
        """Let go of what the framework keeps for the calling thread, which is about to end."""

    @abstractmethod
    def computing(self, what: str) -> AbstractContextManager[object]:
        """Around all that is computed: no other thread computes (`turn`), and nothing takes derivatives; running out of
        memory for `what` is an `InputError`."""

    @contextmanager
    def running(self, blocks: Sequence[Any], what: str) -> Iterator[None]:
        """`computing` with a model's blocks.

        Raises:
            InputError: the model is being steered in place.
        """
        with self.computing(what):
            self.hooks.refuse(blocks[0])
            yield

    def hooked(
        self, blocks: Sequence[Any], hook: Hook, layers: Iterable[int], law: LawHooks = UNSTEERED
    ) -> AbstractContextManager[None]:
        """Inside this context every call of the blocks at `layers` goes through `hook` (see `BlockHooks`)."""
        return self.hooks(blocks, hook, layers, law).placed()
