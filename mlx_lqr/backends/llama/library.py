"""What is taken of llama-cpp-python and of ggml, the tensor library beneath it.

llama-cpp-python binds the whole of llama.h, and of ggml.h next to nothing. The few functions that read and write a
tensor, or look into a file, are called by ctypes here, in the library that it brings along. They work for tensors on
any device.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import sys
import threading
from collections import deque
from collections.abc import Mapping
from importlib import metadata
from types import ModuleType
from typing import Any

from mlx_lqr.backends.borrowed import check_borrowed
from mlx_lqr.errors import InputError

PACKAGE = "llama-cpp-python"


class GGUFParameters(ctypes.Structure):
    """`gguf_init_params`: how a file is opened."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_get_name": (ctypes.c_char_p, [ctypes.c_void_p]),
    "ggml_op_desc": (ctypes.c_char_p, [ctypes.c_void_p]),
    "ggml_nelements": (ctypes.c_int64, [ctypes.c_void_p]),
    "ggml_nbytes": (ctypes.c_size_t, [ctypes.c_void_p]),
    "ggml_nrows": (ctypes.c_int64, [ctypes.c_void_p]),
    "ggml_backend_tensor_get": (None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
    "ggml_backend_tensor_set": (None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
    "ggml_backend_dev_count": (ctypes.c_size_t, []),
    "ggml_backend_dev_get": (ctypes.c_void_p, [ctypes.c_size_t]),
    "ggml_backend_dev_type": (ctypes.c_int, [ctypes.c_void_p]),
    "ggml_backend_dev_description": (ctypes.c_char_p, [ctypes.c_void_p]),
    "gguf_init_from_file": (ctypes.c_void_p, [ctypes.c_char_p, GGUFParameters]),
    "gguf_find_key": (ctypes.c_int64, [ctypes.c_void_p, ctypes.c_char_p]),
    "gguf_get_kv_type": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_int64]),
    "gguf_get_val_str": (ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_int64]),
    "gguf_free": (None, [ctypes.c_void_p]),
    "gguf_get_data_offset": (ctypes.c_size_t, [ctypes.c_void_p]),
    "gguf_find_tensor": (ctypes.c_int64, [ctypes.c_void_p, ctypes.c_char_p]),
    "gguf_get_tensor_offset": (ctypes.c_size_t, [ctypes.c_void_p, ctypes.c_int64]),
    "gguf_get_tensor_type": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_int64]),
    "gguf_get_tensor_size": (ctypes.c_size_t, [ctypes.c_void_p, ctypes.c_int64]),
}
"""Name -> what it returns and takes, as ggml.h, ggml-backend.h and gguf.h declare it"""
USED = (
    "ggml_backend_sched_eval_callback",
    "llama_backend_init",
    "llama_batch",
    "llama_context_default_params",
    "llama_decode",
    "llama_free",
    "llama_get_logits",
    "llama_get_memory",
    "llama_init_from_model",
    "llama_log_callback",
    "llama_log_set",
    "llama_memory_seq_cp",
    "llama_memory_seq_rm",
    "llama_model_chat_template",
    "llama_model_default_params",
    "llama_model_desc",
    "llama_model_free",
    "llama_model_get_vocab",
    "llama_model_load_from_file",
    "llama_model_meta_count",
    "llama_model_meta_key_by_index",
    "llama_model_meta_val_str_by_index",
    "llama_model_n_ctx_train",
    "llama_model_n_embd",
    "llama_model_n_layer",
    "llama_model_n_params",
    "llama_model_size",
    "llama_pos",
    "llama_print_system_info",
    "llama_seq_id",
    "llama_state_seq_get_data",
    "llama_state_seq_get_size",
    "llama_state_seq_set_data",
    "llama_supports_gpu_offload",
    "llama_token",
    "llama_token_to_piece",
    "llama_tokenize",
    "llama_vocab_bos",
    "llama_vocab_eos",
    "llama_vocab_eot",
    "llama_vocab_get_add_bos",
    "llama_vocab_get_add_eos",
    "llama_vocab_get_text",
    "llama_vocab_is_eog",
    "llama_vocab_n_tokens",
    "llama_vocab_type",
)
"""Of llama.h, what any module here uses"""
_one_import = threading.Lock()


@functools.cache
def llama() -> Any:
    """The module with the functions of llama.h, at its own cost alone.

    The package's `__init__` also brings what its own generation needs, which takes five times as long to import.
    """
    with _one_import:
        if "llama_cpp" in sys.modules:
            return _quiet(importlib.import_module("llama_cpp.llama_cpp"))
        found = importlib.util.find_spec("llama_cpp")
        if found is None or found.submodule_search_locations is None:
            raise InputError(f'{PACKAGE} is not installed: pip install "mlx-lqr[llama]"')
        stand_in = ModuleType("llama_cpp")
        stand_in.__path__ = list(found.submodule_search_locations)
        sys.modules["llama_cpp"] = stand_in
        try:
            return _quiet(importlib.import_module("llama_cpp.llama_cpp"))
        except (OSError, RuntimeError, FileNotFoundError) as error:
            raise InputError(f"{PACKAGE} cannot load llama.cpp ({error}): install it again") from error
        finally:
            del sys.modules["llama_cpp"]


@functools.cache
def ggml() -> Any:
    """The library with the functions of ggml.h and ggml-backend.h that are named above.

    It is llama.cpp's own, through which those it was linked with are found: a wheel holds ggml under several names,
    each a copy, and another copy knows nothing of llama.cpp's devices.

    Raises:
        InputError: one of the functions is not there.
    """
    module = llama()
    check_borrowed("llama")
    library = module._lib
    try:
        for name, (returns, takes) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = returns, takes
    except AttributeError as error:
        raise changed(f"brings another ggml ({error})") from error
    return library


def parameters(kind: str, values: Mapping[str, Any]) -> Any:
    """llama.cpp's default parameters of a "model" or a "context", but for these values.

    Raises:
        InputError: there is no such parameter.
    """
    made = getattr(llama(), f"llama_{kind}_default_params")()
    for name, value in values.items():
        if not hasattr(made, name):  # ctypes would set it, and nobody would read it
            raise changed(f"has no {kind} parameter {name}")
        setattr(made, name, value)
    return made


def has_amx() -> bool:
    """Whether llama.cpp is built to multiply quantised weights in the tiles of Intel's AMX."""
    return b"AMX_INT8 = 1" in llama().llama_print_system_info()


def why() -> str:
    """The last error that llama.cpp has reported, after a colon; empty where there is none."""
    return f": {_reported[-1]}" if _reported else ""


def changed(what: str) -> InputError:
    """The refusal of a version in which something is not as it was."""
    return InputError(
        f"{PACKAGE} {metadata.version(PACKAGE)} {what}: this version is not one that mlx-lqr is made for, install "
        'another (pip install -U "mlx-lqr[llama]")'
    )


def _quiet(module: Any) -> Any:
    """llama.cpp, started, and with nothing to say on the terminal."""
    global _log
    if lacking := [name for name in USED if not hasattr(module, name)]:
        raise changed(f"has no {lacking[0]}")
    if _log is None:
        _log = module.llama_log_callback(_keep_errors)
        module.llama_log_set(_log, None)
        module.llama_backend_init()
    return module


_ERROR = 4
"""GGML_LOG_LEVEL_ERROR"""
_reported: deque[str] = deque(maxlen=1)
_log: Any = None


def _keep_errors(level: int, text: bytes, _: Any) -> None:
    if level == _ERROR and (said := text.decode("utf-8", "replace").strip()):
        _reported.append(said.partition("\n")[0][:200])


_GPUS = (1, 2)
"""GGML_BACKEND_DEVICE_TYPE_GPU and _IGPU"""


def device_name() -> str:
    """What computes, as a person would call it: the GPUs by their names, where there are any."""
    library = ggml()
    devices = [library.ggml_backend_dev_get(i) for i in range(library.ggml_backend_dev_count())]
    gpus = [one for one in devices if library.ggml_backend_dev_type(one) in _GPUS]
    return ", ".join(library.ggml_backend_dev_description(one).decode("utf-8", "replace") for one in gpus) or "CPU"
