"""What the project does on a Mac's GPU, rehearsed on the CPU (see metal.py), with numbers against float32.

bfloat16 keeps 8 bits: what is rounded once is off by 2^-9 of itself at most, float16's 11 bits by 2^-12.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from backends import smollm2_on, tiny_folder
from metal import NotOnMetalError, rehearse
from mlx.utils import tree_flatten, tree_unflatten
from test_runtime import with_tokenizer
from tiny import FAMILY

import mlx_lqr
from mlx_lqr import InputError, tasks
from mlx_lqr.analysis import linearity
from mlx_lqr.backends import blas, mlx_sampling
from mlx_lqr.backends.base import Law, Sampling
from mlx_lqr.backends.mlx import MLXModel
from mlx_lqr.baseline import METHODS
from mlx_lqr.convert import convert
from mlx_lqr.laws import LinearFeedback, law_of
from mlx_lqr.loading import preferred_backend
from mlx_lqr.runtime import __main__ as runtime
from mlx_lqr.runtime.chat import Chat
from mlx_lqr.runtime.decode import decode

PROMPT = [5, 17, 3, 42, 8, 29, 11, 60]
POSITIVE, NEGATIVE = [[1, 2, 3], [4, 5], [9, 30, 7]], [[6, 7], [8], [12, 44]]
ROUNDING = {"bfloat16": 2.0**-9, "float16": 2.0**-12}
DENSE = sorted(family for family in FAMILY if family not in ("mixtral", "qwen3_moe"))
"""On the CPU, MLX multiplies dense experts in float32 alone."""


@pytest.fixture(autouse=True)
def metal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        rehearse(patch)
        yield


def relative(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of rows (n, d), 1 where both are zero."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.divide((a * b).sum(axis=-1), lengths, out=np.ones(len(a)), where=lengths > 0)


def tokens_of(model: MLXModel, *prompts: Sequence[int], law: Law | None = None, n: int = 4) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    for i, token in decode(model, [list(prompt) for prompt in prompts], law=law, max_tokens=n):
        found[i].append(token)
    return found


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
    library = mlx_sampling.import_mlx_lm("sample_utils")
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
    if (family in DENSE or kind == "4 bits") and (family, kind) != ("gemma3_text", "float16")
]


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_the_main_job_in_every_family(family: str, kind: str) -> None:
    """Contrast, both costs, Jacobians, steered decoding, scores and steering in place."""
    model, reference = rounded(family, kind)
    tolerance = 60 * ROUNDING["float16" if kind == "float16" else "bfloat16"]  # a dozen roundings, amplified
    found, expected = (mlx_lqr.contrast(one, POSITIVE, NEGATIVE) for one in (model, reference))
    assert relative(found.direction, expected.direction) < tolerance
    jacobians = [mlx_lqr.linearize(one, [PROMPT]) for one in (model, reference)]
    for A, B in zip(*jacobians, strict=True):
        assert relative(A, B) < tolerance
    for cost in ("state", "feature"):
        options: dict[str, Any] = {"q": 1.0, "layers": [0, 2], "cost": cost}
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
