"""Models that are on no list: every number is that of mlx-lm's own model, and what cannot be right is refused."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.architectures import CONFIGS, EXACT, LOOPS, by_hand, folder_of, model_of, module_of
from helpers.controllers import CONTRASTS, controller_for
from helpers.decoding import answered_anew, decoded, decoded_together, tokens
from helpers.tiny_tokenizers import Letters
from mlx.utils import tree_flatten

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends.measurement import EXACT as EXACT_ERROR
from mlx_lqr.backends.measurement import USABLE
from mlx_lqr.backends.mlx import frozen, measured_model
from mlx_lqr.backends.mlx import measurement as measuring
from mlx_lqr.backends.mlx.measured_model import MeasuredModel
from mlx_lqr.backends.mlx.measurement import Measurement
from mlx_lqr.backends.mlx.shared import Shared
from mlx_lqr.backends.protocol import Law
from mlx_lqr.methods.alqr import LinearFeedback
from mlx_lqr.methods.running import law_on
from mlx_lqr.runtime import Chat, stream
from mlx_lqr.runtime.decode import decode

PROMPT = [5, 9, 2, 33, 7, 51, 20, 11, 3]
SHARING = ("gemma4_text", "rwkv7")
every = pytest.mark.parametrize("family", EXACT + SHARING)
exact = pytest.mark.parametrize("family", EXACT)
STRENGTH = 2.0


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """So that nothing measured by another version counts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_LQR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def response(family: str, layer: int, moves: np.ndarray) -> np.ndarray:
    """A_k w (n, d) for rows w (n, d), by differences of mlx-lm's forward pass of the whole prompt without a cache."""
    model = model_of(family)
    outputs: list[mx.array] = []
    size = 1e-2 * float(np.linalg.norm(last_inputs(family)[layer])) / model.hidden_size**0.5
    shifts = mx.array(np.concatenate([size * moves, -size * moves]).astype(np.float32))

    def push(k: int, z: mx.array) -> mx.array:
        return mx.concatenate([z[:, :-1], z[:, -1:] + shifts[:, None]], axis=1) if k == layer else z

    def record(k: int, z: mx.array, output: mx.array) -> mx.array:
        if k == layer:
            outputs.append(output[:, -1])
        return output

    with by_hand(model.blocks, record, push):
        mx.eval(model.module(mx.array([PROMPT] * len(shifts))))
    ends = np.asarray(outputs[0]).astype(np.float64)
    return (ends[: len(moves)] - ends[len(moves) :]) / (2 * size)


def last_inputs(family: str) -> list[np.ndarray]:
    """z_k at the prompt's last token, of mlx-lm's pass without a cache."""
    states: list[np.ndarray] = []

    def record(k: int, z: mx.array, output: mx.array) -> mx.array:
        states.append(np.asarray(z[0, -1]))
        return output

    model = model_of(family)
    with by_hand(model.blocks, record):
        mx.eval(model.module(mx.array([PROMPT])))
    return states


@exact
def test_traces_of_prompts_that_begin_alike_are_those_of_each_alone(family: str) -> None:
    model = model_of(family)
    prompts = [[*PROMPT, *PROMPT], [*PROMPT, *PROMPT[:3]], [*PROMPT, *PROMPT, 5]]
    for trace, prompt in zip(list(model.traces(prompts)), prompts, strict=True):
        alone = model.trace(prompt)
        np.testing.assert_allclose(trace.residual, alone.residual, rtol=1e-3, atol=1e-4)
        A = model.jacobian(alone, 1)
        assert np.abs(model.jacobian(trace, 1) - A).max() < 1e-3 * np.abs(A).max()


@exact
def test_derivatives_are_those_of_mlx_lms_own_model(family: str) -> None:
    model = model_of(family)
    trace = model.trace(PROMPT)
    np.testing.assert_allclose(trace.residual[:-1], last_inputs(family), rtol=1e-3, atol=1e-4)
    w, u = np.random.default_rng(0).standard_normal((2, 4, model.hidden_size)).astype(np.float32)
    for k in range(model.num_layers):
        expected = response(family, k, w)
        A = model.jacobian(trace, k)
        scale = np.linalg.norm(expected)
        assert np.linalg.norm(w @ A.T - expected) < 1e-2 * scale
        assert np.linalg.norm(model.jvp(trace, k, w) - expected) < 1e-2 * scale
        assert np.linalg.norm(model.vjp(trace, k, u) - u @ A) < 1e-3 * np.linalg.norm(u @ A)
        moved = trace.residual[k] + 1e-2 * w
        straight = model.block(trace, k, trace.residual[k][None]) + 1e-2 * w @ A.T
        assert np.abs(model.block(trace, k, moved) - straight).max() < 0.05 * np.abs(straight).max()


@every
def test_numbers_are_those_of_a_pass_without_a_cache(family: str) -> None:
    model = model_of(family)
    logits = np.asarray(model.module(mx.array([PROMPT]))[0])
    scale = np.abs(logits).max()
    assert np.abs(model.logits(PROMPT) - logits[-1]).max() < 1e-4 * scale
    (along,) = model.logits_along([(PROMPT[:3], PROMPT[3:])])
    assert np.abs(along - logits[2:]).max() < 1e-4 * scale
    residuals = model.residuals([PROMPT, PROMPT[:4]])
    assert np.abs(residuals[0, :-1] - last_inputs(family)).max() < 1e-3
    assert np.abs(residuals[1] - model.trace(PROMPT[:4]).residual).max() < 1e-3


def steered_by_hand(family: str, controller: mlx_lqr.Controller, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of mlx-lm's passes without a cache, steered from the prompt's last position on."""
    model, run = model_of(family), list(prompt)

    def steer(k: int, z: mx.array, output: mx.array) -> mx.array:
        values, x = np.array(output), np.array(z)
        for i in range(len(prompt) - 1, len(run)):
            error = controller.offset[k] + STRENGTH * controller.setpoint[k] - x[0, i] @ controller.sensor[k]
            values[0, i] += controller.gain[k] @ error
        return mx.array(values)

    for _ in range(count):
        with by_hand(model.blocks, steer):
            run.append(int(mx.argmax(model.module(mx.array([run]))[0, -1]).item()))
    return run[len(prompt) :]


@every
@pytest.mark.parametrize("cost", ["state", "feature"])
def test_steered_tokens_are_those_of_a_model_hooked_by_hand(family: str, cost: str) -> None:
    model = model_of(family)
    controller = controller_for(model, cost=cost)
    law, prompts = LinearFeedback(controller, STRENGTH), [PROMPT, PROMPT[:4]]
    expected = [steered_by_hand(family, controller, prompt, 5) for prompt in prompts]
    assert [decoded(model, prompt, law=law, max_tokens=5) for prompt in prompts] == expected
    assert decoded_together(model, prompts, law=law, max_tokens=5) == expected
    plain = model.logits(PROMPT)
    assert np.abs(model.logits(PROMPT, law=law) - plain).max() > 0.01 * np.abs(plain).max()


@pytest.mark.parametrize("family", ["llama4", "gpt_oss"])
def test_what_a_law_carries_is_of_each_sequence(family: str) -> None:
    """Whether a batch's caches are merged or its sequences are run one by one."""
    model = model_of(family)
    spid = mlx_lqr.fit_baseline(model, "spid", *CONTRASTS["a"], numbers={"kd": 3.0})
    prompts = [PROMPT, PROMPT[:4], PROMPT[2:5]]

    def law() -> Law:
        return law_on(model, spid, STRENGTH)

    alone = [decoded(model, prompt, law=law(), max_tokens=6) for prompt in prompts]
    assert decoded_together(model, prompts, law=law(), max_tokens=6) == alone
    ended = {1}
    rest = [token for i, token in decode(model, prompts, law=law(), max_tokens=6, ended=ended) if i == 2]
    assert rest == alone[2]
    assert alone != [decoded(model, prompt, max_tokens=6) for prompt in prompts]


@pytest.mark.parametrize("family", ["qwen3_next", "gemma3", "llama4", "mamba2"])
def test_chat_and_adaptive_gains(family: str) -> None:
    """What caches cannot take back is run again."""
    model = MeasuredModel(module_of(family), CONFIGS[family], family, Letters())  # type: ignore[arg-type]
    chat = Chat(model, options={"max_tokens": 6, "temperature": 0})
    chat.add(controller_for(model), STRENGTH)
    for question in ("hello", "and then"):
        assert tokens(chat.answer(question)) == answered_anew(chat)
    adapted = mlx_lqr.adapt(model, controller_for(model, cost="feature"), PROMPT)
    expected = decoded(model, PROMPT, law=LinearFeedback(adapted, STRENGTH), max_tokens=5)
    adaptive = controller_for(model, cost="adaptive")
    pieces = stream(model, PROMPT, controller=adaptive, strength=STRENGTH, max_tokens=5, temperature=0)
    assert tokens(pieces) == expected


@pytest.mark.parametrize("family", ["qwen3_next", "gpt_oss", "mamba2"])
def test_mlx_lms_own_generation_is_steered_in_place(family: str) -> None:
    model = model_of(family)
    controller = controller_for(model)
    with mlx_lqr.steer(model.module, controller, STRENGTH):
        library = importlib.import_module("mlx_lm.generate")
        theirs = [int(token) for token, _ in library.generate_step(mx.array(PROMPT), model.module, max_tokens=5)]
    assert theirs == decoded(model, PROMPT, law=LinearFeedback(controller, STRENGTH), max_tokens=5)


@pytest.fixture
def nothing_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What blocks share beside the residual stream is not found."""
    unknown = lambda calls, moved: ([Shared()] * len(calls), np.empty((len(calls) + 1, 0), np.float32))  # noqa: E731
    monkeypatch.setattr(frozen, "shared_by", unknown)


@pytest.mark.usefixtures("nothing_found")
def test_blocks_that_share_more_than_is_found_are_said() -> None:
    with pytest.warns(RuntimeWarning, match=r"'rwkv7' blocks hand on more .* is off by [\d.]+ %"):
        model = MeasuredModel(module_of("rwkv7", seed=4), CONFIGS["rwkv7"], "not found")
    assert model.measurement.jacobian < EXACT_ERROR < model.measurement.chain < USABLE


@pytest.mark.usefixtures("nothing_found")
def test_a_chain_that_is_too_far_off_is_refused_with_its_number() -> None:
    kinds = [*["sliding_attention"] * 3, "full_attention"] * 2
    module = module_of("gemma4_text", num_hidden_layers=8, layer_types=kinds)
    with pytest.raises(InputError, match=r"'gemma4_text' cannot be steered: the product .* by [\d.]+ %") as refusal:
        MeasuredModel(module, CONFIGS["gemma4_text"], "far off")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("family", LOOPS)
def test_no_chain_of_blocks_is_refused(family: str) -> None:
    with pytest.raises(InputError, match=rf"'{family}' cannot be steered: .*4 blocks 8 times"):
        MeasuredModel(module_of(family), CONFIGS[family], family)


def test_whatever_fails_while_measuring_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise AttributeError("no such thing\nat all")

    module = module_of("granite", seed=1)
    monkeypatch.setattr(type(module), "__call__", fail)
    with pytest.raises(
        InputError, match=r"'granite' cannot be steered: running a few tokens failed \(no such thing\)$"
    ):
        MeasuredModel(module, CONFIGS["granite"], "granite")


def test_a_model_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of("seed_oss", seed=2)
    before = MeasuredModel(module, CONFIGS["seed_oss"], "first").measurement
    monkeypatch.setattr(measuring.Measured, "all", lambda self: pytest.fail("measured again"))
    assert MeasuredModel(module, CONFIGS["seed_oss"], "second").measurement == before
    other = Measurement(0.0, 0.0, 0.5, differences=False, merges=True)
    monkeypatch.setattr(measuring.Measured, "all", lambda self: other)
    with pytest.raises(InputError, match=r"by 50 %"):
        MeasuredModel(module_of("seed_oss", seed=3), CONFIGS["seed_oss"], "third")


def test_what_a_config_does_not_say_is_no_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The length of the context is said to be open, heads are not counted as one, and norms tell models apart."""
    folder = folder_of("granite", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": None}))
    with pytest.warns(RuntimeWarning, match="does not say how long the context of this granite model is"):
        mlx_lqr.load(folder, backend="mlx")
    model = MeasuredModel(module_of("granite"), CONFIGS["granite"] | {"num_attention_heads": None}, "granite")
    with pytest.raises(InputError, match="does not say how many there are"):
        model.head_outputs([PROMPT])
    monkeypatch.setattr(measured_model, "without_adapter", lambda _: [])
    with pytest.raises(InputError, match="no norm weights, by which a controller knows its model"):
        list(model._norms())


def test_a_vision_models_text_part_loads_from_its_folder(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="of this gemma3 model only the part for text is used"):
        model = mlx_lqr.load(folder_of("gemma3", tmp_path), backend="mlx")
    assert model.context_length == 512
    assert decoded(model, PROMPT, max_tokens=5) == decoded(model_of("gemma3"), PROMPT, max_tokens=5)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(InputError) as refusal:
        mlx_lqr.load(tmp_path, backend="mlx")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("family", "bits"), [("gpt_oss", 4), ("qwen3_next", 8)])
def test_packed_weights(family: str, bits: int, tmp_path: Path) -> None:
    folder = folder_of(family, tmp_path, bits=bits, hidden_size=64, intermediate_size=64)
    model = mlx_lqr.load(folder, backend="mlx")
    assert isinstance(model, MeasuredModel)
    assert max(model.measurement.jacobian, model.measurement.chain) < EXACT_ERROR
    assert any("scales" in name for name, _ in tree_flatten(model.module.parameters()))
    assert decoded(model, PROMPT, max_tokens=3)
