"""Control vectors of other programs: what repeng or llama.cpp's cvector-generator has fitted, read from a GGUF file.

y + s b_k with b_k = direction.k of the file (files/control_vectors.py), at every token, as both programs do it. They
fit the vectors themselves, in ways like those of `pca` and `actadd`; here nothing is fitted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from mlx_lqr.backends.protocol import Runner
from mlx_lqr.errors import InputError, quoted
from mlx_lqr.files.control_vectors import ControlVectors, read_control_vectors
from mlx_lqr.lqr.controller import Positions
from mlx_lqr.methods.addition import Addition
from mlx_lqr.methods.baseline import Baseline, BaselineMethod
from mlx_lqr.methods.method import Problem, Shown, StrengthScale

_AS_IN_GGUF = {
    "bailingmoe": "bailingmoe2",
    "cohere": "commandr",
    "deepseekv2": "deepseek2",
    "deepseekv3": "deepseek2",
    "glmmoedsa": "glmdsa",
    "gptbigcode": "starcoder",
    "granitemoehybrid": "granitehybrid",
    "hunyuanv1dense": "hunyuandense",
    "mimov2flash": "mimo2",
    "minimax": "minimaxm2",
    "ministral3": "mistral3",
    "mistral": "llama",
    "mixtral": "llama",
    "nemotronh": "nemotronhmoe",
    "olmo3": "olmo2",
    "phi": "phi2",
    "qwen2": "qwen2vl",
    "qwen3": "qwen3vl",
    "qwen3moe": "qwen3vlmoe",
    "step3p5": "step35",
}
"""What GGUF files call the kinds of models that config.json has another name for, both as `_plain` writes them"""


class ControlVector(BaselineMethod):
    name = "control-vector"
    title = "control vector"
    formula = "`y + s b`, `b` from a GGUF file of llama.cpp or repeng"
    positions: Positions = "all"
    strengths = StrengthScale("1 adds the vectors as they are in the file", span=(0.0, 10.0))
    tensors: Mapping[str, str] = {"shift": "Tdm"}

    def fit(self, problem: Problem, options: Mapping[str, Any]) -> Baseline:
        raise InputError("control vectors are read and not fitted: the method pca fits them as repeng does")

    def law(self, steering: Baseline, strength: float | Sequence[float]) -> Addition:
        return Addition(steering, strength)

    def check_model(self, steering: Baseline, model: Runner) -> None:
        """By the sizes, and by the fingerprint where the file has one, else by what it says of the model."""
        hint = steering.model_name
        if steering.hidden_size != model.hidden_size or steering.num_layers > model.num_layers:
            of = f" of a {quoted(hint)} model" if hint else ""
            raise InputError(
                f"this control vector{of} is {steering.hidden_size} wide and for {steering.num_layers} layers or more, "
                f"and {model.name} has {model.num_layers} layers of width {model.hidden_size}: take one that was made "
                "for it"
            )
        if steering.fingerprint:
            super().check_model(steering, model)
        elif hint and hint != model.name and not _alike(hint, model.family):
            raise InputError(
                f"this control vector is for a model of the kind {quoted(hint)}, and {model.name} is of the kind "
                f"{quoted(model.family)}: take one that was made for it"
            )

    def combine(self, steerings: Sequence[Baseline]) -> Baseline:
        """The sum, up to the last layer that any of them knows."""
        known = {one.fingerprint for one in steerings} - {""}
        hints = {_plain(one.model_name) for one in steerings if not one.fingerprint} - {""}
        widths = {one.hidden_size for one in steerings}
        if len(widths) > 1 or len(hints) > 1:
            raise InputError("these control vectors are of different models: use one at a time")
        fingerprint = known.pop() if len(known) == 1 else None
        layers = max(one.num_layers for one in steerings)
        return super().combine(
            [_longer(one, layers, one.fingerprint if fingerprint is None else fingerprint) for one in steerings]
        )

    def show(self, steering: Baseline) -> Shown:
        return replace(super().show(steering), fitted="read from GGUF")


def read_control_vector(path: str | PathLike[str]) -> Baseline:
    """The vectors in a GGUF file. They recommend strength 1, and know of as many layers as the file does.

    Raises:
        InputError: see `read_control_vectors`.
    """
    return as_steering(read_control_vectors(path), Path(path).stem)


def as_steering(vectors: ControlVectors, name: str = "") -> Baseline:
    """What a file holds as steering; the concept has this name where the file has none."""
    layers = tuple(vectors.directions)
    width = len(vectors.directions[layers[0]])
    shift = np.zeros((max(layers[-1] + 1, vectors.layer_count), width, 1), np.float32)
    for layer, direction in vectors.directions.items():
        shift[layer, :, 0] = direction
    return Baseline(
        method=ControlVector.name,
        tensors={"shift": shift},
        numbers={},
        active_layers=layers,
        concepts=(vectors.concept or name or "control vector",),
        positions="all",
        model_name=vectors.model_hint,
        fingerprint=vectors.fingerprint,
        num_layers=len(shift),
        hidden_size=width,
        prompt_counts=((0, 0),),
        strength=(1.0,),
    )


def _longer(steering: Baseline, layers: int, fingerprint: str) -> Baseline:
    """The same with zeros up to so many layers."""
    shift = steering.tensors["shift"]
    padded = np.pad(shift, ((0, layers - len(shift)), (0, 0), (0, 0)))
    return replace(steering, tensors={"shift": padded}, num_layers=layers, fingerprint=fingerprint)


def _alike(hint: str, family: str) -> bool:
    names = {_plain(hint), _plain(family)}
    return len({_AS_IN_GGUF.get(name, name) for name in names}) == 1


def _plain(name: str) -> str:
    """A kind of model without what names differ in that mean the same: case, punctuation and "_text"."""
    return re.sub(r"[^a-z0-9]", "", name.casefold()).removesuffix("text")
