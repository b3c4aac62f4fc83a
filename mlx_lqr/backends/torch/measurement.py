"""Whether a model that is on no list can be steered: measured on the model itself, once, and kept.

What is measured, each against the model's own forward pass, with every block in float32:

    steps      logits of a prompt in one pass, token by token, and of the model's own `generate`
    jacobian   u' A_k w of some blocks, by differences of z_{k+1} when z_k at the last token is moved along w
    chain      u' A_{T-1} ... A_0 w, by differences of z_T when z_0 at the last token is moved along w
    appends    logits of a prompt in one pass, and in two
    pads       logits of a prompt alone, and beside a longer one
    crops      logits after tokens that were taken back, and after none

Where blocks hand on more than the state, as keys shared between layers, every A_k is right and the chain is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np
import torch

from mlx_lqr.backends import measurement
from mlx_lqr.backends.hooks import BlockCall
from mlx_lqr.backends.measurement import EXACT, relative_error
from mlx_lqr.backends.protocol import Differentiable, Float32
from mlx_lqr.backends.torch.copying import copied
from mlx_lqr.backends.torch.frozen import frozen_at, in_float32, in_full
from mlx_lqr.backends.torch.layout import Layout, StateHooks
from mlx_lqr.backends.torch.library import cropped
from mlx_lqr.errors import InputError

VERSION = 1
"""Increased when something else is measured, so that what was kept before is not used."""
TRIES = 3
"""At how many tokens derivatives are looked at, at most; the best counts."""
TOKENS, SHORTER = 12, 5
"""Lengths of the prompts that are run."""
DIRECTIONS = 16
MOVES = (1e-2, 2e-3, 5e-4)
"""How far the state is moved, times its norm. The best of them counts: a longer one may switch an expert."""
LAYERS = 6
"""At how many layers Jacobians are looked at, at most."""


@dataclass(frozen=True)
class Measurement(measurement.Measurement):
    """With what the model does with several tokens or sequences, and its cache can take back."""

    appends: bool
    """Whether several tokens at once can follow those that the cache holds."""
    pads: bool
    """Whether prompts of different lengths can share a pass, padded on the right."""
    crops: bool
    """Whether the cache can forget its newest tokens."""

    @property
    def findings(self) -> list[str]:
        how = "a chat's cache takes back tokens" if self.crops else "a chat is read anew where tokens are taken back"
        return [*super().findings, how]


class Measured:
    """A model while it is measured, with random tokens."""

    def __init__(self, module: Any, layout: Layout) -> None:
        self._module, self._layout = module, layout
        self._device = next(module.parameters()).device
        self._hooks = StateHooks.of(layout)
        random = np.random.default_rng(0)
        self._prompt = random.integers(layout.vocabulary, size=TOKENS).tolist()
        self._lasts = [self._prompt[-1], *random.integers(layout.vocabulary, size=TRIES - 1).tolist()]
        self._left = random.standard_normal((DIRECTIONS, layout.width)).astype(np.float32)
        self._right = random.standard_normal((DIRECTIONS, layout.width)).astype(np.float32)

    def all(self) -> Measurement:
        """Everything, with derivatives where they are right. Blocks are in float32 one by one, what is around them at
        once."""
        with torch.no_grad(), in_float32(self._module, apart=self._layout.blocks):
            return self._all()

    def _all(self) -> Measurement:
        whole, _, _ = self._run([self._prompt])
        _, _, cache = self._run([self._prompt[:-1]])
        last, _, _ = self._run([self._prompt[-1:]], copied(cache))
        others = [last, self._generated()]
        steps = max(relative_error(logits - logits.mean(), whole - whole.mean()) for logits in others)
        differences, (jacobian, chain) = False, self._best(cache, differences=False)
        if not jacobian <= EXACT:
            by_differences = self._best(cache, differences=True)
            differences = not 2 * by_differences[0] >= jacobian
            jacobian, chain = by_differences if differences else (jacobian, chain)
        return Measurement(
            steps,
            jacobian,
            chain,
            differences,
            appends=_holds(lambda: self._in_two(whole)),
            pads=_holds(self._padded),
            crops=_holds(lambda: self._taken_back(cache)),
        )

    def error_of(self, model: Differentiable) -> float:
        """How far the Jacobians of a model that differentiates the same module in another way are from those here."""
        trace = model.trace(self._prompt)
        with torch.no_grad():
            _, cache = self._layout.call(self._module, torch.tensor([self._prompt[:-1]], device=self._device), None)
        residual, blocks, _ = frozen_at(self._module, self._layout, cache, self._prompt[-1], differences=False)
        return max(
            relative_error(self._left @ model.jacobian(trace, k), blocks[k].vjp(residual[k], self._left))
            for k in self._chosen()
        )

    def _generated(self) -> np.ndarray:
        """Logits (1, V) of `generate`, which may tell the model more of the positions than a plain call does."""
        tokens = torch.tensor([self._prompt], device=self._device)
        options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        with self._in_full():
            output = self._module.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **options)
        return self._values(output.logits[0])

    def _in_two(self, whole: np.ndarray) -> float:
        _, _, cache = self._run([self._prompt[:SHORTER]])
        logits, _, _ = self._run([self._prompt[SHORTER:]], cache)
        return relative_error(logits, whole)

    def _padded(self) -> float:
        shorter = self._prompt[:SHORTER]
        alone, _, _ = self._run([shorter])
        rows = [self._prompt, [*shorter, *[0] * (TOKENS - SHORTER)]]
        together, _, _ = self._run(rows, position=SHORTER - 1)
        return relative_error(together[1:], alone)

    def _taken_back(self, cache: Any) -> float:
        expected, _, _ = self._run([self._prompt[-1:]], copied(cache))
        longer = copied(cache)
        for token in self._prompt[:2]:
            _, _, longer = self._run([[token]], longer)
        shorter = cropped(copied(longer), 2)
        if shorter is None:
            return np.inf
        logits, _, _ = self._run([self._prompt[-1:]], shorter)
        return relative_error(logits, expected)

    def _best(self, cache: Any, *, differences: bool) -> tuple[float, float]:
        """The errors of derivatives at the token where they are least: at some, two experts may be about to switch."""
        best = np.inf, np.inf
        for token in self._lasts:
            try:
                errors = self._derivatives(cache, token, differences=differences)
            except (RuntimeError, NotImplementedError):
                if differences:
                    raise
                return best  # there is no derivative
            best = best if max(best) < max(errors) else errors
            if max(best) <= EXACT:
                break
        return best

    def _derivatives(self, cache: Any, token: int, *, differences: bool) -> tuple[float, float]:
        """The errors of single Jacobians, the worst of them, and of their product."""
        residual, blocks, _ = frozen_at(self._module, self._layout, cache, token, differences=differences, float32=True)
        error = partial(self._error_between, cache=cache, token=token, residual=residual)
        single = [error(blocks[k].vjp(residual[k], self._left), start=k, end=k + 1) for k in self._chosen()]
        pulled = self._left
        for k in reversed(range(len(blocks))):
            pulled = blocks[k].vjp(residual[k], pulled)
        return max(single), error(pulled, start=0, end=len(blocks))

    def _error_between(
        self, pulled: Float32, *, cache: Any, token: int, residual: Float32, start: int, end: int
    ) -> float:
        """Of u' d z_end / d z_start w, by what has been pulled back and by differences of the model itself."""
        predicted, errors = pulled @ self._right.T, []
        for move in MOVES:
            length = move * np.linalg.norm(residual[start]) / self._layout.width**0.5
            moves = np.concatenate([length * self._right, -length * self._right]).astype(np.float32)
            pushed = start, torch.tensor(moves, device=self._device)
            rows = len(moves)
            _, states, _ = self._run([[token]] * rows, copied(cache, rows), pushed, end)
            response = (states[:DIRECTIONS] - states[DIRECTIONS:]) / (2 * length)
            errors.append(relative_error(predicted, self._left @ response.T))
        return min(errors)

    def _chosen(self) -> list[int]:
        """The first layer of every kind, the middle and the last."""
        kinds: dict[Any, int] = {}
        blocks = self._layout.blocks
        for k, block in enumerate(blocks):
            kinds.setdefault((type(block), tuple(name for name, _ in block.named_parameters())), k)
        return sorted({*list(kinds.values())[: LAYERS - 2], len(blocks) // 2, len(blocks) - 1})

    def _run(
        self,
        tokens: Sequence[Sequence[int]],
        cache: Any = None,
        pushed: tuple[int, torch.Tensor] | None = None,
        end: int = 0,
        *,
        position: int = -1,
    ) -> tuple[np.ndarray, np.ndarray, Any]:
        """Logits (B, V) at a position, the output of block `end` - 1 at the last one (B, d), and the cache.

        Args:
            pushed: a layer, and what is added (B, d) to its input at the last position.
        """
        states: list[torch.Tensor] = []

        def hook(k: int, z: torch.Tensor, call: BlockCall) -> torch.Tensor:
            if pushed is not None and k == pushed[0]:
                z = torch.cat([z[:, :-1], (z[:, -1] + pushed[1])[:, None]], dim=1)
            output = in_full(self._layout.blocks[k], z, call)
            if k == end - 1:
                states.append(output[:, -1])
            return output

        blocks = self._layout.blocks
        with self._hooks(blocks, hook, range(len(blocks))).placed():
            logits, cache = self._layout.call(self._module, torch.tensor(tokens, device=self._device), cache)
        return self._values(logits[:, position]), states[0].double().cpu().numpy() if states else np.empty(0), cache

    def _in_full(self) -> AbstractContextManager[None]:
        """Inside this context every block runs in float32."""
        blocks = self._layout.blocks
        return self._hooks(blocks, lambda k, z, call: in_full(blocks[k], z, call), range(len(blocks))).placed()

    @staticmethod
    def _values(logits: torch.Tensor) -> np.ndarray:
        """Logits in float64, with 0 for tokens that the model hides."""
        hidden = logits <= torch.finfo(logits.dtype).min
        return logits.masked_fill(hidden, 0).double().cpu().numpy()


def _holds(error: Callable[[], float]) -> bool:
    try:
        return error() <= EXACT
    except Exception:  # whatever transformers' models raise, they are not run so
        return False


def measured(module: Any, layout: Layout, fingerprint: str, family: str) -> Measurement:
    """The measurement of an accepted model.

    Raises:
        InputError: the model fails while it is measured, or is too far off.
    """
    dtypes = sorted({str(weight.dtype) for weight in layout.blocks[0].parameters()})
    versions = [VERSION, metadata.version("transformers"), metadata.version("torch")]
    described = [type(module).__name__, module.config.to_json_string(), dtypes, str(layout.dtype)]
    identity = [*versions, *described, fingerprint, next(module.parameters()).device.type]
    accepted = measurement.measured(Measurement, lambda: Measured(module, layout).all(), identity, family)
    if not accepted.pads:
        raise InputError(
            f"models of the type {family!r} cannot be steered: a prompt beside a longer one has other logits than alone"
        )
    return accepted
