"""A backend that runs and records and does no more, as one around an engine would: what works, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.backends import BACKENDS, smollm2_on, tiny_folder, tiny_on

import mlx_lqr
from mlx_lqr import InputError, analysis, loading
from mlx_lqr.backends import registry
from mlx_lqr.backends.backend import Backend, Suitability
from mlx_lqr.backends.capabilities import DIFFERENTIABLE, HEAD_RECORDER, RECORDER, RUNNER, Capability
from mlx_lqr.backends.description import Description
from mlx_lqr.backends.protocol import GREEDY, Decoder, Float32, Law, Model, Recorder, Runner, Sampling
from mlx_lqr.backends.text.text_tokenizer import TextTokenizer
from mlx_lqr.commands import main
from mlx_lqr.loading import adopt

PROMPT = [5, 17, 3, 42, 8]
POSITIVE, NEGATIVE = [[1, 2, 3], [4, 5]], [[6, 7], [8]]
ALL: dict[str, Capability[Any]] = {
    "recorder": RECORDER,
    "head recorder": HEAD_RECORDER,
    "differentiable": DIFFERENTIABLE,
}


class Engine:
    """A model behind an engine's interface: `Runner` and `Recorder`, spelled out, and not a name more."""

    backend = "engine"

    def __init__(self, model: Model) -> None:
        self._model = model
        self.name, self.family = model.name, model.family
        self.num_layers, self.hidden_size = model.num_layers, model.hidden_size
        self.vocab_size, self.context_length = model.vocab_size, model.context_length

    @property
    def tokenizer(self) -> TextTokenizer:
        return self._model.tokenizer

    @property
    def fingerprint(self) -> str:
        return self._model.fingerprint

    @property
    def description(self) -> Description:
        return self._model.description

    def decoder(self, law: Law | None = None, sampling: Sampling = GREEDY, *, rolling: bool = False) -> Decoder:
        return self._model.decoder(law, sampling, rolling=rolling)

    def leave_thread(self) -> None:
        pass

    def steer(self, law: Law, *, steer_all: bool) -> AbstractContextManager[None]:
        return self._model.steer(law, steer_all=steer_all)

    def residuals(self, prompts: Any, **options: Any) -> Float32:
        return self._model.residuals(prompts, **options)

    def logits(self, tokens: Any, **options: Any) -> Float32:
        return self._model.logits(tokens, **options)

    def log_probabilities(self, pairs: Any, **options: Any) -> list[Float32]:
        return self._model.log_probabilities(pairs, **options)

    def logits_along(self, pairs: Any, **options: Any) -> list[Float32]:
        return self._model.logits_along(pairs, **options)


class EngineBackend(Backend):
    name = "engine"
    title = "The engine"
    capabilities = frozenset({RECORDER})
    takes_device = False
    spreads = False
    adopts = "engine.open"

    def suitability(self) -> Suitability:
        return Suitability.CPU

    def check_installed(self) -> None:
        pass

    def load(self, folder: Path, name: str, **options: Any) -> Recorder:
        loaded = registry.backend(BACKENDS[0]).load(folder, name, **options)
        return Engine(loaded)  # type: ignore[arg-type]

    def adopt(self, model: Any) -> Runner | None:
        return None


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's backend beside those of the list."""
    listed, engine = registry.backends(), EngineBackend()
    by_name = {backend.name: backend for backend in (*listed, engine)}
    monkeypatch.setattr(registry, "backends", lambda: tuple(by_name.values()))
    monkeypatch.setattr(registry, "backend", by_name.__getitem__)


@pytest.fixture
def engine() -> Any:
    return Engine(tiny_on(BACKENDS[0], "llama"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_lists_what_its_models_can_do(backend: str) -> None:
    model = tiny_on(backend, "llama")
    row = registry.backend(backend)
    assert row.name == backend == model.backend
    assert {name for name, capability in ALL.items() if capability.is_of(model)} == {
        name for name, capability in ALL.items() if capability in row.capabilities
    }
    assert RUNNER.is_of(model)
    assert get_args(loading.BackendName) == ("auto", *(backend.name for backend in registry.backends()))


def test_nothing_is_computed_to_learn_what_a_model_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "fingerprint", property(lambda _: pytest.fail("was computed")))
    engine = Engine(tiny_on(BACKENDS[0], "llama"))
    assert [capability.is_of(engine) for capability in (RUNNER, RECORDER, HEAD_RECORDER, DIFFERENTIABLE)] == [
        True, True, False, False,
    ]  # fmt: skip
    adopted: Any = adopt(engine)
    assert adopted is engine
    assert not RUNNER.is_of("a name")


def test_contrast_generate_and_methods_without_jacobians_work(engine: Any) -> None:
    model = tiny_on(BACKENDS[0], "llama")
    controller = mlx_lqr.fit(model, POSITIVE, NEGATIVE, q=1.0, layers="all", cost="feature")
    assert np.array_equal(
        mlx_lqr.contrast(engine, POSITIVE, NEGATIVE).direction, mlx_lqr.contrast(model, POSITIVE, NEGATIVE).direction
    )
    steered = [
        [
            piece.token
            for piece in mlx_lqr.stream(one, PROMPT, controller=controller, strength=2.0, max_tokens=8, temperature=0)
        ]
        for one in (engine, model)
    ]
    assert steered[0] == steered[1]
    baseline = mlx_lqr.fit_baseline(engine, "actadd", POSITIVE, NEGATIVE)
    assert mlx_lqr.generate(engine, PROMPT, controller=baseline, max_tokens=3, temperature=0)
    with mlx_lqr.steer(engine, controller):
        pass


NEEDS: dict[str, Callable[[Any, mlx_lqr.Controller], Any]] = {
    "fit controllers": lambda model, _: mlx_lqr.fit(model, POSITIVE, NEGATIVE),
    "compute Jacobians": lambda model, _: mlx_lqr.linearize(model, [PROMPT]),
    "adapt gains to a prompt": lambda model, controller: mlx_lqr.adapt(model, controller, PROMPT),
    "certify controllers": lambda model, controller: analysis.certify(model, controller, [PROMPT], [PROMPT[:3]]),
    "measure how linear": lambda model, _: analysis.linearity(model, [PROMPT, PROMPT[:3]]),
    "adapt gains": lambda model, own: mlx_lqr.generate(model, PROMPT, controller=own, adaptive=True, temperature=0),
    "record attention heads": lambda model, _: mlx_lqr.fit_baseline(model, "iti", POSITIVE * 3, NEGATIVE * 3),
}


@pytest.mark.parametrize("what", NEEDS)
def test_what_is_missing_is_one_line_with_the_way_out(what: str, engine: Any, registered: None) -> None:
    controller = mlx_lqr.fit(tiny_on(BACKENDS[0], "llama"), POSITIVE, NEGATIVE, q=1.0, layers="all", cost="feature")
    with pytest.raises(InputError) as refusal:
        NEEDS[what](engine, controller)
    message = str(refusal.value)
    assert message.startswith(f"The engine runs models but cannot {what}")
    assert f"--backend {' or '.join(BACKENDS)} " in message
    assert "\n" not in message


def test_it_is_loaded_and_refused_by_its_name(registered: None) -> None:
    folder = tiny_folder("llama")
    model: Any = mlx_lqr.load(folder, backend="engine", dtype="float32")  # type: ignore[arg-type]
    assert type(model) is Engine
    default: Any = mlx_lqr.load(folder, dtype="float32")
    assert type(default) is not Engine, "the first of the list is taken"
    with pytest.raises(InputError, match=r"The engine chooses its device itself: .* for the torch backend"):
        mlx_lqr.load(folder, backend="engine", device="cpu")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"give what mlx_lqr\.load, mlx_lm\.load, .* or engine\.open returned"):
        adopt(3)


def test_commands_run_on_it_and_fit_says_the_line(
    dog: Path, registered: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = smollm2_on(BACKENDS[0])
    monkeypatch.setattr(EngineBackend, "load", lambda self, folder, name, **options: Engine(whole))
    monkeypatch.setattr(registry.backend(BACKENDS[0]), "load", EngineBackend().load, raising=False)

    def run(*arguments: str, status: int = 0, text: str | None = None) -> str:
        done = CliRunner().invoke(main, list(arguments), input=text)
        assert done.exit_code == status, done.output
        return done.output if status else done.stdout

    options = ("--backend", BACKENDS[0])
    told = run("generate", "demo", *options, "-p", "I saw", "-c", f"{dog}:2", "-n", "4", "--seed", "1", "--json")
    assert json.loads(told)
    assert run("chat", "demo", *options, "-c", f"{dog}:2", "-n", "3", "--seed", "1", text="Hello\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openings.jsonl").write_text('{"prompt": "Once upon a time,"}\n')
    (tmp_path / "sums.jsonl").write_text('{"prompt": "2 + 3 =", "answer": "5", "others": ["4", "9"]}\n')
    small = ("--openings", "openings.jsonl", "--capability", "sums.jsonl", "--samples", "1", "-n", "4")
    monkeypatch.setattr("mlx_lqr.tasks.damage.POSITIONS", 2)
    assert json.loads(
        run("eval", "concept", "demo", *options, "-c", str(dog), "--strengths", "2", *small, "-o", "out", "--json")
    )
    told = run("fit", "demo", *options, "--concept", "dog", "-o", str(tmp_path / "dog.safetensors"), status=2)
    assert "The engine runs models but cannot fit controllers: load this one with --backend mlx or torch" in told
    assert len(told.strip().splitlines()) == 1
