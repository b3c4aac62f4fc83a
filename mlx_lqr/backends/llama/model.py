"""The llama.cpp backend: a GGUF file as it is, run and steered, recorded and scored. Nothing is differentiated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from mlx_lqr.backends.batching import Stretches, batches
from mlx_lqr.backends.checkpoint.config import check_rolling
from mlx_lqr.backends.description import Description
from mlx_lqr.backends.fingerprint import fingerprint_of
from mlx_lqr.backends.hooks import UNSTEERED, LawHooks
from mlx_lqr.backends.llama.context import BATCH, Batch, Context, Slot
from mlx_lqr.backends.llama.decoder import LlamaDecoder
from mlx_lqr.backends.llama.framework import NumPyFramework
from mlx_lqr.backends.llama.gguf import norms
from mlx_lqr.backends.llama.hook import Rows, hook_for
from mlx_lqr.backends.llama.library import device_name
from mlx_lqr.backends.llama.load import Loaded
from mlx_lqr.backends.llama.native import why_not
from mlx_lqr.backends.llama.recording import RecordingHook
from mlx_lqr.backends.llama.tokenizer import LlamaTokenizer
from mlx_lqr.backends.overflow import Examined, first_overflow, located
from mlx_lqr.backends.protocol import (
    GREEDY,
    Float32,
    Kept,
    Law,
    Progress,
    Sampling,
    restart,
)
from mlx_lqr.backends.scoring import ScoringModel
from mlx_lqr.errors import InputError, OverflowingError

_SIDE_BY_SIDE = 64
"""Sequences in a batch that is read whole; places in a context take memory"""
_EXAMINED = 32
"""Tokens at once where an overflow is looked for: the logits of all of them are computed"""


class LlamaModel(ScoringModel):
    """A GGUF file behind the `Recorder` protocol.

    Args:
        file: it, or any of its parts.
        name: the model's.
    """

    backend = "llama"
    _framework: NumPyFramework
    _side_by_side = _SIDE_BY_SIDE

    def __init__(self, file: Path, name: str) -> None:
        self.name, self.file = name, file
        self._loaded = loaded = Loaded(file)
        self.family = loaded.architecture
        self.num_layers, self.hidden_size = loaded.num_layers, loaded.hidden_size
        self.vocab_size, self.context_length = loaded.vocab_size, loaded.context_length
        self._framework = NumPyFramework(device_name())
        self._context = Context(loaded, lambda: hook_for(self.num_layers, self.hidden_size, BATCH))
        self._recording: tuple[Context, RecordingHook] | None = None

    @cached_property
    def tokenizer(self) -> LlamaTokenizer:
        """See `Runner`."""
        return LlamaTokenizer(self._loaded)

    @cached_property
    def fingerprint(self) -> str:
        """See `Runner`."""
        sizes = (self.num_layers, self.hidden_size, self.vocab_size)
        return fingerprint_of(sizes, norms(self._loaded.files, self._loaded.architecture, self.num_layers))

    @property
    def description(self) -> Description:
        """See `Runner`."""
        return Description(
            device=self._framework.device_name + (f" (laws in Python: {reason})" if (reason := why_not()) else ""),
            dtype=self._framework.dtype_name,
            packing=self._loaded.packing,
            parameters=self._loaded.parameters,
            nbytes=self._loaded.nbytes,
            context_length=self.context_length,
        )

    def decoder(self, law: Law | None = None, sampling: Sampling = GREEDY, *, rolling: bool = False) -> LlamaDecoder:
        """See `Runner`."""
        check_rolling(self._loaded.rolls, rolling)
        window = self.context_length if rolling else None
        return LlamaDecoder(self._context, self._framework, self.vocab_size, self._overflow, law, sampling, window)

    def _computing(self, what: str) -> AbstractContextManager[None]:
        return self._framework.computing(what)

    def leave_thread(self) -> None:
        """See `Runner`; nothing is kept for a thread."""

    def steer(self, law: Law, *, steer_all: bool) -> AbstractContextManager[None]:
        """See `Runner`.

        Raises:
            InputError: always.
        """
        raise InputError(
            "llama.cpp's own functions cannot be steered in place: use mlx_lqr.generate, stream or batch_generate, "
            "which take the controller themselves"
        )

    def residuals(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        law: Law | None = None,
        steer_all: bool = False,
        progress: Progress | None = None,
    ) -> Float32:
        """See `Recorder`."""
        placed = self.place(law)
        result = np.empty((len(prompts), self.num_layers + 1, self.hidden_size), np.float32)
        done = 0
        for batch in batches([len(prompt) for prompt in prompts], BATCH, most=_SIDE_BY_SIDE, pads=False):
            own = [prompts[i] for i in batch]
            last = [len(prompt) - 1 for prompt in own]
            restart(placed)
            with self._computing("the activations"):
                context, hook = self._recorder()
                first = [0] * len(own) if steer_all else last
                for rows, _ in self._run(context, own, placed, first, last):
                    result[[batch[row] for row in rows]] = hook.streams
            done += len(batch)
            if progress:
                progress("Activations", done, len(prompts))
        if (row := first_overflow(result)) is not None:
            raise self._overflow(placed, prompts[row], 0 if steer_all else len(prompts[row]) - 1)
        return result

    def _logits_at(
        self, asked: Stretches, law: Law | None, steer_all: bool, kept: Kept | None
    ) -> tuple[Float32, Float32]:
        first = [0] * len(asked.sequences) if steer_all else asked.first
        logits = np.concatenate(
            [part for _, part in self._run(self._context, asked.sequences, law, first, asked.first)]
        )
        return logits, np.where(np.isfinite(logits).all(axis=-1), np.float32(0), np.float32(np.nan))

    def _run(
        self,
        context: Context,
        sequences: Sequence[Sequence[int]],
        law: Law | None,
        first: Sequence[int],
        asked: Sequence[int],
    ) -> Iterator[tuple[list[int], Float32]]:
        """Run sequences whole, as many tokens at once as llama.cpp takes.

        Args:
            law: placed.
            first: for each sequence the position from which on it is steered.
            asked: and that from which on logits are asked for.

        Yields:
            The sequence of each output of a batch, and its logits (n, V).
        """
        slots = [context.slot() for _ in sequences]
        rows = [(row, i) for row, sequence in enumerate(sequences) for i in range(len(sequence))]
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            outputs = [n for n, (row, i) in enumerate(part) if i >= asked[row]]
            steered = [n for n, (row, i) in enumerate(part) if i >= first[row]]
            batch = Batch(
                [sequences[row][i] for row, i in part],
                [slots[row] for row, _ in part],
                outputs,
                [Rows(law, steered)] if law is not None and steered else (),
            )
            logits, failures = context.run(batch)
            for error in failures.values():
                raise error
            if outputs:
                yield [part[n][0] for n in outputs], logits

    def _recorder(self) -> tuple[Context, RecordingHook]:
        """A context of its own to read streams in, so that nothing stops at every block where tokens are decoded."""
        if self._recording is None:
            hook = RecordingHook(self.num_layers, self.hidden_size)
            self._recording = Context(self._loaded, lambda: hook, always=True), hook
        return self._recording

    def _overflow(self, law: Law | None, tokens: Sequence[int], first: int) -> OverflowingError:
        """See `Decoder.overflow`; the law is placed."""
        restart(law)
        with self._computing("the prompts"):
            context, hook = self._recorder()
            slot = context.slot()
            return located(
                partial(self._examined, context, hook, slot, law),
                tokens,
                first,
                law,
                layers=self.num_layers,
                chunk=_EXAMINED,
                dtype=self._framework.dtype_name,
            )

    def _examined(
        self,
        context: Context,
        hook: RecordingHook,
        slot: Slot,
        law: Law | None,
        tokens: Sequence[int],
        steering: LawHooks,
    ) -> Examined:
        rows = range(len(tokens))
        steered = [Rows(law, rows)] if law is not None and steering is not UNSTEERED else []
        logits, failures = context.run(Batch(tokens, [slot] * len(tokens), rows, steered))
        for error in failures.values():
            raise error
        energies = self._framework.energy(hook.streams)  # (L, T + 1)
        return energies.T.tolist(), bool(np.isfinite(logits[-1]).all())
