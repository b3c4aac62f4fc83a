"""A model that is spread over several processes, each on a machine of its own, started by `mlx.launch`.

    tensor      every process has a part of each weight, by mlx-lm's `shard`; inside each block their parts are summed
    pipeline    every process has some of the blocks; what its last one puts out goes to the others

All processes run the same calls in the same order. What leaves the model, as numbers or tokens, is one process's on all
of them: what they do next depends on it, and a machine of another kind may differ in the last digit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lqr import launched
from mlx_lqr.backends.mlx.blocks import ClassHooks
from mlx_lqr.backends.mlx.framework import MLXFramework
from mlx_lqr.backends.mlx.pipeline import Stages, place_stages
from mlx_lqr.backends.mlx.tensor_parallel import can_shard, shard
from mlx_lqr.backends.protocol import OVERFLOWED, Float32
from mlx_lqr.errors import InputError, first_line

Norms = Callable[[Sequence[nn.Module]], Iterable[tuple[str, bytes]]]
"""The norm weights of a model's blocks, by which its fingerprint is made"""


def joined(*, pipeline: bool) -> Spread:
    """How a model is to be spread over the processes that `mlx.launch` has started.

    Args:
        pipeline: by blocks, also where weights could be split.

    Raises:
        InputError: the other processes cannot be reached, or a pipeline of one.
    """
    if launched.count() == 1:
        raise InputError("a pipeline needs several machines: start this with mlx.launch, or leave --pipeline out")
    try:
        group = mx.distributed.init(strict=True)
    except RuntimeError as error:
        raise InputError(f"the other machines of mlx.launch cannot be reached: {first_line(error)}") from error
    return Spread(group, pipeline=pipeline)


class Spread:
    """How one model is spread over the processes of a group."""

    def __init__(self, group: mx.distributed.Group, *, pipeline: bool) -> None:
        self.rank, self.count = group.rank(), group.size()
        self.norms: list[tuple[str, bytes]] = []
        """Of the whole model's blocks."""
        self._group, self._pipeline = group, pipeline
        self._stages: Stages | None = None

    def place(self, module: nn.Module, blocks: Sequence[nn.Module], norms: Norms) -> None:
        """Leave in the module, whose weights have not been read yet, what this process is to have.

        Raises:
            InputError: a model that cannot be spread over so many.
        """
        self.norms = list(norms(blocks))
        if self._pipeline or not can_shard(module):
            self._stages = place_stages(module, blocks, self._group)
        else:
            shard(module, self._group)

    @property
    def name(self) -> str:
        """Tells measurements of a model that is spread in different ways apart."""
        return f"{'tensor' if self._stages is None else 'pipeline'} {self.count}"

    @property
    def is_pipeline(self) -> bool:
        return self._stages is not None

    @property
    def has_second_derivative(self) -> bool:
        """Not through a sum over processes, whose derivative MLX knows, but not the derivative of that."""
        return self._stages is not None

    def runs(self, block: nn.Module) -> bool:
        """Whether this process has the block, or a part of it."""
        return self._stages is None or self._stages.owner(block) == self.rank

    def given(self, block: nn.Module, state: mx.array) -> mx.array:
        """What a block is given, for a hook that is called before the block itself asks for it."""
        return state if self._stages is None else self._stages.before_hook(block, state)

    def here(self, layers: Iterable[int]) -> list[int]:
        """Those of these layers whose blocks this process runs."""
        return [k for k in layers if self._stages is None or self._stages.has(k)]

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Around passes of which each process needs its own blocks' states alone; rank 0 has the logits."""
        if self._stages is None:
            yield
            return
        self._stages.everywhere = False
        try:
            yield
        finally:
            self._stages.everywhere = True

    def left_to_compute(self) -> list[mx.array]:
        """What has to be computed with a pass's caches where its logits are not: others wait for it."""
        return [] if self._stages is None or self._stages.last is None else [self._stages.last]

    def first(self, array: np.ndarray) -> np.ndarray:
        """Rank 0's array, on all."""
        return self._of(0, array)

    def first_array(self, array: mx.array) -> mx.array:
        """Rank 0's array, on all, computed lazily."""
        own = array if self.rank == 0 else mx.depends(mx.zeros_like(array), array)
        return mx.distributed.all_sum(own, group=self._group)

    def agreed(self, tokens: mx.array) -> mx.array:
        """Rank 0's tokens (B,), on all, but `OVERFLOWED` where activations have overflowed on any."""
        overflowed = (tokens == OVERFLOWED).astype(tokens.dtype)
        own = tokens if self.rank == 0 else mx.zeros_like(tokens)
        summed = mx.distributed.all_sum(mx.stack([own, overflowed]), group=self._group)
        return mx.where(summed[1] > 0, OVERFLOWED, summed[0])

    def said(self, text: str | None) -> str | None:
        """Rank 0's text, on all."""
        written = json.dumps(text).encode() if self.rank == 0 else b""
        length = int(self._sum(np.array([len(written)], np.int32))[0])
        letters = np.frombuffer(written.ljust(length), np.uint8).astype(np.int32) if self.rank == 0 else None
        summed = self._sum(letters if letters is not None else np.zeros(length, np.int32))
        said: str | None = json.loads(summed.astype(np.uint8).tobytes())
        return said

    def union(self, numbers: Iterable[int], limit: int) -> list[int]:
        """The numbers, below the limit, of all processes together."""
        flags = np.zeros(limit, np.int32)
        flags[list(numbers)] = 1
        return np.flatnonzero(self._sum(flags)).tolist()

    def of_owner(self, block: nn.Module, compute: Callable[[], Float32], shape: tuple[int, ...]) -> Float32:
        """What `compute` gives, an array of this shape, where the block is.

        Raises:
            RuntimeError: it failed there.
        """
        if self._stages is None:
            return self.first(compute())
        owner, failure, result = self._stages.owner(block), None, np.zeros(shape, np.float32)
        if owner == self.rank:
            try:
                with self._stages.alone():
                    result = compute()
            except Exception as error:
                failure = error
        if self._sum(np.array([failure is not None], np.int32))[0]:
            raise failure or RuntimeError(f"rank {owner} failed")
        return self._of(owner, result)

    def _of(self, rank: int, array: np.ndarray) -> np.ndarray:
        return self._sum(array if self.rank == rank else np.zeros_like(array))

    def _sum(self, array: np.ndarray) -> np.ndarray:
        """On the CPU's stream, since a GPU is not left waiting for another machine."""
        return np.asarray(mx.distributed.all_sum(mx.array(array), group=self._group, stream=mx.cpu))

    def framework(self, dtype: mx.Dtype, hooks: type[ClassHooks]) -> MLXFramework:
        """MLX, but what leaves it is rank 0's on all."""
        return _Framework(self, dtype, hooks)


class _Framework(MLXFramework):
    def __init__(self, spread: Spread, dtype: mx.Dtype, hooks: type[ClassHooks]) -> None:
        super().__init__(dtype, hooks)
        self._spread = spread

    def numpy(self, array: mx.array) -> Float32:
        return self._spread.first(super().numpy(array))

    def is_finite(self, array: mx.array) -> bool:
        return bool(self._spread.first(np.array([super().is_finite(array)], np.int32))[0])
