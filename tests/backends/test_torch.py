"""What is the torch backend's own: transformers' generation under a controller, and derivatives of its models."""

from __future__ import annotations

import copy
import gc
import importlib.util
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from helpers.backends import tiny_folder, tiny_on
from helpers.controllers import controller_for, law_for
from helpers.decoding import decoded, decoded_together
from helpers.linear_systems import system
from helpers.prompts import BATCH, PROMPT
from helpers.tiny import families, tiny
from helpers.tiny_torch import STEERED, ours, small, theirs
from mlx.utils import tree_flatten
from torch.fx.experimental.proxy_tensor import make_fx

import mlx_lqr
from mlx_lqr import InputError, loading
from mlx_lqr.backends.torch import backend as torch_backend
from mlx_lqr.backends.torch import decoder as torch_decoder
from mlx_lqr.backends.torch.algebra import TorchAlgebra
from mlx_lqr.backends.torch.library import cache_argument
from mlx_lqr.backends.torch.model import TorchModel
from mlx_lqr.commands import main
from mlx_lqr.methods.alqr import LinearFeedback
from mlx_lqr.methods.running import law_on
from mlx_lqr.runtime.decode import decode

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "options",
    [{}, {"prefill_chunk_size": 1}, {"prefill_chunk_size": 5}, {"prefill_chunk_size": 11}, {"use_cache": False},
     {"cache_implementation": "static"}, {"num_beams": 1, "do_sample": True, "top_k": 1}],
)  # fmt: skip
@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("family", STEERED)
def test_transformers_generates_what_our_loop_generates(family: str, positions: Any, options: dict[str, Any]) -> None:
    model = small(family)
    controller = controller_for(model, positions=positions)
    expected = ours(model, PROMPT, controller)
    with mlx_lqr.steer(model.module, controller, 2.0):
        answer = theirs(model, PROMPT, **options)
    assert answer == expected
    assert expected != theirs(model, PROMPT)


@pytest.mark.parametrize("family", STEERED)
def test_each_prompt_of_a_padded_batch_is_steered_as_if_alone(family: str) -> None:
    model = small(family)
    controller = controller_for(model)
    width = max(len(prompt) for prompt in BATCH)
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in BATCH])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in BATCH])
    with mlx_lqr.steer(model, controller, 2.0):
        answers = model.module.generate(
            tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert answers[:, width:].tolist() == [ours(model, prompt, controller, 6) for prompt in BATCH]


@pytest.mark.parametrize("draft", ["another", "steered", "itself"])
def test_assisted_decoding_changes_no_token(draft: str) -> None:
    model, other = small(), small(seed=2)
    controller = controller_for(model)
    expected = ours(model, PROMPT, controller, 12)
    drafting = model.module if draft == "itself" else other.module
    with mlx_lqr.steer(model, controller, 2.0):
        if draft == "steered":
            with mlx_lqr.steer(other, controller_for(small(seed=2)), 2.0):
                answer = theirs(model, PROMPT, 12, assistant_model=drafting)
        else:
            answer = theirs(model, PROMPT, 12, assistant_model=drafting)
    assert answer == expected


def test_generation_goes_on_from_a_cache() -> None:
    model = small()
    controller = controller_for(model)
    cache = transformers.DynamicCache(config=model.module.config)
    with torch.no_grad():
        model.module(torch.tensor([PROMPT[:7]]), **{cache_argument(model.module): cache})
    expected = ours(model, PROMPT, controller)
    with mlx_lqr.steer(model, controller, 2.0):
        assert theirs(model, PROMPT, **{cache_argument(model.module): cache}) == expected


def test_exactly_the_last_prompt_token_and_the_generated_tokens_are_steered() -> None:
    """In the last block's keys one sees which positions the blocks before it steered."""
    model = small()
    controller = controller_for(model)
    answer = ours(model, PROMPT, controller)
    last = len(PROMPT) - 1

    def keys(tokens: list[int], **options: Any) -> np.ndarray:
        cache = transformers.DynamicCache(config=model.module.config)
        theirs(model, tokens, **{cache_argument(model.module): cache}, **options)
        keys: np.ndarray = cache.layers[-1].keys[0].numpy()
        return keys

    with mlx_lqr.steer(model, controller, 2.0):
        steered = keys(PROMPT, prefill_chunk_size=5)
    plain = keys([*PROMPT, *answer], max_tokens=1)
    moved = np.abs(steered - plain[:, : steered.shape[1]]).max(axis=(0, 2))
    assert moved[:last].max() < 1e-5
    assert moved[last:].min() > 1e-2


def test_a_direct_call_is_steered_at_its_last_position() -> None:
    model = small()
    controller = controller_for(model)
    expected = model.logits(PROMPT, law=law_on(model, controller, 2.0))
    with torch.no_grad():
        plain = model.module(torch.tensor([PROMPT])).logits[0].numpy()
        with mlx_lqr.steer(model, controller, 2.0):
            logits = model.module(torch.tensor([PROMPT])).logits[0].numpy()
    assert np.abs(logits[-1] - expected).max() < 1e-4
    assert np.abs(logits[:-1] - plain[:-1]).max() == 0


def test_another_thread_is_steered_too() -> None:
    model = small()
    controller = controller_for(model)
    expected = ours(model, PROMPT, controller)
    with mlx_lqr.steer(model, controller, 2.0), ThreadPoolExecutor() as pool:
        assert pool.submit(theirs, model, PROMPT, prefill_chunk_size=3).result() == expected


@pytest.mark.parametrize("left", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_is_as_before_afterwards(left: Any) -> None:
    model = small()
    controller = controller_for(model)

    def state() -> list[Any]:
        modules = list(model.module.modules())
        return [
            *([*module.__dict__] for module in modules),
            *(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in modules),
            *(block.forward.__func__ for block in model.blocks),
            copy.deepcopy(model.module.config.to_dict()),
            model.module.config._attn_implementation,
            model.module.generate,
        ]

    before, plain = state(), theirs(model, PROMPT)
    weights = {name: weight.clone() for name, weight in model.module.state_dict().items()}
    try:
        with mlx_lqr.steer(model.module, controller, 2.0):
            assert theirs(model, PROMPT) != plain
            if left is not None:
                raise left
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert state() == before
    assert theirs(model, PROMPT) == plain
    assert all(torch.equal(weight, weights[name]) for name, weight in model.module.state_dict().items())


def test_an_error_inside_generate_leaves_nothing_behind() -> None:
    model = small()
    controller = controller_for(model)
    expected = ours(model, PROMPT, controller)

    def fail(*_: Any) -> bool:
        raise OSError("full")

    with mlx_lqr.steer(model, controller, 2.0):
        with pytest.raises(OSError, match="full"):
            theirs(model, PROMPT, stopping_criteria=[fail])
        assert theirs(model, PROMPT, prefill_chunk_size=5) == expected


def shifted_output(module: Any, tokens: list[int], layer: int, shift: np.ndarray) -> np.ndarray:
    """Output of block `layer` at the last token when its input there is shifted; all as transformers runs it."""
    outputs = []

    def move(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        z = args[0].clone()
        z[0, -1] += torch.tensor(shift)
        return z, *args[1:]

    block = module.base_model.layers[layer]
    handles = [
        block.register_forward_pre_hook(move),
        block.register_forward_hook(lambda _, __, output: outputs.append(output[0, -1].numpy())),
    ]
    with torch.no_grad():
        module(torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    (output,) = outputs
    return np.asarray(output)


@families
def test_jacobian_equals_finite_differences(family: str, random: np.random.Generator) -> None:
    """In float64, though transformers' norms and softmax compute in float32 whatever they are given."""
    model, step = tiny_on("torch", family), 5e-3
    exact = tiny_on("torch", family).module.double()
    exact.set_attn_implementation("eager")  # older versions leave Gemma 2's caps out of the others
    if getattr(exact.config, "_experts_implementation", None):
        exact.set_experts_implementation("eager")  # the others have no float64
    tokens = PROMPT[:10]
    trace = model.trace(tokens)
    for layer in range(model.num_layers):
        A = model.jacobian(trace, layer)
        for w in random.standard_normal((3, model.hidden_size)):
            near, far = (
                shifted_output(exact, tokens, layer, size * w) - shifted_output(exact, tokens, layer, -size * w)
                for size in (step, 2 * step)
            )
            difference = (8 * near - far) / (12 * step)
            assert np.linalg.norm(A @ w - difference) < 1e-3 * np.linalg.norm(difference), (family, layer)
            assert np.linalg.norm(model.jvp(trace, layer, w[None]) - difference) < 1e-3 * np.linalg.norm(difference)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_model_is_linearised_in_float32(dtype: str) -> None:
    """Its Jacobian is that of the same weights in float32 at the same point, angles of rotation included."""
    model = mlx_lqr.load(tiny_folder("llama"), backend="torch", dtype=dtype)
    assert isinstance(model, TorchModel)
    exact = TorchModel(copy.deepcopy(model.module).float(), "exact")
    assert model._dtype == getattr(torch, dtype)
    traces = model.trace(PROMPT), exact.trace(PROMPT)
    jacobian = model.jacobian(traces[0], 0)
    expected = exact.jacobian(traces[1], 0)
    assert np.abs(jacobian - expected).max() < (2e-2 if dtype == "bfloat16" else 3e-3) * np.abs(expected).max()
    alone = model.jacobian(model.trace([7]), 0), exact.jacobian(exact.trace([7]), 0)  # no prefix, nothing rounded
    assert np.abs(alone[0] - alone[1]).max() < 1e-5 * np.abs(alone[1]).max()
    assert model.blocks[0].mlp.down_proj.weight.dtype == getattr(torch, dtype)


def test_wide_blocks_are_differentiated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    trace = model.trace(PROMPT)
    whole = model.jacobian(trace, 1)
    monkeypatch.setattr("mlx_lqr.backends.torch.blocks.TANGENTS", 5)
    assert np.abs(model.jacobian(trace, 1) - whole).max() < 1e-5


@pytest.mark.parametrize("layers", [None, [1, 3]])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_riccati_recursion_in_torch_equals_numpys(layers: list[int] | None, dtype: Any) -> None:
    jacobians = system(5, 24)
    expected = mlx_lqr.solve(jacobians, 1.0, 1.0, 1.0, layers=layers)
    gains = mlx_lqr.solve(jacobians, 1.0, 1.0, 1.0, layers=layers, dtype=dtype, algebra=TorchAlgebra(CPU))
    for a, b in zip(gains, expected, strict=True):
        assert a.dtype == dtype
        assert np.abs(a - b).max() <= (1e-10 if dtype == np.float64 else 1e-4) * np.abs(b).max()


@pytest.mark.parametrize(
    "jacobians",
    [
        [np.eye(4), np.full((4, 4), np.inf)],
        [np.eye(4), np.eye(4), 1e30 * np.eye(4)],
        [np.eye(4), np.diag([1.0, 1.0, 1.0, 3e4]), np.eye(4)],
    ],
)
def test_the_riccati_recursion_in_torch_fails_as_numpys_does(jacobians: list[np.ndarray]) -> None:
    refusals = []
    for algebra in (None, TorchAlgebra(CPU)):
        with pytest.raises(InputError, match="layer") as refusal:
            mlx_lqr.solve(jacobians, dtype=np.float32, algebra=algebra)
        refusals.append(str(refusal.value))
    assert refusals[0] == refusals[1]


def test_a_fit_uses_the_models_own_algebra(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    expected = controller_for(model)
    monkeypatch.setattr(TorchModel, "algebra", TorchAlgebra(CPU))
    assert np.abs(controller_for(model).gain - expected.gain).max() < 1e-6 * np.abs(expected.gain).max()


def test_auto_takes_torch_only_where_a_gpu_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch_backend, "nvidia_driver", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for nothing"))
    assert loading.preferred_backend() == "mlx"
    monkeypatch.setattr(torch_backend, "nvidia_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loading.preferred_backend() == "torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loading.preferred_backend() == "mlx"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert loading.preferred_backend() == "mlx"


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="use auto, mlx, torch"):
        mlx_lqr.load("demo", backend="jax")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="for the torch backend"):
        mlx_lqr.load("demo", backend="mlx", device="cuda")
    with pytest.raises(InputError, match="device must be cpu, cuda"):
        mlx_lqr.load("demo", device="tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="finds no CUDA GPU"):
        mlx_lqr.load("demo", backend="torch", device="cuda")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))
    with pytest.raises(InputError, match=r'needs torch, which is not installed: pip install "mlx-lqr\[torch\]"'):
        mlx_lqr.load("demo", backend="torch")
    monkeypatch.undo()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.57.1")
    with pytest.raises(InputError, match=r"transformers 5\.20 or newer, not 4\.57\.1"):
        mlx_lqr.load("demo", backend="torch")


def exhausted(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nand more lines")


def test_running_out_of_memory_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = small(), tmp_path / "jacobians"
    expected = mlx_lqr.linearize(model, [PROMPT])
    calls: dict[str, Callable[[], Any]] = {
        "dtype bfloat16": lambda: model.residuals([PROMPT]),
        "fewer or shorter prompts": lambda: model.logits(PROMPT),
        "shorter prompts": lambda: model.log_probabilities([(PROMPT, [1])])[0],
    }
    for advice, call in calls.items():
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", exhausted)
            with pytest.raises(InputError, match=f"not enough memory.*{advice}") as refusal:
                call()
        assert "\n" not in str(refusal.value)
    original, finished = model.jacobian, list[int]()

    def failing(trace: Any, layer: int) -> np.ndarray:
        if layer == 1 and len(finished) == 1:
            with monkeypatch.context() as patch:
                patch.setattr("mlx_lqr.backends.torch.blocks.vmap", exhausted)
                return original(trace, layer)
        finished.append(layer)
        return original(trace, layer)

    with monkeypatch.context() as patch:
        patch.setattr(model, "jacobian", failing)
        with pytest.raises(InputError, match="what is stored so far stays"):
            mlx_lqr.linearize(model, [PROMPT], store=file)
        finished.append(-1)
        resumed = mlx_lqr.linearize(model, [PROMPT], store=file)
    assert finished == [2, -1, 1, 0]
    assert all(np.array_equal(a, b) for a, b in zip(resumed, expected, strict=True))
    for product in ("__matmul__", "__truediv__"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, product, exhausted)
            with pytest.raises(InputError, match="not enough memory for the gains"):
                mlx_lqr.solve(expected, algebra=TorchAlgebra(CPU))
    monkeypatch.setattr("mlx_lqr.backends.torch.model.load_module", exhausted)
    with pytest.raises(InputError, match="not enough memory for the model: load it with dtype bfloat16"):
        mlx_lqr.load(tiny_folder("llama"), backend="torch")


@pytest.mark.parametrize("damage", ["packed", "other packing", "truncated", "missing", "shape", "no weights", "code"])
def test_folders_that_torch_cannot_load_are_refused(damage: str, tmp_path: Path) -> None:
    folder = tiny_folder("llama")
    config, weights = folder / "config.json", folder / "model.safetensors"
    if damage in ("packed", "other packing"):
        key = "quantization" if damage == "packed" else "quantization_config"
        config.write_text(config.read_text().replace("{", f'{{"{key}": {{"bits": 4}}, ', 1))
    elif damage == "code":
        config.write_text(config.read_text().replace("{", '{"model_file": "evil.py", ', 1))
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif damage == "no weights":
        weights.rename(folder / "pytorch_model.bin")
    else:
        parameters = dict(tree_flatten(tiny("llama").module.parameters()))
        name = "model.layers.1.mlp.up_proj.weight"
        del parameters[name]
        if damage == "shape":
            parameters[name] = mx.zeros((3, 4))
        mx.save_safetensors(str(weights), parameters, metadata={"format": "mlx"})
    expected = {"packed": "quantised for MLX", "other packing": "unquantised checkpoint", "truncated": "damaged",
                "no weights": "pickled weights are never read", "code": "needs its own code"}  # fmt: skip
    with pytest.raises(InputError, match=expected.get(damage, "do not fit its config")) as refusal:
        mlx_lqr.load(folder, backend="torch")
    assert "\n" not in str(refusal.value)


def test_a_checkpoint_of_transformers_is_loaded_and_steered(tmp_path: Path) -> None:
    """As `save_pretrained` writes it, mixtures of experts with each expert on its own."""
    for family in ("qwen3_moe", "mixtral", "gemma3_text"):
        model = tiny_on("torch", family)
        folder = tmp_path / family
        for weight in model.module.parameters():
            weight.data = weight.data.contiguous()
        model.module.save_pretrained(folder)
        (folder / "tokenizer.json").write_text((tiny_folder(family) / "tokenizer.json").read_text())
        loaded = mlx_lqr.load(folder, backend="torch")
        assert loaded.fingerprint == model.fingerprint
        controller = controller_for(loaded)
        assert relative_difference(loaded.logits(PROMPT), model.logits(PROMPT)) < (1e-2 if "gemma" in family else 1e-6)
        assert ours(loaded, PROMPT, controller) != decoded(loaded, PROMPT, max_tokens=8)  # type: ignore[arg-type]


def relative_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def test_the_command_line_says_the_same_on_both_backends(dog: Path) -> None:
    arguments = ["generate", "demo", "-p", "Once upon a time,", "-c", f"{dog}:2", "-n", "12", "--temperature", "0"]
    answers = [
        CliRunner().invoke(main, [*arguments, *more])
        for more in (["--backend", "mlx"], ["--backend", "torch"], ["--device", "cpu"])
    ]
    assert [answer.exit_code for answer in answers] == [0, 0, 0], answers[1].output
    assert answers[0].output == answers[1].output == answers[2].output
    refused = CliRunner().invoke(main, [*arguments, "--device", "tpu"])
    assert refused.exit_code == 2
    assert refused.output.count("\n") == 1


class Recorded:
    """Stands for a CUDA graph: the tensor operations of one step, replayed without the Python that chose them."""

    made = 0

    def __init__(self, run: Callable[..., torch.Tensor], tokens: torch.Tensor, length: int) -> None:
        Recorded.made += 1
        self._operations = make_fx(run)(tokens.clone(), torch.full((1,), length))

    def replay(self, tokens: torch.Tensor, length: int) -> torch.Tensor:
        logits: torch.Tensor = self._operations(tokens, torch.full((1,), length))
        return logits


def recording(model: TorchModel, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """A decoder that records its steps, as on a GPU."""
    monkeypatch.setattr(torch_decoder, "_Graph", Recorded)
    Recorded.made = 0
    decoder: Any = model.decoder(**options)
    decoder._records_graphs = True
    return decoder


def test_nothing_is_collected_while_a_step_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It might be the graph of a decoder that nobody uses any more, which CUDA does not let go then."""
    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    for name in ("CUDAGraph", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Mock)
    collects: list[bool] = []

    def run(tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        collects.append(gc.isenabled())
        if len(collects) == 6:
            raise RuntimeError
        return tokens

    torch_decoder._Graph(run, torch.tensor([1]), 2)
    assert gc.isenabled()
    with pytest.raises(RuntimeError):
        torch_decoder._Graph(run, torch.tensor([1]), 2)
    assert gc.isenabled()
    assert collects == [True, True, False] * 2


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "phi3"])
def test_a_step_does_the_same_whatever_the_numbers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it may be recorded: over a growing cache, in a batch of which some end, and where the context rolls."""
    model = small(family, max_position_embeddings=400)
    law = law_for(model)
    expected = decoded(model, PROMPT, law=law, max_tokens=270)
    assert decoded(model, PROMPT, law=law, max_tokens=270, decoder=recording(model, monkeypatch)) == expected
    assert Recorded.made == 2  # once more where the cache has grown
    monkeypatch.setattr(torch_decoder, "RECORD_AFTER", 2)  # and then once more
    batch = decoded_together(model, BATCH, law=law, max_tokens=8)
    decoder = recording(model, monkeypatch)
    ended: set[int] = set()
    answers: list[list[int]] = [[] for _ in BATCH]
    for i, token in decode(model, BATCH, law=law, max_tokens=8, decoder=decoder, ended=ended):
        answers[i].append(token)
        if i == 1 and len(answers[i]) == 3:
            ended.add(i)
    batch[1] = batch[1][:3]
    assert answers == batch
    assert Recorded.made == 2


def test_a_recorded_step_rolls_and_takes_a_new_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("qwen3", max_position_embeddings=16)
    options: dict[str, Any] = {"max_tokens": 600, "overflow": "roll"}
    expected = decoded(model, PROMPT, **options)
    assert decoded(model, PROMPT, decoder=recording(model, monkeypatch, rolling=True), **options) == expected
    # Two concepts, since this stand-in for a graph takes a tensor of one number for that number.
    other = mlx_lqr.fit(model, [[9, 10]], [[11, 12]], q=1.0, concept="other", layers="all")
    law = LinearFeedback(mlx_lqr.Controller.combine(controller_for(model), other), 1.0)
    decoder = recording(model, monkeypatch, law=law)
    decoder.fill([PROMPT[:-1]], steered=False)
    for strength in (1.0, 3.0, -2.0):
        law.strength = strength
        logits = decoder.step(PROMPT[-1:])[0].numpy()
        assert np.abs(logits - model.logits(PROMPT, law=law)).max() < 1e-4
        decoder.rewind(len(PROMPT) - 1)
    assert Recorded.made == 1
