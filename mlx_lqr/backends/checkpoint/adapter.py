"""A LoRA adapter: what it makes of a model's weights, whatever tool wrote it and whatever backend runs it.

    W  ->  W + up down                       LoRA; up carries the scale
    W  ->  m (W + up down) / |W + up down|   DoRA; the norm is of each row
    W  ->  a weight of the adapter's own     a layer that was trained whole

Weights go by the names of Hugging Face's checkpoints; the experts of a layer are one weight (E, rows, columns) under
`mlp.experts.NAME.weight`. `canonical` makes these names of others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_lqr.errors import InputError

Weight = NDArray[np.float32]
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_UNTIED = "merge it into a copy of the model with a head of its own (tie_word_embeddings false)"


@dataclass(frozen=True, eq=False)
class Change:
    """What becomes of one weight of shape (rows, columns), or (E, rows, columns) for experts."""

    replacement: Weight | None = None
    """A weight, or a bias, in place of the model's"""
    up: Weight | None = None
    """(rows, r) or (E, rows, r)"""
    down: Weight | None = None
    """(r, columns) or (E, r, columns)"""
    magnitude: Weight | None = None
    """(rows,): the norm of each row afterwards"""
    experts: tuple[int, ...] | None = None
    """Which experts the E of `up` and `down` are; None for all of them"""

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the weight that it changes, without the number of experts where it changes some of them."""
        if self.up is None or self.down is None:
            return None if self.replacement is None else self.replacement.shape
        shape = (*self.up.shape[:-1], self.down.shape[-1])
        return shape if self.experts is None else shape[1:]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it can change a weight of this shape."""
        if self.experts is not None and (len(shape) != 3 or max(self.experts) >= shape[0]):
            return False
        if self.replacement is not None and self.replacement.shape != shape:
            return False
        if self.magnitude is not None and self.magnitude.shape != shape[:1]:
            return False
        return self.shape == (shape if self.experts is None else shape[1:])

    @property
    def transposed(self) -> Change:
        """The same change of a weight that has been taken for its transpose."""
        if self.up is None or self.down is None:
            return self
        return replace(self, up=self.down.swapaxes(-1, -2), down=self.up.swapaxes(-1, -2))

    def of_all_experts(self, count: int) -> Change:
        """The same change with `up` and `down` of all experts, zero for those that it leaves alone."""
        if self.experts is None or self.up is None or self.down is None:
            return self
        up = np.zeros((count, *self.up.shape[1:]), np.float32)
        down = np.zeros((count, *self.down.shape[1:]), np.float32)
        up[list(self.experts)], down[list(self.experts)] = self.up, self.down
        return replace(self, up=up, down=down, experts=None)

    def applied(self, weight: Any, array: Callable[[Weight], Any]) -> Any:
        """The changed weight.

        Args:
            weight: the framework's, in float32.
            array: makes a framework's array of a NumPy one.
        """
        change = self.of_all_experts(weight.shape[0])
        if change.replacement is not None:
            weight = array(change.replacement)
        if change.up is not None and change.down is not None:
            weight = weight + array(change.up) @ array(change.down)
        if change.magnitude is not None:
            weight = weight * (array(change.magnitude) / (weight * weight).sum(-1) ** 0.5)[:, None]
        return weight


@dataclass(frozen=True, eq=False)
class Adapter:
    """What an adapter's folder says."""

    name: str
    changes: Mapping[str, Change]
    """By the names of the weights"""
    base: str | None
    """The model that it was trained on, as its config names it"""
    is_peft: bool = False
    """Whether PEFT wrote it, which adapts embeddings and head apart, even where a model has one weight for both"""

    @property
    def digest(self) -> str:
        """What tells adapters apart: the same for one adapter in both formats."""
        digest = hashlib.sha256()
        for name, change in sorted(self.changes.items()):
            digest.update(f"{name} {change.experts}".encode())
            for part in (change.replacement, change.up, change.down, change.magnitude):
                digest.update(b"-" if part is None else np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()[:16]

    def changes_for(
        self, shapes: Mapping[str, tuple[int, ...]], *, tied: bool, embeddings: str = EMBEDDINGS
    ) -> Mapping[str, Change]:
        """The changes, once it is sure that they are of this model.

        Args:
            shapes: of all of the model's weights, by name.
            tied: whether the embeddings are the head too.
            embeddings: their name.

        Raises:
            InputError: the adapter is another model's, or it wants two weights where the model has one.
        """
        changes = self._tied(embeddings) if tied else self.changes
        for name, change in changes.items():
            if name not in shapes:
                raise InputError(f"the adapter {self.name} changes {name}, which this model has not: {self._way_out}")
            if not change.fits(shapes[name]):
                raise InputError(
                    f"the adapter {self.name} is for a {name} of shape {change.shape}, but this model's is "
                    f"{shapes[name]}: {self._way_out}"
                )
        return changes

    @property
    def _way_out(self) -> str:
        return f"load the model that it was trained on{f' ({self.base})' if self.base else ''}"

    def _tied(self, name: str) -> Mapping[str, Change]:
        """The changes of a model whose embeddings, of this name, are its head."""
        embeddings, head = self.changes.get(name), self.changes.get(HEAD)
        if head is not None:
            if embeddings is None or not _is_same_weight(embeddings, head):
                raise InputError(
                    f"the adapter {self.name} changes lm_head, which in this model is the embeddings too: {_UNTIED}"
                )
            return {name: change for name, change in self.changes.items() if name != HEAD}
        if embeddings is not None and self.is_peft:
            raise InputError(
                f"the adapter {self.name} changes embed_tokens, which in this model is the head too, and PEFT leaves "
                f"the head as it was: {_UNTIED}"
            )
        return self.changes


def _is_same_weight(one: Change, other: Change) -> bool:
    """Whether both put the same weight in place of the model's, and do nothing else."""
    if one.replacement is None or other.replacement is None or one.up is not None or other.up is not None:
        return False
    return np.array_equal(one.replacement, other.replacement)


def canonical(name: str) -> str:
    """The name of a weight that a family of mlx-lm, or an older transformers, calls `name`."""
    return name.replace(".block_sparse_moe.", ".mlp.").replace(".switch_mlp.", ".experts.")
