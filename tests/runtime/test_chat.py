"""A conversation: what is reused between answers changes none, strengths act at once, nothing that was said is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.backends import tiny_on
from helpers.by_hand import last_features
from helpers.command_line import refused, run
from helpers.controllers import controller_for
from helpers.decoding import answered_anew, tokens
from helpers.tiny_tokenizers import Letters, chatting

import mlx_lqr
from mlx_lqr import InputError, Options
from mlx_lqr.backends.protocol import Model
from mlx_lqr.commands.chat_view import draw_tracking
from mlx_lqr.convert.sources import demo_model
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.methods.alqr import LinearFeedback
from mlx_lqr.runtime import Chat, stream

QUESTIONS = ["hello", "tell me more", "and then"]


@pytest.mark.parametrize("positions", [None, "last", "all"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_every_answer_is_that_of_a_fresh_decode(family: str, positions: str | None) -> None:
    # The second question still fits the sliding window, so that the cache can be wound back; the third does not.
    model = chatting(family, **({"sliding_window": 24} if family == "gemma3_text" else {}))
    chat = Chat(model, options={"max_tokens": 8, "temperature": 0})
    if positions is not None:
        chat.add(controller_for(model, positions=positions), 2.0)
    decoders = []
    for question in QUESTIONS:
        assert tokens(chat.answer(question)) == answered_anew(chat)
        assert chat._turn is not None
        decoders.append(chat._turn.decoder)
        if positions is not None:
            chat.set_strength(chat.strengths["a"] + 1.5)
    assert (decoders[0] is decoders[1]) == (positions != "all")
    assert (decoders[1] is decoders[2]) == (positions != "all" and family == "llama")


def test_every_answer_is_that_of_a_fresh_decode_while_steering_changes() -> None:
    model = chatting()
    chat = Chat(model, options={"max_tokens": 6, "temperature": 0})
    answers = [tokens(chat.answer("hello"))]
    for change in (
        # what was run without steering is of no use to this one
        lambda: chat.add(controller_for(model, positions="all"), 3.0),
        chat.off,
        lambda: chat.add(controller_for(model), 3.0),
        lambda: chat.add(controller_for(model, "b"), 2.0),
        lambda: chat.off("a"),
        lambda: chat.options.update({"repetition_penalty": 1.3}),
        lambda: chat.options.update({"overflow": "roll", "repetition_penalty": 1.0}),
    ):
        change()
        answers.append(tokens(chat.answer("more")))
        assert answers[-1] == answered_anew(chat)
    assert chat.strengths == {"b": 2.0}


def test_answers_of_the_real_model_are_those_of_fresh_decodes(smollm2: Model, dog: Path) -> None:
    chat = Chat(smollm2, options={"max_tokens": 6, "temperature": 0})
    chat.add(Controller.load(dog), 2.0)
    for question, change in zip(QUESTIONS, (lambda: chat.set_strength(3.5), chat.off, chat.off), strict=True):
        assert tokens(chat.answer(question)) == answered_anew(chat)
        change()


def test_from_the_second_answer_on_there_is_more_feedback(tmp_path: Path) -> None:
    model = chatting()
    chat = Chat(model, options={"max_tokens": 8, "temperature": 0})
    first = controller_for(model, positions="all")
    chat.add(first, 0.5)
    chat.system_prompt = "be brief"

    def shares() -> tuple[float, ...]:
        assert chat._turn is not None
        assert isinstance(chat._turn.controller, Controller)
        return chat._turn.controller.shares

    list(chat.answer("hello"))
    assert shares() == first.shares < first.in_conversation().shares
    answer = tokens(chat.answer("more"))
    assert shares() == first.in_conversation().shares
    prompt = model.tokenizer.chat(chat.messages[:-1])
    steered = {"strength": 0.5, **chat.options}
    assert answer == tokens(stream(model, prompt, controller=first.in_conversation(), **steered))
    assert answer != tokens(stream(model, prompt, controller=first, **steered))
    assert np.allclose(chat.track().steered.setpoint, first.in_conversation().setpoint_at([0.5]))
    chat.set_strength(0.3)
    assert tokens(chat.steered()) == answered_anew(chat) != answer
    chat.save(tmp_path / "chat.json")
    chat.undo()
    chat.undo()
    list(chat.answer("hello"))
    assert shares() == first.shares
    chat.load(tmp_path / "chat.json")
    list(chat.answer("and then"))
    assert shares() == first.in_conversation().shares


def by_hand(model: Model, law: LinearFeedback, prompt: list[int], strengths: list[float]) -> list[int]:
    """Tokens from one step after another, step i under strengths[i]."""
    decoder = model.decoder(law)
    decoder.fill([prompt[:-1]], steered=False)
    decoded = [prompt[-1]]
    for strength in strengths:
        law.strength = strength
        decoded += decoder.sample(decoder.step(decoded[-1:])).tolist()
    return decoded[1:]


def test_a_strength_changed_during_an_answer_acts_from_the_next_step_on() -> None:
    model = chatting()
    chat = Chat(model, options={"max_tokens": 12, "temperature": 0})
    controller = controller_for(model)
    chat.add(controller, 1.0)
    pieces = chat.answer("hello")
    answered = tokens(islice(pieces, 3))
    chat.set_strength(6.0)
    answered += tokens(pieces)
    prompt = model.tokenizer.chat(chat.messages[:-1])
    law = LinearFeedback(controller, 1.0)
    # With the third token, the step that makes the fourth has begun.
    assert answered == by_hand(model, law, prompt, [1.0] * 4 + [6.0] * 8)
    assert answered != by_hand(model, law, prompt, [1.0] * 12)
    assert chat.track().strength == (6.0,)


@pytest.mark.parametrize(("positions", "adaptive"), [("last", False), ("all", False), ("last", True)])
def test_tracking_shows_the_answer_as_it_was_steered(positions: Any, adaptive: bool) -> None:
    model = chatting("gemma3_text")  # its window of 6 has long moved on
    chat = Chat(model, options={"max_tokens": 9, "adaptive": adaptive, "temperature": 0})
    controller = controller_for(model, positions=positions)
    chat.add(controller, 1.0)
    pieces = chat.answer("hello")
    answer = tokens(islice(pieces, 3))
    chat.set_strength(4.0)
    answer += tokens(pieces)
    chat.set_strength(0.0)  # of the next answer
    tracked = chat.track()
    assert tracked.strength == (4.0,)
    assert np.allclose(tracked.steered.setpoint, controller.offset + 4 * controller.magnitude)
    prompt = model.tokenizer.chat(chat.messages[:-1])
    if adaptive:
        controller = mlx_lqr.adapt(model, controller, prompt)
    before: list[float | None] = [1.0 if positions == "all" else None] * (len(prompt) - 1)
    run = [*prompt, *(token for token in answer if token is not None)]
    expected = last_features(model, controller, run, [*before, *[1.0] * 4, *[4.0] * 6])
    assert np.allclose(tracked.steered.feature, expected, atol=1e-4)
    plain = last_features(model, controller, run, [None] * len(run))
    assert np.allclose(tracked.unsteered.feature, plain, atol=1e-4)
    assert np.abs(expected - plain).max() > 0.01
    pushed = controller.gain @ (controller.offset + 4 * controller.setpoint - expected)[..., None]  # (T, d, 1)
    assert np.allclose(tracked.push, np.linalg.norm(pushed[..., 0], axis=1), rtol=1e-3)
    assert chat.strengths == {"a": 0.0}


def test_tracking_is_drawn_where_the_numbers_are(capsys: pytest.CaptureFixture[str]) -> None:
    model = chatting()
    chat = Chat(model, options={"max_tokens": 4, "temperature": 0})
    chat.add(controller_for(model, layers=[1, 2]), 2.0)
    chat.add(controller_for(model, "b"), 1.0)
    list(chat.answer("hello"))
    tracked = chat.track()
    draw_tracking(tracked)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if line.strip()[:1].isdigit() and "┃" in line]
    assert len(rows) == 2 + 3  # the layers where something is controlled
    for (layer, setpoint, feature, without, *_), concept in zip(rows, (0, 0, 1, 1, 1), strict=True):
        shown = np.array([float(setpoint), float(feature), float(without)])
        parts = tracked.steered.setpoint, tracked.steered.feature, tracked.unsteered.feature
        assert np.allclose(shown, [part[int(layer), concept] for part in parts], rtol=1e-3)


def test_what_cannot_be_compared_or_tracked_is_refused() -> None:
    model = chatting()
    chat = Chat(model, options={"max_tokens": 4, "temperature": 0})
    for refusal in (chat.steered, chat.unsteered, chat.track):
        with pytest.raises(InputError, match="no answer"):
            refusal()
    list(chat.answer("hello"))
    with pytest.raises(InputError, match="nothing steers"):
        chat.steered()
    with pytest.raises(InputError, match="not steered"):
        chat.track()
    chat.restart()
    with pytest.raises(InputError, match="no answer"):
        chat.track()


def test_comparing_leaves_the_conversation_alone() -> None:
    model = chatting()
    chat = Chat(model, options={"max_tokens": 6, "temperature": 0})
    chat.add(controller_for(model), 3.0)
    given = "".join(piece.text for piece in chat.answer("hello"))
    before = json.dumps(chat.messages)
    assert "".join(piece.text for piece in chat.steered()) == given
    plain = Chat(model, options={"max_tokens": 6, "temperature": 0})
    assert tokens(plain.answer("hello")) == tokens(chat.unsteered())
    chat.set_strength(8.0)
    assert tokens(chat.steered()) == answered_anew(chat)  # steered otherwise than the answer given
    assert json.dumps(chat.messages) == before
    assert tokens(chat.answer("more")) == answered_anew(chat)


def test_an_answer_cut_short_stays_and_the_chat_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chatting()
    chat = Chat(model, options={"max_tokens": 9, "temperature": 0})
    chat.add(controller_for(model), 1.0)
    pieces = chat.answer("hello")
    said: list[str] = [piece.text for piece in islice(pieces, 3)]
    chat.set_strength(1e30)
    with pytest.raises(InputError, match="overflow"):
        said.extend(piece.text for piece in pieces)
    assert len(said) >= 3
    assert chat.messages[-1] == {"role": "assistant", "content": "".join(said)}
    with pytest.raises(InputError, match="overflow"):
        list(chat.answer("nothing comes of this"))
    assert len(chat.messages) == 2
    chat.set_strength(1.0)
    assert tokens(chat.answer("more")) == answered_anew(chat)

    steps = iter(range(100))

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if next(steps) == 10:  # in the middle of a pass: some blocks have their new keys and values, some not
            raise KeyboardInterrupt
        return call(*arguments, **options)

    block = type(model.blocks[1])
    call = block.__call__
    monkeypatch.setattr(block, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(chat.answer("again"))
    monkeypatch.undo()
    assert chat.messages[-1]["role"] == "assistant"
    assert tokens(chat.answer("and again")) == answered_anew(chat)


def test_an_answer_ends_where_the_next_one_begins() -> None:
    chat = Chat(chatting(), options={"max_tokens": 9, "temperature": 0.0})
    first, second = chat.answer("hello"), chat.answer("more")
    said = "".join(piece.text for piece in islice(first, 3))
    answer = [next(second).token]
    with pytest.raises(InputError, match="has begun"):
        next(first)
    answer += tokens(second)
    assert [message["content"] for message in chat.messages[:3]] == ["hello", said, "more"]
    assert answer == answered_anew(chat)

    def ask(question: str) -> str:
        try:
            return "".join(piece.text for piece in chat.answer(question))
        except InputError as refusal:
            return str(refusal)

    with ThreadPoolExecutor(4) as pool:
        asked = list(pool.map(ask, ["one", "two", "three", "four"]))
    assert all("has begun" in one or len(one) <= 9 for one in asked)
    assert tokens(chat.answer("and now")) == answered_anew(chat)


def test_an_answer_gets_the_room_that_the_context_leaves() -> None:
    model = chatting(max_position_embeddings=24)
    chat = Chat(model, options={"max_tokens": 16, "temperature": 0})
    assert len(tokens(chat.answer("ten letter"))) == 25 - 12
    with pytest.raises(InputError, match="/new"):
        list(chat.answer("no room"))
    assert len(chat.messages) == 2
    chat.options["overflow"] = "roll"  # which the decoder of the first answer cannot
    assert tokens(chat.answer("room now")) == answered_anew(chat)
    rolling = Chat(model, options={"max_tokens": 16, "overflow": "roll", "temperature": 0})
    rolling.add(controller_for(model), 2.0)
    for question in QUESTIONS:
        assert tokens(rolling.answer(question)) == answered_anew(rolling)
    assert np.all(np.isfinite(rolling.track().steered.feature))


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_rolling_chat_runs_each_token_a_few_times_at_most(
    backend: str, steered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_on(backend, "llama", tie_word_embeddings=False)
    model._tokenizer = Letters()
    chat = Chat(model, options={"max_tokens": 8, "overflow": "roll", "temperature": 0.0})
    if steered:
        chat.add(controller_for(model), 2.0)
    run = 0
    decoder = type(model.decoder())
    append = decoder._append

    def counted(self: Any, tokens: Any, **options: Any) -> Any:
        nonlocal run
        run += tokens.shape[1]
        return append(self, tokens, **options)

    monkeypatch.setattr(decoder, "_append", counted)
    said, most, turns = 0, 0, 60
    for turn in range(turns):
        before = run
        answer = tokens(chat.answer(f"question {turn}"))
        most = max(most, run - before)
        said += len(f"question {turn}") + len(answer) + 2
        if turn % 20 == 19:
            assert answer == answered_anew(chat)
            run = before  # of the fresh one
    assert said > 4 * model.context_length
    assert run < 3 * said
    assert most <= model.context_length
    assert 2 <= len(chat.messages) - chat._forgotten < len(chat.messages) == 2 * turns


def test_a_rolling_chat_forgets_whole_turns_and_no_system_prompt() -> None:
    model = chatting(max_position_embeddings=64)
    chat = Chat(
        model, [{"role": "system", "content": "be brief"}], {"max_tokens": 8, "overflow": "roll", "temperature": 0.0}
    )
    prompts = []
    for question in ("one", "two", "three", "four", "five"):
        list(chat.answer(question))
        assert chat._turn is not None
        prompts.append(chat._turn.prompt)
        kept = [chat.messages[0], *chat.messages[1 + chat._forgotten : -1]]
        assert prompts[-1] == model.tokenizer.chat(kept)
        assert len(prompts[-1]) + 8 <= 64
        assert kept[1]["role"] == "user"
    assert chat._forgotten > 0
    assert "".join(piece.text for piece in chat.unsteered()) == chat.messages[-1]["content"]
    list(chat.answer("a question that is longer than all that the context of this model has place for, so it rolls"))
    assert chat._forgotten == len(chat.messages) - 3
    chat.options["overflow"] = "error"
    with pytest.raises(InputError, match="/new"):
        list(chat.answer("and all of it"))


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"max_tokens": 0}, {"stop": ("",)}, {"overflow": "spill"}])
def test_wrong_options_are_refused_before_anything_is_said(options: Options) -> None:
    with pytest.raises(InputError):
        Chat(chatting(), options=options)


def test_a_transcript_brings_the_conversation_back(tmp_path: Path) -> None:
    model = chatting()
    chat = Chat(model, [{"role": "system", "content": "Be brief.\nVery."}], options={"max_tokens": 6, "temperature": 0})
    chat.add(controller_for(model), 3.0)
    chat.add(controller_for(model, "b"), 0.5)
    list(chat.answer("hello"))
    chat.save(tmp_path / "chat.json")
    other = Chat(model, options={"max_tokens": 6, "temperature": 0})
    other.add(controller_for(model), 1.0)
    (note,) = other.load(tmp_path / "chat.json")
    assert "steered by b" in note
    other.add(controller_for(model, "b"), 1.0)
    assert other.load(tmp_path / "chat.json") == []
    assert other.strengths == chat.strengths == {"a": 3.0, "b": 0.5}
    assert other.messages == chat.messages
    assert tokens(other.answer("more")) == tokens(chat.answer("more"))
    model.name = "another"
    (note,) = other.load(tmp_path / "chat.json")
    assert "of tiny-llama; another continues it" in note


SOUND: dict[str, Any] = {
    "model": "m",
    "strengths": {},
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe", "UTF-16"),
        (b"{half", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "damaged"),
        (b"3", "damaged"),
        ({key: SOUND[key] for key in ("model", "strengths")}, "no 'messages'"),
        ({**SOUND, "strengths": {"a": "much"}}, "strength"),
        ({**SOUND, "strengths": {"a": float("nan")}}, "finite"),
        ({**SOUND, "messages": "hello"}, "wrong type"),
        ({**SOUND, "messages": ["hello"]}, "message 1 has no text"),
        ({**SOUND, "messages": [{"role": "user", "content": None}]}, "message 1 has no text"),
        ({**SOUND, "messages": [{"role": "robot", "content": "a"}]}, "message 1 has the role 'robot'"),
        ({**SOUND, "messages": [{"content": "a"}]}, "no 'role'"),
        ({**SOUND, "messages": [{"role": ["user"], "content": "a"}]}, "message 1 has the role"),
        ({**SOUND, "messages": [SOUND["messages"][1]]}, "message 1 has the role 'assistant'"),
        ({**SOUND, "messages": [*SOUND["messages"], SOUND["messages"][1]]}, "message 3 has the role 'assistant'"),
        (
            {**SOUND, "messages": [*SOUND["messages"], {"role": "system", "content": "a"}]},
            "message 3 has the role 'system'",
        ),
        ({**SOUND, "messages": [SOUND["messages"][0]]}, "no answer"),
    ],
)
def test_a_damaged_transcript_is_refused_and_changes_nothing(content: Any, says: str, tmp_path: Path) -> None:
    model = chatting()
    chat = Chat(model, options={"max_tokens": 4, "temperature": 0})
    list(chat.answer("hello"))
    before = list(chat.messages)
    file = tmp_path / "chat.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(InputError, match=says) as refusal:
        chat.load(file)
    assert "\n" not in str(refusal.value)
    assert chat.messages == before


def test_a_chat_in_a_pipe(dog: Path, tmp_path: Path) -> None:
    """Only answers on stdout, a line continued by a backslash, and every command."""
    saved = tmp_path / "chat.json"
    lines = ["What animal\\", "barks?", "/strength 0", "/strength dog 3.5", "/strength", "And now?", f"/save {saved}"]
    lines += ["/new", f"/load {saved}", "/off dog", f"/add {dog}:2", "/off", "/new", "/help", "/quit", "not read"]
    result = run("chat", "demo", "-c", f"{dog}:2", "-n", 6, "--seed", 1, "--system", "Be brief.", text="\n".join(lines))
    assert result.exit_code == 0, result.output
    transcript = json.loads(saved.read_text())
    roles = [message["role"] for message in transcript["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert transcript["messages"][1]["content"] == "What animal\nbarks?"
    answers = [message["content"] for message in transcript["messages"][2::2]]
    assert result.stdout == "".join(answer + "\n" for answer in answers)
    assert transcript["strengths"] == {"dog": 3.5}
    states = [line for line in result.stderr.splitlines() if "teered" in line][:7]
    assert [state.rpartition("teered")[2] for state in states] == [
        ": dog 0.",
        ": dog 3.5.",
        ": dog 3.5.",
        ": dog 3.5.",
        ".",
        ": dog 2.",
        ".",
    ]
    assert f"5 messages of {saved}" in result.stderr
    assert "Alt-Enter" in result.stderr


def test_the_options_and_the_strength_arrive_in_chat(smollm2: Model, dog: Path) -> None:
    question = "Tell me about your day."
    given = ["-n", 12, "--temperature", 1.5, "--top-k", 40, "--seed", 5, "--repetition-penalty", 1.2, "--stop", "zzz"]
    live = run("chat", "demo", "-c", f"{dog}:0", *given, text=f"/strength 4\n{question}\n").stdout
    options: Options = {"max_tokens": 12, "temperature": 1.5, "top_k": 40, "seed": 5, "repetition_penalty": 1.2}
    prompt = smollm2.tokenizer.chat([{"role": "user", "content": question}])
    controller = Controller.load(dog)
    assert live == mlx_lqr.generate(smollm2, prompt, controller=controller, strength=4.0, **options) + "\n"
    assert live != mlx_lqr.generate(smollm2, prompt, **options) + "\n"


def test_compare_and_track_are_drawn_in_a_pipe(dog: Path) -> None:
    result = run(
        "chat", "demo", "-c", f"{dog}:2", "-n", 6, "--temperature", 0, text="What barks?\n/compare\n/track\n/compare\n"
    )
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    headings = [i for i, line in enumerate(lines) if line.split() == ["Steered:", "dog", "2.", "Not", "steered."]]
    assert len(headings) == 2
    steered, plain = lines[headings[0] + 2][:40].strip(), lines[headings[0] + 2][40:].strip()
    assert lines[0].startswith(steered)
    assert plain
    assert plain != steered
    assert [int(line.split()[0]) for line in lines if "┃" in line and line.strip()[0].isdigit()] == [*range(20, 30)]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/strength lots", "strength must be a number"),
        ("/strength cat 2", "no concept 'cat'"),
        ("/strength nan", "finite"),
        ("/dance", "no command /dance"),
        ("/add missing.safetensors", "no file missing.safetensors"),
        ("/add", "name a file"),
        ("/off cat", "no concept 'cat'"),
        ("/compare", "no answer"),
        ("/track", "no answer"),
        ("/save", "name a file"),
        ("/save /dev/null/chat.json", "cannot write"),
        ("/load", "name a file"),
        ("/load missing.json", "cannot read missing.json"),
    ],
)
def test_mistakes_in_chat(line: str, says: str, dog: Path) -> None:
    assert says in refused("chat", "demo", "-c", dog, text=line + "\n")


def test_an_overflow_ends_a_pipe_with_one_line(dog: Path) -> None:
    assert "lower the strength" in refused("chat", "demo", "-c", f"{dog}:1e30", "--seed", 1, text="hello\n")


def test_mistakes_in_the_options_of_chat() -> None:
    assert "temperature" in refused("chat", "demo", "--temperature", -1, text="")
    assert "max_tokens" in refused("chat", "demo", "-n", 0, text="")
    command = [sys.executable, "-c", "from mlx_lqr.commands import main; main()", "chat", "demo"]
    done = subprocess.run(command, input=b"\xff\xfe\n", capture_output=True, check=False)
    assert done.returncode == 2
    assert b"Error: what comes through the pipe is not UTF-8 text" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_base_model_does_not_chat(tmp_path: Path, smollm2: Model) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in demo_model().iterdir():
        if file.suffix == ".safetensors":
            (base / file.name).symlink_to(file)
        elif file.name != "chat_template.jinja":
            shutil.copy(file, base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "no chat template" in refused("chat", base, text="hi\n")
