"""Control laws inside llama.cpp: between two nodes of its graph, where a block's output can be read and changed.

ggml's scheduler asks a callback about every node, whether it wants to see what the node has computed. At a block k that
is steered, this one sees z_k, which is what block k - 1 put out ("l_out-(k-1)", or the embeddings), and then the
block's own output "l_out-k", to which it adds u_k in place. It asks for nothing else, since each tensor that is asked
for cuts the graph in two.

llama.cpp runs a batch in parts of at most `n_ubatch` rows, in order. At the last block it drops the rows whose logits
nobody has asked for, once attention has used them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mlx_lqr.backends.llama.library import ggml, llama
from mlx_lqr.backends.protocol import Float32, Law
from mlx_lqr.errors import InputError

EMBEDDINGS = (b"inp_embd", b"embd", b"inp_scaled")
"""The names of z_0 in llama.cpp's graphs; where there are several, the last that is computed is z_0."""


@dataclass(frozen=True)
class Rows:
    """The rows of a batch that a law steers."""

    law: Law
    rows: Sequence[int]
    """Positions in the llama_batch of the next llama_decode, ascending"""


class Hook(Protocol):
    """What steers inside a context's llama_decode."""

    callback: Any
    """A `ggml_backend_sched_eval_callback`, which lives as long as the hook."""
    user_data: int | None
    """What the callback is given, an address."""

    @property
    def failures(self) -> Mapping[int, Exception]:
        """By number in `steered`, what a law raised in the last llama_decode, which left its rows as they were."""

    @property
    def overflowed(self) -> Collection[int]:
        """The rows whose |z|^2 was not finite after the last steered block, of which llama.cpp's norms make zeros."""

    def prepare(self, steered: Sequence[Rows], tokens: int, outputs: Sequence[int]) -> None:
        """Before every llama_decode.

        Args:
            steered: all rows that are, those of a law together. The laws are placed: they take NumPy arrays in float32.
            tokens: how many rows the batch has.
            outputs: the rows whose logits are asked for, ascending.
        """

    def finish(self) -> None:
        """After it: raises what a law raised, the first of `failures`, or what has interrupted it."""


def output_name(layer: int) -> bytes:
    """What llama.cpp calls the output of a block."""
    return b"l_out-%d" % layer


class PythonHook:
    """The hook that evaluates laws with NumPy.

    A law is called with rows (n, 1, d) in float32: n sequences side by side of one token each, or n tokens. At the last
    block it sees z for the output of rows that are not computed there.

    Args:
        num_layers, hidden_size: T and d.
    """

    def __init__(self, num_layers: int, hidden_size: int) -> None:
        self.user_data: int | None = None
        self.failures: Mapping[int, Exception] = {}
        self.overflowed: Collection[int] = ()
        self._last, self._width = num_layers - 1, hidden_size
        self._acting: dict[int, list[tuple[int, Law, np.ndarray]]] = {}
        """Layer -> what steers there: its number, the law, and its rows (n,)"""
        self._wanted: dict[bytes, int] = {}
        """Name of a tensor -> k where it is the output of block k, which is z_{k+1} too; -1 where it is z_0"""
        self._interruption: BaseException | None = None
        self._part = _Part(0)
        self._tokens, self._outputs = 0, np.empty(0, np.int64)
        library = ggml()
        self._name = library.ggml_get_name
        self._elements, self._element_size = library.ggml_nelements, library.ggml_element_size
        self._get, self._set = library.ggml_backend_tensor_get, library.ggml_backend_tensor_set
        self.callback = llama().ggml_backend_sched_eval_callback(self._called)

    def prepare(self, steered: Sequence[Rows], tokens: int, outputs: Sequence[int]) -> None:
        """See `Hook`."""
        self.failures, self._interruption, self._part, self._acting = {}, None, _Part(0), {}
        self.overflowed = set()
        self._tokens, self._outputs = tokens, np.asarray(outputs, np.int64)
        for number, own in enumerate(steered):
            if not own.rows or (own.law.replayable and not own.law.acts):
                continue
            rows = np.asarray(own.rows, np.int64)
            for layer in own.law.layers:
                self._acting.setdefault(layer, []).append((number, own.law, rows))
        self._wanted = {}
        for layer in self._acting:
            self._wanted[output_name(layer)] = layer
            self._wanted |= dict.fromkeys(EMBEDDINGS, -1) if layer == 0 else {output_name(layer - 1): layer - 1}

    def finish(self) -> None:
        """See `Hook`.

        Raises:
            InputError: also where llama.cpp has not computed what was to be steered, in this order.
        """
        if self._interruption is not None:
            raise self._interruption
        for error in self.failures.values():
            raise error
        if self._acting and self._part.end != self._tokens:
            raise InputError(
                f"llama.cpp has shown the stream of {self._part.end} of {self._tokens} tokens: this model, or this "
                "version of llama-cpp-python, cannot be steered (try --backend mlx)"
            )

    def _called(self, tensor: int, ask: bool, _: int | None) -> bool:
        if ask:
            return self._name(tensor) in self._wanted
        try:
            self._computed(tensor, self._wanted[self._name(tensor)])
        except BaseException as error:  # which ctypes would print, and forget
            self._interruption = self._interruption or error
        return True

    def _computed(self, tensor: int, k: int) -> None:
        """z_{k+1}, which is the output of block k, has been computed in a part of the batch."""
        part = self._part
        if k < part.layer or (k == part.layer and k >= 0):
            part = self._part = _Part(part.end)
        part.layer = k
        stream = np.empty((self._elements(tensor) // self._width, self._width), np.float32)
        if self._element_size(tensor) != 4:
            raise InputError("llama.cpp computes this model's stream in 16 bits, which cannot be steered")
        self._get(tensor, stream.ctypes.data, 0, stream.nbytes)
        if k != self._last:
            part.end = part.start + len(stream)
        rows = np.arange(part.start, part.end)
        if k == self._last:
            rows = self._outputs[(self._outputs >= part.start) & (self._outputs < part.end)]
        if len(rows) != len(stream):
            raise InputError("llama.cpp has computed other rows than those asked for: use --backend mlx")
        if k in self._acting and self._act(k, part, stream, rows):
            self._set(tensor, stream.ctypes.data, 0, stream.nbytes)
            if k == max(self._acting):
                with np.errstate(over="ignore", invalid="ignore"):
                    energy = np.square(stream).sum(axis=-1)
                self.overflowed = {*self.overflowed, *rows[~np.isfinite(energy)].tolist()}
        part.z, part.z_layer = stream, k
        self._shown(k, stream, rows)

    def _shown(self, k: int, stream: Float32, rows: np.ndarray) -> None:
        """Told z_{k+1} (n, d) of these rows (n,) of the batch, ascending, as it goes into the next block."""

    def _act(self, k: int, part: _Part, output: Float32, computed: np.ndarray) -> bool:
        """Let the laws of block k change its output in place; whether there was any in these rows."""
        if part.z is None or part.z_layer != k - 1:
            raise InputError("llama.cpp does not show the stream between this model's blocks: use --backend mlx")
        acted = False
        for number, law, rows in self._acting[k]:
            own = rows[(rows >= part.start) & (rows < part.end)]
            if not len(own) or number in self.failures:
                continue
            z = part.z[own - part.start]
            there = np.isin(own, computed)
            places = np.searchsorted(computed, own[there])
            before = z.copy()
            before[there] = output[places]
            try:
                with np.errstate(all="ignore"):  # what overflows is noticed by whoever decodes
                    after = law(k, z[:, None], before[:, None])[:, 0]
            except Exception as error:
                self.failures = {**self.failures, number: error}
                continue
            output[places] = after[there]
            acted = True
        return acted


@dataclass
class _Part:
    """The rows of a batch that llama.cpp runs at once, and what is known of them by now."""

    start: int
    end: int = 0
    layer: int = -2
    """The last block that has been computed; -1 for the embeddings"""
    z: Float32 | None = None
    """What a block has put out, the last that was shown: (end - start, d)"""
    z_layer: int = -2

    def __post_init__(self) -> None:
        self.end = self.start


def hook_for(num_layers: int, hidden_size: int, n_ubatch: int) -> Hook:
    """The hook of a context.

    Args:
        num_layers, hidden_size: T and d.
        n_ubatch: how many rows of a batch llama.cpp runs at once, at most.
    """
    from mlx_lqr.backends.llama.native import NativeHook, native  # which is built on this module

    if native() is None:
        return PythonHook(num_layers, hidden_size)
    return NativeHook(num_layers, hidden_size, n_ubatch)
