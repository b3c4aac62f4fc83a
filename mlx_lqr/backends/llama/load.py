"""A GGUF file in llama.cpp: the model, what the file says, and whether it can be steered."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mlx_lqr.backends.llama.gguf import ARCHITECTURES
from mlx_lqr.backends.llama.library import has_amx, llama, parameters, why
from mlx_lqr.convert.parts import part_paths
from mlx_lqr.errors import InputError, quoted

_ALL_LAYERS = 999
_TOPOLOGY = Path("/sys/devices/system/cpu")


class Loaded:
    """A model in memory; its weights stay in the file, which is mapped.

    On processors with AMX llama.cpp would rearrange quantised weights for it, and crash at the first token in many
    builds (ggml-org/llama.cpp, issue 20824 and pull request 26954). It is told not to rearrange weights there.

    Raises:
        InputError: the file cannot be read, or holds a model that is not steered here.
    """

    def __init__(self, file: Path) -> None:
        library = llama()
        self.files = [part for part in part_paths(file) if part.is_file()]
        if not self.files:
            raise InputError(f"{file} does not exist: give a .gguf file")
        asked: dict[str, Any] = {"n_gpu_layers": _ALL_LAYERS} if library.llama_supports_gpu_offload() else {}
        if has_amx():
            asked["use_extra_bufts"] = False
        self.pointer = library.llama_model_load_from_file(os.fsencode(self.files[0]), parameters("model", asked))
        if not self.pointer:
            raise InputError(f"llama.cpp cannot load {file}{why()}: download it again, or use --backend mlx")
        weakref.finalize(self, library.llama_model_free, self.pointer)
        self.metadata = _metadata(self.pointer)
        self.architecture = self.metadata.get("general.architecture", "")
        if self.architecture not in ARCHITECTURES:
            raise InputError(
                f"{file} has the architecture {quoted(self.architecture)}, which is not steered in llama.cpp (but "
                f"{', '.join(sorted(ARCHITECTURES))}): use --backend mlx"
            )
        self.num_layers: int = library.llama_model_n_layer(self.pointer)
        self.hidden_size: int = library.llama_model_n_embd(self.pointer)
        self.vocab_size: int = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self.pointer))
        self.context_length: int = library.llama_model_n_ctx_train(self.pointer)
        scaling = f"{self.architecture}.rope.scaling."
        original = self.metadata.get(scaling + "original_context_length")
        self.rolls = original is None or self.metadata.get(scaling + "type") in ("yarn", "linear", "none")
        if not self.rolls and original is not None:  # another RoPE beyond this length
            self.context_length = min(self.context_length, int(original))
        self.parameters: int = library.llama_model_n_params(self.pointer)
        self.nbytes: int = library.llama_model_size(self.pointer)
        self.threads = _threads()

    @property
    def packing(self) -> str:
        """What llama.cpp calls the kind of most weights, such as "Q4_1"; empty where they are plain numbers."""
        said = _text(partial(llama().llama_model_desc, self.pointer)).rpartition(" ")[2]
        return "" if said in ("F32", "F16", "BF16") else said

    @property
    def unquantised(self) -> bool:
        """Whether the matrices are in float32."""
        return self.metadata.get("general.file_type") == "0"


def _metadata(model: Any) -> dict[str, str]:
    """What the file says, as texts, but for lists."""
    library, said = llama(), {}
    for i in range(library.llama_model_meta_count(model)):
        key = _text(partial(library.llama_model_meta_key_by_index, model, i))
        said[key] = _text(partial(library.llama_model_meta_val_str_by_index, model, i))
    return said


def _text(write: Callable[[Any, int], int]) -> str:
    """What a function of llama.cpp writes into a buffer, which says how long the whole is."""
    buffer = ctypes.create_string_buffer(1024)
    length = write(buffer, len(buffer))
    if length >= len(buffer):
        buffer = ctypes.create_string_buffer(length + 1)
        write(buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace")


def _threads() -> int:
    """As many as the processor has cores, with which llama.cpp is quickest, or what OMP_NUM_THREADS says."""
    stated = os.environ.get("OMP_NUM_THREADS", "")
    if stated.isdecimal() and int(stated) > 0:
        return int(stated)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for number in allowed:
        file = _TOPOLOGY / f"cpu{number}" / "topology" / "thread_siblings_list"
        try:
            siblings.add(file.read_text())
        except OSError:
            siblings.add(str(number))
    return max(1, len(siblings))
