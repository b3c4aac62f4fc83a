"""The laws of the methods that A-LQR is compared with: what defines each of them, on every backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.backends import BACKENDS, smollm2_on, tiny_on
from safetensors.numpy import load_file, save_file
from scipy.integrate import solve_ivp
from scipy.optimize import minimize

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends.protocol import CarryingLaw, Model
from mlx_lqr.commands import main
from mlx_lqr.methods.baseline import Baseline
from mlx_lqr.methods.linear_act import linear_map
from mlx_lqr.methods.odesteer import OFFSET, gradient_flow, kernel_logistic_regression
from mlx_lqr.methods.registry import METHODS
from mlx_lqr.methods.steering import combine, law_of
from mlx_lqr.runtime.chat import Chat
from mlx_lqr.runtime.decode import decode

PROMPT = [5, 17, 3, 42, 8, 29, 11, 60]
BATCH = [PROMPT, PROMPT[:1], PROMPT[2:6], PROMPT[::-1]]
POSITIVE, NEGATIVE = [[1, 2, 3], [4, 5], [9, 30, 7]], [[6, 7], [8], [12, 44]]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_method = pytest.mark.parametrize("method", sorted(METHODS))


def fitted(model: Model, method: str, **options: Any) -> Any:
    return mlx_lqr.fit_baseline(model, method, POSITIVE, NEGATIVE, **options)


def streams(model: Model, steering: Baseline | None, strength: float, prompt: list[int] = PROMPT) -> np.ndarray:
    """z_0..z_T at the last token: (T + 1, d)"""
    law = law_of(steering, strength) if steering is not None else None
    steer_all = steering is not None and steering.positions == "all"
    return model.residuals([prompt], law=law, steer_all=steer_all)[0]


def tokens_of(model: Model, steering: Baseline | None, strength: float = 1.0, **options: Any) -> list[int]:
    pieces = mlx_lqr.stream(
        model, PROMPT, controller=steering, strength=strength, max_tokens=12, temperature=0, **options
    )
    return [piece.token for piece in pieces if piece.token is not None]


def strength_for(method: str) -> float:
    return 60.0 if "angular" in method else 1.5


# What each method is.


@every_backend
def test_actadd_adds_the_mean_difference_at_its_layers_and_nowhere_else(backend: str) -> None:
    model = tiny_on(backend, "llama")
    steering = fitted(model, "actadd", layers=[1])
    plain, steered = streams(model, None, 0), streams(model, steering, 2.5)
    difference = np.mean([model.residuals([p])[0] for p in POSITIVE], axis=0) - np.mean(
        [model.residuals([p])[0] for p in NEGATIVE], axis=0
    )
    assert np.allclose(steered[:2], plain[:2], atol=1e-6)
    assert np.allclose(steered[2] - plain[2], 2.5 * difference[2], atol=1e-5)
    assert fitted(model, "actadd").active_layers == (1,)  # the middle one


@every_backend
def test_only_the_last_token_is_steered_or_all_of_them(backend: str) -> None:
    """Token i of a prompt is its last one in a shorter prompt: there the law must have been at work, or not."""
    model = tiny_on(backend, "llama")
    for positions in ("last", "all"):
        steering = fitted(model, "actadd", layers=[0], positions=positions)
        law, steer_all = law_of(steering, 3.0), positions == "all"
        decoder = model.decoder(law)
        decoder.fill([PROMPT[:-1]], steered=steer_all)
        stepwise = np.array(decoder.step(PROMPT[-1:])[0].tolist())
        assert np.allclose(model.logits(PROMPT, law=law, steer_all=steer_all), stepwise, atol=1e-4)
        inside = model.log_probabilities([(PROMPT[:4], PROMPT[4:])], law=law, steer_all=steer_all)[0]
        outside = model.log_probabilities([(PROMPT[:4], PROMPT[4:])])[0]
        assert np.abs(inside - outside).max() > 1e-3
    logits = [model.logits(PROMPT, law=law, steer_all=steer_all) for steer_all in (False, True)]
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


@every_backend
def test_proportional_feedback_with_gain_one_reaches_the_setpoint(backend: str) -> None:
    model = tiny_on(backend, "llama")
    steering = fitted(model, "proportional", layers=[0, 2])
    steered = streams(model, steering, 1.7)
    for k in (0, 2):
        feature = steering.tensors["direction"][k] @ steered[k + 1]
        assert feature == pytest.approx(1.7 * steering.tensors["setpoint"][k], rel=1e-4)
    half = fitted(model, "proportional", layers=[2], numbers={"kp": 0.5})
    feature = [half.tensors["direction"][2] @ streams(model, one, 1.7)[3] for one in (None, half)]
    assert feature[1] == pytest.approx((feature[0] + 1.7 * half.tensors["setpoint"][2]) / 2, rel=1e-4)


@every_backend
def test_ablation_leaves_nothing_along_the_direction(backend: str) -> None:
    model = tiny_on(backend, "llama")
    single = fitted(model, "ablation", source_layer=2)
    plain = streams(model, None, 0)
    assert single.positions == "all"
    v = single.tensors["direction"]
    assert np.array_equal(v[0], v[2])
    assert np.abs(v @ streams(model, single, 1.0)[1:].T).max() < 1e-4
    first = fitted(model, "ablation", layers=[0], positions="last")
    v = first.tensors["direction"][0]
    assert np.allclose(streams(model, first, 0.5)[1], plain[1] - 0.5 * (v @ plain[1]) * v, atol=1e-5)


@every_backend
def test_mean_act_maps_the_source_mean_onto_the_target_mean_at_every_layer(backend: str) -> None:
    model = tiny_on(backend, "llama")
    steering = fitted(model, "mean-act")
    moved = model.residuals(NEGATIVE, law=law_of(steering, 1.0), steer_all=True).mean(axis=0)
    target = model.residuals(POSITIVE).mean(axis=0)
    assert np.allclose(moved[1:], target[1:], atol=1e-4)  # also at the last, since each knows of those before it
    at_once = fitted(model, "mean-act", incremental=False)
    moved = model.residuals(NEGATIVE, law=law_of(at_once, 1.0), steer_all=True).mean(axis=0)
    assert np.allclose(moved[1], target[1], atol=1e-4)
    assert not np.allclose(moved[3], target[3], atol=1e-2)


def test_linear_act_recovers_an_affine_map_of_gaussians(random: np.random.Generator) -> None:
    source = random.standard_normal((4000, 3)).astype(np.float32) * [1, 2, 0] + [0, 5, 1]
    target = random.standard_normal((3000, 3)).astype(np.float32) * [3, 1, 0] + [1, -2, 4]
    scale, shift = linear_map(source, target)
    assert np.allclose(scale, [3, 0.5, 1], rtol=0.06)  # a constant neuron is only shifted
    assert np.allclose(scale * source.mean(axis=0) + shift, target.mean(axis=0), atol=1e-3)
    exact = linear_map(source[:50], 3 * source[:50][::-1] - 1)  # in whatever order the prompts come
    assert np.allclose(exact[0][:2], 3, rtol=1e-4)
    assert np.allclose(exact[1][:2], -1, atol=1e-3)
    assert (linear_map(source[:7], -target[:5])[0] >= 0).all()  # increasing, whatever the sets


@every_backend
def test_linear_act_maps_each_neuron_on_its_own(backend: str) -> None:
    model = tiny_on(backend, "llama")
    steering = fitted(model, "linear-act", layers=[1], positions="last")
    scale, shift = steering.tensors["scale"][1], steering.tensors["shift"][1]
    plain = streams(model, None, 0)
    assert np.allclose(streams(model, steering, 1.0)[2], scale * plain[2] + shift, atol=1e-4)
    assert np.allclose(streams(model, steering, 0.5)[2], (scale * plain[2] + shift + plain[2]) / 2, atol=1e-4)
    moved = model.residuals(NEGATIVE, law=law_of(fitted(model, "linear-act"), 1.0), steer_all=True).mean(axis=0)
    assert np.allclose(moved[1:], model.residuals(POSITIVE).mean(axis=0)[1:], atol=1e-3)


@every_backend
def test_pid_act_without_integral_and_derivative_is_mean_act_and_sums_with_them(backend: str) -> None:
    model = tiny_on(backend, "llama")
    plain = fitted(model, "pid-act", numbers={"kp": 1, "ki": 0, "kd": 0})
    assert np.array_equal(plain.tensors["shift"], fitted(model, "mean-act").tensors["shift"])
    numbers = {"kp": 0.8, "ki": 0.3, "kd": 0.2}
    shift = fitted(model, "pid-act", numbers=numbers, incremental=False).tensors["shift"][:, :, 0]
    r = fitted(model, "mean-act", incremental=False).tensors["shift"][:, :, 0]
    assert np.allclose(shift[0], 0.8 * r[0], atol=1e-5)
    assert np.allclose(shift[2], 0.8 * r[2] + 0.3 * (r[0] + r[1]) + 0.2 * (r[2] - r[1]), atol=1e-5)


@every_backend
@pytest.mark.parametrize("angle", [360.0, 70.0, 180.0, -45.0])
def test_angular_steering_keeps_the_length_and_hits_the_angle(backend: str, angle: float) -> None:
    model = tiny_on(backend, "llama")
    steering = fitted(model, "angular", layers=[1], positions="last")
    plane = steering.tensors["plane"]
    assert np.allclose(plane.T @ plane, np.eye(2), atol=1e-6)
    plain, steered = streams(model, None, 0)[2], streams(model, steering, angle)[2]
    assert np.linalg.norm(steered) == pytest.approx(np.linalg.norm(plain), rel=1e-5)
    inside = plane.T @ steered
    assert np.allclose(
        inside / np.linalg.norm(inside), [np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))], atol=1e-4
    )
    assert np.allclose(steered - plane @ inside, plain - plane @ (plane.T @ plain), atol=1e-5)


def test_adaptive_angular_steering_turns_only_what_points_along_the_feature(random: np.random.Generator) -> None:
    model = tiny_on("mlx", "llama")
    law = law_of(fitted(model, "adaptive-angular"), 120.0)
    always = law_of(fitted(model, "angular"), 120.0)
    y = random.standard_normal((1, 40, 32)).astype(np.float32)
    aligned = y @ fitted(model, "angular").tensors["plane"][:, 0] > 0
    assert 5 < aligned.sum() < 35
    assert np.array_equal(law(1, y, y)[~aligned], y[~aligned])
    assert np.allclose(law(1, y, y)[aligned], always(1, y, y)[aligned])


def test_the_barrier_of_odesteer_is_the_log_density_ratio_of_a_regression_on_all_products(
    random: np.random.Generator,
) -> None:
    rows = random.standard_normal((14, 4))
    labels = np.where(np.arange(14) < 8, 1.0, -1.0)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    weights = kernel_logistic_regression((units @ units.T + OFFSET) ** 2, labels)

    def features(u: np.ndarray) -> np.ndarray:
        products = np.einsum("...i,...j->...ij", u, u).reshape(*u.shape[:-1], 16)
        return np.concatenate([products, np.sqrt(2 * OFFSET) * u, np.full((*u.shape[:-1], 1), OFFSET)], axis=-1)

    def loss(solution: np.ndarray) -> float:
        margin = labels * (features(units) @ solution[:-1] + solution[-1])
        return float(np.log1p(np.exp(-margin)).sum() + 0.5 * solution[:-1] @ solution[:-1])

    best = minimize(loss, np.zeros(22), tol=1e-12).x
    elsewhere = random.standard_normal((5, 4))
    ratio = (elsewhere @ units.T + OFFSET) ** 2 @ weights
    assert np.allclose(ratio - ratio[0], (features(elsewhere) - features(elsewhere[0])) @ best[:-1], atol=1e-4)


@every_backend
def test_odesteer_goes_up_its_barrier_along_the_differential_equation(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_on(backend, "llama")
    steering = fitted(model, "odesteer")
    assert steering.active_layers == (1,)
    anchors, weights = (steering.tensors[name].astype(np.float64) for name in ("anchors", "weights"))
    outputs = np.stack([model.residuals([prompt])[0, 2] for prompt in (*POSITIVE, *NEGATIVE)])
    assert np.allclose(anchors, outputs / np.linalg.norm(outputs, axis=1, keepdims=True), atol=1e-5)
    between = np.linalg.norm(outputs[:3].mean(axis=0) - outputs[3:].mean(axis=0))
    assert steering.tensors["distance"].tolist() == pytest.approx([0, between, 0], rel=1e-4)

    def barrier(y: np.ndarray) -> float:
        return float((anchors @ y / np.linalg.norm(y) + OFFSET) ** 2 @ weights)

    def uphill(_: float, y: np.ndarray) -> np.ndarray:
        steps = 1e-5 * np.eye(len(y))
        gradient = np.array([(barrier(y + step) - barrier(y - step)) / 2e-5 for step in steps])
        return gradient / np.linalg.norm(gradient)

    start = streams(model, None, 0)[2].astype(np.float64)
    for strength in (1.0, 0.3, -0.5):
        exact = solve_ivp(
            lambda t, y, s=strength: np.sign(s) * uphill(t, y), (0, abs(strength) * between), start, rtol=1e-6
        )
        for steps, error in ((10, 0.1), (300, 0.004)):
            monkeypatch.setattr("mlx_lqr.methods.odesteer.STEPS", steps)
            end = streams(model, steering, strength)[2]
            assert np.linalg.norm(end - exact.y[:, -1]) < error * abs(strength) * between
            assert (barrier(end) - barrier(start)) * strength > 0
    assert np.array_equal(streams(model, steering, 0.0), streams(model, None, 0))
    with pytest.raises(InputError, match="at one layer"):
        fitted(model, "odesteer", layers=[0, 1])
    with pytest.raises(InputError, match="does not tell"):
        gradient_flow(steering, 1, outputs[:3], outputs[:3])


# S-PID, whose state is the difficult part.


def spid_by_hand(steering: Baseline, strength: float, z: Any, before: np.ndarray) -> tuple[Any, np.ndarray]:
    """u_k for each z_k in turn, and the last error; written from the definition."""
    total, previous, pushes = np.zeros(32), before, []
    kp, ki, kd = (steering.numbers[name] for name in ("kp", "ki", "kd"))
    for k in range(3):
        v = steering.tensors["direction"][k].astype(np.float64)
        error = (strength * steering.tensors["setpoint"][k] - v @ z[k]) * v
        total = total + error if steering.tensors["kept"][k] else np.zeros(32)
        pushes.append(kp * error + ki * total + kd * (error - previous))
        previous = error
    return pushes, previous


@pytest.mark.parametrize("kd", [0.0, 0.4])
def test_spid_is_its_definition_over_layers_and_tokens(kd: float, random: np.random.Generator) -> None:
    steering = fitted(tiny_on("mlx", "llama"), "spid", numbers={"kp": 0.5, "ki": 0.3, "kd": kd})
    law = law_of(steering, 2.0)
    assert law.replayable == (kd == 0)
    assert isinstance(law, CarryingLaw) == (kd != 0)
    before = np.zeros(32)
    for _ in range(3):
        z = random.standard_normal((3, 1, 1, 32)).astype(np.float32)
        expected, before = spid_by_hand(steering, 2.0, z[:, 0, 0], before)
        for k in range(3):
            assert np.allclose(law(k, z[k], np.zeros_like(z[k]))[0, 0], expected[k], atol=1e-5)


@every_backend
def test_spid_equals_the_golden_numbers(backend: str, golden: dict[str, Any]) -> None:
    model = smollm2_on(backend)
    numbers = {"kp": 0.5, "ki": 0.05, "kd": 0.01}
    steering = mlx_lqr.fit_baseline(model, "spid", golden["positive"], golden["negative"], numbers=numbers)
    for strength in (1.0, 3.0):
        name = f"spid_kp0.5_ki0.05_kd0.01/strength{strength}"
        logits = model.logits(golden["tokens"]["prompt"], law=law_of(steering, strength))
        assert np.abs(logits - golden[f"logits/{name}"]).max() < 2e-3
        pieces = mlx_lqr.stream(
            model, golden["prompt"], controller=steering, strength=strength, max_tokens=40, temperature=0
        )
        assert [piece.token for piece in pieces] == golden["tokens"][name]


@every_backend
def test_spid_starts_anew_at_every_prompt(backend: str) -> None:
    model = tiny_on(backend, "llama")
    steering = fitted(model, "spid", numbers={"kd": 2.0})
    law = law_of(steering, 2.0)
    first = [token for _, token in decode(model, [PROMPT], law=law, max_tokens=8)]
    decoder = model.decoder(law)
    for prompt in (PROMPT[3:5], PROMPT):  # one decoder for both, the second without what the first has left
        decoder.fill([prompt[:-1]], steered=False)
        tokens = decoder.sample(decoder.step(prompt[-1:])).tolist()
        for _ in range(7):
            tokens += decoder.sample(decoder.step(tokens[-1:])).tolist()
        assert decoder.rewind(0)
    assert tokens == first
    one, two = model.residuals([PROMPT], law=law)[0], model.residuals(BATCH, law=law)[0]
    assert np.allclose(one, two, atol=1e-4)
    following = first[:4]
    scores = model.log_probabilities([(PROMPT, following)], law=law)[0]
    assert scores[0] == pytest.approx(log_softmax(model.logits(PROMPT, law=law))[following[0]], abs=1e-4)
    assert (scores > np.log(1 / 64)).all()  # the likeliest of 64 tokens, each time: as decoded


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return np.asarray(logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max())


def test_spid_is_refused_where_its_derivative_has_no_meaning() -> None:
    model = tiny_on("mlx", "llama")
    with pytest.raises(InputError, match="kd = 0"):
        fitted(model, "spid", positions="all")
    assert fitted(model, "spid", positions="all", numbers={"kd": 0.0}).positions == "all"
    with pytest.raises(InputError, match=r"mlx_lqr\.generate"):
        mlx_lqr.steer(model, fitted(model, "spid"))


# What all of them share.


@every_backend
@every_method
def test_a_batch_is_steered_as_each_prompt_alone(backend: str, method: str) -> None:
    model = tiny_on(backend, "llama")
    steering = fitted(model, method, **({"numbers": {"kd": 1.0}} if method == "spid" else {}))
    options: dict[str, Any] = {
        "law": law_of(steering, strength_for(method)),
        "steer_all": steering.positions == "all",
        "max_tokens": 10,
    }
    alone = [[token for _, token in decode(model, [prompt], **options)] for prompt in BATCH]
    ended: set[int] = set()
    together: list[list[int]] = [[] for _ in BATCH]
    for i, token in decode(model, BATCH, ended=ended, **options):
        together[i].append(token)
        if i == 1 and len(together[1]) == 3:
            ended.add(1)  # the rows after it move up
    assert together == [alone[0], alone[1][:3], *alone[2:]]


@every_backend
@every_method
def test_strength_zero_changes_nothing(backend: str, method: str) -> None:
    model = tiny_on(backend, "llama")
    steering = fitted(model, method)
    assert np.array_equal(streams(model, steering, 0.0), streams(model, None, 0.0))


@every_method
def test_backends_agree_and_long_answers_too(method: str) -> None:
    """After 32 tokens MLX replays a compiled step; a strength set meanwhile is taken over."""
    answers: list[list[int]] = []
    for backend in BACKENDS:
        model = tiny_on(backend, "llama")
        law = law_of(fitted(tiny_on("mlx", "llama"), method), strength_for(method))
        answers.append([])
        for _, token in decode(model, [PROMPT], law=law, steer_all=METHODS[method].positions == "all", max_tokens=48):
            answers[-1].append(token)
            if len(answers[-1]) == 38:
                law.strength = -strength_for(method)
    assert answers[0] == answers[1]


@every_method
def test_a_file_keeps_everything_and_refuses_another_model(method: str, tmp_path: Path) -> None:
    model = tiny_on("mlx", "llama")
    steering = fitted(model, method, concept="ocean")
    steering.save(tmp_path / "file")
    loaded = mlx_lqr.load_steering(tmp_path / "file")
    assert type(loaded) is type(steering)
    for name in ("method", "active_layers", "concepts", "positions", "fingerprint", "prompt_counts"):
        assert getattr(loaded, name) == getattr(steering, name)
    assert loaded.arrays.keys() == steering.arrays.keys()
    for name, numbers in steering.arrays.items():
        assert np.array_equal(loaded.arrays[name], numbers)
    with pytest.raises(InputError, match="was fitted on"):
        mlx_lqr.generate(tiny_on("mlx", "qwen3"), PROMPT, controller=loaded)
    shown = CliRunner().invoke(main, ["show", str(tmp_path / "file")])
    assert shown.exit_code == 0
    assert METHODS[method].title in shown.output or method == "alqr"  # which its weights tell
    described = json.loads(CliRunner().invoke(main, ["show", "--json", str(tmp_path / "file")]).output)
    assert described["method"] == method


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    steering = fitted(tiny_on("mlx", "llama"), "actadd")
    steering.save(tmp_path / "file")
    tensors, metadata = load_file(tmp_path / "file"), metadata_of(tmp_path / "file")
    for changed in (
        {"method": "magic"},
        {"layers": "[7]"},
        {"layers": "3"},
        {"numbers": '{"kp": 1}'},
        {"concepts": "[]"},
        {"T": "4"},
    ):
        save_file(tensors, tmp_path / "bad", {**metadata, **changed})
        with pytest.raises(InputError, match="fit it again"):
            mlx_lqr.load_steering(tmp_path / "bad")
    save_file({"shift": tensors["shift"] * np.nan}, tmp_path / "bad", metadata)
    with pytest.raises(InputError, match="not finite"):
        mlx_lqr.load_steering(tmp_path / "bad")
    (tmp_path / "text").write_text("no safetensors")
    with pytest.raises(InputError, match="damaged"):
        mlx_lqr.load_steering(tmp_path / "text")
    with pytest.raises(InputError, match="there is no file"):
        mlx_lqr.load_steering(tmp_path / "missing")


def metadata_of(file: Path) -> dict[str, str]:
    raw = file.read_bytes()
    metadata: dict[str, str] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    return metadata


def test_vectors_are_added_up_and_other_methods_are_refused_by_name() -> None:
    model = tiny_on("mlx", "llama")
    one = fitted(model, "actadd", concept="a", layers=[0])
    two = mlx_lqr.fit_baseline(model, "actadd", NEGATIVE, POSITIVE, concept="b", layers=[0, 2])
    both = combine([one, two])
    assert isinstance(two, Baseline)
    assert isinstance(both, Baseline)
    assert both.active_layers == (0, 2)
    law = law_of(both, [2.0, 0.5])
    y = np.zeros((1, 1, 32), np.float32)
    expected = 2 * one.tensors["shift"][0, :, 0] + 0.5 * two.tensors["shift"][0, :, 0]
    assert np.allclose(law(0, y, y)[0, 0], expected, atol=1e-6)
    assert [part.concepts for part in both.split()] == [("a",), ("b",)]
    controller = mlx_lqr.fit(model, POSITIVE, NEGATIVE, concept="c", cost="feature", layers="all")
    with pytest.raises(InputError, match="actadd, alqr"):
        combine([one, controller])  # type: ignore[list-item]
    with pytest.raises(InputError, match="two files of the method ablation"):
        combine([fitted(model, "ablation", concept="a"), fitted(model, "ablation", concept="b")])
    with pytest.raises(InputError, match="twice"):
        combine([one, one])


def test_what_only_controllers_can_is_refused_by_name() -> None:
    model = tiny_on("mlx", "llama")
    steering = fitted(model, "actadd")
    with pytest.raises(InputError, match="actadd cannot be adaptive"):
        mlx_lqr.generate(model, PROMPT, controller=steering, adaptive=True)
    with pytest.raises(InputError, match="actadd cannot be recorded"):
        mlx_lqr.generate(model, PROMPT, controller=steering, record=mlx_lqr.Recording())
    for method, options, reason in (
        ("actadd", {"numbers": {"kp": 1.0}}, "has no kp: it belongs to proportional, spid, pid-act"),
        ("actadd", {"source_layer": 1}, "belongs to ablation"),
        ("ablation", {"incremental": False}, "has no incremental: it belongs to mean-act, linear-act, pid-act"),
        ("magic", {}, "there is no method"),
        ("ablation", {"source_layer": 9}, "between 0 and 3"),
    ):
        with pytest.raises(InputError, match=reason):
            fitted(model, method, **options)


@every_backend
def test_steering_of_others_calls_leaves_the_model_untouched_after(backend: str) -> None:
    model = tiny_on(backend, "llama")
    before = model.logits(PROMPT)
    for method in METHODS:
        steering = fitted(model, method, **({"numbers": {"kd": 0.0}} if method == "spid" else {}))
        with mlx_lqr.steer(model.module, steering, strength_for(method)):
            theirs = generated_by_others(backend, model)
        assert theirs == tokens_of(model, steering, strength_for(method))
        assert np.array_equal(model.logits(PROMPT), before)


def generated_by_others(backend: str, model: Any) -> list[int]:
    """12 greedy tokens by mlx-lm's or transformers' own generation."""
    if backend == "mlx":
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        return [int(token) for token, _ in generate_step(mx.array(PROMPT), model.module, max_tokens=12)]
    import torch

    answer = model.module.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)
    tokens: list[int] = answer[0, len(PROMPT) :].tolist()
    return tokens


# In a conversation, and on the command line.


def test_a_chat_is_steered_by_any_method(smollm2: Model, tmp_path: Path) -> None:
    positive, negative = mlx_lqr.bundled_prompts("dog")
    session = Chat(smollm2, options={"max_tokens": 4, "temperature": 0})
    steering = mlx_lqr.fit_baseline(smollm2, "spid", positive[:4], negative[:4], concept="dog")
    session.add(steering, 0.5)
    answers = ["".join(piece.text for piece in session.answer("Hi")) for _ in range(2)]
    assert all(answers)
    session.set_strength(0.2, "dog")
    assert "".join(piece.text for piece in session.unsteered())
    assert "".join(piece.text for piece in session.steered())
    assert session.excess() is None
    with pytest.raises(InputError, match="spid cannot be tracked"):
        session.track()
    with pytest.raises(InputError, match="cannot be combined"):
        session.add(mlx_lqr.fit_baseline(smollm2, "actadd", positive[:2], negative[:2], concept="other"))
    session.off("dog")
    assert session.controller is None


def test_the_command_line_fits_and_uses_a_method(tmp_path: Path) -> None:
    for name in ("positive", "negative"):
        text = "\n".join(mlx_lqr.bundled_prompts("dog")[name == "negative"][:3])
        (tmp_path / name).write_text(text)
    file = str(tmp_path / "dog.safetensors")
    base = ["fit", "demo", "-o", file, *("--positive", str(tmp_path / "positive"))]
    base += ["--negative", str(tmp_path / "negative"), "--method"]
    run = CliRunner().invoke
    done = run(main, [*base, "mean-act", "--layers", "14,15"])
    assert done.exit_code == 0, done.output
    answer = run(main, ["generate", "demo", "-p", "Once", "-c", f"{file}:0.5", "-n", "3", "--seed", "1", "--json"])
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.output)["concepts"] == {"positive": 0.5}
    for options, reason in (
        (["actadd", "--q", "1"], "--q is not for the method actadd"),
        (["alqr", "--kp", "1"], "--kp is not for the method alqr"),
        (["actadd", "--kp", "1"], "not for the method actadd: it belongs to proportional, spid, pid-act"),
        (["spid", "--simultaneous"], "not for the method spid: it belongs to mean-act, linear-act, pid-act"),
    ):
        refused = run(main, [*base, *options])
        assert refused.exit_code == 2
        assert reason in refused.output
    refused = run(main, ["generate", "demo", "-p", "Once", "-c", file, "--json", "--track"])
    assert refused.exit_code == 2
    assert "mean-act cannot be tracked" in refused.output
