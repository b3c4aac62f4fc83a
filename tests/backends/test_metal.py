"""What the project does on a Mac's GPU, rehearsed on the CPU (see metal.py), with numbers against float32.

bfloat16 keeps 8 bits: what is rounded once is off by 2^-9 of itself at most, float16's 11 bits by 2^-12.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.backends import smollm2_on, tiny_folder
from helpers.decoding import steering_of
from helpers.metal import NotOnMetalError, rehearse
from helpers.tiny import FAMILY
from helpers.tiny_tokenizers import with_tokenizer
from mlx.utils import tree_flatten, tree_unflatten

import mlx_lqr
from mlx_lqr import InputError, tasks
from mlx_lqr.analysis import linearity
from mlx_lqr.backends import blas
from mlx_lqr.backends.mlx.library import filters
from mlx_lqr.backends.mlx.model import MLXModel
from mlx_lqr.backends.protocol import Law, Sampling
from mlx_lqr.convert import convert
from mlx_lqr.loading import preferred_backend
from mlx_lqr.lqr.fit import solve_controller
from mlx_lqr.lqr.linearize import Jacobians
from mlx_lqr.methods.alqr import LinearFeedback
from mlx_lqr.methods.registry import METHODS
from mlx_lqr.methods.steering import law_of
from mlx_lqr.runtime import __main__ as runtime
from mlx_lqr.runtime.chat import Chat
from mlx_lqr.runtime.decode import decode
from mlx_lqr.tasks.damage import Capability, NeutralText, Question

PROMPT = [5, 17, 3, 42, 8, 29, 11, 60]
POSITIVE, NEGATIVE = [[1, 2, 3], [4, 5], [9, 30, 7]], [[6, 7], [8], [12, 44]]
EPSILON = 2.0**-9
ROUNDING = {"bfloat16": EPSILON, "float16": 2.0**-12}
DENSE = sorted(family for family in FAMILY if family not in ("mixtral", "qwen3_moe"))
"""On the CPU, MLX multiplies dense experts in float32 alone."""


@pytest.fixture(autouse=True)
def metal(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearse(monkeypatch)  # by the same one that tests use, which then undoes everything in its order


def relative(actual: Any, expected: Any) -> float:
    return float(np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of rows (n, d), 1 where both are zero."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.divide((a * b).sum(axis=-1), lengths, out=np.ones(len(a)), where=lengths > 0)


def tokens_of(model: MLXModel, *prompts: Sequence[int], law: Law | None = None, n: int = 4) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]
    for i, token in decode(model, [list(prompt) for prompt in prompts], law=law, max_tokens=n):
        answers[i].append(token)
    return answers


def shortfall(reference: Any, prompt: Sequence[int], tokens: Sequence[int], law: Law | None = None) -> float:
    """How much less likely the tokens are, at most, than the reference's own choice at each of them, in nats.

    Greedy tokens of 16 bits may differ from those of 32 where two are nearly as likely.
    """
    logits = reference.logits_along([(list(prompt), list(tokens[:-1]))], law=law)[0]
    return float((logits.max(axis=1) - logits[np.arange(len(tokens)), list(tokens)]).max())


# The guard and the switch.


@pytest.mark.parametrize(
    "work",
    [
        lambda: mx.linalg.inv(mx.eye(2)),
        lambda: mx.linalg.svd(mx.eye(2)),
        lambda: mx.linalg.cholesky(mx.eye(2)),
        lambda: mx.zeros(2, mx.float64),
        lambda: mx.zeros(2, dtype=mx.float64),
        lambda: mx.array([1.0], mx.float64),
        lambda: mx.array([1.0]).astype(mx.float64),
        lambda: mx.random.normal((2,), dtype=mx.float64),
        lambda: mx.exp(mx.array([1.0]).astype(mx.float64, stream=mx.cpu)),
    ],
)
def test_the_guard_fails_where_metal_would(work: Any) -> None:
    with pytest.raises(NotOnMetalError):
        work()


def test_the_guard_lets_through_what_metal_does() -> None:
    assert mx.linalg.inv(mx.eye(2), stream=mx.cpu).tolist() == mx.eye(2).tolist()
    assert isinstance(mx.exp(mx.array(np.ones(2))), mx.array)
    assert not isinstance(1.0, mx.array)
    with pytest.raises(ValueError, match="bfloat16"):
        np.asarray(mx.zeros(2, mx.bfloat16))


@pytest.mark.parametrize("dtype", sorted(ROUNDING))
def test_every_branch_of_the_gpu_is_taken(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder("llama")
    weights = mx.load(str(folder / "model.safetensors"))
    cast = {name: weight.astype(getattr(mx, dtype)) for name, weight in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), cast)
    monkeypatch.setattr(blas, "_loaded", None)
    monkeypatch.setattr(blas, "_warned", False)
    assert blas.preload() is None
    assert preferred_backend() == "mlx"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = mlx_lqr.load(folder)
    assert isinstance(model, MLXModel)
    assert {weight.dtype for _, weight in tree_flatten(model.module.parameters())} == {getattr(mx, dtype)}
    assert model._compiled is None
    assert type(model.module.model.embed_tokens) is nn.Embedding
    asked = []
    library = filters()
    apply_top_p = library.apply_top_p
    monkeypatch.setattr(library, "apply_top_p", lambda *args: asked.append(1) or apply_top_p(*args))
    list(decode(model, [PROMPT], sampling=Sampling(1.0, top_p=0.5, seed=0), max_tokens=2))
    assert len(asked) == 2


def test_a_switch_of_another_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_LQR_REHEARSE", "cuda")
    with pytest.raises(InputError, match='cuda is unknown: set it to "metal"'):
        mlx_lqr.load(tiny_folder("llama"), backend="mlx")


# Every family, tiny.


def rounded(family: str, kind: str) -> tuple[MLXModel, MLXModel]:
    """A tiny model in 16 bits, or in 4 bits with activations of bfloat16, and the model of these weights in float32."""
    model = with_tokenizer(family)
    if kind == "4 bits":
        nn.quantize(model.module, group_size=32, bits=4)
    model.module.set_dtype(mx.float16 if kind == "float16" else mx.bfloat16)
    mx.eval(model.module.parameters())
    parameters = {name: weight.astype(mx.float32) if mx.issubdtype(weight.dtype, mx.floating) else weight
                  for name, weight in tree_flatten(model.module.parameters())}  # fmt: skip
    reference = with_tokenizer(family)
    if kind == "4 bits":
        nn.quantize(reference.module, group_size=32, bits=4)
    reference.module.update(tree_unflatten(list(parameters.items())))
    return MLXModel(model.module, model.name, model.tokenizer), reference


KINDS = [
    (family, kind)
    for family in sorted(FAMILY)
    for kind in ("bfloat16", "float16", "4 bits")
    if kind == "4 bits" or (family in DENSE and (kind == "bfloat16" or family in ("llama", "gemma2", "qwen3")))
]


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_the_main_job_in_every_family(family: str, kind: str) -> None:
    """Contrast, both costs, Jacobians, steered decoding, scores and steering in place."""
    model, reference = rounded(family, kind)
    tolerance = 60 * ROUNDING["float16" if kind == "float16" else "bfloat16"]  # a dozen roundings, amplified
    tolerance *= 1 if family in DENSE else 2  # by the choice of experts too
    contrast, expected = (mlx_lqr.contrast(one, POSITIVE, NEGATIVE) for one in (model, reference))
    assert relative(contrast.direction, expected.direction) < tolerance
    jacobians = [mlx_lqr.linearize(one, [PROMPT]) for one in (model, reference)]
    for A, B in zip(*jacobians, strict=True):
        assert relative(A, B) < tolerance
    for cost in ("state", "feature"):
        options: dict[str, Any] = {"q": 1.0, "layers": [0, 2], "cost": cost, "readout": "direction"}
        fits = [mlx_lqr.fit(one, POSITIVE, NEGATIVE, **options) for one in (model, reference)]
        assert relative(fits[0].gain, fits[1].gain) < 2 * tolerance
    law = LinearFeedback(fits[1], 1.5)
    prompts = [PROMPT, PROMPT[:1], PROMPT[2:6]]
    alone, together = [tokens_of(model, prompt, law=law)[0] for prompt in prompts], tokens_of(model, *prompts, law=law)
    spread = float(np.std(reference.logits(PROMPT, law=law)))
    for prompt, tokens in zip(prompts * 2, alone + together, strict=True):
        assert shortfall(reference, prompt, tokens, law) < tolerance * spread
    scores = [one.log_probabilities([(PROMPT, [1, 2]), ([3], [4])], law=law) for one in (model, reference)]
    assert np.abs(np.concatenate(scores[0]) - np.concatenate(scores[1])).max() < tolerance * spread
    with mlx_lqr.steer(model.module, fits[1], 1.5):
        logits = np.array(model.module(mx.array([PROMPT]))[0, -1].astype(mx.float32))
    assert np.abs(logits - reference.logits(PROMPT, law=law)).max() < tolerance * spread


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("dtype", sorted(ROUNDING))
def test_every_law_acts_in_the_dtype_of_the_activations(dtype: str, method: Any) -> None:
    """One array of float32 in a law would turn the residual stream of all later layers, and their cost, to float32."""
    model, reference = rounded("llama", dtype)
    steering = mlx_lqr.fit_baseline(reference, method, POSITIVE, NEGATIVE)
    law = law_of(steering, 30.0 if "angular" in method else 1.0)
    decoder = model.decoder(law)
    decoder.fill([PROMPT[:-1]], steered=steering.positions == "all")
    logits = decoder.step(PROMPT[-1:])
    assert logits.dtype == getattr(mx, dtype)
    expected = reference.logits(PROMPT, law=law, steer_all=steering.positions == "all")
    first = np.array(logits[0].astype(mx.float32))
    assert relative(first, expected) < 60 * ROUNDING[dtype]


def test_a_recording_adaptive_gains_and_linearity() -> None:
    model, reference = rounded("llama", "bfloat16")
    for one in (model, reference):
        one._tokenizer = mlx_lqr.load(tiny_folder("llama"), backend="mlx").tokenizer
    controller = mlx_lqr.fit(reference, POSITIVE, NEGATIVE, q=1.0, layers=[0, 2], cost="feature", feedback=0.1)
    recordings = []
    for one in (model, reference):
        recordings.append(mlx_lqr.Recording())
        list(mlx_lqr.stream(one, PROMPT, controller=controller, max_tokens=1, record=recordings[-1], temperature=0))
    errors, pushes = zip(*((one.feature_error(), one.push()) for one in recordings), strict=True)
    assert np.allclose(*errors, atol=0.1, equal_nan=True)
    assert np.allclose(*pushes, atol=0.1, equal_nan=True)
    adapted = [mlx_lqr.adapt(one, controller, PROMPT) for one in (model, reference)]
    assert relative(adapted[0].gain, adapted[1].gain) < 0.1
    law = LinearFeedback(adapted[1], 1.0)
    pieces = list(mlx_lqr.stream(model, PROMPT, controller=controller, adaptive=True, max_tokens=4, temperature=0))
    assert shortfall(reference, PROMPT, [piece.token for piece in pieces if piece.token is not None], law) < 0.2
    measured, expected = (linearity(one, [PROMPT, PROMPT[:4]], controller) for one in (model, reference))
    for name in ("norm", "singular_values", "similarity"):
        assert relative(getattr(measured, name), getattr(expected, name)) < 0.1


# SmolLM2.

POSITIVE_TEXTS, NEGATIVE_TEXTS = ["The sea was calm", "Waves broke"], ["The bread was warm", "Trains left"]
LAYERS = [27, 28, 29]


@functools.cache
def folder_of(gguf: Path, kind: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="smollm2-")) / "model"
    return convert(gguf, folder, quantize=4 if kind == "4 bits" else None)


@pytest.fixture
def in_16_bits(smollm2_gguf: Path) -> MLXModel:
    return _in_16_bits(smollm2_gguf)


@functools.cache
def _in_16_bits(gguf: Path) -> MLXModel:
    model = mlx_lqr.load(folder_of(gguf, "bfloat16"))
    assert isinstance(model, MLXModel)
    assert model._dtype == mx.bfloat16
    return model


@functools.cache
def in_4_bits(gguf: Path) -> tuple[MLXModel, MLXModel]:
    """SmolLM2 in 4 bits, and its own weights unpacked, in float32."""
    folder = folder_of(gguf, "4 bits")
    model, reference = mlx_lqr.load(folder), mlx_lqr.load(folder, dtype="float32")
    assert isinstance(model, MLXModel)
    assert isinstance(reference, MLXModel)
    unpack(reference.module)
    return model, reference


@dataclass(frozen=True)
class Pair:
    """A model as it is on a Mac, the same weights in float32, and by how many nats their choices may differ."""

    model: MLXModel
    reference: MLXModel
    tolerance: float


@pytest.fixture(params=["bfloat16", pytest.param("4 bits", marks=pytest.mark.slow)])
def pair(request: pytest.FixtureRequest, smollm2_gguf: Path) -> Pair:
    if request.param == "bfloat16":
        reference = smollm2_on("mlx")
        assert isinstance(reference, MLXModel)
        return Pair(_in_16_bits(smollm2_gguf), reference, 0.25)
    return Pair(*in_4_bits(smollm2_gguf), 2.0)  # the CPU adds up packed products in bfloat16 too


@functools.cache
def fitted() -> mlx_lqr.Controller:
    """In float32."""
    model = smollm2_on("mlx")
    options: dict[str, Any] = {"concept": "sea", "layers": LAYERS, "readout": "direction"}
    return mlx_lqr.fit(model, POSITIVE_TEXTS, NEGATIVE_TEXTS, **options)


def test_smollm2_is_fitted_in_bfloat16_as_in_float32(in_16_bits: MLXModel) -> None:
    both = in_16_bits, smollm2_on("mlx")
    contrast, expected = (mlx_lqr.contrast(one, POSITIVE_TEXTS, NEGATIVE_TEXTS) for one in both)
    assert_directions_agree(contrast, expected, tolerance=15 * EPSILON)
    ids = in_16_bits.tokenizer.encode(POSITIVE_TEXTS[0])
    traces = [one.trace(ids) for one in both]
    rows = np.random.default_rng(0).standard_normal((3, 576)).astype(np.float32)
    for layer in (0, 15, 29):
        for product in ("vjp", "jvp"):
            a, b = (getattr(one, product)(trace, layer, rows) for one, trace in zip(both, traces, strict=True))
            assert relative(a, b) < 20 * EPSILON
    for cost in ("state", "feature"):
        options: dict[str, Any] = {"layers": LAYERS, "cost": cost, "jacobian_prompts": 1}
        fits = [mlx_lqr.fit(one, POSITIVE_TEXTS[1:], NEGATIVE_TEXTS[1:], **options) for one in both]
        assert cosine(fits[0].gain[:, :, 0], fits[1].gain[:, :, 0]).min() > 0.97


def test_smollm2_is_steered_as_in_float32(pair: Pair) -> None:
    """Alone and in a batch, with gains made at the prompt, and where mlx_lm itself generates."""
    from mlx_lm.generate import generate_step

    model, reference, controller = pair.model, pair.reference, fitted()
    law = LinearFeedback(controller, 1.5)
    prompts = [model.tokenizer.encode(text) for text in ("Once upon", "I")]
    alone = [tokens_of(model, prompt, law=law, n=3)[0] for prompt in prompts]
    assert shortfall(reference, prompts[0], alone[0]) > 1  # these are others than those that are not steered
    for prompt, tokens in zip(prompts * 2, alone + tokens_of(model, *prompts, law=law, n=3), strict=True):
        assert shortfall(reference, prompt, tokens, law) < pair.tolerance
    with mlx_lqr.steer(model.module, controller, 1.5):
        steps = generate_step(mx.array(prompts[0]), model.module, max_tokens=2)
        assert shortfall(reference, prompts[0], [int(token) for token, _ in steps], law) < pair.tolerance
    pieces = mlx_lqr.stream(
        model, prompts[0], controller=controller, strength=1.5, adaptive=True, max_tokens=2, temperature=0
    )
    law = LinearFeedback(mlx_lqr.adapt(reference, controller, prompts[0]), 1.5)
    assert shortfall(reference, prompts[0], [piece.token or 0 for piece in pieces], law) < pair.tolerance


def test_smollm2_chats(pair: Pair) -> None:
    """The second prompt goes on from what the first has left."""
    controller = fitted()
    chat = Chat(pair.model, options={"max_tokens": 2, "temperature": 0})
    chat.messages.append({"role": "system", "content": "Hi"})  # or the template writes a longer one
    chat.add(controller, 1.5)
    for question in ("Hi", "Why?"):
        tokens = [piece.token for piece in chat.answer(question) if piece.token is not None]
        prompt = pair.model.tokenizer.chat(chat.messages[:-1])
        steering = steering_of(chat)
        assert steering is not None
        assert shortfall(pair.reference, prompt, tokens, law_of(steering, 1.5)) < pair.tolerance


def test_tasks_measure_what_they_do_in_float32(pair: Pair) -> None:
    question = Question("Once upon a", "time", ("fish",))
    metrics = []
    for model in (pair.model, pair.reference):
        decoding = tasks.Decoding(samples=1, max_tokens=2)
        damage = [NeutralText(["The train left the station"]), Capability([question])]
        task = tasks.concept(["sea"], openings=["I like"], decoding=decoding, damage=damage)
        metrics.append(tasks.evaluate(model, task, tasks.NamedSteering("sea", fitted()), [0.0, 0.5]).results())
    for ours, expected in zip(*metrics, strict=True):
        for name in ("kl", "capability"):
            assert ours.metrics[name].value == pytest.approx(expected.metrics[name].value, abs=pair.tolerance / 5)
    pairs = [(pair.model.tokenizer.encode("France:"), pair.model.tokenizer.encode(" Paris"))]
    scores = [model.log_probabilities(pairs)[0] for model in (pair.model, pair.reference)]
    assert np.abs(scores[0] - scores[1]).max() < pair.tolerance


def test_the_minimal_runtime_in_bfloat16(smollm2_gguf: Path, tmp_path: Path, capsys: Any) -> None:
    fitted().save(tmp_path / "sea.safetensors")
    given = ["-p", "The sea", "-c", f"{tmp_path / 'sea.safetensors'}:1.5", "-n", "3", "--top-p", "0.9", "--seed", "1"]
    assert runtime.main([str(folder_of(smollm2_gguf, "bfloat16")), *given]) == 0
    said = capsys.readouterr()
    assert said.out.strip()
    assert said.err == ""


@pytest.mark.slow
def test_smollm2_is_fitted_in_4_bits_as_unpacked(smollm2_gguf: Path) -> None:
    """A token takes a third of a second here, so that there are few of them."""
    model, reference = in_4_bits(smollm2_gguf)
    ids = model.tokenizer.encode("The sea")
    both = model, reference
    contrasts = [mlx_lqr.contrast(one, ["The sea"], ["The car"]) for one in both]
    assert_directions_agree(*contrasts, tolerance=40 * EPSILON)  # the CPU adds up packed products in bfloat16 too
    traces = [one.trace(ids) for one in both]
    jacobians = [
        Jacobians([np.empty((576, 0)) if k < 28 else one.jacobian(trace, k) for k in range(30)], one.fingerprint)
        for one, trace in zip(both, traces, strict=True)
    ]
    for cost in ("state", "feature"):
        options: dict[str, Any] = {"layers": [28, 29], "cost": cost}
        fits = [solve_controller(*one, **options) for one in zip(contrasts, jacobians, strict=True)]
        assert cosine(fits[0].gain[:, :, 0], fits[1].gain[:, :, 0]).min() > 0.97


def assert_directions_agree(contrast: mlx_lqr.Contrast, expected: mlx_lqr.Contrast, tolerance: float) -> None:
    """A direction is a difference of means much longer than itself: its error is to be seen beside their length."""
    length = np.linalg.norm(expected.mean_positive, axis=1)
    assert (np.linalg.norm(contrast.mean_positive - expected.mean_positive, axis=1) / length).max() < tolerance
    assert (np.linalg.norm(contrast.direction - expected.direction, axis=1) / length).max() < 1.5 * tolerance
    assert cosine(contrast.direction, expected.direction).min() > 0.98


def unpack(module: nn.Module) -> None:
    """Dense weights in float32 in the place of packed ones."""
    dense = []
    for path, leaf in tree_flatten(module.leaf_modules(), is_leaf=nn.Module.is_module):
        if "scales" in leaf:
            packing = {"group_size": leaf.group_size, "bits": leaf.bits}
            weight = mx.dequantize(leaf.weight, leaf.scales, leaf.biases, **packing).astype(mx.float32)
            stand_in = nn.Embedding(1, 1) if isinstance(leaf, nn.QuantizedEmbedding) else nn.Linear(1, 1, bias=False)
            stand_in.weight = weight
            dense.append((path, stand_in))
    module.update_modules(tree_unflatten(dense))
    mx.eval(module.parameters())
