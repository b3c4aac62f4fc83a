"""Models that are on no list, on torch: every number is that of transformers' own model, and what cannot be right is
refused."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from helpers.controllers import CONTRASTS, controller_for
from helpers.decoding import answered_anew, decoded, decoded_together, tokens
from helpers.tiny_tokenizers import Letters
from helpers.torch_architectures import SETTINGS, STREAMS, by_hand, config_of, model_of, module_of, precise

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends.measurement import EXACT
from mlx_lqr.backends.mlx import measured_model as mlx_measured
from mlx_lqr.backends.protocol import CarryingLaw
from mlx_lqr.backends.torch import measurement as measuring
from mlx_lqr.backends.torch.measured_model import MeasuredModel
from mlx_lqr.backends.torch.measurement import Measurement
from mlx_lqr.methods.alqr import LinearFeedback
from mlx_lqr.methods.running import law_on
from mlx_lqr.runtime import Chat, stream

PROMPT = [5, 9, 2, 33, 7, 51, 20, 11, 3]
every = pytest.mark.parametrize("family", SETTINGS)
plain = pytest.mark.parametrize("family", [family for family in SETTINGS if family not in STREAMS])
STRENGTH = 2.0


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """So that nothing measured by another version counts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_LQR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def response(family: str, layer: int, moves: np.ndarray) -> np.ndarray:
    """A_k w (n, d) for rows w (n, d), by differences of transformers' forward pass in float64 without a cache."""
    outputs: list[torch.Tensor] = []
    size = 1e-3 * float(np.linalg.norm(last_inputs(family)[layer])) / moves.shape[1] ** 0.5
    shifts = torch.tensor(np.concatenate([size * moves, -size * moves]), dtype=torch.float64)

    def push(k: int, z: torch.Tensor) -> torch.Tensor:
        return torch.cat([z[:, :-1], z[:, -1:] + shifts[:, None]], dim=1) if k == layer else z

    def record(k: int, z: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if k == layer:
            outputs.append(output[:, -1])
        return output

    with by_hand(precise(family), family, record, push):
        precise(family)(torch.tensor([PROMPT] * len(shifts)), use_cache=False)
    ends = outputs[0].numpy()
    difference: np.ndarray = (ends[: len(moves)] - ends[len(moves) :]) / (2 * size)
    return difference


def last_inputs(family: str) -> list[np.ndarray]:
    """z_k at the prompt's last token, of transformers' pass in float64 without a cache."""
    states: list[np.ndarray] = []

    def record(k: int, z: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        states.append(z[0, -1].numpy())
        return output

    with by_hand(precise(family), family, record):
        precise(family)(torch.tensor([PROMPT]), use_cache=False)
    return states


@plain
def test_derivatives_are_those_of_transformers_own_model(family: str) -> None:
    model = model_of(family)
    trace = model.trace(PROMPT)
    np.testing.assert_allclose(trace.residual[:-1], last_inputs(family), rtol=1e-3, atol=1e-4)
    assert np.array_equal(trace.state, trace.residual)
    assert model.state_size == model.hidden_size
    w, u = np.random.default_rng(0).standard_normal((2, 3, model.hidden_size)).astype(np.float32)
    for k in range(model.num_layers):
        expected = response(family, k, w)
        A = model.jacobian(trace, k)
        scale = np.linalg.norm(expected)
        assert np.linalg.norm(w @ A.T - expected) < 2e-3 * scale
        assert np.linalg.norm(model.jvp(trace, k, w) - expected) < 2e-3 * scale
        assert np.linalg.norm(model.vjp(trace, k, u) - u @ A) < 1e-4 * np.linalg.norm(u @ A)
        moved = trace.residual[k] + 1e-3 * w
        straight = model.block(trace, k, trace.residual[k][None]) + 1e-3 * w @ A.T
        assert np.abs(model.block(trace, k, moved) - straight).max() < 5e-3 * np.abs(straight).max()


@every
def test_numbers_are_those_of_a_pass_without_a_cache(family: str) -> None:
    model = model_of(family)
    with torch.no_grad():
        logits = model.module(torch.tensor([PROMPT]), use_cache=False).logits[0].numpy()
    scale = np.abs(logits).max()
    assert np.abs(model.logits(PROMPT) - logits[-1]).max() < 1e-4 * scale
    (along,) = model.logits_along([(PROMPT[:3], PROMPT[3:])])
    assert np.abs(along - logits[2:]).max() < 1e-4 * scale
    residuals = model.residuals([PROMPT, PROMPT[:4]])
    assert np.abs(residuals[0] - model.trace(PROMPT).residual).max() < 1e-3
    assert np.abs(residuals[1] - model.trace(PROMPT[:4]).residual).max() < 1e-3


def generated_by_hand(family: str, controller: mlx_lqr.Controller, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of transformers' own generate, its blocks steered from the prompt's last position on."""
    module = model_of(family).module

    def steer(k: int, z: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        error = controller.offset[k] + STRENGTH * controller.setpoint[k] - z[0, -1].numpy() @ controller.sensor[k]
        steered = output.clone()
        steered[0, -1] += torch.tensor(controller.gain[k] @ error)
        return steered

    with by_hand(module, family, steer):
        answer = generate(module, prompt, count)
    return answer


def generate(module: Any, prompt: list[int], count: int) -> list[int]:
    given = torch.tensor([prompt])
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answer = module.generate(given, attention_mask=torch.ones_like(given), **options)
    return [int(token) for token in answer[0, len(prompt) :]]


@plain
@pytest.mark.parametrize("cost", ["state", "feature"])
def test_steered_tokens_are_those_of_transformers_hooked_by_hand(family: str, cost: str) -> None:
    model = model_of(family)
    controller = controller_for(model, cost=cost)
    law, prompts = LinearFeedback(controller, STRENGTH), [PROMPT, PROMPT[:4]]
    expected = [generated_by_hand(family, controller, prompt, 5) for prompt in prompts]
    assert [decoded(model, prompt, law=law, max_tokens=5) for prompt in prompts] == expected
    assert decoded_together(model, prompts, law=law, max_tokens=5) == expected
    unsteered = model.logits(PROMPT)
    assert np.abs(model.logits(PROMPT, law=law) - unsteered).max() > 0.01 * np.abs(unsteered).max()


@pytest.mark.parametrize("family", ["glm4", "qwen3_next", "mamba", "gemma3n_text"])
def test_chat_and_adaptive_gains(family: str) -> None:
    """What caches cannot take back is run again."""
    model = MeasuredModel(model_of(family).module, family, Letters())  # type: ignore[arg-type]
    chat = Chat(model, options={"max_tokens": 6, "temperature": 0})
    chat.add(controller_for(model), STRENGTH)
    for question in ("hello", "and then"):
        assert tokens(chat.answer(question)) == answered_anew(chat)
    adapted = mlx_lqr.adapt(model, controller_for(model, cost="feature"), PROMPT)
    expected = decoded(model, PROMPT, law=LinearFeedback(adapted, STRENGTH), max_tokens=5)
    adaptive = controller_for(model, cost="adaptive")
    pieces = stream(model, PROMPT, controller=adaptive, strength=STRENGTH, max_tokens=5, temperature=0)
    assert tokens(pieces) == expected


def test_what_a_law_carries_is_of_each_sequence_of_a_batch() -> None:
    model, prompts = model_of("lfm2"), [PROMPT, PROMPT[:4]]
    steering = mlx_lqr.fit_baseline(model, "spid", *CONTRASTS["a"])
    law = law_on(model, steering, STRENGTH)
    assert isinstance(law, CarryingLaw)
    expected = [decoded(model, prompt, law=law, max_tokens=5) for prompt in prompts]
    assert decoded_together(model, prompts, law=law, max_tokens=5) == expected
    pairs = [(PROMPT[:3], PROMPT[3:]), (PROMPT[:2], PROMPT[2:4])]
    alone = [model.log_probabilities([pair], law=law)[0] for pair in pairs]
    for together, single in zip(model.log_probabilities(pairs, law=law), alone, strict=True):
        assert np.abs(together - single).max() < 1e-5


def test_heads_are_recorded_where_blocks_have_them() -> None:
    model, inputs = model_of("glm4"), []
    projection = model.blocks[1].self_attn.o_proj
    handle = projection.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0, -1].numpy()))
    with torch.no_grad():
        model.module(torch.tensor([PROMPT]))
    handle.remove()
    heads = model.head_outputs([PROMPT, PROMPT[:4]])
    assert heads.shape[:3] == (2, 4, 4)
    assert np.abs(heads[0, 1].ravel() - inputs[0]).max() < 1e-5
    with pytest.raises(InputError, match=r"without self_attn\.o_proj"):
        model_of("gpt2").head_outputs([PROMPT])


def test_what_a_cache_takes_back_is_as_if_it_had_never_been() -> None:
    model = model_of("glm4")
    assert model.measurement.crops
    decoder = model.decoder()
    decoder.fill([PROMPT], steered=False)
    assert decoder.rewind(4)
    assert decoder.position == 4
    assert np.abs(decoder.step(PROMPT[4:5]).numpy()[0] - model.logits(PROMPT[:5])).max() < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "qwen3_next", "gemma3", "gpt_oss", "bart"])
def test_transformers_own_generation_is_steered_in_place(family: str) -> None:
    model = model_of(family)
    controller = controller_for(model)
    with mlx_lqr.steer(model.module, controller, STRENGTH):
        theirs = generate(model.module, PROMPT, 5)
    assert theirs == decoded(model, PROMPT, law=LinearFeedback(controller, STRENGTH), max_tokens=5)
    with mlx_lqr.steer(model.module, controller, STRENGTH), torch.no_grad():
        logits = model.module(torch.tensor([PROMPT])).logits[0, -1].numpy()
    assert np.abs(logits - model.logits(PROMPT, law=LinearFeedback(controller, STRENGTH))).max() < 1e-4


def test_a_call_that_does_not_go_through_the_model_is_refused() -> None:
    """Its positions are not known."""
    model = model_of("glm4")
    turn = model.module.model.rotary_emb(torch.zeros(1, 1, 32), torch.zeros(1, 1, dtype=torch.long))
    with mlx_lqr.steer(model, controller_for(model), STRENGTH), pytest.raises(InputError, match="in another way than"):
        model.blocks[0](torch.zeros(1, 1, 32), position_embeddings=turn)


def test_sixteen_bits() -> None:
    """Weights stay as they are; derivatives are of the same block in float32."""
    model = MeasuredModel(module_of("granitemoehybrid").bfloat16(), "narrow")
    full = model_of("granitemoehybrid")
    assert model.fingerprint == full.fingerprint
    trace = model.trace(PROMPT)
    w = np.random.default_rng(0).standard_normal((3, model.hidden_size)).astype(np.float32)
    assert np.abs(model.vjp(trace, 1, w) - w @ model.jacobian(trace, 1)).max() < 1e-4
    assert {weight.dtype for weight in model.module.parameters()} == {torch.bfloat16}
    near = np.linalg.norm(model.logits(PROMPT) - full.logits(PROMPT)) / np.linalg.norm(full.logits(PROMPT))
    assert near < 0.1


def test_a_model_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of("glm4", seed=2)
    before = MeasuredModel(module, "first").measurement
    monkeypatch.setattr(measuring.Measured, "all", lambda self: pytest.fail("measured again"))
    assert MeasuredModel(module, "second").measurement == before
    other = Measurement(0.0, 0.0, 0.5, differences=False, appends=True, pads=True, crops=True)
    monkeypatch.setattr(measuring.Measured, "all", lambda self: other)
    with pytest.raises(InputError, match=r"'glm4' cannot be steered: the product .* by 50 %"):
        MeasuredModel(module_of("glm4", seed=3), "third")


def test_differences_stand_in_for_a_derivative_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = MeasuredModel(module_of("glm4", seed=4), "derivative")
    monkeypatch.setenv("MLX_LQR_CACHE", str(tmp_path))  # or it would be taken for the same model
    module = module_of("glm4", seed=4)

    def without_derivative(part: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.detach()

    for layer in module.model.layers:
        layer.mlp.register_forward_hook(without_derivative)
    model = MeasuredModel(module, "no derivative")
    assert (model.measurement.differences, right.measurement.differences) == (True, False)
    assert max(model.measurement.jacobian, model.measurement.chain) < EXACT
    trace = model.trace(PROMPT)
    expected = right.jacobian(right.trace(PROMPT), 1)
    assert np.linalg.norm(model.jacobian(trace, 1) - expected) < 1e-2 * np.linalg.norm(expected)


def refused(kind: str, line: str, **settings: Any) -> None:
    config = transformers.AutoConfig.for_model(kind, vocab_size=16, pad_token_id=0, **settings)
    factory = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    with pytest.raises(InputError, match=line) as refusal:
        mlx_lqr.steer(factory.from_config(config), None)  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)


def test_what_is_no_chain_of_blocks_with_a_cache_is_refused_with_its_reason() -> None:
    refused("t5", "'t5' cannot be steered: running a few tokens failed", d_model=8, num_layers=2, num_heads=2, d_ff=8)
    bert = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    refused("bert", "'bert' cannot be steered: it keeps nothing of the tokens that it has read", **bert)
    looped = config_of("glm4").to_dict() | {"model_type": "hrm_text"}
    refused("hrm_text", "blocks .* times, and not each once in order", **{k: looped[k] for k in bert})


def folder_of(family: str, place: Path) -> Path:
    model_of(family).module.save_pretrained(place)
    words = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"w": 0}, "unk_token": "w"}}
    (place / "tokenizer.json").write_text(json.dumps(words))
    return place


def test_a_vision_models_text_part_loads_from_its_folder(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="of this gemma3 model only the part for text is used"):
        model = mlx_lqr.load(folder_of("gemma3", tmp_path), backend="torch", device="cpu")
    assert model.context_length == 128
    assert decoded(model, PROMPT, max_tokens=5) == decoded(model_of("gemma3"), PROMPT, max_tokens=5)


@pytest.mark.parametrize("family", ["glm4", "deepseek_v3", "mamba"])
def test_a_controller_of_mlx_is_one_of_torch(family: str, tmp_path: Path) -> None:
    """Where both libraries give weights the same names, a model has the same fingerprint on both."""
    folder = folder_of(family, tmp_path)
    theirs, model = mlx_lqr.load(folder, backend="mlx"), model_of(family)
    controller = controller_for(theirs)
    expected = decoded(theirs, PROMPT, law=law_on(theirs, controller, STRENGTH), max_tokens=5)
    assert decoded(model, PROMPT, law=law_on(model, controller, STRENGTH), max_tokens=5) == expected


def test_norms_that_mlx_keeps_otherwise_are_known() -> None:
    """mlx-lm adds 1 to those of Qwen3-Next when it loads them."""
    model = model_of("qwen3_next")
    turn = {"rope_theta": 1e4, "partial_rotary_factor": 0.25, "full_attention_interval": 2}
    settings = model.module.config.to_dict() | turn
    architecture: Any = importlib.import_module("mlx_lm.models.qwen3_next")
    module = architecture.Model(architecture.ModelArgs.from_dict(settings))
    weights: dict[str, Any] = {}
    for name, weight in model.module.state_dict().items():
        place, _, part = name.partition(".experts.")
        parts = {"gate_proj": weight.chunk(2, 1)[0], "up_proj": weight.chunk(2, 1)[1]} if part == "gate_up_proj" else {}
        parts |= {"down_proj": weight} if part == "down_proj" else {}
        weights |= {
            f"{place}.experts.{e}.{name}.weight": mx.array(one.numpy())
            for name, stacked in parts.items()
            for e, one in enumerate(stacked)
        }
        if not part:
            weights[name] = mx.array(weight.numpy())
    module.load_weights(list(module.sanitize(weights).items()))
    theirs = mlx_measured.MeasuredModel(module, settings, "theirs")
    assert np.abs(theirs.logits(PROMPT) - model.logits(PROMPT)).max() < 1e-3
    assert theirs.fingerprint == model.fingerprint


def test_no_config_chooses_the_code_that_computes(tmp_path: Path) -> None:
    folder, expected = folder_of("glm4", tmp_path), model_of("glm4")
    config = json.loads((folder / "config.json").read_text())
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "evil/model"}')
    for changes in (
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "flash_attention_2"},
        {"_attn_implementation_internal": "flash_attention_2", "_experts_implementation": "none such"},
        {"auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}},
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        model = mlx_lqr.load(folder, backend="torch", device="cpu")
        assert np.array_equal(model.logits(PROMPT), expected.logits(PROMPT)), changes


def test_a_folder_that_is_damaged_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = folder_of("glm4", tmp_path)
    model = mlx_lqr.load(folder, backend="torch", device="cpu")
    assert model.fingerprint == model_of("glm4").fingerprint
    config = json.loads((folder / "config.json").read_text())
    for changes, line in (
        ({"num_hidden_layers": 5}, "do not fit its config.json: they lack"),
        ({"num_hidden_layers": 3}, "beyond what it has a place for"),
        ({"intermediate_size": 64}, "do not fit its config.json"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantised in a format of its own"),
        ({"hidden_act": "none such"}, "do not fit its config.json"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(InputError, match=line) as refusal:
            mlx_lqr.load(folder, backend="torch", device="cpu")
        assert "\n" not in str(refusal.value)
