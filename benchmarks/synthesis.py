"""What synthesis costs: Jacobians, gains and a new concept on SmolLM2, each beside its floor or the usual way.

    python benchmarks/synthesis.py    # everything in one run; one comparison needs the test extra (torch, transformers)
    python benchmarks/synthesis.py --no-torch --no-scaling

Ratios are medians over rounds in which the things compared run in turn. Memory counts MLX's and NumPy's arrays beyond
the loaded model.
"""

from __future__ import annotations

import statistics
import threading
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import click
from report import ratio, say

import mlx_lqr  # first, so that MLX gets its BLAS
from mlx_lqr.backends.mlx.library import model_classes
from mlx_lqr.backends.mlx.model import MLXModel
from mlx_lqr.lqr.adapt import adapt
from mlx_lqr.lqr.linearize import traces
from mlx_lqr.lqr.riccati import Weights, sweep

# isort: split
import mlx.core as mx
import numpy as np

SHAPES = {
    "1B (Llama 3.2)": {"d": 2048, "T": 16, "inner": 8192, "heads": 32, "kv": 8},
    "3B (Llama 3.2)": {"d": 3072, "T": 28, "inner": 8192, "heads": 24, "kv": 8},
    "8B (Llama 3.1)": {"d": 4096, "T": 32, "inner": 14336, "heads": 32, "kv": 8},
    "14B (Qwen3)": {"d": 5120, "T": 40, "inner": 17408, "heads": 40, "kv": 8},
}


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turn(rounds: int, *works: Callable[[], Any]) -> list[list[float]]:
    """Seconds of each work in each round, after one round that does not count."""
    for work in works:
        work()
    measured = [[seconds(work) for work in works] for _ in range(rounds)]
    return [list(column) for column in zip(*measured, strict=True)]


def peak_megabytes(work: Callable[[], Any]) -> float:
    """Most memory that MLX's and Python's arrays took together, sampled every half millisecond."""
    mx.clear_cache()
    before, most, done = mx.get_active_memory(), 0, threading.Event()

    def sample() -> None:
        nonlocal most
        while not done.wait(0.0005):
            most = max(most, mx.get_active_memory() - before + tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    sampler = threading.Thread(target=sample)
    sampler.start()
    work()
    done.set()
    sampler.join()
    tracemalloc.stop()
    return most / 1e6


def matrix_products_alone(model: MLXModel) -> None:
    """The products that make our Jacobians: those that form the slopes of attention and MLP, and one more."""
    d = model.hidden_size
    wide = mx.ones((d, d))
    mx.eval(wide)
    for block in model.blocks:
        attention, mlp = block.self_attn, block.mlp
        heads, groups = attention.n_heads, attention.n_kv_heads
        size = attention.q_proj.weight.shape[0] // heads
        for layer, count in ((attention.q_proj, heads), (attention.k_proj, groups), (attention.v_proj, groups)):
            by_head = mx.ones((count, heads // count * size, size))
            mx.eval(by_head @ layer.weight.reshape(count, size, d))
        mx.eval(attention.o_proj.weight @ attention.q_proj.weight)
        mx.eval(mlp.down_proj.weight @ mlp.up_proj.weight)
        mx.eval(wide @ wide)


def plain_products_alone(model: MLXModel) -> None:
    """The products of plain forward mode: every weight of every block, once for each direction."""
    wide = {
        width: mx.ones((model.hidden_size, width)) for width in (model.hidden_size, model.module.args.intermediate_size)
    }
    mx.eval(wide)
    for block in model.blocks:
        attention, mlp = block.self_attn, block.mlp
        layers = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        for layer in (*layers, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            mx.eval(wide[layer.weight.shape[1]] @ layer.weight.T)


def whole_sequence_reverse_mode(folder: str, tokens: list[int]) -> tuple[float, np.ndarray]:
    """torch.autograd.functional.jacobian of every block over the whole sequence: seconds, and A_k w for w = 1."""
    import torch
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    states: list[torch.Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, args: states.append(args[0])) for block in module.model.layers]
    with torch.no_grad():
        module(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    rotary = module.model.rotary_emb(states[0], torch.arange(len(tokens))[None])
    products = []
    start = time.perf_counter()
    for block, z in zip(module.model.layers, states, strict=True):

        def last(z: torch.Tensor, block: Any = block) -> torch.Tensor:
            output = block(z, position_embeddings=rotary)
            return (output[0] if isinstance(output, tuple) else output)[0, -1]

        jacobian = torch.autograd.functional.jacobian(last, z.detach(), vectorize=True)
        products.append(jacobian[:, 0, -1].sum(dim=1).numpy())
    return time.perf_counter() - start, np.stack(products)


def textbook_gains(jacobians: mlx_lqr.Jacobians, weights: Weights, dtype: Any) -> list[np.ndarray]:
    """K_k and S_k as textbooks write them: S = Q + A'SA - (B'SA)'(R + B'SB)^-1 (B'SA), B = I."""
    d = jacobians[0].shape[0]
    S = (weights.qf * np.eye(d)).astype(dtype)
    gains = []
    for k in reversed(range(len(jacobians))):
        A = jacobians[k].astype(dtype)
        SA = S @ A
        K = np.linalg.solve(S + (weights.r * np.eye(d)).astype(dtype), SA)
        S = (weights.q * np.eye(d)).astype(dtype) + A.T @ SA - SA.T @ K
        gains.append(K)
    return gains[::-1]


def worst(measured: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(measured, expected, strict=True))


def jacobians_beside_others(model: MLXModel, tokens: list[int], rounds: int, torch_folder: str | None) -> None:
    """Both ways start from known states: neither clock counts the forward pass."""
    (point,) = traces(model, [tokens])
    matrices: list[np.ndarray] = []

    def jacobians() -> None:
        matrices[:] = [model.jacobian(point, k) for k in range(model.num_layers)]

    works: list[Callable[[], Any]] = [
        jacobians,
        lambda: matrix_products_alone(model),
        lambda: plain_products_alone(model),
    ]
    ours, floor, plain = in_turn(2 * rounds, *works)
    say(f"Jacobians of all layers, a prompt of {len(tokens)} tokens", statistics.median(ours), "s")
    say("the same matrix products alone (floor)", statistics.median(floor), "s")
    say("  ratio", ratio(ours, floor), "x", "at most 2")
    say("the matrix products of plain forward mode alone", statistics.median(plain), "s")
    if torch_folder is None:
        return
    taken, again = [], []
    for _ in range(rounds):
        took, products = whole_sequence_reverse_mode(torch_folder, tokens)
        taken.append(took)
        again.append(seconds(jacobians))
    expected = np.stack([A.sum(axis=1) for A in matrices])
    off = np.linalg.norm(products - expected, axis=1) / np.linalg.norm(expected, axis=1)
    say("whole-sequence reverse mode in torch", statistics.median(taken), "s", f"agrees to {off.max():.0e}")
    say("  it takes longer than ours by", ratio(taken, again), "x", "at least 20")


def accuracy(jacobians: mlx_lqr.Jacobians) -> None:
    weights = Weights(10.0, 1.0, 10.0)
    reference = textbook_gains(jacobians, weights, np.float64)
    print("gains at q/r = 10, worst relative difference from the textbook's form in float64:")
    forms = {
        "ours in float64 (at most 1e-6)": list(mlx_lqr.solve(jacobians, 10.0, 1.0, 10.0)),
        "ours in float32": list(mlx_lqr.solve(jacobians, 10.0, 1.0, 10.0, dtype=np.float32)),
        "the textbook's in float32": textbook_gains(jacobians, weights, np.float32),
    }
    for name, gains in forms.items():
        print(f"  {name:48}{worst(gains, reference):9.0e}")


def block_of(shape: dict[str, int]) -> MLXModel:
    """A Llama of one block with random weights."""
    Model, ModelArgs = model_classes("llama")
    arguments = {
        "model_type": "llama",
        "hidden_size": shape["d"],
        "num_hidden_layers": 1,
        "intermediate_size": shape["inner"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv"],
        "rms_norm_eps": 1e-5,
        "vocab_size": 64,
        "max_position_embeddings": 4096,
    }
    model = MLXModel(Model(ModelArgs.from_dict(arguments)), "one block")
    mx.eval(model.module.parameters())
    return model


def scaled(name: str, shape: dict[str, int]) -> str:
    """A row of the table: one block's Jacobian and one Riccati step, measured and multiplied by T."""
    d, T = shape["d"], shape["T"]
    model = block_of(shape)
    (point,) = traces(model, [[1, 2, 3, 4, 5, 6, 7, 8] * 4])
    random = np.random.default_rng(0)
    few = random.standard_normal(((T + 1) // 2, d)).astype(np.float32)  # the average number of columns of W
    A = np.eye(d, dtype=np.float32) + random.standard_normal((d, d)).astype(np.float32) / np.sqrt(d)
    model.jvp(point, 0, few)
    jacobians = seconds(lambda: model.jacobian(point, 0)) * T
    riccati = seconds(lambda: list(sweep([(0, A)], Weights(), [0]))) * T
    feature = seconds(lambda: model.vjp(point, 0, few)) * T
    state_memory = peak_megabytes(lambda: list(sweep([(0, model.jacobian(point, 0))], Weights(), [0]))) / 1e3
    feature_memory = peak_megabytes(lambda: model.vjp(point, 0, few)) / 1e3
    return (
        f"{name:16}{d:6d}{T:4d}{jacobians:10.0f} s{riccati:8.0f} s{jacobians + riccati:10.0f} s{state_memory:6.1f} GB"
        f"{feature:12.1f} s{feature_memory:6.2f} GB"
    )


def scaling() -> None:
    print("\nlarger models: one random float32 block of each shape, one nominal prompt of 32 tokens, times T;")
    print("memory is beyond the model's own.\n")
    print(f"{'shape':16}{'d':>6}{'T':>4}{'Jacobians':>12}{'Riccati':>10}{'state cost':>12}{'memory':>9}"
          f"{'feature cost':>14}{'memory':>9}")  # fmt: skip
    for name, shape in SHAPES.items():
        print(scaled(name, shape), flush=True)


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--torch/--no-torch", default=True, help="Compare with the whole-sequence reverse-mode way.")
@click.option("--scaling/--no-scaling", "with_scaling", default=True, help="Print the table for larger shapes.")
def main(rounds: int, torch: bool, with_scaling: bool) -> None:
    """Measure synthesis on SmolLM2-135M-Instruct."""
    from mlx_lqr.convert.sources import demo_model

    model = mlx_lqr.load("demo", dtype="float32")
    assert isinstance(model, MLXModel)
    positive, negative = mlx_lqr.bundled_prompts("ocean")
    positive, negative = positive[:60], negative[:60]

    encoded = [model.tokenizer.encode(text) for text in positive]
    mean = statistics.mean(map(len, encoded))
    typical = min(encoded, key=lambda tokens: abs(len(tokens) - mean))
    jacobians_beside_others(model, typical, rounds, str(demo_model()) if torch else None)
    stored = mlx_lqr.linearize(model, positive[:1])
    (solving,) = in_turn(rounds, lambda: mlx_lqr.solve(stored))
    say("gains of all layers, float64", statistics.median(solving), "s", "at most 3")
    accuracy(stored)

    unit = 8 * model.hidden_size**2 / 1e6
    caches = sum(point.nbytes for point in traces(model, positive[:8])) / 1e6  # type: ignore[attr-defined]
    used = peak_megabytes(lambda: mlx_lqr.fit(model, positive[:8], negative[:8], layers="all")) - caches
    say("peak memory of fit, 8 + 8 prompts", used, "MB")
    say("  in (d, d) float64 matrices", used / unit, "", f"below 12, beside {caches:.1f} MB of prompts' caches")

    (again,) = in_turn(rounds, lambda: mlx_lqr.fit(model, positive, negative, layers="all", jacobians=stored))
    say("a new concept, 120 prompts, stored Jacobians", statistics.median(again), "s", "below 15")
    prompts = [model.tokenizer.encode(text) for text in positive + negative]
    one_by_one, batched = in_turn(
        rounds, lambda: [model.residuals([prompt]) for prompt in prompts], lambda: model.residuals(prompts)
    )
    say("activations of 120 prompts, one by one / batched", ratio(one_by_one, batched), "x", "at least 2")

    contrast = mlx_lqr.contrast(model, positive[:20], negative[:20])
    (adapting,) = in_turn(2 * rounds, lambda: adapt(model, contrast, positive[0], layers="all"))
    say("feature cost at one prompt, forward included", statistics.median(adapting), "s", "below 0.3")
    used = peak_megabytes(lambda: adapt(model, contrast, positive[0], layers="all"))
    say("  its memory", used, "MB", f"= {used / unit:.1f} (d, d) float64 matrices")
    if with_scaling:
        scaling()


if __name__ == "__main__":
    main()
