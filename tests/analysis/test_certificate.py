"""The certificate: its prediction and bound against dense linear algebra and the model itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command_line import refused, run
from helpers.controllers import controller_for
from helpers.prompts import NOMINAL_PROMPTS as PROMPTS
from helpers.tiny import tiny
from helpers.transitions import transition_norms

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.analysis import Certificate, certify
from mlx_lqr.analysis.closed_loop import AtPrompt, ClosedLoop
from mlx_lqr.analysis.lyapunov import error_bound, lyapunov_sweep, weighted_norm
from mlx_lqr.analysis.rollout import roll_out
from mlx_lqr.backends.protocol import Model
from mlx_lqr.files.results import as_json, write_json
from mlx_lqr.lqr.controller import Controller

CALIBRATION, HELD_OUT = PROMPTS[:2], PROMPTS[2:]


def certified(model: Model, controller: Controller, **options: Any) -> Certificate:
    return certify(model, controller, CALIBRATION, HELD_OUT, **options)


@pytest.mark.parametrize("linearised", ["prompt", "average"])
@pytest.mark.parametrize(("family", "setpoint"), [("llama", "paper"), ("llama", "centred"), ("gemma3_text", "paper")])
def test_the_prediction_is_the_linear_loop(family: str, setpoint: str, linearised: Any) -> None:
    """Step by step with dense matrices, from the unsteered residual stream alone."""
    model = tiny(family, num_hidden_layers=4)
    controller = controller_for(model, layers=[1, 2, 3], setpoint=setpoint)
    certificate = certified(model, controller, strengths=(1.0, 2.5), linearised=linearised)
    v, g = controller.sensor[:, :, 0].astype(np.float64), controller.gain[:, :, 0].astype(np.float64)
    for n, prompt in enumerate(HELD_OUT):
        A = mlx_lqr.linearize(model, [prompt] if linearised == "prompt" else CALIBRATION)
        z0 = model.residuals([prompt])[0].astype(np.float64)
        for s, strength in enumerate((1.0, 2.5)):
            p = np.zeros(32)
            for k in range(4):
                u = (controller.offset[k, 0] + strength * controller.setpoint[k, 0] - v[k] @ (z0[k] + p)) * g[k]
                p = A[k] @ p + u
                if k < 3:
                    assert certificate.predicted[n, s, k + 1] == pytest.approx(v[k + 1] @ (z0[k + 1] + p), abs=2e-3)
    wanted = [controller.setpoint_at([strength])[:, 0] for strength in (1.0, 2.5)]
    assert certificate.setpoint[:, :-1] == pytest.approx(np.stack(wanted), rel=1e-6)
    assert np.all(np.isnan(certificate.setpoint[:, -1])) == (setpoint == "centred")
    assert certificate.first == 1
    # Nothing is displaced yet.
    assert certificate.feature[:, :, 1] == pytest.approx(certificate.predicted[:, :, 1], abs=1e-4)
    assert certificate.feature_posterior[..., :2].max() < 1e-4  # but for rounding


def test_a_bound_from_the_very_samples_always_holds() -> None:
    """Constants that are the largest at the held-out prompts themselves: no estimate is left in the bound."""
    model = tiny("llama", num_hidden_layers=5)
    controller = controller_for(model)
    for linearised in ("prompt", "average"):
        certificate = certify(
            model, controller, PROMPTS, PROMPTS, quantile=1.0, linearised=linearised, strengths=(1.0, 3.0)
        )
        for quantity in ("feature", "deviation"):
            for kind in ("posterior", "prior"):
                assert np.all(certificate.held(quantity, kind) == 1), (linearised, quantity, kind)
        assert np.all(certificate.remainder_held == 1)
        assert np.all(certificate.feature_posterior <= certificate.feature_prior * (1 + 1e-4) + 1e-4)
        assert np.all(certificate.feature_posterior[..., certificate.first + 2 :] > 0)


def test_own_jacobians_leave_no_mismatch_and_a_tighter_bound() -> None:
    model = tiny("llama", num_hidden_layers=4)
    controller = controller_for(model)
    own, average = (certified(model, controller, linearised=at) for at in ("prompt", "average"))
    assert np.nanmax(own.mismatch.quantile) < 1e-4
    assert np.nanmin(average.mismatch.quantile) > 1e-3
    assert np.median(own.feature_posterior[..., -1]) < np.median(average.feature_posterior[..., -1])
    assert own.full_state is not None
    assert own.contraction.spectral_norm.shape == (4,)
    stored = mlx_lqr.linearize(model, CALIBRATION)
    given = certified(model, controller, linearised="average", jacobians=stored)
    assert np.allclose(given.predicted, average.predicted, atol=1e-4)


def test_the_deviation_is_of_second_order() -> None:
    """Half the push leaves a quarter of the deviation from the linear prediction."""
    model = tiny("qwen3")
    controller = controller_for(model, layers=[0, 1])
    off = []
    for share in (0.5, 0.25):
        weaker = replace(controller, gain=controller.gain * np.float32(share))
        certificate = certified(model, weaker, strengths=(1.0,))
        off.append(certificate.deviation[..., 2])
    assert np.median(off[0] / off[1]) == pytest.approx(4, rel=0.35)


def test_the_certified_band_is_where_the_prior_bound_is_small() -> None:
    model = tiny("llama")
    controller = controller_for(model, layers=[0, 1])
    certificate = certified(model, controller, strengths=(0.5, 1.0, 2.0, 4.0))
    for k in range(certificate.first, 4):
        low, high = certificate.certified_band[k]
        for s, strength in enumerate(certificate.strengths):
            within = np.all(certificate.feature_prior[:, s, k] <= 0.5 * certificate.magnitude[k])
            if not np.isnan(low) and low <= strength <= high:
                assert within, (k, strength)
    # At the first layer nothing is displaced, whatever the strength.
    assert certificate.certified_band[certificate.first].tolist() == [-8, 8]
    assert len(certificate.measured_band()) == 4
    assert set(certificate.measured_band()[certificate.first]) == set(certificate.strengths)


def test_the_papers_bound_holds_for_the_full_state_feedback() -> None:
    """u_k = -K_k dz_k about an unsteered trajectory, from a displaced z_0; L_k the largest along these trajectories."""
    model = tiny("llama", num_hidden_layers=4)
    trace = model.trace(PROMPTS[0])
    A = [model.jacobian(trace, k).astype(np.float64) for k in range(4)]
    gains = mlx_lqr.solve(A, 1.0, 1.0, 1.0)
    F = [A[k] - gains[k] for k in range(4)]
    steps = list(lyapunov_sweep((k, F[k]) for k in reversed(range(4))))[::-1]
    P = [step.factor for step in steps] + [steps[-1].next_factor]
    reference = [trace.residual[0]]
    for k in range(4):
        reference.append(model.block(trace, k, reference[k][None])[0])
    z = reference[0] + 0.3 * np.random.default_rng(0).standard_normal((20, 32)).astype(np.float32)
    error = [(z - reference[0]).astype(np.float64)]
    for k in range(4):
        z = model.block(trace, k, z) - (error[k] @ gains[k].T).astype(np.float32)
        error.append((z - reference[k + 1]).astype(np.float64))
    size = np.stack([weighted_norm(P[k], error[k]) for k in range(5)], axis=1)
    remainder = np.stack([weighted_norm(P[k + 1], error[k + 1] - error[k] @ F[k].T) for k in range(4)], axis=1)
    L = np.max(2 * remainder / size[:, :-1] ** 2, axis=0)
    bound = error_bound(transition_norms(F), size[:, 0], L / 2 * size[:, :-1] ** 2)
    assert np.all(size <= bound * (1 + 1e-6))
    assert np.median(bound[:, -1] / size[:, -1]) < 20
    loop = ClosedLoop(model, controller_for(model, qf=1.0), (1.0,), AtPrompt(model, trace))
    theory = loop.full_state()
    assert theory.step_norm == pytest.approx([step.step_norm for step in steps], rel=1e-3)
    assert theory.to_output == pytest.approx([*(step.to_output for step in steps), 1], rel=1e-3)


def test_a_controller_of_all_positions_is_certified_in_its_own_prefix() -> None:
    model = tiny("llama", num_hidden_layers=4)
    controller = controller_for(model, positions="all")
    average = certified(model, controller, linearised="average", strengths=(2.0, 1.0))
    run_alone = roll_out(model, HELD_OUT[0], controller, (2.0,))
    assert average.feature[0, 0, 1] == pytest.approx(controller.sensor[1, :, 0] @ run_alone.steered[0, 1], abs=1e-4)
    assert not np.allclose(average.unsteered[:, 0, 2], average.unsteered[:, 1, 2])  # another strength, another prefix
    with pytest.raises(InputError, match="one strength"):
        certified(model, controller)
    assert np.all(certified(model, controller, strengths=(1.0,), quantile=1.0).feature_posterior >= 0)


def test_what_cannot_be_certified_is_refused() -> None:
    model = tiny("llama")
    controller = controller_for(model)
    jacobians = mlx_lqr.linearize(model, [PROMPTS[0]])
    both = Controller.combine(controller, controller_for(model, "b"))
    for says, call in {
        "at least two": lambda: certify(model, controller, [], HELD_OUT),
        "finite strength": lambda: certified(model, controller, strengths=()),
        "quantile": lambda: certified(model, controller, quantile=0.0),
        "'prompt' or 'average'": lambda: certified(model, controller, linearised="x"),
        "are averages": lambda: certified(model, controller, jacobians=jacobians),
        "one concept": lambda: certified(model, both),
        "fitted on": lambda: certified(tiny("llama", seed=1), controller),
        "not of tiny-qwen3": lambda: certified(
            tiny("qwen3"), controller_for(tiny("qwen3")), linearised="average", jacobians=jacobians
        ),
        "overflow": lambda: certified(model, controller, strengths=(1e38,)),
    }.items():
        with pytest.raises(InputError, match=says):
            call()


def test_results_are_written_as_json(tmp_path: Path) -> None:
    model = tiny("llama")
    certificate = certified(model, controller_for(model), strengths=(1.0,))
    write_json(tmp_path / "a.json", certificate)
    read = json.loads((tmp_path / "a.json").read_text())
    assert read["strengths"] == [1.0]
    assert np.allclose(read["feature"], certificate.feature, rtol=1e-5)
    assert read["contraction"]["step_norm"] == pytest.approx(certificate.contraction.step_norm.tolist(), rel=1e-5)
    assert as_json({"a": np.float32(np.nan), "b": (1, np.inf)}) == {"a": None, "b": [1, None]}


@pytest.fixture
def tiny_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], tuple[Path, Path]]:
    """Makes a command load a tiny model, and gives files of a controller of it and of prompts."""
    import importlib

    def prepare() -> tuple[Path, Path]:
        model = tiny("llama", num_hidden_layers=4)
        controller = controller_for(model, layers=[1, 2, 3])
        controller.save(tmp_path / "a.safetensors")
        (tmp_path / "prompts.txt").write_text("5 17 3\n9 9 41 2\n7\n3 1\n")
        module = importlib.import_module("mlx_lqr.commands.analysis")
        monkeypatch.setattr(module, "load", lambda *_, **__: model)
        read = lambda path: [[int(word) for word in line.split()] for line in Path(path).read_text().splitlines()]  # noqa: E731
        monkeypatch.setattr(module, "read_prompts", read)
        return tmp_path / "a.safetensors", tmp_path / "prompts.txt"

    return prepare


def test_the_command_certify(tiny_command: Callable[[], tuple[Path, Path]], tmp_path: Path) -> None:
    controller, prompts = tiny_command()
    arguments = "certify", "x", "-c", controller, "--prompts", prompts, "--strengths", "1,2"
    result = run(*arguments, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "an estimate, not a proof" in result.stdout
    assert result.stdout.count("strength ") == 2
    rows = [line for line in result.stdout.splitlines() if line.startswith(("    1", "    2", "    3", "  out"))]
    assert len(rows) == 3 * 4
    names = {
        "certificate.json",
        *(f"{name}.{kind}" for name in ("tracking", "error-and-bound") for kind in ("png", "svg")),
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    numbers = json.loads(run(*arguments, "--json", "--linearised", "average").stdout)
    assert numbers["linearised"] == "average"
    assert len(numbers["held"]["feature_posterior"]) == 5
    assert np.shape(numbers["feature"]) == (2, 2, 5)
    assert json.loads((tmp_path / "out" / "certificate.json").read_text())["held"]["feature_prior"][0] == 1


def test_the_command_linearity(tiny_command: Callable[[], tuple[Path, Path]], tmp_path: Path) -> None:
    controller, prompts = tiny_command()
    arguments = "linearity", "x", "--prompts", prompts
    result = run(*arguments, "-c", controller, "--write", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "alpha/trust" in result.stdout
    assert sum(line.startswith("    ") and line.split()[0].isdigit() for line in result.stdout.splitlines()) == 4
    assert Controller.load(controller).checked_push is not None
    assert len(list((tmp_path / "out").iterdir())) == 9
    numbers = json.loads(run(*arguments, "--json").stdout)
    assert numbers["concept"] == ""
    assert np.shape(numbers["similarity"]) == (4, 4, 4)
    assert "alpha/trust" not in run(*arguments).stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["linearity", "demo", "--write"], "-c FILE"),
        (["linearity", "demo", "--modes", "0"], "--modes"),
        (["linearity", "demo", "--strengths", "1,much"], "1,2,3"),
        (["linearity", "demo", "--prompts", "missing.txt"], "missing.txt"),
        (["certify", "demo"], "--controller"),
        (["certify", "demo", "-c", "missing.safetensors"], "no file missing"),
        (["certify", "demo", "-c", "{dog}", "--strengths", "inf"], "finite"),
        (["certify", "demo", "-c", "{dog}", "--prompts", "{one}"], "one prompt"),
        (["certify", "demo", "-c", "{dog}", "--jacobians", "missing"], "no file missing"),
    ],
)
def test_mistakes_in_linearity_and_certify(arguments: list[str], says: str, dog: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("alone\n")
    filled = [text.replace("{dog}", str(dog)).replace("{one}", str(tmp_path / "one.txt")) for text in arguments]
    assert says in refused(*filled)


def test_plots_without_matplotlib_are_refused_at_once(dog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "mlx-lqr[plots]" in refused("certify", "demo", "-c", dog, "-o", "out")


def test_the_real_model_is_certified(smollm2: Model, dog: Path) -> None:
    """The linear prediction is close where the paper says that it is: late layers, moderate strengths."""
    controller = Controller.load(dog)
    controller = replace(controller, gain=controller.gain * (np.arange(30) >= 25)[:, None, None].astype(np.float32))
    certificate = certify(
        smollm2, controller, ["The weather in", "She told me"], ["Once upon a time,"], strengths=(1.0,)
    )
    assert certificate.first == 25
    off = np.abs(certificate.feature - certificate.predicted)[0, 0, 27:30] / certificate.magnitude[27:30]
    assert off.max() < 0.15
    moved = np.abs(certificate.feature - certificate.unsteered)[0, 0, 27:30] / certificate.magnitude[27:30]
    assert np.median(off / moved) < 0.1
    assert np.all(certificate.contraction.step_norm[25:] < 1)
    assert np.median(certificate.held()[25:]) == 1
