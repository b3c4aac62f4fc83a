"""How fast tokens come, steered and not, ours and others', on SmolLM2.

    python benchmarks/decode.py
    python benchmarks/decode.py --tokens 200 --rounds 20
    python benchmarks/decode.py --llama          # llama.cpp steered, over its own loop

Everything decodes the same prompt in turn, in one process, and is timed from the first new token to the last; ratios
are medians over rounds. The controllers act at every layer, which is the dearest case.
"""

from __future__ import annotations

import importlib.util
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import click
from report import ratio

import mlx_lqr  # first, so that MLX gets its BLAS
from mlx_lqr.backends.mlx.device import on_gpu
from mlx_lqr.backends.mlx.model import MLXModel
from mlx_lqr.lqr.layers import Layers

PROMPT = "Once upon a time, in a small town by a river,"
Stream = Callable[[], Iterable[Any]]


def pace(stream: Iterable[Any]) -> float:
    """Seconds a token between the first and the last."""
    tokens = iter(stream)
    next(tokens)
    start = time.perf_counter()
    count = sum(1 for _ in tokens)
    return (time.perf_counter() - start) / count


def fitted(model: MLXModel, concept: str, layers: Layers = "all") -> mlx_lqr.Controller:
    positive, negative = mlx_lqr.bundled_prompts(concept)
    return mlx_lqr.fit(
        model, positive[:20], negative[:20], concept=concept, layers=layers, cost="feature", jacobian_prompts=1
    )


def contenders(model: MLXModel, tokens: int) -> dict[str, Stream]:
    import mlx.core as mx
    import mlx_lm

    from mlx_lqr.convert.sources import demo_model

    controllers = [fitted(model, concept) for concept in ("ocean", "dog", "formal")]
    joint = mlx_lqr.Controller.combine(*controllers)
    prompt = model.tokenizer.encode(PROMPT)
    module, tokenizer, *_ = mlx_lm.load(str(demo_model()))
    if not on_gpu():
        module.set_dtype(mx.float32)  # 16 bits are slower there
    tokenizer.eos_token_ids = set()  # nobody stops early
    model.tokenizer.end_tokens = frozenset()

    def ours(**options: Any) -> Stream:
        return lambda: mlx_lqr.stream(model, prompt, max_tokens=tokens, temperature=0, **options)

    streams: dict[str, Stream] = {
        "mlx_lm.stream_generate, not steered": lambda: mlx_lm.stream_generate(
            module, tokenizer, mx.array(prompt), max_tokens=tokens
        ),
        "ours, not steered": ours(),
        "ours, one controller": ours(controller=controllers[0], strength=1.0),
        "ours, three controllers combined": ours(controller=joint, strength=0.5),
    }
    if importlib.util.find_spec("llama_cpp") is not None:
        streams["llama.cpp, the same model in Q4_1"] = llama_cpp_stream(prompt, tokens)
    return streams


def llama_cpp_stream(prompt: list[int], tokens: int) -> Stream:
    from llama_rows import OwnLoop

    loop = OwnLoop()
    return lambda: loop.stream(prompt, tokens)


def batch_gain(model: MLXModel, size: int, tokens: int, rounds: int) -> list[float]:
    """Tokens a second of a batch over tokens a second of one sequence, in each round."""
    prompts = [model.tokenizer.encode(f"{PROMPT} number {i}")[i % 7 :] for i in range(size)]

    def batch() -> Iterable[int]:
        """One element a step of the whole batch."""
        return (i for i, _ in mlx_lqr.batch_stream(model, prompts, max_tokens=tokens, temperature=0) if i == 0)

    gains = []
    for _ in range(rounds):
        one = pace(mlx_lqr.stream(model, prompts[0], max_tokens=tokens, temperature=0))
        gains.append(size * one / pace(batch()))
    return gains


@click.command()
@click.option("--tokens", default=100, show_default=True, help="The compiled step takes over after 32.")
@click.option("--rounds", default=12, show_default=True, help="Many short ones: a shared machine's speed drifts.")
@click.option("--llama", is_flag=True, help="Measure llama.cpp alone, over its own loop without a callback.")
@click.option("--busy", is_flag=True, help="With --llama: one thread, and its processor time, for a machine in use.")
def main(tokens: int, rounds: int, llama: bool, busy: bool) -> None:
    """Measure decoding on SmolLM2-135M-Instruct."""
    if busy:
        os.environ["OMP_NUM_THREADS"] = "1"
    model = mlx_lqr.load("demo", backend="mlx")
    assert isinstance(model, MLXModel)
    if llama:
        import llama_rows

        controllers = [fitted(model, concept) for concept in ("ocean", "dog", "formal")]
        laws = (fitted(model, "ocean", "auto"), controllers[0], mlx_lqr.Controller.combine(*controllers))
        llama_rows.measure(dict(zip(llama_rows.STEERED, laws, strict=True)), tokens, rounds, busy=busy)
        return
    streams = contenders(model, tokens)
    for stream in streams.values():
        pace(stream())  # a round that does not count
    seconds: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(rounds):
        for name in sorted(streams, key=lambda _: random.random()):  # no one always goes after the same one
            seconds[name].append(pace(streams[name]()))
    for name, taken in seconds.items():
        print(f"{name:44}{1e3 * statistics.median(taken):8.1f} ms a token{1 / statistics.median(taken):8.1f} tokens/s")
    theirs, plain, one, three, *_ = seconds.values()
    print(f"speed steered / not steered, one controller{ratio(plain, one):11.3f}    at least 0.97")
    print(f"speed steered / not steered, three{ratio(plain, three):20.3f}")
    print(f"speed steered / mlx_lm not steered{ratio(theirs, one):20.3f}    at least 1.0, aim 1.5")
    gain = statistics.median(batch_gain(model, 16, tokens, max(1, rounds // 2)))
    print(f"tokens/s of a batch of 16 / of one{gain:20.2f}    at least 5")


if __name__ == "__main__":
    main()
