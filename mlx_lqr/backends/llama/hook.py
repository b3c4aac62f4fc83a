"""Control laws inside llama.cpp: between two nodes of its graph, where a block's output can be read and changed.

ggml's scheduler asks a callback about every node, whether it wants to see what the node has computed. At a block k that
is steered, this one sees z_k, which is what block k - 1 put out ("l_out-(k-1)", or the embeddings), and then the
block's own output "l_out-k", to which it adds u_k in place. A law of the site "attention" changes the product of the
output projection, which is the node after "kqv_out-k". It asks for nothing else, since each tensor that is asked for
cuts the graph in two.

llama.cpp runs a batch in parts of at most `n_ubatch` rows, in order. At the last block it drops the rows whose logits
nobody has asked for, once attention has used them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mlx_lqr.backends.llama.library import ggml, llama
from mlx_lqr.backends.protocol import Affine, AffineLaw, Float32, Law
from mlx_lqr.errors import InputError

EMBEDDINGS = (b"inp_embd", b"embd", b"inp_scaled")
"""The names of z_0 in llama.cpp's graphs; where there are several, the last that is computed is z_0."""
FIRST = -1
"""The stage at which z_0 has been computed"""


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


def heads_name(layer: int) -> bytes:
    """What llama.cpp calls the outputs of a block's attention heads, side by side."""
    return b"kqv_out-%d" % layer


def projection_stage(layer: int) -> int:
    """The stage at which the output projection of a block's attention has been computed; stages come in order."""
    return 2 * layer


def output_stage(layer: int) -> int:
    """The stage at which a block's output has been computed; of layer -1 it is `FIRST`."""
    return 2 * layer + 1


def stage_of(law: Law, layer: int) -> int:
    """The stage that a law changes at a layer."""
    return projection_stage(layer) if law.site == "attention" else output_stage(layer)


class Seen:
    """What the laws of a batch do, and whether that and their rows are the same as in the batch before."""

    def __init__(self) -> None:
        self._affine_kinds: dict[type, bool] = {}
        self._batch: tuple[Any, ...] = ()
        self._laws: list[Any] = []

    def affines(self, law: Any) -> Mapping[int, Affine] | None:
        """By layer what a law does; None where it has to be called.

        Raises:
            InputError: it acts inside attention and reads what is there.
        """
        kind = type(law)
        if kind not in self._affine_kinds:
            self._affine_kinds[kind] = isinstance(law, AffineLaw)  # slow, for a protocol
        affines: Mapping[int, Affine] | None = law.affine() if self._affine_kinds[kind] else None
        if law.site == "attention" and (affines is None or any(map(_reads, affines.values()))):
            raise InputError("llama.cpp steers inside attention by fixed vectors alone: use --backend mlx")
        return affines

    def is_new(self, steered: Sequence[Rows], laws: Sequence[Any], tokens: int, outputs: Sequence[int]) -> bool:
        """Whether this batch is another than the last one asked about.

        Args:
            laws: objects that are others where one of the laws does something else.
        """
        batch = (tokens, list(outputs), [list(own.rows) for own in steered])
        if batch == self._batch and not any(map(operator.is_not, laws, self._laws)):
            return False
        self._batch, self._laws = batch, list(laws)
        return True


def check_shown(shown: int, expected: int) -> None:
    """Refuse a llama_decode in which fewer rows were steered than there were to be, counted again at every stage."""
    if shown != expected:
        raise InputError(
            f"llama.cpp has shown {shown} of {expected} outputs that were to be steered: this model, or this version "
            "of llama-cpp-python, cannot be steered (try --backend mlx)"
        )


def _reads(affine: Affine) -> bool:
    return affine.read_input is not None or affine.read_output is not None


@dataclass(frozen=True)
class _Places:
    """Where the n rows that a law steers stand in a part of a batch, c of them in the tensor of a stage too."""

    own: slice | np.ndarray
    """The n rows among all of the part"""
    both: slice | np.ndarray
    """The c rows among all of the part"""
    computed: slice | np.ndarray
    """The c rows among the n"""
    there: slice | np.ndarray
    """The c rows in the tensor"""
    count: int
    """c"""


def _indices(rows: np.ndarray) -> slice | np.ndarray:
    """Ascending rows (n,) as an index, which gives a view where they are side by side."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


class _Acting:
    """A law at one of its stages.

    Args:
        number: in `steered`.
        affine: what it does; None where it has to be called.
    """

    def __init__(self, number: int, law: Law, layer: int, affine: Affine | None) -> None:
        self.number, self.law, self.layer = number, law, layer
        self.reads = affine is None or affine.read_input is not None
        self.affine = affine is not None
        if affine is not None:
            self._target = affine.target  # (m,)
            self._gain = np.ascontiguousarray(affine.gain.T)  # (m, d)
            self._read_input, self._read_output = affine.read_input, affine.read_output  # (d, m)

    def push(self, z: Float32 | None, output: Float32, places: _Places) -> None:
        """output += (target - z R - output S) G' in place, at these rows of `output`."""
        error = self._target
        if self._read_input is not None:
            assert z is not None
            error = error - z[places.both].dot(self._read_input)
        if self._read_output is not None:
            error = error - output[places.there].dot(self._read_output)
        output[places.there] += error.dot(self._gain)

    def call(self, z: Float32, output: Float32, places: _Places) -> None:
        """Let the law change these rows of `output`; where the stage has not computed a row it sees z for it."""
        z = z[places.own].copy()
        before = z.copy()
        before[places.computed] = output[places.there]
        output[places.there] = self.law(self.layer, z[:, None], before[:, None])[:, 0][places.computed]


class PythonHook:
    """The hook that evaluates laws with NumPy.

    A law that is not affine is called with rows (n, 1, d) in float32: n sequences side by side of one token each, or n
    tokens. At the last block it sees z for the output of rows that are not computed there.

    Args:
        num_layers, hidden_size: T and d.
    """

    def __init__(self, num_layers: int, hidden_size: int) -> None:
        self.user_data: int | None = None
        self.failures: Mapping[int, Exception] = {}
        self.overflowed: Collection[int] = ()
        self._last, self._width = output_stage(num_layers - 1), hidden_size
        self._seen = Seen()
        self._acting: dict[int, list[_Acting]] = {}
        """Stage -> what steers there"""
        self._final = FIRST
        """The last of these stages"""
        self._rows: dict[int, np.ndarray] = {}
        """Number in `steered` -> rows (n,)"""
        self._wanted: dict[bytes, int] = {}
        """Name of a tensor -> its stage, or that of the projection which comes after it"""
        self._stage = FIRST
        """Of the tensor that llama.cpp has last been told to show"""
        self._projection: int | None = None
        """The stage of the product that comes next"""
        self._interruption: BaseException | None = None
        self._part = Part(0)
        self._tokens, self._outputs = 0, np.empty(0, np.int64)
        self._shown_rows, self._expected = 0, 0
        self._places: dict[tuple[int, int, int, bool], _Places | None] = {}
        self._buffers = [_Buffer(1, hidden_size), _Buffer(1, hidden_size)]
        """What is held of the stage before, and of this one"""
        library = ggml()
        self._operation, self._bytes, self._count = library.ggml_op_desc, library.ggml_nbytes, library.ggml_nrows
        self._get, self._set = library.ggml_backend_tensor_get, library.ggml_backend_tensor_set
        self.callback = llama().ggml_backend_sched_eval_callback(self._called(library.ggml_get_name))

    def prepare(self, steered: Sequence[Rows], tokens: int, outputs: Sequence[int]) -> None:
        """See `Hook`."""
        self.failures, self._interruption, self._part, self._projection = {}, None, Part(0), None
        self.overflowed, self._shown_rows = (), 0
        affines = [self._seen.affines(own.law) for own in steered]
        laws: list[Any] = [own.law if one is None else one for own, one in zip(steered, affines, strict=True)]
        laws += [not own.law.replayable or own.law.acts for own in steered]
        if self._seen.is_new(steered, laws, tokens, outputs):
            self._arrange(steered, affines, tokens, outputs)

    def _arrange(
        self, steered: Sequence[Rows], affines: Sequence[Mapping[int, Affine] | None], tokens: int, outputs: Any
    ) -> None:
        """What acts, on which rows, and which tensors that takes."""
        self._tokens, self._outputs = tokens, np.asarray(outputs, np.int64)
        self._acting, self._rows, self._places, self._expected = {}, {}, {}, 0
        for number, (own, affine) in enumerate(zip(steered, affines, strict=True)):
            if not own.rows or (own.law.replayable and not own.law.acts):
                continue
            rows = self._rows[number] = np.asarray(own.rows, np.int64)
            for layer in own.law.layers if affine is None else affine:
                stage = stage_of(own.law, layer)
                one = _Acting(number, own.law, layer, None if affine is None else affine[layer])
                self._acting.setdefault(stage, []).append(one)
                self._expected += len(np.intersect1d(rows, self._outputs) if stage == self._last else rows)
        self._final = max(self._acting, default=FIRST)
        self._wanted.clear()
        for stage, acting in self._acting.items():
            self._wanted[output_name(stage // 2) if stage % 2 else heads_name(stage // 2)] = stage
            if stage == self._last or any(one.reads for one in acting):
                self._wanted |= self._named(stage - 2)

    @staticmethod
    def _named(stage: int) -> dict[bytes, int]:
        """The tensors that a block has put out, by name; of `FIRST` there are several."""
        return dict.fromkeys(EMBEDDINGS if stage == FIRST else (output_name(stage // 2),), stage)

    def finish(self) -> None:
        """See `Hook`.

        Raises:
            InputError: also where llama.cpp has not computed what was to be steered, in this order.
        """
        if self._interruption is not None:
            raise self._interruption
        for error in self.failures.values():
            raise error
        check_shown(self._shown_rows, self._expected)

    def _called(self, name: Callable[[int], bytes]) -> Callable[[int, bool, int | None], bool]:
        """The callback. It is asked a thousand times a token, so that it looks up next to nothing."""
        wanted = self._wanted

        def called(tensor: int, ask: bool, _: int | None) -> bool:
            if ask:
                if self._projection is not None and self._operation(tensor) == b"MUL_MAT":
                    self._stage, self._projection = self._projection, None
                    return True
                named = name(tensor)
                if named not in wanted:
                    return False
                self._stage = wanted[named]
                if self._stage % 2 == 0:
                    self._projection = self._stage
                    return False
                return True
            try:
                with np.errstate(all="ignore"):  # what overflows is noticed by whoever decodes
                    self._computed(tensor, self._stage)
            except BaseException as error:  # which ctypes would print, and forget
                self._interruption = self._interruption or error
            return True

        return called

    def _computed(self, tensor: int, stage: int) -> None:
        """The tensor of a stage has been computed in a part of the batch."""
        part = self._part
        if stage < part.stage or (stage == part.stage and stage != FIRST):
            part = self._part = Part(part.end)
        part.stage = stage
        count = self._count(tensor)
        buffer = self._buffers[0]
        if buffer.rows != count:
            buffer = self._buffers[0] = _Buffer(count, self._width)
        if self._bytes(tensor) != buffer.nbytes:
            raise InputError("llama.cpp computes this model's stream in 16 bits, which cannot be steered")
        self._get(tensor, buffer.address, 0, buffer.nbytes)
        if stage != self._last:
            part.end = part.start + count
        elif count != len(self._computed_rows(part, stage)):
            raise InputError("llama.cpp has computed other rows than those asked for: use --backend mlx")
        if stage in self._acting and self._act(stage, part, buffer.array):
            self._set(tensor, buffer.address, 0, buffer.nbytes)
            if stage == self._final and not np.isfinite(np.vdot(buffer.array, buffer.array)):
                self._note_overflow(buffer.array, self._computed_rows(part, stage))
        if stage % 2:
            part.z, part.z_stage = buffer.array, stage
            self._buffers.reverse()
            self._shown(stage // 2, buffer.array, part)

    def _computed_rows(self, part: Part, stage: int) -> np.ndarray:
        """The rows of the batch that the tensor of a stage has."""
        if stage != self._last:
            return np.arange(part.start, part.end)
        return self._outputs[(self._outputs >= part.start) & (self._outputs < part.end)]

    def _note_overflow(self, stream: Float32, rows: np.ndarray) -> None:
        energy = np.square(stream).sum(axis=-1)
        self.overflowed = {*self.overflowed, *rows[~np.isfinite(energy)].tolist()}

    def _shown(self, k: int, stream: Float32, part: Part) -> None:
        """Told z_{k+1} (n, d) of the rows `_computed_rows`, as it goes into the next block; it is gone afterwards."""

    def _act(self, stage: int, part: Part, output: Float32) -> bool:
        """Let the laws of a stage change its tensor in place; whether there was any in these rows."""
        acted = False
        for one in self._acting[stage]:
            if one.reads and (part.z is None or part.z_stage != stage - 2):
                raise InputError("llama.cpp does not show the stream between this model's blocks: use --backend mlx")
            places = self._placed(part, stage, one.number)
            if places is None:
                continue
            self._shown_rows += places.count
            if one.affine:
                one.push(part.z, output, places)
                acted = True
            elif one.number not in self.failures and part.z is not None:
                try:
                    one.call(part.z, output, places)
                    acted = True
                except Exception as error:
                    self.failures = {**self.failures, one.number: error}
        return acted

    def _placed(self, part: Part, stage: int, number: int) -> _Places | None:
        """Where the rows of a law stand; None where there are none in this part. Found once for batches alike."""
        key = (part.start, part.end, number, stage == self._last)
        if key not in self._places:
            rows, computed = self._rows[number], self._computed_rows(part, stage)
            own = rows[(rows >= part.start) & (rows < part.end)]
            there = np.isin(own, computed)
            both = own[there]
            self._places[key] = None
            if len(own):
                self._places[key] = _Places(
                    own=_indices(own - part.start),
                    both=_indices(both - part.start),
                    computed=_indices(np.flatnonzero(there)),
                    there=_indices(np.searchsorted(computed, both)),
                    count=len(both),
                )
        return self._places[key]


class _Buffer:
    """Memory for rows (n, d), whose address is looked up once."""

    def __init__(self, rows: int, width: int) -> None:
        self.rows, self.array = rows, np.empty((rows, width), np.float32)
        self.address, self.nbytes = self.array.ctypes.data, self.array.nbytes


@dataclass
class Part:
    """The rows of a batch that llama.cpp runs at once, and what is known of them by now."""

    start: int
    end: int = 0
    stage: int = FIRST - 1
    """The last that has been computed"""
    z: Float32 | None = None
    """What a block has put out, the last that was shown: (end - start, d)"""
    z_stage: int = FIRST - 1

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
