"""What a model is, whether it can be steered, and how fast: everything that can be told before anything is fitted."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mlx_lqr.backends.capabilities import DIFFERENTIABLE
from mlx_lqr.backends.description import Description
from mlx_lqr.backends.measurement import Measurement
from mlx_lqr.backends.protocol import Differentiable, Progress, Runner
from mlx_lqr.errors import InputError

READ, WRITTEN, NOMINAL = 128, 16, 24
"""Tokens: of a prompt that is read, of an answer that is written, of a prompt that a controller is fitted on."""
ROWS = 32
"""Directions that are pulled back through all blocks, about as many as the feature cost needs."""
LAYERS = 3
"""Layers whose Jacobians are formed, to know what all cost."""


@dataclass(frozen=True)
class Speed:
    """Seconds, on this machine now."""

    reading: float
    """A token of a prompt"""
    writing: float
    """A token of an answer, not steered; steering adds a few per cent"""
    state_cost: float | None
    """A prompt of a contrast set, when a controller is fitted with the state cost; None without derivatives"""
    feature_cost: float | None
    """The same for the feature cost"""


@dataclass(frozen=True)
class Check:
    """What `check` found."""

    model_name: str
    backend: str
    description: Description
    num_layers: int
    hidden_size: int
    vocab_size: int
    has_chat_template: bool | None
    """None where the model came without its tokenizer"""
    measurement: Measurement | None
    """How right its derivatives are; None for a backend without"""
    speed: Speed


def check(model: Runner, *, progress: Progress | None = None) -> Check:
    """Look at a model: what it is, how right its derivatives are, and how fast it is on this machine.

    Args:
        model: what `load` returned.
        progress: called as progress("Measuring", done, total).

    Raises:
        InputError: the model cannot be steered.
    """
    able: Any = model
    measurement: Measurement | None = able.measure() if DIFFERENTIABLE.is_of(model) else None
    return Check(
        model_name=model.name,
        backend=model.backend,
        description=model.description,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        has_chat_template=_has_template(model),
        measurement=measurement,
        speed=_speed(model, progress),
    )


def _has_template(model: Runner) -> bool | None:
    try:
        return model.tokenizer.has_chat_template
    except InputError:
        return None


def _speed(model: Runner, progress: Progress | None) -> Speed:
    able: Any = model
    works = {"reading": partial(_reading, model), "writing": partial(_writing, model)}
    if DIFFERENTIABLE.is_of(model):
        works |= {"state_cost": partial(_state_cost, able), "feature_cost": partial(_feature_cost, able)}
    seconds: dict[str, float | None] = {"state_cost": None, "feature_cost": None}
    for done, (name, work) in enumerate(works.items()):
        if progress:
            progress("Measuring", done, len(works))
        work()  # what the first of its kind prepares is not counted
        seconds[name] = work()
    if progress:
        progress("Measuring", len(works), len(works))
    return Speed(**seconds)  # type: ignore[arg-type]


def _tokens(model: Runner, count: int) -> list[int]:
    """Random ones, as many as the context has room for."""
    count = min(count, model.context_length - WRITTEN)
    tokens: list[int] = np.random.default_rng(0).integers(model.vocab_size, size=max(count, 2)).tolist()
    return tokens


def _reading(model: Runner) -> float:
    tokens = _tokens(model, READ)
    start = time.perf_counter()
    decoder = model.decoder()
    decoder.fill([tokens[:-1]], steered=False)
    decoder.sample(decoder.step(tokens[-1:])).tolist()
    return (time.perf_counter() - start) / len(tokens)


def _writing(model: Runner) -> float:
    decoder = model.decoder()
    tokens = _tokens(model, NOMINAL)
    decoder.fill([tokens[:-1]], steered=False)
    token = decoder.sample(decoder.step(tokens[-1:]))
    token.tolist()
    start = time.perf_counter()
    for _ in range(WRITTEN - 1):
        token = decoder.sample(decoder.step(token))
        token.tolist()
    return (time.perf_counter() - start) / (WRITTEN - 1)


def _state_cost(model: Differentiable) -> float:
    layers = np.unique(np.linspace(0, model.num_layers - 1, LAYERS, dtype=int)).tolist()
    start = time.perf_counter()
    trace = model.trace(_tokens(model, NOMINAL))
    traced = time.perf_counter()
    for layer in layers:
        model.jacobian(trace, layer)
    return traced - start + (time.perf_counter() - traced) * model.num_layers / len(layers)


def _feature_cost(model: Differentiable) -> float:
    start = time.perf_counter()
    trace = model.trace(_tokens(model, NOMINAL))
    rows = np.eye(min(ROWS, model.hidden_size), model.state_size, dtype=np.float32)
    for layer in reversed(range(model.num_layers)):
        rows = model.vjp(trace, layer, rows)
    return time.perf_counter() - start
