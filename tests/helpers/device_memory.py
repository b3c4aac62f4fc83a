"""Memory that this process cannot read, for llama.cpp, without a GPU: a second process holds it and computes on it.

    python -m pytest -p helpers.device_memory tests/backends/test_llama.py

As a plugin of pytest it lets llama.cpp compute everything there, through its RPC device: weights, keys, values and
residual streams lie in that process, and are got and set by the functions that get and set those of Metal and CUDA.
llama-cpp-python has to be built with `CMAKE_ARGS=-DGGML_RPC=ON`.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from typing import Any

import pytest

from mlx_lqr.backends.llama.library import llama

CPU = 0
"""GGML_BACKEND_DEVICE_TYPE_CPU"""
WAIT = 30.0
"""Seconds for the other process to start"""
endpoint: str | None = None
"""Where the device is, in tests that run with it; llama.cpp calls it by that"""


def _function(name: str, returns: Any, *takes: Any) -> Any:
    """A function of ggml, of the very library that llama.cpp calls: a wheel holds several copies of it."""
    function = getattr(llama()._lib, name, None)
    if function is None:
        pytest.exit(f"llama-cpp-python has no {name}: build it with CMAKE_ARGS=-DGGML_RPC=ON", 2)
    function.restype, function.argtypes = returns, takes
    return function


def serve(address: str, threads: int) -> None:
    """Be the device for as long as the process that started this one runs."""
    threading.Thread(target=lambda: os._exit(len(sys.stdin.read())), daemon=True).start()
    of_type = _function("ggml_backend_dev_by_type", ctypes.c_void_p, ctypes.c_int)
    sizes, pointers = [ctypes.c_size_t] * 2, [ctypes.c_char_p] * 2
    start = _function("ggml_backend_rpc_start_server", None, *pointers, *sizes, ctypes.c_void_p)
    start(address.encode(), None, threads, 1, (ctypes.c_void_p * 1)(of_type(CPU)))


def connect(address: str) -> None:
    """Let llama.cpp take that device for what it loads from now on."""
    add = _function("ggml_backend_rpc_add_server", ctypes.c_void_p, ctypes.c_char_p)
    _function("ggml_backend_register", None, ctypes.c_void_p)(add(address.encode()))


def _free_port() -> int:
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _listens(port: int) -> bool:
    with closing(socket.socket()) as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def pytest_configure(config: pytest.Config) -> None:
    """Start the device, which ends when this process has: llama.cpp frees what is there at the very end."""
    global endpoint
    port = _free_port()
    endpoint = f"127.0.0.1:{port}"
    command = [sys.executable, __file__, endpoint]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + WAIT
    while not _listens(port):
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.exit("the process that is the device does not start", 2)
        time.sleep(0.05)
    connect(endpoint)


if __name__ == "__main__":
    serve(sys.argv[1], 1)
