"""MLX, torch and transformers' own generate on one machine, and what the torch backend does on a GPU.

    python benchmarks/backends.py                  # SmolLM2 on the CPU, every backend in turn
    python benchmarks/backends.py --device cuda    # SmolLM2 and an 8B-shaped model of random weights on a GPU

Ratios are medians over rounds in which everything runs in turn. Floors are bytes or operations over the rates at which
this very machine copies and multiplies.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from report import ratio, say

import mlx_lqr  # first, so that MLX gets its BLAS
from mlx_lqr.backends.protocol import Model
from mlx_lqr.lqr.linearize import stream_jacobians, traces
from mlx_lqr.lqr.riccati import Weights, sweep

# isort: split
import numpy as np
import torch
import transformers

from mlx_lqr.backends.torch.model import TorchModel

PROMPT = "Once upon a time, in a small town by a river,"
LLAMA_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
Pace = Callable[[], float]


class NoTokenizer:
    """For random weights, which have no text to tell."""

    end_tokens: frozenset[int] = frozenset()

    def stream(self, prompt: Sequence[int] = ()) -> NoTokenizer:
        return self

    def add(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


class Clock(transformers.generation.BaseStreamer):
    """Notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def our_pace(model: Model, prompt: list[int], tokens: int, **options: Any) -> float:
    """Seconds a token between the first and the last."""
    pieces: Iterable[Any] = mlx_lqr.stream(model, prompt, max_tokens=tokens, temperature=0, **options)
    times = [time.perf_counter() for _ in pieces]
    return (times[-1] - times[0]) / (len(times) - 1)


def their_pace(module: Any, prompt: list[int], tokens: int) -> float:
    """The same for transformers' generate."""
    clock, inputs = Clock(), torch.tensor([prompt], device=module.device)
    module.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        streamer=clock,
    )
    return (clock.times[-1] - clock.times[1]) / (len(clock.times) - 2)  # the first time is the prompt's


@contextmanager
def plain_hooks(model: TorchModel, controller: mlx_lqr.Controller, strength: float) -> Iterator[None]:
    """The law in forward hooks, as one writes them with nothing but transformers."""
    handles = []
    for k in controller.active_layers:
        parts = [
            controller.sensor[k],
            controller.gain[k].T,
            controller.offset[k] + strength * controller.setpoint[k],
        ]
        V, G, target = (torch.tensor(part, device=model.module.device).to(model.module.dtype) for part in parts)

        def hook(_: Any, args: Any, kwargs: Any, output: Any, V: Any = V, G: Any = G, target: Any = target) -> Any:
            z = args[0] if args else kwargs["hidden_states"]
            steered = output.clone()
            steered[:, -1] += (target - z[:, -1] @ V) @ G
            return steered

        handles.append(model.blocks[k].register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def contenders(
    models: dict[str, Any], prompt: list[int], controller: mlx_lqr.Controller, tokens: int
) -> dict[str, Pace]:
    paces: dict[str, Pace] = {}
    steering = {"controller": controller, "strength": 1.0}
    for name, model in models.items():
        paces[f"ours on {name}, not steered"] = lambda model=model: our_pace(model, prompt, tokens)
        paces[f"ours on {name}, steered"] = lambda model=model: our_pace(model, prompt, tokens, **steering)
    model = models["torch"]

    def with_plain_hooks() -> float:
        with plain_hooks(model, controller, 1.0):
            return their_pace(model.module, prompt, tokens)

    def inside_steer() -> float:
        with mlx_lqr.steer(model, controller, 1.0):
            return their_pace(model.module, prompt, tokens)

    paces["transformers' generate, not steered"] = lambda: their_pace(model.module, prompt, tokens)
    paces["transformers' generate, forward hooks"] = with_plain_hooks
    paces["transformers' generate inside mlx_lqr.steer"] = inside_steer
    return paces


def decoding(
    models: dict[str, Any], prompt: list[int], controller: mlx_lqr.Controller, tokens: int, rounds: int
) -> None:
    paces = contenders(models, prompt, controller, tokens)
    for pace in paces.values():
        pace()  # a round that does not count
    seconds: dict[str, list[float]] = {name: [] for name in paces}
    for _ in range(rounds):
        for name in sorted(paces, key=lambda _: random.random()):  # no one always goes after the same one
            seconds[name].append(paces[name]())
    for name, taken in seconds.items():
        say(name, 1e3 * statistics.median(taken), "ms/token")
    for name in models:
        own, plain = seconds[f"ours on {name}, steered"], seconds[f"ours on {name}, not steered"]
        say(f"{name}: speed steered / not steered", ratio(plain, own), "", "at least 0.97")
        say(f"{name}: speed over generate with forward hooks",
            ratio(seconds["transformers' generate, forward hooks"], own), "", "aim 5 on a GPU")  # fmt: skip
    if {"mlx", "torch"} <= models.keys():
        say("speed of torch over MLX, steered",
            ratio(seconds["ours on mlx, steered"], seconds["ours on torch, steered"]), "")  # fmt: skip


def linearising(models: dict[str, Any], prompt: list[int], rounds: int) -> None:
    """Seconds a prompt for all Jacobians, the backends in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            for _layer in stream_jacobians(model, traces(model, [prompt])):
                pass
            seconds[name].append(time.perf_counter() - start)
    for name, taken in seconds.items():
        say(f"all Jacobians of a prompt on {name}", statistics.median(taken), "s")


def smollm2(device: str, tokens: int, rounds: int) -> None:
    print(f"SmolLM2-135M-Instruct, {device}")
    on_cpu = device == "cpu"
    models: dict[str, Any] = {"mlx": mlx_lqr.load("demo", backend="mlx", dtype="float32")} if on_cpu else {}
    dtype = "float32" if on_cpu else "bfloat16"
    models["torch"] = mlx_lqr.load("demo", backend="torch", device=device, dtype=dtype)
    prompt = models["torch"].tokenizer.encode(PROMPT)
    positive, negative = mlx_lqr.bundled_prompts("ocean")
    controller = mlx_lqr.fit(
        models["torch"], positive[:20], negative[:20], layers="all", cost="feature", jacobian_prompts=1
    )
    for model in models.values():
        model.tokenizer.end_tokens = frozenset()  # nobody stops early
    decoding(models, prompt, controller, tokens, rounds)
    linearising(models, prompt, max(1, rounds // 4))


def cuda_seconds(work: Callable[[], Any], times: int = 10) -> float:
    """Seconds a call on the GPU, after a call that does not count."""
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def product_rate(dtype: torch.dtype) -> float:
    """Operations a second of a product of two matrices of the model's width."""
    a = torch.randn(4096, 4096, device="cuda", dtype=dtype)
    return 2 * 4096**3 / cuda_seconds(lambda: a @ a)


def read_rate() -> float:
    """Bytes a second at which memory is read: those of a matrix in the product of it and a vector."""
    matrix = torch.randn(16384, 16384, device="cuda", dtype=torch.bfloat16)
    vector = torch.randn(16384, device="cuda", dtype=torch.bfloat16)
    return matrix.nbytes / cuda_seconds(lambda: matrix @ vector)


def eight_billion(device: str, tokens: int, rounds: int) -> None:
    torch.set_float32_matmul_precision("highest")
    rates = {dtype: product_rate(dtype) for dtype in (torch.float32, torch.float64)}
    memory_rate = read_rate()
    print(f"\nLlama 3 8B's shape, random weights in bfloat16, {torch.cuda.get_device_name(device)}")
    say("memory read", memory_rate / 1e9, "GB/s")
    for dtype, rate in rates.items():
        say(f"products in {str(dtype).removeprefix('torch.')}", rate / 1e12, "TFLOP/s")
    with torch.device(device):
        config = transformers.LlamaConfig(**LLAMA_8B)
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = TorchModel(module.eval().requires_grad_(False), "8B", NoTokenizer())  # type: ignore[arg-type]
    weights = sum(weight.nbytes for weight in module.parameters())
    blocks = sum(weight.numel() for block in model.blocks for weight in block.parameters())
    say("weights", weights / 1e9, "GB")
    prompt = np.random.default_rng(0).integers(0, 100_000, 32).tolist()
    controller = mlx_lqr.fit(model, [prompt], [prompt[::-1]], layers="all", cost="feature", jacobian_prompts=1)
    torch.cuda.reset_peak_memory_stats()
    decoding({"torch": model}, prompt, controller, tokens, rounds)
    say("floor of a token: the weights read once", 1e3 * weights / memory_rate, "ms")
    say("peak memory of decoding", torch.cuda.max_memory_allocated() / 1e9, "GB")
    torch.cuda.reset_peak_memory_stats()
    trace, d, T = model.trace(prompt), model.hidden_size, model.num_layers
    jacobian = statistics.median(cuda_seconds(lambda k=k: model.jacobian(trace, k), 2) for k in (0, T // 2, T - 1))
    say("all Jacobians of a prompt", T * jacobian, "s")
    say("floor: every weight times every direction once", 2 * blocks * d / rates[torch.float32], "s")
    say("peak memory of linearising", torch.cuda.max_memory_allocated() / 1e9, "GB")
    torch.cuda.reset_peak_memory_stats()
    A = model.jacobian(trace, 0)
    start = time.perf_counter()
    for _gain in sweep(((k, A) for k in reversed(range(4))), Weights(1e-6, 1.0, 1e-6), range(4), algebra=model.algebra):
        pass
    say("gains of all layers in float64", (time.perf_counter() - start) / 4 * T, "s")
    say("floor: three products and an inverse a layer", T * 8 * d**3 / rates[torch.float64], "s")
    say("peak memory of the gains, model included", torch.cuda.max_memory_allocated() / 1e9, "GB")


@click.command()
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda.")
@click.option("--tokens", default=40, show_default=True)
@click.option("--rounds", default=8, show_default=True, help="Many short ones: a shared machine's speed drifts.")
def main(device: str, tokens: int, rounds: int) -> None:
    """Measure the backends side by side."""
    if device != "cpu" and not torch.cuda.is_available():
        print("There is no CUDA GPU here: nothing was measured on one.")
        return
    transformers.logging.set_verbosity_error()
    smollm2(device, tokens, rounds)
    if device != "cpu":
        eight_billion(device, tokens, rounds)
    elif not torch.cuda.is_available():
        print("There is no CUDA GPU here: nothing was measured on one.")


if __name__ == "__main__":
    main()
