"""Where llama.cpp computes: in this process's memory, on a GPU, or on the device of `helpers.device_memory`."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from helpers.tiny_gguf import write

import mlx_lqr

pytest.importorskip("llama_cpp")

from helpers import device_memory

from mlx_lqr.backends.llama import library
from mlx_lqr.backends.llama.library import llama


@pytest.mark.parametrize(("features", "rearranged"), [("AVX512 = 1 | AMX_INT8 = 1 | ", False), ("AVX512 = 1 | ", True)])
def test_weights_are_not_rearranged_for_amx(
    features: str, rearranged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There llama.cpp crashes; the tests of quantised files show it where the processor has it."""
    asked: list[bool] = []
    load = llama().llama_model_load_from_file
    monkeypatch.setattr(llama(), "llama_print_system_info", lambda: f"CPU : {features}".encode())
    monkeypatch.setattr(
        llama(),
        "llama_model_load_from_file",
        lambda file, parameters: (asked.append(parameters.use_extra_bufts), load(file, parameters))[1],
    )
    mlx_lqr.load(write(tmp_path / "tiny.gguf", "llama").path, backend="llama")
    assert asked == [rearranged]


def test_weights_lie_on_the_device_and_it_is_named(tmp_path: Path) -> None:
    said: list[str] = []
    callback = llama().llama_log_callback(lambda level, text, _: said.append(text.decode()))
    llama().llama_log_set(callback, None)
    try:
        model = mlx_lqr.load(write(tmp_path / "tiny.gguf", "llama").path, backend="llama")
    finally:
        llama().llama_log_set(library._log, None)
    buffers = [line for line in said if "model buffer size" in line]
    assert buffers
    devices = gpus()
    assert all(any(name in line for line in buffers) for name in devices)
    assert model.description.device.partition(" (laws")[0] == (", ".join(devices.values()) or "CPU")
    assert device_memory.endpoint is None or device_memory.endpoint in devices.values()


def gpus() -> dict[str, str]:
    """By what llama.cpp calls them, the GPUs' names."""
    ggml = library.ggml()
    ggml.ggml_backend_dev_name.restype, ggml.ggml_backend_dev_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    devices = [ggml.ggml_backend_dev_get(i) for i in range(ggml.ggml_backend_dev_count())]
    return {
        ggml.ggml_backend_dev_name(one).decode(): ggml.ggml_backend_dev_description(one).decode()
        for one in devices
        if ggml.ggml_backend_dev_type(one) in library._GPUS
    }
