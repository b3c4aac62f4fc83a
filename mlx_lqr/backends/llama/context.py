"""A llama_context that several decoders share, each with sequences of its own, and that grows as they need it.

A context has its number of cells for keys and values, its number of sequences and its evaluation callback for good.
Cells take memory, and a callback takes time. So the first context is small and has no callback; where that is not
enough another takes its place, and the sequences move.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_lqr.backends.llama.hook import Hook, Rows
from mlx_lqr.backends.llama.library import llama, parameters, why
from mlx_lqr.backends.llama.load import Loaded
from mlx_lqr.backends.protocol import Float32
from mlx_lqr.errors import InputError

BATCH = 512
"""Rows of a llama_decode, at most; llama.cpp computes them at once."""
_CELLS = 512
"""Of the first context; a further one has twice as many as the last, or more."""
_SEQUENCES = (1, 16, 64, 256)
_F32 = 0
"""GGML_TYPE_F32"""
_DISABLED = 0
"""LLAMA_FLASH_ATTN_TYPE_DISABLED"""


class Slot:
    """A place for one sequence in a context, given back when nobody refers to it any more."""

    def __init__(self, number: int, released: deque[int]) -> None:
        self.number = number
        self.length = 0
        """The position of the next token"""
        self.forgotten = 0
        """How many of the tokens before it are not held any more"""
        weakref.finalize(self, released.append, number).atexit = False


def _free(pointer: Any, *used: object) -> None:
    """Free a context. What it uses is held until then: collected with it, its model could be freed before it."""
    llama().llama_free(pointer)


@dataclass(frozen=True)
class Batch:
    """What one llama_decode is to run: n rows, in order for each sequence."""

    tokens: Sequence[int]
    slots: Sequence[Slot]
    """Where each row goes"""
    outputs: Sequence[int]
    """The rows whose logits are asked for, ascending"""
    steered: Sequence[Rows] = ()


class Context:
    """Not safe to be used by two threads at once.

    Args:
        loaded: the model.
        make_hook: what steers, for a context that has something to steer.
        always: whether it has its callback from the beginning.
    """

    def __init__(self, loaded: Loaded, make_hook: Callable[[], Hook], *, always: bool = False) -> None:
        self._loaded, self._make_hook = loaded, make_hook
        self._hook: Hook | None = make_hook() if always else None
        self._released: deque[int] = deque()
        self._slots: weakref.WeakValueDictionary[int, Slot] = weakref.WeakValueDictionary()
        self._cells, self._sequences = 0, _SEQUENCES[0]
        self._pointer: Any = None
        self._free: Any = None
        self._batch = _Buffers()

    def expect_laws(self) -> None:
        """Have a hook from the first batch on; where there have been batches, the next law brings it."""
        if self._pointer is None and self._hook is None:
            self._hook = self._make_hook()

    @property
    def holds_a_hook(self) -> bool:
        return self._hook is not None

    def slot(self) -> Slot:
        """A place for another sequence.

        Raises:
            InputError: there are too many.
        """
        self._give_back()
        number = next(i for i in range(_SEQUENCES[-1] + 1) if i not in self._slots)
        if number >= self._sequences:
            if number >= _SEQUENCES[-1]:
                raise InputError(f"llama.cpp holds {_SEQUENCES[-1]} sequences at once and no more: ask for fewer")
            sequences = next(count for count in _SEQUENCES if count > number)
            self._grow(sequences=sequences)
        slot = self._slots[number] = Slot(number, self._released)
        return slot

    def copy(self, slot: Slot) -> Slot:
        """Another sequence that holds the same, in the same cells."""
        other = self.slot()
        other.length, other.forgotten = slot.length, slot.forgotten
        if self._pointer:
            llama().llama_memory_seq_cp(self._memory, slot.number, other.number, -1, -1)
        return other

    def forget(self, slot: Slot, start: int, end: int | None = None) -> bool:
        """Hold a sequence's tokens at the positions from `start` to `end` no more; False where that cannot be done."""
        done = llama().llama_memory_seq_rm(self._memory, slot.number, start, -1 if end is None else end)
        if done and end is None:
            slot.length = start
        elif done:
            slot.forgotten += end - start if end is not None else 0
        return bool(done)

    def run(self, batch: Batch) -> tuple[Float32, Mapping[int, Exception]]:
        """Append the rows of a batch to their sequences.

        Returns:
            The logits (n, V) of the outputs, NaN for rows whose activations overflow, and by number in `steered` why
            laws have failed.

        Raises:
            InputError: there is no memory for it, or llama.cpp cannot run it.
        """
        self._give_back()
        if batch.steered and self._hook is None:
            self._grow(hook=self._make_hook())
        held = sum(slot.length - slot.forgotten for slot in self._slots.values())
        if self._pointer is None or held + len(batch.tokens) > self._cells:
            self._grow(cells=held + len(batch.tokens))
        native = self._batch.filled(batch)
        if self._hook is not None:
            self._hook.prepare(batch.steered, len(batch.tokens), batch.outputs)
        status = llama().llama_decode(self._pointer, native)
        if status:
            raise InputError(f"llama.cpp cannot run {len(batch.tokens)} tokens (status {status}{why()})")
        for slot in batch.slots:
            slot.length += 1
        failures: Mapping[int, Exception] = {}
        if self._hook is not None:
            try:
                self._hook.finish()
            except Exception:
                failures = self._hook.failures
                if not failures:
                    raise
        logits = self._logits(len(batch.outputs))
        if self._hook is not None and self._hook.overflowed:
            logits[[row in self._hook.overflowed for row in batch.outputs]] = np.nan
        return logits, failures

    def _logits(self, count: int) -> Float32:
        vocabulary = self._loaded.vocab_size
        if not count:
            return np.empty((0, vocabulary), np.float32)
        return np.ctypeslib.as_array(llama().llama_get_logits(self._pointer), (count, vocabulary)).copy()

    @property
    def _memory(self) -> Any:
        return llama().llama_get_memory(self._pointer)

    def _give_back(self) -> None:
        """Empty the places that nobody refers to any more. They may have been let go of by any thread, at any time."""
        while self._released:
            number = self._released.popleft()
            if self._pointer and number not in self._slots:
                llama().llama_memory_seq_rm(self._memory, number, -1, -1)

    def _grow(self, *, cells: int = 0, sequences: int = 0, hook: Hook | None = None) -> None:
        """Let a larger context take the place of this one."""
        if self._pointer is None and not cells:  # nothing is held yet, so it is made when its size is known
            self._sequences, self._hook = max(sequences, self._sequences), hook or self._hook
            return
        cells = self._cells if cells <= self._cells else max(cells, 2 * self._cells, _CELLS)
        sequences, hook = max(sequences, self._sequences), hook or self._hook
        pointer = self._made(cells, sequences, hook)
        free = weakref.finalize(self, _free, pointer, self._loaded, hook)
        if self._pointer is not None:
            for number in list(self._slots):
                _move(self._pointer, pointer, number)
            self._free()
        self._pointer, self._free = pointer, free
        self._cells, self._sequences, self._hook = cells, sequences, hook

    def _made(self, cells: int, sequences: int, hook: Hook | None) -> Any:
        library, loaded = llama(), self._loaded
        asked: dict[str, Any] = {
            "n_ctx": cells,
            "n_batch": BATCH,
            "n_ubatch": BATCH,
            "n_seq_max": sequences,
            "n_threads": loaded.threads,
            "n_threads_batch": loaded.threads,
            "kv_unified": True,
            "swa_full": True,  # or what has been read could not be gone back to
            "no_perf": True,
        }
        if loaded.unquantised:
            # or keys and values would be the one thing in 16 bits; llama.cpp's flash attention computes in 16 bits too
            asked |= {"type_k": _F32, "type_v": _F32, "flash_attn_type": _DISABLED}
        if hook is not None:
            asked |= {"cb_eval": hook.callback, "cb_eval_user_data": hook.user_data}
        pointer = library.llama_init_from_model(loaded.pointer, parameters("context", asked))
        if not pointer:
            raise InputError(
                f"llama.cpp has no memory for a context of {cells} tokens{why()}: shorten the prompt, or ask for less "
                "at once"
            )
        return pointer


def _move(old: Any, new: Any, number: int) -> None:
    """Let a context hold what another does of one sequence."""
    library = llama()
    size = library.llama_state_seq_get_size(old, number)
    state = (ctypes.c_uint8 * size)()
    if library.llama_state_seq_get_data(old, state, size, number) == 0:
        raise InputError("llama.cpp cannot copy what its context holds: install another version of llama-cpp-python")
    if library.llama_state_seq_set_data(new, state, size, number) == 0:
        raise InputError("llama.cpp has no room for what its context held: ask for less at once")


class _Buffers:
    """The memory that a `llama_batch` points to, used again and again."""

    def __init__(self) -> None:
        library = llama()
        pointer = ctypes.POINTER(library.llama_seq_id)
        self._tokens, self._positions = (library.llama_token * BATCH)(), (library.llama_pos * BATCH)()
        self._counts, self._sequences = (ctypes.c_int32 * BATCH)(*[1] * BATCH), (library.llama_seq_id * BATCH)()
        size = ctypes.sizeof(library.llama_seq_id)
        start = ctypes.addressof(self._sequences)
        self._places = (pointer * BATCH)(*(ctypes.cast(start + i * size, pointer) for i in range(BATCH)))
        self._asked = (ctypes.c_int8 * BATCH)()
        self._native = library.llama_batch(
            token=self._tokens,
            embd=None,
            pos=self._positions,
            n_seq_id=self._counts,
            seq_id=self._places,
            logits=self._asked,
        )

    def filled(self, batch: Batch) -> Any:
        """The batch as a `llama_batch`, valid until the next one."""
        count = len(batch.tokens)
        self._tokens[:count] = list(batch.tokens)
        self._sequences[:count] = [slot.number for slot in batch.slots]
        following: dict[int, int] = {}
        for row, slot in enumerate(batch.slots):
            position = following.get(slot.number, slot.length)
            self._positions[row] = position
            following[slot.number] = position + 1
        asked = np.ctypeslib.as_array(self._asked)
        asked[:count] = 0
        asked[list(batch.outputs)] = 1
        self._native.n_tokens = count
        return self._native
