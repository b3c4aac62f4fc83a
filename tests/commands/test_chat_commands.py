"""What can be typed after a slash: answers again, undone and set; steering turned off and on, and fitted meanwhile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.chance import allow_unseeded
from helpers.command_line import refused, run, small
from helpers.controllers import controller_for
from helpers.decoding import tokens
from helpers.tiny_tokenizers import chatting

from mlx_lqr import InputError
from mlx_lqr.backends.protocol import Model
from mlx_lqr.commands.chat_commands import COMMANDS, GROUPS
from mlx_lqr.commands.chat_settings import SETTINGS
from mlx_lqr.commands.chat_state import steering_line
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.methods.steering import combine, load_steering
from mlx_lqr.runtime import Chat, stream
from mlx_lqr.runtime.generate import Options

GREEDY: Options = {"max_tokens": 6, "temperature": 0}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_LQR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    return small(monkeypatch)


def talk(*lines: str, given: tuple[object, ...] = ("-n", 6, "--temperature", 0)) -> Any:
    """What `mlx-lqr chat` comes to with these lines in a pipe."""
    result = run("chat", "tiny", *given, text="".join(f"{line}\n" for line in lines))
    assert result.exit_code == 0, result.output
    return result


def quick(model: Model, concept: str) -> Controller:
    return controller_for(model, concept, cost="feature", layers=[1, 2])


def messages_of(file: Path) -> list[str]:
    return [message["content"] for message in json.loads(file.read_text())["messages"]]


def test_another_answer_takes_the_place_of_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    allow_unseeded(monkeypatch)
    chat = Chat(chatting(), options={"max_tokens": 12, "temperature": 2.0, "top_p": 1.0})
    given = ["".join(piece.text for piece in pieces) for pieces in (chat.answer("a"), chat.answer("b"))]
    again = "".join(piece.text for piece in chat.regenerate())
    assert again != given[1]
    assert [message["content"] for message in chat.messages] == ["a", given[0], "b", again]
    plain = Chat(chatting(), options=GREEDY)
    list(plain.answer("a"))
    assert tokens(plain.regenerate()) == tokens(
        stream(plain.model, plain.model.tokenizer.chat(plain.messages[:1]), **GREEDY)
    )


def test_where_no_other_answer_comes_the_old_one_stays() -> None:
    chat = Chat(chatting(), options=GREEDY)
    chat.add(quick(chat.model, "a"), 1.0)
    for question in ("a", "b"):
        list(chat.answer(question))
    before = list(chat.messages)
    chat.set_strength(1e30)
    with pytest.raises(InputError, match="overflow"):
        list(chat.regenerate())
    assert chat.messages == before
    with pytest.raises(InputError, match="no answer"):
        list(Chat(chatting()).regenerate())


def test_what_is_undone_is_as_if_never_said() -> None:
    chat, other = Chat(chatting(), options=GREEDY), Chat(chatting(), options=GREEDY)
    list(chat.answer("a"))
    list(chat.answer("not this"))
    assert chat.undo() == "not this"
    list(other.answer("a"))
    assert tokens(chat.answer("b")) == tokens(other.answer("b"))
    assert chat.messages == other.messages
    chat.undo()
    chat.undo()
    with pytest.raises(InputError, match="no answer"):
        chat.undo()


def test_off_and_on_bring_back_what_was() -> None:
    chat = Chat(chatting(), options=GREEDY)
    controllers = [quick(chat.model, concept) for concept in "ab"]
    chat.add(combine(controllers), [2.0, 0.5])
    steered = tokens(chat.answer("hello"))
    chat.undo()
    chat.off()
    assert (chat.strengths, chat.resting) == ({}, {"a": 2.0, "b": 0.5})
    unsteered = tokens(Chat(chat.model, options=GREEDY).answer("hello"))
    assert tokens(chat.answer("hello")) == unsteered != steered
    chat.undo()
    with pytest.raises(InputError, match="/on"):
        chat.set_strength(1.0)
    chat.on("b")
    assert (chat.strengths, chat.resting) == ({"b": 0.5}, {"a": 2.0})
    chat.on()
    assert (chat.strengths, chat.resting) == ({"b": 0.5, "a": 2.0}, {})
    assert tokens(chat.answer("hello")) == steered
    chat.off("a")
    assert steering_line(chat) == "Steered: b 0.5."
    chat.add(controllers[0], 3.0)  # another one for what is off
    assert (chat.strengths, chat.resting) == ({"b": 0.5, "a": 3.0}, {})
    with pytest.raises(InputError, match="nothing was turned off"):
        chat.on()


def test_every_setting_is_set_and_listed(model: Model, tmp_path: Path) -> None:
    values = {"temperature": "0.5", "top_p": "0.7", "top_k": "5", "min_p": "0.1", "repetition_penalty": "1.2"}
    values |= {"frequency_penalty": "0.4", "presence_penalty": "-0.1"}
    values |= {"seed": "3", "max_tokens": "4", "system": "be brief, please", "markdown": "on", "stats": "on"}
    assert values.keys() == SETTINGS.keys()
    saved = tmp_path / "chat.json"
    lines = [f"/set {name} {value}" for name, value in values.items()]
    result = talk(*lines, "hello", f"/save {saved}", "/set", "/set seed none", "/set system none", "/new", "/set")
    rows = [line.split(maxsplit=1) for line in result.stderr.splitlines() if line.split(" ")[0] in SETTINGS]
    for set_first, listed, (name, value) in zip(rows[:12], rows[12:24], values.items(), strict=True):
        assert set_first[0] == listed[0] == name
        assert set_first[1].startswith(f"{value} ")
        assert listed[1].startswith(f"{value} ")
    assert [row[1].split()[0] for row in rows[-12:] if row[0] in ("seed", "system")] == ["none", "none"]
    options: Options = {"temperature": 0.5, "top_p": 0.7, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    options |= {"frequency_penalty": 0.4, "presence_penalty": -0.1, "seed": 3, "max_tokens": 4}
    chat = Chat(model, options=options)
    chat.system_prompt = "be brief, please"
    list(chat.answer("hello"))
    assert messages_of(saved) == [message["content"] for message in chat.messages]
    assert "[4 tokens, " in result.stderr


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/set heat 1", "no setting 'heat'"),
        ("/set temperature hot", "temperature must be a number, not 'hot'"),
        ("/set temperature -1", "temperature must be zero or above"),
        ("/set top_p nan", "top_p must be a number"),
        ("/set top_k 1.5", "top_k must be a whole number"),
        ("/set max_tokens 0", "max_tokens"),
        ("/set stats maybe", "stats must be on or off"),
        ("/regen", "no answer"),
        ("/undo", "no answer"),
        ("/on", "nothing was turned off"),
        ("/name me", "not kept"),
        ("/resume", "no session"),
        ("/fit", "/fit NAME"),
        ("/fit dog one.txt", "/fit NAME"),
        ("/fit 'dog", "No closing quotation"),
        ("/fit unicorn", "no bundled concept 'unicorn'"),
        ("/fit ../dog a b", "cannot be called"),
        ("/fit mine missing.txt missing.txt", "cannot read missing.txt"),
    ],
)
def test_mistakes(line: str, says: str, model: Model) -> None:
    assert says in refused("chat", "tiny", text=line + "\n")


def test_a_setting_that_is_refused_stays_as_it_was() -> None:
    chat = Chat(chatting(), options=GREEDY)
    with pytest.raises(InputError):
        chat.set_options({"top_k": 4, "temperature": -1.0})
    assert chat.options == GREEDY


def test_a_concept_is_fitted_and_steers(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ["a dog barks", "the dog runs", "my dog sleeps"], ["a stone lies", "the tree grows", "my hat falls"]
    monkeypatch.setattr("mlx_lqr.commands.kept_controllers.bundled_prompts", lambda concept: few)
    files, saved = [tmp_path / "with prompts.txt", tmp_path / "without.txt"], tmp_path / "chat.json"
    for file, prompts in zip(files, few, strict=True):
        file.write_text("".join(f"{prompt}\n" for prompt in prompts))
    own = f"/fit own '{files[0]}' {files[1]}"
    result = talk("/fit dog", "/off", own, "hello", f"/save {saved}", "/concepts", "/off", "/fit dog")
    dog, mine, again = (
        Path(line.partition(": ")[2]) for line in result.stderr.splitlines() if line.startswith("The controller:")
    )
    assert dog == again
    for file, concept, state in ((dog, "dog", "off"), (mine, "own", "on")):
        steering = load_steering(file)
        assert steering.concepts == (concept,)
        assert steering.strength is not None  # it is calibrated
        assert f"{concept} {steering.strength[0]:g}, {state}: {file}" in result.stderr
    chat = Chat(model, options=GREEDY)
    chat.add(load_steering(mine))
    list(chat.answer("hello"))
    assert messages_of(saved) == [message["content"] for message in chat.messages]


def test_help_lists_every_command_in_a_group(model: Model) -> None:
    listed = [name for names in GROUPS.values() for name in names]
    assert sorted(listed) == sorted(COMMANDS)
    shown = talk("/help").stderr
    assert all(f"  /{name}" in shown for name in COMMANDS)
    assert max(map(len, shown.splitlines()[:-1])) <= 80
    for leave in ("/quit", "/exit", "/bye"):
        assert talk(leave, "/not-read").exit_code == 0


def test_the_frequency_penalty_that_is_listed_is_the_one_that_holds(model: Model) -> None:
    result = talk("/set", "/set temperature 0", "/set", "/set frequency_penalty 0.7", given=())
    shown = [line.split()[1] for line in result.stderr.splitlines() if line.startswith("frequency_penalty")]
    assert shown == ["0.3", "0", "0.7"]
