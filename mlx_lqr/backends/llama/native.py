"""Laws inside llama.cpp without Python: the callback in native.c, compiled once by whatever C compiler is here.

llama.cpp asks its callback about every node of the graph, some thirty for each block and token. Answering that from
Python is what steering costs there, not the laws. Affine laws (`AffineLaw`) are evaluated in C too; where any other
steers, its decode is left to `PythonHook`. Where nothing can be compiled everything is, and the results are the same.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_lqr.backends.llama.hook import EMBEDDINGS, PythonHook, Rows, Seen, check_shown, output_stage, stage_of
from mlx_lqr.backends.llama.library import ggml, llama
from mlx_lqr.backends.protocol import Affine
from mlx_lqr.errors import InputError, first_line
from mlx_lqr.files.atomic import writing
from mlx_lqr.files.cache import cache_folder

SETTING = "MLX_LQR_NATIVE"
_SOURCE = Path(__file__).with_name("native.c")
_COMPILERS = ("cc", "clang", "gcc")
_FLAGS = ("-O3", "-std=c99", "-shared", "-fPIC")
_PATIENCE = 60.0
"""Seconds that compiling may take, which takes a fifth of one"""

_Address = ctypes.c_void_p
_Number = ctypes.c_int32


class _Part(ctypes.Structure):
    """`struct part` of native.c"""

    _fields_ = [
        *((name, _Address) for name in ("read_input", "read_output", "target", "gain", "rows")),
        ("concepts", _Number),
        ("count", _Number),
    ]


class _Stage(ctypes.Structure):
    """`struct stage`"""

    _fields_ = [("parts", _Address), ("count", _Number)]


class _State(ctypes.Structure):
    """`struct hook`"""

    _fields_ = [
        *(
            (name, _Address)
            for name in ("name", "operation", "elements", "bytes", "get", "set", "instead", "instead_data")
        ),
        *((name, _Address) for name in ("inputs", "stages", "outputs", "input", "output", "overflowed", "errors")),
        *((name, _Number) for name in ("layers", "width", "ubatch", "tokens", "output_count", "reads_first")),
        *(
            (name, _Number)
            for name in (
                "start",
                "rows",
                "asked",
                "projection",
                "held",
                "held_first",
                "held_count",
                "overflows",
                "applied",
            )
        ),
        *((name, _Number) for name in ("failure", "failed_layer")),
    ]


_FAILURES = {
    1: "llama.cpp computes this model's stream in 16 bits, which cannot be steered",
    2: "llama.cpp has computed other rows of a batch than those asked for",
    3: "llama.cpp does not show the stream between this model's blocks: use --backend mlx",
}


class NativeHook:
    """The hook (see `Hook`) that evaluates affine laws in C.

    Args:
        num_layers, hidden_size: T and d.
        n_ubatch: how many rows of a batch llama.cpp runs at once, at most.
    """

    def __init__(self, num_layers: int, hidden_size: int, n_ubatch: int) -> None:
        library = native()
        assert library is not None
        self._python = PythonHook(num_layers, hidden_size)
        self._by_python = False
        self._kept: list[Any] = []
        """What the state points to"""
        self._seen = Seen()
        self._placed: dict[int, tuple[Any, dict[int, _Arrays]]] = {}
        """id of a law's numbers -> them, and by layer the arrays that C reads"""
        self._expected = 0
        """How many rows are to be steered, counted again at every stage"""
        self._last = output_stage(num_layers - 1)
        self._overflowed = np.zeros(0, np.uint8)
        self._streams = np.empty((2, n_ubatch, hidden_size), np.float32)
        self._names = (ctypes.c_char_p * (len(EMBEDDINGS) + 1))(*EMBEDDINGS, None)
        self._state = _State(
            inputs=ctypes.addressof(self._names),
            input=self._streams[0].ctypes.data,
            output=self._streams[1].ctypes.data,
            layers=num_layers,
            width=hidden_size,
            ubatch=n_ubatch,
            **{field: ctypes.cast(getattr(ggml(), name), _Address).value for field, name in _FUNCTIONS.items()},
        )
        self.user_data: int | None = ctypes.addressof(self._state)
        address = ctypes.cast(library.mlx_lqr_eval, _Address).value
        assert address is not None
        self.callback = llama().ggml_backend_sched_eval_callback(address)

    @property
    def failures(self) -> Mapping[int, Exception]:
        """See `Hook`."""
        return self._python.failures if self._by_python else {}

    @property
    def overflowed(self) -> Collection[int]:
        """See `Hook`."""
        if self._by_python:
            return self._python.overflowed
        return np.flatnonzero(self._overflowed).tolist() if self._state.overflows else ()

    def prepare(self, steered: Sequence[Rows], tokens: int, outputs: Sequence[int]) -> None:
        """See `Hook`."""
        state = self._state
        affines = [self._seen.affines(own.law) for own in steered]
        self._by_python = any(one is None for one in affines)
        if self._by_python:
            state.instead = ctypes.cast(self._python.callback, _Address).value
            self._python.prepare(steered, tokens, outputs)
            return
        state.instead = None
        state.start = state.rows = state.applied = state.failure = 0
        if state.overflows:
            self._overflowed[:], state.overflows = 0, 0
        state.asked, state.held, state.projection = 2 * state.layers, -1, -1
        if self._seen.is_new(steered, affines, tokens, outputs):
            self._arrange([(one, own) for one, own in zip(affines, steered, strict=True) if one], tokens, outputs)

    def finish(self) -> None:
        """See `Hook`.

        Raises:
            InputError: also where llama.cpp has not computed what was to be steered, in this order.
        """
        if self._by_python:
            self._python.finish()
            return
        if self._state.failure:
            raise InputError(f"layer {self._state.failed_layer}: {_FAILURES[self._state.failure]}")
        check_shown(self._state.applied, self._expected)

    def _arrange(self, laws: Sequence[tuple[Mapping[int, Affine], Rows]], tokens: int, outputs: Sequence[int]) -> None:
        """Let the state point to the numbers and the rows of all laws."""
        state, last = self._state, self._last
        wanted = np.array(outputs, np.int32)
        self._placed = {id(one): (one, self._arrays(one)) for one, _ in laws}
        parts: dict[int, list[_Part]] = {}
        self._kept, self._expected, most = [wanted], 0, 1
        for affines, own in laws:
            steered = np.array(own.rows, np.int32)
            self._kept.append(steered)
            for layer, arrays in self._placed[id(affines)][1].items():
                stage = stage_of(own.law, layer)
                parts.setdefault(stage, []).append(arrays.part(steered))
                computed = np.intersect1d(steered, wanted) if stage == last else steered
                self._expected += len(computed)
                most = max(most, len(arrays.target))
        stages = (_Stage * (2 * state.layers))()
        for stage, at_once in parts.items():
            together = (_Part * len(at_once))(*at_once)
            self._kept.append(together)
            stages[stage] = _Stage(ctypes.addressof(together), len(at_once))
        errors = np.empty(most, np.float32)
        self._kept += [stages, errors]
        state.stages, state.errors = ctypes.addressof(stages) if parts else None, errors.ctypes.data
        self._overflowed, state.overflows = np.zeros(tokens, np.uint8), 0
        state.overflowed = self._overflowed.ctypes.data
        state.reads_first = any(part.read_input for part in parts.get(output_stage(0), ()))
        state.outputs, state.output_count, state.tokens = wanted.ctypes.data, len(wanted), tokens

    def _arrays(self, affines: Mapping[int, Affine]) -> dict[int, _Arrays]:
        if id(affines) in self._placed:
            return self._placed[id(affines)][1]
        return {layer: _Arrays(one) for layer, one in affines.items()}


class _Arrays:
    """The numbers of an `Affine`, laid out as native.c reads them."""

    def __init__(self, affine: Affine) -> None:
        self.target = np.ascontiguousarray(affine.target, np.float32)
        self._rows = {
            "gain": _rows(affine.gain),
            "read_input": _rows(affine.read_input),
            "read_output": _rows(affine.read_output),
        }

    def part(self, rows: np.ndarray) -> _Part:
        pointers = {name: own.ctypes.data for name, own in self._rows.items() if own is not None}
        return _Part(
            target=self.target.ctypes.data,
            rows=rows.ctypes.data,
            concepts=len(self.target),
            count=len(rows),
            **pointers,
        )


def _rows(columns: np.ndarray | None) -> np.ndarray | None:
    return None if columns is None else np.ascontiguousarray(columns.T, np.float32)


_FUNCTIONS = {
    "name": "ggml_get_name",
    "operation": "ggml_op_desc",
    "elements": "ggml_nelements",
    "bytes": "ggml_nbytes",
    "get": "ggml_backend_tensor_get",
    "set": "ggml_backend_tensor_set",
}
"""By the state's fields"""


def native() -> Any:
    """The library made of native.c, or None where there is none; `why_not` says why."""
    return _built()[0]


def why_not() -> str:
    """Why laws run in Python here; empty where they do not."""
    return _built()[1]


@functools.cache
def _built() -> tuple[Any, str]:
    """The library, compiled into the cache folder the first time; or why there is none."""
    if os.environ.get(SETTING) == "off":
        return None, f"{SETTING} is off"
    if os.name != "posix":
        return None, "it is compiled on Linux and macOS only"
    source = _SOURCE.read_bytes()
    identity = b" ".join([source, *map(str.encode, _FLAGS), sysconfig.get_platform().encode()])
    file = cache_folder() / "native" / f"hook-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _ours(file.parent):
            return None, f"others may write to {file.parent}"
        if not file.exists() and (reason := _compile(file)):
            return None, reason
        if not _ours(file):
            return None, f"{file} is not yours alone to write: remove it"
        library = ctypes.CDLL(str(file))
        size = library.mlx_lqr_size
        size.restype, size.argtypes = ctypes.c_size_t, [_Number]
        if [size(which) for which in range(3)] != [ctypes.sizeof(kind) for kind in (_Part, _Stage, _State)]:
            return None, "its structures are laid out in another way here"
        return library, ""
    except (OSError, AttributeError, InputError) as error:
        return None, first_line(error)


def _compile(file: Path) -> str:
    """Make `file` of native.c, whole or not at all; returns why not. Two processes at once make the same file twice."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        return "no C compiler is here"
    with writing(file) as temporary:
        command = [compiler, *_FLAGS, "-o", str(temporary), str(_SOURCE)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
        except subprocess.TimeoutExpired:
            raise InputError(f"{compiler} takes longer than {_PATIENCE:g} s") from None
        if done.returncode or not temporary.is_file():
            raise InputError(f"{compiler} cannot compile it ({(done.stderr.strip() or 'no file').splitlines()[0]})")
        temporary.chmod(0o700)
    return ""


def _ours(path: Path) -> bool:
    """Whether only we may write it, since it is loaded."""
    state = path.stat()
    return state.st_uid == os.getuid() and not state.st_mode & 0o022
