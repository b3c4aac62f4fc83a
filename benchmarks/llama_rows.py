"""llama.cpp's own loop against ours on the same GGUF file, steered and not: for decode.py.

What all are measured against is the shortest loop that there is: llama_decode in a context without a callback, and the
largest logit (which takes NumPy half a millisecond less than llama.cpp's greedy sampler).
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from report import ratio

import mlx_lqr
from mlx_lqr.backends.llama import native
from mlx_lqr.backends.llama.hook import PythonHook
from mlx_lqr.backends.llama.library import llama, parameters
from mlx_lqr.backends.llama.load import Loaded
from mlx_lqr.convert.sources import demo_gguf_file

PLAIN = "llama.cpp's own loop, not steered"
FITS_LAYERS = "ours, fit's layers"
ALL_LAYERS = "ours, all 30 layers"
STEERED = {
    FITS_LAYERS: "at least 0.97",
    ALL_LAYERS: "at least 0.95",
    "ours, all 30 layers, three concepts": "",
}
IN_PYTHON = {"ours in Python, fit's layers": FITS_LAYERS, "ours in Python, all 30 layers": ALL_LAYERS}
AIMS = {"ours, not steered": "", **STEERED, **dict.fromkeys(IN_PYTHON, "at least 0.85")}
PROMPT_TOKENS = 256


class OwnLoop:
    """llama.cpp without us."""

    def __init__(self) -> None:
        library, self._loaded = llama(), Loaded(demo_gguf_file())
        threads = self._loaded.threads
        asked = {"n_ctx": 512, "n_batch": 512, "n_ubatch": 512, "n_threads": threads, "n_threads_batch": threads}
        self._context = library.llama_init_from_model(self._loaded.pointer, parameters("context", asked))

    def stream(self, prompt: list[int], tokens: int) -> Iterator[int]:
        library = llama()
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        batch = (library.llama_token * len(prompt))(*prompt)
        library.llama_decode(self._context, library.llama_batch_get_one(batch, len(prompt)))
        one = (library.llama_token * 1)(self._likeliest())
        yield one[0]
        for _ in range(tokens - 1):
            library.llama_decode(self._context, library.llama_batch_get_one(one, 1))
            one[0] = self._likeliest()
            yield one[0]

    def _likeliest(self) -> int:
        logits = llama().llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._loaded.vocab_size,)).argmax())


def measure(controllers: Mapping[str, mlx_lqr.Controller], tokens: int, rounds: int, *, busy: bool) -> None:
    """Print speeds over that of llama.cpp's own loop.

    Args:
        controllers: for each of `STEERED`.
        busy: take the process's own processor time, on one thread, and not the time on the clock.
    """
    model: Any = mlx_lqr.load("demo", backend="llama")
    slow: Any = mlx_lqr.load("demo", backend="llama")
    slow._context._make_hook = lambda: PythonHook(slow.num_layers, slow.hidden_size)
    model.tokenizer.end_tokens = slow.tokenizer.end_tokens = frozenset()
    options: dict[str, tuple[Any, Any]] = {"ours, not steered": (model, {})}
    for name, controller in controllers.items():
        options[name] = (model, {"controller": controller, "strength": 0.5})
    for name, same in IN_PYTHON.items():
        options[name] = (slow, options[same][1])
    own, prompt = OwnLoop(), model.tokenizer.encode("Once upon a time, in a small town by a river, there was a ") * 40
    streams: dict[str, Callable[[list[int], int], Iterable[Any]]] = {PLAIN: own.stream}
    for name, (runner, steering) in options.items():
        streams[name] = lambda prompt, tokens, runner=runner, steering=steering: mlx_lqr.stream(
            runner, prompt, max_tokens=tokens, temperature=0, **steering
        )
    clock = time.process_time if busy else time.perf_counter
    decoding: dict[str, list[float]] = {name: [] for name in streams}
    reading: dict[str, list[float]] = {name: [] for name in streams}
    for number in range(rounds + 1):
        for name in sorted(streams, key=lambda _: random.random()):  # no one always goes after the same one
            start = clock()
            pieces = iter(streams[name](prompt[:PROMPT_TOKENS], tokens + 1))
            next(pieces)
            begun = clock()
            count = sum(1 for _ in pieces)
            if number:  # the first is not counted
                reading[name].append(begun - start)
                decoding[name].append((clock() - begun) / count)
    print(f"laws in C: {native.why_not() or 'yes'}")
    for name, seconds in decoding.items():
        print(f"{name:44}{1e3 * statistics.median(seconds):8.2f} ms a token")
    for name, aim in AIMS.items():
        print(f"speed of {name:40}{ratio(decoding[PLAIN], decoding[name]):8.3f}    {aim}")
        print(f"  a prompt of {PROMPT_TOKENS} tokens, its last steered{ratio(reading[PLAIN], reading[name]):14.3f}")
