"""Whether a model that is on no list can be steered: measured on the model itself, once, and kept.

What is measured, each against the model's own forward pass, with every block in float32:

    steps      logits of a prompt in one pass, and token by token
    jacobian   u' A_k w of some blocks, by differences of z_{k+1} when z_k at the last token is moved along w
    chain      u' A_{T-1} ... A_0 w, by differences of z_T when z_0 at the last token is moved along w
    batch      logits of sequences of different lengths side by side, and each alone

What blocks hand on beside the residual stream, as keys shared between layers, is a part of the state (shared.py).
Where more is handed on than is found, every A_k is right and the chain is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_lqr.backends import measurement
from mlx_lqr.backends.hooks import BlockCall
from mlx_lqr.backends.measurement import EXACT, relative_error
from mlx_lqr.backends.mlx.copying import copied
from mlx_lqr.backends.mlx.device import on_gpu
from mlx_lqr.backends.mlx.frozen import FrozenBlock, frozen_at, in_full
from mlx_lqr.backends.mlx.layout import Layout, StateHooks
from mlx_lqr.backends.mlx.library import can_merge, merged_caches, new_caches, settings_of
from mlx_lqr.backends.protocol import Differentiable, Float32

VERSION = 2
"""Increased when something else is measured, so that what was kept before is not used."""
TOKENS, SHORTER = 12, 2
"""Lengths of the prompts that are run."""
DIRECTIONS = 16
MOVES = (1e-2, 2e-3, 4e-4, 1e-4)
"""How far the state is moved, times its norm. The best of them counts: a longer one may switch an expert or bend, a
shorter one rounds."""
LAYERS = 6
"""At how many layers Jacobians are looked at, at most."""


@dataclass(frozen=True)
class Measurement(measurement.Measurement):
    """With what mlx-lm's own caches can do."""

    merges: bool
    """Whether sequences of different lengths can share a batch."""
    shared: int = 0
    """m, how many numbers blocks hand on beside the residual stream at a token"""

    @property
    def findings(self) -> list[str]:
        how = "side by side" if self.merges else "one by one"
        beside = [f"blocks hand on {self.shared} numbers beside the residual stream; they are in the state"]
        return [*super().findings, f"prompts of a batch are decoded {how}", *(beside if self.shared else [])]


class Measured:
    """A model while it is measured, with random tokens."""

    def __init__(self, module: nn.Module, layout: Layout) -> None:
        self._module, self._layout = module, layout
        self._hooks = StateHooks.of(layout)
        self._random = np.random.default_rng(0)
        self._prompt = self._random.integers(layout.vocabulary, size=TOKENS).tolist()
        self._left = self._random.standard_normal((DIRECTIONS, layout.width)).astype(np.float32)
        self._right = self._random.standard_normal((DIRECTIONS, layout.width)).astype(np.float32)

    def all(self) -> Measurement:
        """Everything, with derivatives where they are right."""
        caches = new_caches(self._module)
        self._run([self._prompt[:-1]], caches)
        steps = self._steps(caches)
        try:
            jacobian, chain, shared = self._derivatives(caches, differences=False)
        except (ValueError, RuntimeError, NotImplementedError):  # there is no derivative
            jacobian, chain, shared = np.inf, np.inf, 0
        differences = False
        if not jacobian <= EXACT:
            others = self._derivatives(caches, differences=True)
            differences = not 2 * others[0] >= jacobian
            jacobian, chain, shared = others if differences else (jacobian, chain, shared)
        return Measurement(steps, jacobian, chain, differences, self._merges(caches), shared)

    def error_of(self, model: Differentiable) -> float:
        """How far the Jacobians of a model that differentiates the same module in another way are from those here."""
        trace = model.trace(self._prompt)
        caches = new_caches(self._module)
        self._run([self._prompt[:-1]], caches)
        residual, blocks = frozen_at(self._module, self._layout, caches, self._prompt[-1], differences=False)
        return max(
            relative_error(self._left @ model.jacobian(trace, k), blocks[k].vjp(residual[k], self._left))
            for k in self._chosen(blocks)
        )

    def _steps(self, caches: Any) -> float:
        whole, _ = self._run([self._prompt], new_caches(self._module))
        last, _ = self._run([self._prompt[-1:]], copied(caches))
        return relative_error(last - last.mean(), whole - whole.mean())

    def _derivatives(self, caches: Any, *, differences: bool) -> tuple[float, float, int]:
        """The errors of single Jacobians, the worst of them, and of their product; m."""
        state, blocks = frozen_at(
            self._module, self._layout, caches, self._prompt[-1], differences=differences, float32=True
        )
        d, m = self._layout.width, state.shape[1] - self._layout.width
        residual, left = state[:, :d], np.pad(self._left, ((0, 0), (0, m)))
        single = [
            self._error_between(blocks[k].vjp(state[k], left)[:, :d], caches, residual, k, k + 1)
            for k in self._chosen(blocks)
        ]
        pulled = left
        for k in reversed(range(len(blocks))):
            pulled = blocks[k].vjp(state[k], pulled)
        return max(single), self._error_between(pulled[:, :d], caches, residual, 0, len(blocks)), m

    def _error_between(self, pulled: Float32, caches: Any, residual: Float32, start: int, end: int) -> float:
        """Of u' d z_end / d z_start w, by what has been pulled back and by differences of the model itself.

        Along some directions w another expert takes over, however short the move, and the difference is of a jump. So
        the median over directions counts, each at its best move.
        """
        predicted, errors, error = pulled @ self._right.T, [], np.inf
        for move in MOVES:
            length = move * np.linalg.norm(residual[start]) / self._layout.width**0.5
            moves = np.concatenate([length * self._right, -length * self._right]).astype(np.float32)
            rows = len(moves)
            _, states = self._run(
                [self._prompt[-1:]] * rows, copied(caches, rows, self._layout.rows_axis), (start, mx.array(moves)), end
            )
            response = (states[:DIRECTIONS] - states[DIRECTIONS:]) / (2 * length)
            difference = np.linalg.norm(predicted - self._left @ response.T, axis=0)
            errors.append(difference / np.linalg.norm(predicted, axis=0))
            error = float(np.median(np.min(errors, axis=0)))
            if error <= EXACT / 10:
                break
        return error

    def _chosen(self, blocks: Sequence[FrozenBlock]) -> list[int]:
        """The first layer of every kind, the middle and the last."""
        kinds: dict[Any, int] = {}
        for k, frozen in enumerate(blocks):
            kinds.setdefault(
                (type(frozen.block), tuple(name for name, _ in tree_flatten(frozen.block.parameters()))), k
            )
        chosen = {*list(kinds.values())[: LAYERS - 2], len(blocks) // 2, len(blocks) - 1}
        spread = self._layout.spread  # a process knows the kinds of its own blocks
        return sorted(chosen) if spread is None else spread.union(chosen, len(blocks))

    def _merges(self, caches: Any) -> bool:
        if not can_merge(caches):
            return False
        try:
            shorter, tokens = new_caches(self._module), self._prompt[-3:]
            self._run([self._prompt[:SHORTER]], shorter)
            if not all(self._agrees(merged, [copied(caches), copied(shorter)], tokens) for merged in self._ways(caches, shorter)):
                return False
            for step, token in enumerate(tokens):
                rows = [0, 1] if step < 2 else [1]
                if step == 2:  # and one of them ends
                    for cache in merged:
                        cache.filter(mx.array(rows))
                together, _ = self._run([[token]] * len(rows), merged)
                single = np.concatenate([self._run([[token]], alone[row])[0] for row in rows])
                if not relative_error(together, single) <= EXACT:
                    return False
        except Exception:  # whatever mlx-lm's caches raise, the sequences are run one by one
            return False
        return True

    def _run(
        self,
        tokens: Sequence[Sequence[int]],
        caches: Any,
        pushed: tuple[int, mx.array] | None = None,
        end: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits (B, V) at the last position, and the output of block `end` - 1 there (B, d).

        Args:
            pushed: a layer, and what is added (B, d) to its input at the last position.
        """
        states: list[mx.array] = []

        def hook(k: int, z: mx.array, call: BlockCall) -> mx.array:
            if pushed is not None and k == pushed[0]:
                moved = (z[:, -1] + pushed[1])[:, None]
                z = mx.concatenate([z[:, :-1], moved.astype(mx.float32)], axis=1)
            output = in_full(self._layout.blocks[k], z, call)
            if k == end - 1:
                states.append(output[:, -1])
            return output

        blocks = self._layout.blocks
        with self._hooks(blocks, hook, range(len(blocks))).placed():
            logits = self._module(mx.array(tokens), cache=caches)[:, -1].astype(mx.float32)
        values = np.where(np.isneginf(logits), 0, logits)  # of tokens that the model hides
        return self._exact(values), self._exact(np.asarray(states[0])) if states else np.empty(0)

    def _exact(self, values: np.ndarray) -> np.ndarray:
        """In float64, and of several processes the first one's, for all have to judge alike."""
        spread = self._layout.spread
        return (values if spread is None else spread.first(values)).astype(np.float64)


def _identity(module: nn.Module, layout: Layout, fingerprint: str) -> list[Any]:
    described = repr(sorted(settings_of(module).items()))
    bits = sorted({str(getattr(weight, "dtype", "")) for _, weight in tree_flatten(layout.blocks[0].parameters())})
    parts = [VERSION, metadata.version("mlx-lm"), metadata.version("mlx"), type(module).__module__, described, bits]
    parts += [fingerprint, str(layout.dtype), on_gpu()]
    return parts if layout.spread is None else [*parts, layout.spread.name]


def measured(module: nn.Module, layout: Layout, fingerprint: str, family: str) -> Measurement:
    """The measurement of an accepted model.

    Raises:
        InputError: the model fails while it is measured, or is too far off.
    """
    identity = _identity(module, layout, fingerprint)
    said = {} if layout.spread is None else {"said": layout.spread.said}
    return measurement.measured(Measurement, Measured(module, layout).all, identity, family, **said)
