"""A model whose own modules run: how it is recorded, scored and steered, whatever the framework.

Every number is got by a hook on the blocks in the model's own forward pass. A backend adds how its modules are called,
its derivatives (`Differentiable`), and its decoder (`hooked_decoder.py`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from mlx_lqr.backends.batching import LEAST_SHARED, Reading, Stretches, alike, in_batches, padded
from mlx_lqr.backends.checkpoint.adapter import Adapter
from mlx_lqr.backends.checkpoint.config import ENDLESS, check_rolling, context_of
from mlx_lqr.backends.description import Description
from mlx_lqr.backends.fingerprint import fingerprint_of
from mlx_lqr.backends.hooked_decoder import HookedDecoder
from mlx_lqr.backends.hooks import BlockCall, LawHooks, output_projection
from mlx_lqr.backends.overflow import first_overflow
from mlx_lqr.backends.protocol import (
    GREEDY,
    Array,
    Float32,
    Kept,
    Law,
    Progress,
    Sampling,
    restart,
)
from mlx_lqr.backends.scoring import ScoringModel
from mlx_lqr.backends.text.text_tokenizer import TextTokenizer
from mlx_lqr.errors import InputError


class OthersCalls(Protocol):
    """Calls of a steered model that are not ours: which of their positions are steered."""

    @property
    def first(self) -> int | Array:
        """The first steered position of the call under way, or a mask (B or 1, L, 1) of those that are."""

    def enter(self, z: Array) -> None:
        """The call has come to the first block, whose input is z (B, L, d)."""

    def end(self, output: Array) -> None:
        """The call has come to the end of the last block, whose output is (B, L, d)."""


class HookedModel(ScoringModel):
    """Everything of `Runner`, `Recorder` and `HeadRecorder` that frameworks have in common.

    Args:
        module: the framework's own model.
        config: its sizes, under the names of config.json.
    """

    backend: str
    family: str

    def __init__(
        self, module: Any, blocks: Sequence[Any], config: Mapping[str, Any], name: str, tokenizer: TextTokenizer | None
    ) -> None:
        self.module = module
        self.blocks = blocks
        self.name = name
        self._tokenizer = tokenizer
        self.num_layers = len(blocks)
        self.hidden_size = int(config["hidden_size"])
        self.vocab_size = int(config["vocab_size"])
        self._heads = int(config["num_attention_heads"])
        self.context_length, self.rolls = context_of(config)
        self.adapter: Adapter | None = None

    @abstractmethod
    def _norms(self) -> Iterable[tuple[str, bytes]]:
        """The blocks' norm weights in bfloat16, by "LAYER.path.to.weight"."""

    @property
    @abstractmethod
    def _final_norm(self) -> Any:
        """The module between the last block and the head."""

    @abstractmethod
    def _run_blocks(self, tokens: Array, past: Any = None) -> None:
        """Run prompts (B, L) through all blocks, after what `_past` returned."""

    @abstractmethod
    def _run(self, tokens: Array, past: Any = None) -> Array:
        """The logits (B, L, V) of prompts (B, L), after what `_past` returned."""

    _shares = False
    """Whether what sequences of a pass begin with in common can be read once"""

    def _past(self, beginnings: Sequence[Sequence[int]], rows: Sequence[int], known: list[Any]) -> Any:
        """What blocks keep of beginnings of one length, for a pass with the beginning of this number in each row; one
        pass can use it. `known` (see `Kept.beginning`) serves the passes of one call: they begin with one template, and
        some with the same several beginnings."""
        raise NotImplementedError

    @abstractmethod
    def _weights(self) -> tuple[int, int, str]:
        """How many numbers the weights stand for, how many bytes they take, and how they are packed."""

    @abstractmethod
    def _new_decoder(self, law: Law | None, sampling: Sampling, window: int | None) -> Any:
        """The framework's `HookedDecoder`."""

    @abstractmethod
    def _others_calls(self, *, steer_all: bool) -> AbstractContextManager[OthersCalls]:
        """Inside this context, calls that are not ours tell which of their positions are steered."""

    def _computing(self, what: str) -> AbstractContextManager[None]:
        """See `Framework.running`."""
        return self._framework.running(self.blocks, what)

    @property
    def state_size(self) -> int:
        """See `Differentiable`."""
        return self.hidden_size

    @property
    def tokenizer(self) -> TextTokenizer:
        if self._tokenizer is None:
            raise InputError("this model came without its tokenizer: use mlx_lqr.load, or give token ids")
        return self._tokenizer

    @cached_property
    def fingerprint(self) -> str:
        sizes = (self.num_layers, self.hidden_size, self.vocab_size)
        return fingerprint_of(sizes, self._norms(), None if self.adapter is None else self.adapter.digest)

    @property
    def description(self) -> Description:
        """See `Runner`."""
        parameters, nbytes, packing = self._weights()
        return Description(
            device=self._framework.device_name,
            dtype=self._framework.dtype_name,
            packing=packing,
            parameters=parameters,
            nbytes=nbytes,
            context_length=self.context_length if self.context_length < ENDLESS else None,
        )

    def leave_thread(self) -> None:
        """See `Runner`."""
        self._framework.leave_thread()

    def residuals(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        law: Law | None = None,
        steer_all: bool = False,
        progress: Progress | None = None,
    ) -> Float32:
        """See `Recorder`."""
        placed, known = self.place(law), list[Any]()
        return in_batches(
            prompts,
            lambda batch: self._residuals_of(batch, placed, steer_all, known),
            progress,
            nested=law is None,
            shares=self._shares and not steer_all,
        )

    def _residuals_of(self, asked: Reading, law: Law | None, steer_all: bool, known: list[Any]) -> Float32:
        """(n, T + 1, d) for n prompts"""
        framework = self._framework
        restart(law)
        with self._computing("the activations"):
            tokens, read, past = self._to_read(asked, known, steered=law is not None and steer_all)
            rows, last = framework.integers(asked.rows), framework.integers([last - read for last in asked.last])
            steering = self._from_positions(law, 0 if steer_all or law is None else last[:, None], tokens)
            recorded: list[Array] = []

            def record(k: int, z: Array, call: BlockCall) -> Array:
                output = steering.block(k, z, call)
                recorded.append(z[rows, last])
                if k == self.num_layers - 1:
                    recorded.append(output[rows, last])
                framework.compute([output, *recorded])  # or the intermediates of all blocks are held at once
                return output

            with framework.hooked(self.blocks, record, range(self.num_layers), steering):
                self._run_blocks(tokens, past)
            residuals = framework.numpy(framework.stack(recorded, 1))
        if (row := first_overflow(residuals)) is not None:
            raise self.decoder(law).overflow(asked.prompts[row], 0 if steer_all else asked.last[row])
        return residuals

    def head_outputs(self, prompts: Sequence[Sequence[int]], *, progress: Progress | None = None) -> Float32:
        """See `HeadRecorder`."""
        known: list[Any] = []
        return in_batches(
            prompts, lambda batch: self._head_outputs_of(batch, known), progress, nested=True, shares=self._shares
        )

    def _head_outputs_of(self, asked: Reading, known: list[Any]) -> Float32:
        """(n, T, heads, head_dim) for n prompts"""
        framework = self._framework
        with self._computing("the activations"):
            tokens, read, past = self._to_read(asked, known, steered=False)
            rows, last = framework.integers(asked.rows), framework.integers([last - read for last in asked.last])
            recorded: list[Array] = []

            def record(k: int, heads: Array, call: BlockCall) -> Array:
                recorded.append(heads[rows, last])
                output = call(heads)
                framework.compute([output, *recorded])
                return output

            projections = [output_projection(block) for block in self.blocks]
            with framework.hooked(projections, record, range(self.num_layers)):
                self._run_blocks(tokens, past)
            heads = framework.numpy(framework.stack(recorded, 1))
        if (row := first_overflow(heads)) is not None:
            raise self.decoder().overflow(asked.prompts[row], asked.last[row] + 1)
        return heads.reshape(*heads.shape[:2], self._heads, -1)

    def projected(self, layer: int, heads: Float32) -> Float32:
        """See `HeadRecorder`."""
        projection = output_projection(self.blocks[layer])
        with self._computing("the activations"):
            rows = np.vstack([heads, np.zeros_like(heads[:1])])  # zero gives the bias, whatever the module
            outputs = self._framework.numpy(projection(self._framework.floats(rows)))
        return outputs[:-1] - outputs[-1]

    def _logits_at(self, asked: Stretches, law: Law | None, steer_all: bool, kept: Kept | None) -> tuple[Array, Array]:
        """See `ScoringModel`."""
        framework = self._framework
        layers = set(law.layers if law is not None else ())
        if kept is None or min(layers, default=kept.layer) < kept.layer:
            kept = Kept(0)
        tokens, read, past = self._to_read(asked, kept.beginning, steered=law is not None and steer_all)
        at = framework.integers(asked.rows), framework.integers([position - read for position in asked.positions])
        first = 0 if steer_all else framework.integers([first - read for first in asked.first])[:, None]
        steering = self._from_positions(law, first, tokens)
        energies: list[Array] = []

        def gather(_: int, z: Array, call: BlockCall) -> Array:
            energies.append(framework.energy(z[at]))
            return call(z[at][None])  # the head is a large matrix, and few positions are asked for

        start, inputs, key = kept.layer, kept.inputs, (read, *map(tuple, asked.sequences))
        known = key in inputs

        def block(k: int, z: Array, call: BlockCall) -> Array:
            if k < start:
                return z  # which nobody needs: block `start` is given what it was given before
            if k == start:
                z = inputs.setdefault(key, z)
            return steering.block(k, z, call)

        gathering = framework.hooked([self._final_norm], gather, [0])
        hooked = sorted({*layers, *range(start if known else 0), start})
        with gathering, framework.hooked(self.blocks, block, hooked, steering):
            logits = framework.float32(self._run(tokens, past)[0])
        return logits, (logits * 0).sum(-1) + energies[0] * 0  # see `HookedDecoder.sample`

    def trace(self, tokens: Sequence[int]) -> Any:
        """See `Differentiable`."""
        return next(self.traces([tokens]))

    def traces(self, prompts: Iterable[Sequence[int]]) -> Iterator[Any]:
        """See `Differentiable`."""
        decoder, read = self.decoder(), list[int]()
        for tokens in prompts:
            held = alike(read, tokens[:-1])
            if read and not (held >= LEAST_SHARED and decoder.rewind(held)):
                decoder, held = self.decoder(), 0
            trace = decoder.trace_prompt(tokens, held)
            if first_overflow(trace.residual) is not None:
                raise self.decoder().overflow(tokens, len(tokens))
            yield trace
            read = list(tokens[:-1])

    def decoder(self, law: Law | None = None, sampling: Sampling = GREEDY, *, rolling: bool = False) -> HookedDecoder:
        """See `Runner`."""
        check_rolling(self.rolls, rolling)
        with self._computing("the next token"):
            decoder: HookedDecoder = self._new_decoder(law, sampling, self.context_length if rolling else None)
        return decoder

    @contextmanager
    def steer(self, law: Law, *, steer_all: bool) -> Iterator[None]:
        """See `Runner`."""
        with ExitStack() as steered:
            with self._framework.turn:  # the passes of other threads end before, and are refused from now on
                steered.enter_context(self._steered(law, steer_all=steer_all))
            try:
                yield
            finally:
                with self._framework.turn:
                    steered.close()

    @contextmanager
    def _steered(self, law: Law, *, steer_all: bool) -> Iterator[None]:
        framework, placed = self._framework, self._placed_for_others(law)
        with self._others_calls(steer_all=steer_all) as calls:
            steering = LawHooks.beyond(placed, lambda: calls.first, framework.concatenate, framework.where)

            def hook(k: int, z: Array, call: BlockCall) -> Array:
                if k == 0:
                    calls.enter(z)
                output = steering.block(k, z, call)
                if k == self.num_layers - 1:
                    calls.end(output)
                return output

            layers = sorted({0, self.num_layers - 1, *placed.layers})
            with framework.hooks(self.blocks, hook, layers, steering).placed(for_all=True):
                yield

    def _placed_for_others(self, law: Law) -> Law:
        """The law for calls that may come from another thread."""
        placed = self.place(law)
        assert placed is not None
        return placed

    def _to_read(self, asked: Reading | Stretches, known: list[Any], *, steered: bool) -> tuple[Array, int, Any]:
        """The tokens (B, L) of a pass, how many of each sequence have been read before them, and what `_past` returned
        of these.

        Args:
            known: see `_past`.
            steered: at those tokens too, so that they are read with the others.
        """
        count = asked.shared if self._shares and not steered else 0
        past = None
        if count:
            beginnings = asked.beginnings
            places = {own: i for i, own in enumerate(beginnings)}
            past = self._past(beginnings, [places[tuple(own[:count])] for own in asked.sequences], known)
        return self._padded([sequence[count:] for sequence in asked.sequences]), count, past

    def _padded(self, prompts: Sequence[Sequence[int]]) -> Array:
        """Tokens (B, L) as `padded` makes them."""
        return self._framework.integers(padded(prompts))

    def _from_positions(self, law: Law | None, first: Array | int, tokens: Array) -> LawHooks:
        """The law from positions `first` (B, 1) of tokens (B, L) on."""
        positions = self._framework.arange(tokens.shape[1])[None]
        return LawHooks.at(law, (positions >= first)[..., None], self._framework.where)
