"""alpha_k and |u_k| on line: what is recorded is what happened, nothing where nobody asks, and a warning outside."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.by_hand import last_features
from helpers.command_line import PROMPT, answers, run
from helpers.controllers import controller_for
from helpers.decoding import tokens
from helpers.tiny import tiny
from helpers.tiny_tokenizers import chatting

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends.protocol import Model
from mlx_lqr.commands.chat_view import draw_tracking
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.methods.alqr import LinearFeedback
from mlx_lqr.methods.recording import RecordedFeedback, Recording
from mlx_lqr.methods.running import law_on
from mlx_lqr.runtime import Chat, Options, batch_stream, stream
from mlx_lqr.runtime.monitor import largest_excess


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_what_is_recorded_is_what_happened(family: str, positions: Any) -> None:
    """Against the features of every token in a fresh run of all of them, and |u_k| = |G_k alpha_k|."""
    model = chatting(family)
    controller = Controller.combine(
        controller_for(model, positions=positions, layers=[0, 1]), controller_for(model, "b", positions=positions)
    )
    recording, prompt, strength = Recording(), [5, 17, 3, 42], [2.0, -1.0]
    options: mlx_lqr.Options = {"controller": controller, "strength": strength, "max_tokens": 5, "temperature": 0}
    recorded = tokens(stream(model, prompt, record=recording, **options))
    assert recorded == tokens(stream(model, prompt, **options))  # recording changes nothing
    run_tokens = [*prompt, *(token for token in recorded if token is not None)][:-1]  # the last one is never run
    first = 0 if positions == "all" else len(prompt) - 1
    error, push = recording.feature_error(), recording.push()
    assert error.shape == (len(run_tokens) - first, 3, 2)
    target = controller.offset + np.array(strength) * controller.setpoint
    for n in range(len(error)):
        law = LinearFeedback(controller, strength)
        decoder = model.decoder(law)
        decoder.fill([run_tokens[:first]], steered=False)
        if n:
            decoder.fill([run_tokens[first : first + n]], steered=True)
        seen = Recording()
        decoder.law = RecordedFeedback(controller, strength, seen)
        decoder.step([run_tokens[first + n]])
        assert np.allclose(error[n], seen.feature_error()[0], atol=1e-4, equal_nan=True)
    assert np.allclose(push, np.linalg.norm(np.einsum("kdm,nkm->nkd", controller.gain, error), axis=2), atol=1e-5)
    if positions == "all":  # the first token stands alone: its residual stream is that of a prompt of one token
        z = model.residuals([prompt[:1]], law=LinearFeedback(controller, strength), steer_all=True)[0, :-1]
        assert np.allclose(error[0], target - np.einsum("kdm,kd->km", controller.sensor, z), atol=1e-4)


def test_layers_without_control_are_not_recorded() -> None:
    model = chatting()
    recording = Recording()
    list(
        stream(
            model, [1, 2], controller=controller_for(model, layers=[1]), max_tokens=3, record=recording, temperature=0
        )
    )
    assert recording.push().shape == (3, 3)
    assert np.isnan(recording.push()[:, [0, 2]]).all()
    assert not np.isnan(recording.push()[:, 1]).any()


@pytest.mark.parametrize("own", [{"adaptive": True}, {"overflow": "roll"}, {}])
def test_many_prompts_go_one_by_one_where_they_must(own: Options) -> None:
    model = chatting()
    controller = controller_for(model)
    prompts = [[1, 2], [3, 4, 5], [6]]
    options: Options = {**own, "controller": controller, "max_tokens": 4, "temperature": 1.0, "seed": 5}
    recordings, done = [Recording() for _ in prompts], list[tuple[str, int, int]]()
    texts = [""] * len(prompts)
    pieces = batch_stream(model, prompts, records=recordings, progress=lambda *state: done.append(state), **options)
    for i, piece in pieces:
        texts[i] += piece.text
    assert done == [("Answers", i, 3) for i in (1, 2, 3)]
    for i, prompt in enumerate(prompts):
        alone = Recording()
        assert texts[i] == mlx_lqr.generate(model, prompt, **{**options, "seed": 5 + i, "record": alone})
        assert np.array_equal(recordings[i].push(), alone.push())
    assert mlx_lqr.batch_generate(model, prompts, **options) == texts


def test_nothing_is_kept_where_nobody_asks() -> None:
    model = tiny("llama")
    law = law_on(model, controller_for(model), 1.0)
    assert type(law) is LinearFeedback
    assert type(law_on(model, controller_for(model), 1.0, Recording())) is RecordedFeedback
    assert Recording().feature_error().size == Recording().push().size == 0
    with pytest.raises(InputError, match="one prompt at a time"):
        mlx_lqr.batch_generate(model, [[1], [2]], controller=controller_for(model), record=Recording())


def test_the_answer_is_cut_out_of_what_was_run() -> None:
    """Not the prompt's other tokens, and not an end token that was run but not shown."""
    model = chatting()
    for positions, first in (("last", 0), ("all", 2)):
        controller = controller_for(model, positions=positions)
        recording = Recording()
        list(stream(model, [1, 2, 3], controller=controller, max_tokens=4, record=recording, temperature=0))
        error, push = recording.answer(controller, 3, 2)
        assert np.array_equal(error, recording.feature_error()[first : first + 3])
        assert np.array_equal(push, recording.push()[first : first + 3])


def test_the_excess_is_the_largest_of_all_ratios() -> None:
    model = tiny("llama")
    controller = controller_for(model)
    assert largest_excess(controller, np.ones((2, 3, 1)), np.ones((2, 3))) is None  # no region
    region = np.array([[1.0], [2.0], [np.inf]], np.float32)
    known = replace(controller, checked_error=region, checked_push=4 * region)
    assert largest_excess(known, np.empty((0, 0, 0)), np.empty((0, 0))) is None  # no token
    error = np.array([[[0.5], [-3.0], [99.0]], [[0.9], [1.0], [5.0]]])
    push = np.array([[np.nan, 1.0, 1.0], [1.0, 1.0, 1.0]])
    excess = largest_excess(known, error, push)
    assert excess is not None
    assert (excess.quantity, excess.layer, excess.token, excess.ratio, excess.outside) == ("alpha", 1, 0, 1.5, 0.5)
    assert str(excess) == (
        "|alpha_k| of a at layer 1, the prompt's last token, is 3, 1.5 times what was checked; 50% of the tokens left "
        "the linear region"
    )
    pushed = largest_excess(known, 0 * error, np.where(push == 1, 40.0, 0.0))
    assert pushed is not None
    assert (pushed.quantity, pushed.layer, pushed.token, pushed.ratio) == ("push", 0, 1, 10.0)
    assert "|u_k| of a at layer 0, token 1," in str(pushed)


def with_region(controller: Controller, size: float) -> Controller:
    region = np.full_like(controller.setpoint, size)
    return replace(controller, checked_error=region, checked_push=region)


@pytest.mark.parametrize(("positions", "adaptive"), [("last", False), ("all", False), ("last", True)])
def test_a_chat_knows_how_far_it_went(positions: Any, adaptive: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model = chatting()
    chat = Chat(model, options={"max_tokens": 5, "adaptive": adaptive, "temperature": 0})
    assert chat.excess() is None
    controller = controller_for(model, positions=positions)
    chat.add(controller, 2.0)
    answer = tokens(chat.answer("hello"))
    assert chat.excess() is None  # no region
    chat.add(with_region(controller, 0.01), 2.0)
    answer = tokens(chat.answer("hello again"))
    excess = chat.excess()
    assert excess is not None
    assert excess.ratio > 1
    assert 0 <= excess.token <= len(answer)
    before = excess
    tracked = chat.track()
    assert chat.excess() == before  # looking does not count as steering
    alpha = np.abs(tracked.error)
    assert np.allclose(tracked.push, np.linalg.norm(tracked.gain @ tracked.error[..., None], axis=1)[:, 0], atol=1e-5)
    draw_tracking(tracked, chat.excess())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if line.strip()[:1].isdigit() and "┃" in line]
    for layer, *_, shown_alpha, shown_push, _bar in ([*row[:4], row[4], row[5], row[6]] for row in rows):
        assert abs(float(shown_alpha)) == pytest.approx(alpha[int(layer), 0], rel=1e-2)
        assert float(shown_push) == pytest.approx(tracked.push[int(layer)], rel=1e-2)
    assert "Over the whole answer:" in "\n".join(lines)
    list(islice(chat.answer("more"), 2))  # cut short
    excess = chat.excess()
    assert excess is not None
    assert excess.token <= 2
    chat.off()
    list(chat.answer("more"))
    assert chat.excess() is None


def test_the_last_token_that_was_run_is_recorded_as_it_was() -> None:
    model = chatting()
    controller = with_region(controller_for(model), 1.0)
    chat = Chat(model, options={"max_tokens": 4, "temperature": 0})
    chat.add(controller, 1.5)
    answer = tokens(chat.answer("hello"))
    assert chat._turn is not None
    error, _ = chat._turn.measured()
    prompt = model.tokenizer.chat(chat.messages[:-1])
    run_tokens = [*prompt, *(token for token in answer[:-1] if token is not None)]
    strengths = [None] * (len(prompt) - 1) + [1.5] * len(answer)
    feature = last_features(model, controller, run_tokens, strengths)
    assert np.allclose(error[-1], controller.offset + 1.5 * controller.setpoint - feature, atol=1e-4)


def test_chat_warns_once_an_answer(dog: Path, tmp_path: Path) -> None:
    file = tmp_path / "dog.safetensors"
    with_region(Controller.load(dog), 0.1).save(file)
    result = run("chat", "demo", "-c", f"{file}:2", "-n", 3, "--temperature", 0, text="Hello\nAnd more\n/track\n")
    assert result.exit_code == 0, result.output
    notes = [line for line in result.stderr.splitlines() if line.startswith("Note: ")]
    assert len(notes) == 2
    assert all("times what was checked" in note and "dog at layer 2" in note for note in notes)
    assert "Over the whole answer" in result.stdout
    with_region(Controller.load(dog), 1e6).save(file)
    assert "Note" not in run("chat", "demo", "-c", f"{file}:2", "-n", 2, "--temperature", 0, text="Hello\n").stderr


def test_generate_shows_the_control_of_every_token(dog: Path, prompt_file: Path, smollm2: Model) -> None:
    controller = Controller.load(dog)
    (answer,) = answers("-p", PROMPT, "-n", 3, "-c", f"{dog}:2", "--track")
    control = answer["control"]
    assert control["layers"] == list(range(20, 30))
    assert np.shape(control["alpha"]["dog"]) == np.shape(control["push"]) == (3, 10)
    assert control["excess"] is None
    tracking = answer["tracking"]["dog"]
    beyond = 2 * (controller.setpoint - controller.magnitude)[:, 0]  # where the push ends lies beyond the setpoint
    alpha = np.array(tracking["setpoint"]) + beyond - np.array(tracking["feature"])
    assert control["alpha"]["dog"][0] == pytest.approx(alpha[20:], rel=1e-2, abs=0.05)
    norms = np.linalg.norm(controller.gain[20:, :, 0], axis=1)
    assert np.allclose(control["push"], np.abs(control["alpha"]["dog"]) * norms, rtol=1e-3)
    many = answers("--prompts", prompt_file, "-n", 2, "-c", f"{dog}:2", "--track")
    assert [np.shape(one["control"]["push"]) for one in many] == [(2, 10)] * 3
    plain = answers("-p", PROMPT, "-n", 2, "-c", f"{dog}:2")
    assert "control" not in plain[0]
    assert json.dumps(many)
