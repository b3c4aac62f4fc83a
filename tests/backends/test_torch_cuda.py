"""The torch backend on a GPU: CUDA graphs, gains on the device, and the same numbers as on the CPU."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from helpers.backends import tiny_folder
from helpers.controllers import controller_for, law_for
from helpers.decoding import decoded, decoded_together
from helpers.linear_systems import system
from helpers.prompts import BATCH, PROMPT
from helpers.tiny import families

import mlx_lqr
from mlx_lqr.backends.protocol import Sampling
from mlx_lqr.backends.torch.algebra import TorchAlgebra
from mlx_lqr.backends.torch.model import TorchModel
from mlx_lqr.methods.alqr import LinearFeedback
from mlx_lqr.methods.registry import METHODS
from mlx_lqr.methods.steering import law_of
from mlx_lqr.runtime.decode import decode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here: nothing was tested on one"),
]


def pair(family: str = "llama", **changes: Any) -> tuple[TorchModel, TorchModel]:
    """The same tiny model on the CPU and on the GPU, both in float32."""
    folder = tiny_folder(family, **changes)
    models = [mlx_lqr.load(folder, backend="torch", device=device, dtype="float32") for device in ("cpu", "cuda")]
    assert isinstance(models[0], TorchModel)
    assert isinstance(models[1], TorchModel)
    return models[0], models[1]


@families
def test_numbers_and_tokens_are_those_of_the_cpu(family: str) -> None:
    cpu, gpu = pair(family)
    assert gpu.fingerprint == cpu.fingerprint
    assert np.abs(gpu.residuals(BATCH) - cpu.residuals(BATCH)).max() < 1e-4
    traces = gpu.trace(PROMPT), cpu.trace(PROMPT)
    for k in range(3):
        A = cpu.jacobian(traces[1], k)
        assert np.abs(gpu.jacobian(traces[0], k) - A).max() < 1e-4 * np.abs(A).max()
    law = law_for(cpu)
    for steer_all in (False, True):
        options = {"law": law, "steer_all": steer_all, "max_tokens": 12}
        assert decoded(gpu, PROMPT, **options) == decoded(cpu, PROMPT, **options)
        assert decoded_together(gpu, BATCH, **options) == decoded_together(cpu, BATCH, **options)


def test_jacobians_are_not_rounded_to_ten_bits_where_the_process_allows_it() -> None:
    cpu, gpu = pair()
    torch.set_float32_matmul_precision("high")
    try:
        A = cpu.jacobian(cpu.trace([7]), 1)
        assert np.abs(gpu.jacobian(gpu.trace([7]), 1) - A).max() < 2e-3 * np.abs(A).max()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_steps_are_replayed_and_a_strength_changes_between_them() -> None:
    cpu, gpu = pair("qwen3")
    controller = controller_for(cpu)
    tokens = []
    for model in (cpu, gpu):
        law = LinearFeedback(controller, 1.0)
        decoder: Any = model.decoder(law)
        decoder.fill([PROMPT[:-1]], steered=False)
        logits, graphs = [], set()
        for strength in (1.0, 3.0, -2.0, 1.0):
            law.strength = strength
            logits.append(decoder.step(PROMPT[-1:])[0].cpu().numpy())
            graphs.add(id(decoder._graph))
        assert len(graphs) == 1, "a new strength recorded the step anew"
        assert (decoder._graph is not None) == (model is gpu)
        tokens.append(np.array(logits))
    assert np.abs(tokens[0] - tokens[1]).max() < 1e-4


def test_strength_0_within_replayed_steps_is_the_unsteered_model() -> None:
    _, gpu = pair("qwen3")
    law = LinearFeedback(controller_for(gpu), 2.0)
    decoder, plain = gpu.decoder(law), gpu.decoder()
    for one in (decoder, plain):
        one.fill([PROMPT[:-1]], steered=False)
    steered = decoder.step(PROMPT[-1:])
    assert decoder.rewind(len(PROMPT) - 1)
    for strength in (0.0, 2.0, 0.0):
        law.strength = strength
        logits = decoder.step(PROMPT[-1:])
        assert torch.allclose(logits, steered if strength else plain.step(PROMPT[-1:]), atol=1e-5)
        assert decoder.rewind(len(PROMPT) - 1)
        plain.rewind(len(PROMPT) - 1)


def test_the_recorded_step_follows_the_cache_as_it_grows_and_rolls() -> None:
    cpu, gpu = pair("qwen3")
    law = law_for(cpu)
    assert decoded(gpu, PROMPT, law=law, max_tokens=240) == decoded(cpu, PROMPT, law=law, max_tokens=240)
    cpu, gpu = pair("qwen3", max_position_embeddings=16)
    options: dict[str, Any] = {"max_tokens": 700, "overflow": "roll"}
    assert decoded(gpu, PROMPT, **options) == decoded(cpu, PROMPT, **options)


def test_a_batch_goes_on_without_those_that_have_ended() -> None:
    _, gpu = pair("gemma3_text")
    free = [decoded(gpu, p, sampling=Sampling(temperature=1.5, seed=7 + i), max_tokens=12) for i, p in enumerate(BATCH)]
    gpu.tokenizer.end_tokens = frozenset({free[0][3], free[2][6]})
    expected = [row[: min((row.index(t) for t in gpu.tokenizer.end_tokens if t in row), default=12)] for row in free]
    sampling = Sampling(temperature=1.5, seed=7)
    assert decoded_together(gpu, BATCH, sampling=sampling, max_tokens=12) == expected


def test_threads_record_and_replay_steps_of_their_own() -> None:
    _, gpu = pair()
    law = law_for(gpu)

    def answer(prompt: list[int]) -> list[int]:
        return decoded(gpu, prompt, law=law, max_tokens=12)

    alone = [answer(prompt) for prompt in BATCH]
    with ThreadPoolExecutor(len(BATCH)) as pool:
        for _ in range(3):
            assert list(pool.map(answer, BATCH)) == alone


def test_a_graph_that_nobody_uses_any_more_does_not_end_a_recording() -> None:
    cpu, gpu = pair()
    law = law_for(cpu)
    thresholds = gc.get_threshold()
    gc.disable()
    try:
        for _ in range(3):
            assert decoded(gpu, PROMPT, law=law, max_tokens=4) == decoded(cpu, PROMPT, law=law, max_tokens=4)
            gc.set_threshold(1)  # from now on the decoder before is collected at once
            gc.enable()
    finally:
        gc.set_threshold(*thresholds)
        gc.enable()


def test_overflowing_activations_are_reported() -> None:
    _, gpu = pair()
    with pytest.raises(mlx_lqr.InputError, match="overflow at layer"):
        decoded(gpu, PROMPT, law=law_for(gpu, 1e25), max_tokens=10)


def test_gains_on_the_gpu_are_those_of_the_cpu() -> None:
    cpu, gpu = pair()
    assert gpu.algebra is not None
    assert cpu.algebra is None
    expected = mlx_lqr.solve(system(5, 64), 1.0, 1.0, 1.0)
    on_the_gpu = mlx_lqr.solve(system(5, 64), 1.0, 1.0, 1.0, algebra=TorchAlgebra(torch.device("cuda")))
    assert all(np.abs(a - b).max() < 1e-8 * np.abs(b).max() for a, b in zip(on_the_gpu, expected, strict=True))
    gains = controller_for(gpu).gain, controller_for(cpu).gain
    assert np.abs(gains[0] - gains[1]).max() < 1e-4 * np.abs(gains[1]).max()


def test_memory_that_runs_out_is_one_line() -> None:
    _, gpu = pair()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)  # an allowance, so that nobody else's memory is taken
    try:
        with pytest.raises(mlx_lqr.InputError, match="not enough memory"):
            decoded_together(gpu, [[1] * 200] * 4000, max_tokens=2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_bfloat16_model_is_steered_and_linearised() -> None:
    model = mlx_lqr.load(tiny_folder("llama"), backend="torch", device="cuda", dtype="bfloat16")
    controller = controller_for(model)
    text = list(mlx_lqr.stream(model, PROMPT, controller=controller, strength=2.0, max_tokens=8, temperature=0))
    assert len(text) == 8
    assert isinstance(model, TorchModel)
    with mlx_lqr.steer(model.module, controller, 2.0):
        tokens = torch.tensor([PROMPT], device="cuda")
        answer = model.module.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert answer.shape[1] == len(PROMPT) + 8


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_writes_the_tokens_of_the_cpu(method: Any) -> None:
    """Replayed as a graph, or, where something goes from token to token, without one; with strengths that change."""
    cpu, gpu = pair()
    steering = mlx_lqr.fit_baseline(cpu, method, BATCH[:2], BATCH[2:4])
    steer_all, strength = steering.positions == "all", 60.0 if "angular" in method else 1.5
    answers = []
    for model in (cpu, gpu):
        law = law_of(steering, strength)
        answers.append(decoded_together(model, BATCH, law=law, steer_all=steer_all, max_tokens=12))
        tokens = []
        for _, token in decode(model, [PROMPT], law=law, steer_all=steer_all, max_tokens=12):
            tokens.append(token)
            if len(tokens) == 6:
                law.strength = -strength
        answers[-1].append(tokens)
    assert answers[0] == answers[1]
