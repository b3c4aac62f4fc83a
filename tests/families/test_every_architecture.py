"""Every architecture that mlx-lm has: a tiny model of it is steered as mlx-lm runs it, or is refused by a measurement.

`make test-families` runs these, with a process on each core. What is known of an architecture stands in `REFUSED`; one
that does better than that fails nothing, and pytest's summary of warnings says to take it off the list.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.architectures import by_hand
from helpers.survey import PROMPTS, STEPS, STRENGTH, TOKENS, Trial, steered, tried, written
from helpers.tiny_architectures import LENGTH, WITHOUT, architectures, tiny_config
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends.measurement import EXACT
from mlx_lqr.backends.mlx.device import on_gpu
from mlx_lqr.backends.mlx.measured_model import MeasuredModel
from mlx_lqr.backends.mlx.model import MLXModel

METAL = r"running a few tokens failed \(\[metal_kernel\] No Metal back-end\)"
REFUSED = {
    "bitnet": METAL,
    "deepseek_v41": r"the derivatives of its blocks differ from their own response by [\d.]+ %",
    "iquestloopcoder": "it calls its 4 blocks 0 times",
    "kimi_k3": "its blocks hand on a ResidualBlocks beside one state",
    "muse_spark": METAL,
    "nanbeige": "it calls its 4 blocks 8 times",
    "plamo3": r"its logits token by token differ from those of one pass by [\d.]+ %",
}
"""Architecture -> what its refusal says."""
WORKING = 115
"""How many work at least, of mlx-lm 0.32.2."""

PLACES: dict[str, int | str] = {"gptj": "inputs", "talkie": 1}
"""Where a block takes its state, if not first."""
STREAMS = ("deepseek_v41", "gemma3n")
"""Architectures whose state is several streams."""
DIRECTIONS, MOVES = 5, (1e-2, 2e-3, 5e-4)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing measured by another version counts."""
    monkeypatch.setenv("MLX_LQR_CACHE", str(tmp_path / "cache"))


def test_the_page_of_architectures_is_made_with_nothing_installed_for_tests() -> None:
    """As `make families` does."""
    page = Path(__file__).parents[2] / "benchmarks/families.py"
    program = f"import sys, runpy; sys.modules['pytest'] = None; runpy.run_path({str(page)!r})"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", architectures())
def test_an_architecture_is_steered_as_mlx_lm_runs_it(name: str, tmp_path: Path) -> None:
    trial = tried(written(tiny_config(name), tmp_path / "model"))
    if trial.model is None:
        _is_refused(name, trial)
        return
    assert trial.steps == dict.fromkeys(STEPS, "yes")
    assert isinstance(trial.model, MLXModel)
    assert trial.controller is not None
    hands = ByHand(name, trial.model)
    _derivatives_are_those_of(hands)
    _tokens_are_those_of(hands, trial.controller)
    _heads_are_recorded_or_refused(trial.model)
    if name in REFUSED:
        warnings.warn(f"{name} works now: take it off REFUSED", stacklevel=1)


def _is_refused(name: str, trial: Trial) -> None:
    line = trial.steps["load"]
    assert name in REFUSED, line
    assert re.match(rf"refused: models of the type '{name}' cannot be steered: .*{REFUSED[name]}", line), line
    assert "\n" not in line


class ByHand:
    """mlx-lm's model with nothing of ours but a hook around each block, at the last token of PROMPTS[0]."""

    def __init__(self, name: str, model: MLXModel) -> None:
        self.name, self.model, self.prompt = name, model, PROMPTS[0]
        self._place, self._streams = PLACES.get(name, 0), name in STREAMS

    def state(self, z: mx.array) -> np.ndarray:
        """The state (B, d) at the last position."""
        last = z[:, :, -1].transpose(1, 0, 2) if self._streams else z[:, -1]
        return np.asarray(last.reshape(last.shape[0], -1).astype(mx.float32)).astype(np.float64)

    def added(self, z: mx.array, shift: np.ndarray) -> mx.array:
        """The model's own state with a shift (B, d) at its last position."""
        moves = mx.array(shift.astype(np.float32))
        if not self._streams:
            last = z[:, -1:].astype(mx.float32) + moves[:, None]
            return mx.concatenate([z[:, :-1], last.astype(z.dtype)], axis=1)
        streams = moves.reshape(len(shift), z.shape[0], -1).transpose(1, 0, 2)
        return mx.concatenate([z[:, :, :-1], z[:, :, -1:] + streams[:, :, None]], axis=2)

    def states(self) -> np.ndarray:
        """z_0..z_{T-1} and the last block's output: (T + 1, d)"""
        seen: list[np.ndarray] = []

        def record(k: int, z: mx.array, output: mx.array) -> mx.array:
            seen.append(self.state(z)[0])
            if k == self.model.num_layers - 1:
                seen.append(self.state(output)[0])
            return output

        self._last_token(1, record)
        return np.array(seen)

    def response(self, moves: np.ndarray, start: int, end: int) -> np.ndarray:
        """d z_end / d z_start w for rows w (n, d), by central differences of the whole model: (n, d)"""
        ends: list[np.ndarray] = []

        def push(k: int, z: mx.array) -> mx.array:
            return self.added(z, np.concatenate([moves, -moves])) if k == start else z

        def record(k: int, z: mx.array, output: mx.array) -> mx.array:
            if k == end - 1:
                ends.append(self.state(output))
            return output

        self._last_token(2 * len(moves), record, push)
        ahead, behind = np.split(ends[0], 2)
        return (ahead - behind) / 2

    def _last_token(self, rows: int, hook: Any, push: Any = None) -> None:
        caches = make_prompt_cache(self.model.module)
        self.model.module(mx.array([self.prompt[:-1]] * rows), cache=caches)
        with by_hand(self.model.blocks, hook, push, place=self._place):
            mx.eval(self.model.module(mx.array([self.prompt[-1:]] * rows), cache=caches))

    def tokens(self, prompt: list[int], controller: mlx_lqr.Controller) -> list[int]:
        """Greedy tokens, steered from the prompt's last position on."""
        module, token = self.model.module, prompt[-1]
        answer: list[int] = []
        caches = make_prompt_cache(module)

        def steer(k: int, z: mx.array, output: mx.array) -> mx.array:
            goal = controller.offset[k] + STRENGTH * controller.setpoint[k]
            return self.added(output, (goal - self.state(z) @ controller.sensor[k]) @ controller.gain[k].T)

        module(mx.array([prompt[:-1]]), cache=caches)
        while len(answer) < TOKENS:
            with by_hand(self.model.blocks, steer, place=self._place):
                token = int(mx.argmax(module(mx.array([[token]]), cache=caches)[0, -1]).item())
            answer.append(token)
        return answer


def _derivatives_are_those_of(hands: ByHand) -> None:
    """A_k w of every block, and the product of all, against differences; the median over directions w.

    Along one of them another expert may take over, where there is no derivative.
    """
    model, count = hands.model, hands.model.num_layers
    trace = model.trace(hands.prompt)
    states = hands.states()
    np.testing.assert_allclose(trace.residual, states, rtol=1e-3, atol=1e-4 * np.abs(states).max())
    jacobians = [model.jacobian(trace, k).astype(np.float64) for k in range(count)]
    d = model.hidden_size
    w = np.random.default_rng(0).standard_normal((DIRECTIONS, d))
    for k in range(count):
        assert _error(hands, w @ jacobians[k][:d, :d].T, w, k, k + 1) < EXACT, f"A_{k}"
    predicted = np.pad(w, ((0, 0), (0, len(jacobians[0]) - d)))
    for jacobian in jacobians:
        predicted = predicted @ jacobian.T
    predicted = predicted[:, :d]
    assert _error(hands, predicted, w, 0, count) < EXACT, "the product of all A_k"


def _error(hands: ByHand, predicted: np.ndarray, w: np.ndarray, start: int, end: int) -> float:
    scale = np.linalg.norm(hands.states()[start]) / w.shape[1] ** 0.5
    moves = np.concatenate([move * scale * w for move in MOVES])
    lengths = np.repeat(MOVES, len(w))[:, None] * scale
    responses = (hands.response(moves, start, end) / lengths).reshape(len(MOVES), *predicted.shape)
    errors = np.linalg.norm(responses - predicted, axis=-1) / np.linalg.norm(predicted, axis=-1)
    return float(np.median(errors.min(axis=0)))


def _tokens_are_those_of(hands: ByHand, controller: mlx_lqr.Controller) -> None:
    """Of our loop, and of mlx-lm's own generation steered in place."""
    model = hands.model
    expected = [hands.tokens(prompt, controller) for prompt in PROMPTS]
    assert [steered(model, prompt, controller) for prompt in PROMPTS] == expected
    with mlx_lqr.steer(model.module, controller, STRENGTH):
        library = importlib.import_module("mlx_lm.generate")
        pieces = library.generate_step(mx.array(hands.prompt), model.module, max_tokens=TOKENS)
        theirs = [int(token) for token, _ in pieces]
    assert theirs == expected[0], "mlx-lm's own generation, steered in place"


def _heads_are_recorded_or_refused(model: MLXModel) -> None:
    try:
        heads = model.head_outputs([PROMPTS[0]])
    except InputError as refusal:
        if "method that acts on whole blocks" not in str(refusal):
            raise
        return
    assert heads.shape[:2] == (1, model.num_layers)
    assert np.isfinite(heads).all()
    assert heads.any()


def test_at_least_this_many_work() -> None:
    """Each of them by its own test."""
    assert len(set(architectures()) - set(REFUSED)) >= WORKING


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_what_cannot_be_made_here_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name, "max_position_embeddings": LENGTH}))
    with pytest.raises(InputError) as refusal:
        mlx_lqr.load(tmp_path, backend="mlx")
    assert "\n" not in str(refusal.value)


PACKED = [
    ("gemma3", {"mode": "affine", "group_size": 32, "bits": 2}),
    ("nemotron_h", {"mode": "affine", "group_size": 64, "bits": 3}),
    ("qwen3_next", {"mode": "affine", "group_size": 32, "bits": 4}),
    ("falcon_h1", {"mode": "affine", "group_size": 32, "bits": 5}),
    ("deepseek_v3", {"mode": "affine", "group_size": 32, "bits": 6}),
    ("mamba2", {"mode": "affine", "group_size": 64, "bits": 8}),
    ("gpt_oss", {"mode": "mxfp4", "group_size": 32, "bits": 4}),
    ("lfm2_moe", {"mode": "nvfp4", "group_size": 16, "bits": 4}),
    ("granitemoehybrid", {"mode": "mxfp8", "group_size": 32, "bits": 8}),
    ("qwen3_moe", {"mode": "nvfp4", "group_size": 16, "bits": 4}),
]
"""Each mode of quantising that MLX has, and each number of bits."""


@pytest.mark.parametrize(
    ("name", "packed"), PACKED, ids=[f"{name}-{how['mode']}-{how['bits']}" for name, how in PACKED]
)
def test_packed_weights_are_steered_too(name: str, packed: dict[str, Any], tmp_path: Path) -> None:
    trial = tried(written(tiny_config(name, hidden_size=64), tmp_path / "model", packed=packed))
    assert trial.steps == dict.fromkeys(STEPS, "yes")
    assert isinstance(trial.model, MLXModel)
    assert trial.controller is not None
    assert any("scales" in part for part, _ in tree_flatten(trial.model.module.parameters()))
    if isinstance(trial.model, MeasuredModel):
        assert max(trial.model.measurement.jacobian, trial.model.measurement.chain) < EXACT
    hands = ByHand(name, trial.model)
    if packed["mode"] == "affine":  # of other modes embeddings come in bfloat16, too coarse for differences
        _derivatives_are_those_of(hands)
    _tokens_are_those_of(hands, trial.controller)


@pytest.mark.skipif(on_gpu(), reason="a GPU multiplies them")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mixtral", "MLX multiplies no experts packed with a global scale"),
        ("gpt_oss", "Global scale is only supported"),
    ],
)
def test_experts_that_mlx_cannot_multiply_on_the_cpu_are_refused(name: str, reason: str, tmp_path: Path) -> None:
    packed = {"mode": "nvfp4", "group_size": 16, "bits": 4, "global_scale": True}
    trial = tried(written(tiny_config(name, hidden_size=64), tmp_path / "model", packed=packed))
    assert re.match(f"refused: .*{reason}", trial.steps["load"])
