"""A conversation that goes on later: with its messages, options and steering, or a line that says why not."""

from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import refused, run, small
from helpers.controllers import controller_for
from helpers.tiny_tokenizers import chatting

from mlx_lqr import InputError
from mlx_lqr.backends.protocol import Model
from mlx_lqr.commands import chat_sessions
from mlx_lqr.commands.chat_commands import carry_out
from mlx_lqr.commands.chat_state import Conversation
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.runtime import Chat
from mlx_lqr.runtime.generate import Options
from mlx_lqr.runtime.session import read_session

OPTIONS: Options = {"max_tokens": 6, "temperature": 0.5, "seed": 3, "stop": ["zz"], "overflow": "roll"}
OPTIONS |= {"frequency_penalty": 0.4, "presence_penalty": -0.1}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_LQR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model() -> Model:
    return chatting()


@pytest.fixture(scope="module")
def controllers(model: Model) -> list[Controller]:
    return [controller_for(model, concept, cost="feature", layers=[1, 2]) for concept in "ab"]


@pytest.fixture
def conversation(cache: Path, tmp_path: Path, model: Model, controllers: list[Controller]) -> Conversation:
    """One that is kept as "first", steered towards a, with b off."""
    conversation = Conversation(Chat(model, options=OPTIONS), session="first")
    for controller, strength in zip(controllers, (2.0, 0.5), strict=True):
        file = tmp_path / f"{controller.concepts[0]}.safetensors"
        controller.save(file)
        conversation.add(str(file), controller, strength)
    conversation.chat.off("b")
    list(conversation.chat.answer("hello"))
    chat_sessions.keep(conversation)
    return conversation


def test_a_session_brings_everything_back(conversation: Conversation) -> None:
    other = Conversation(Chat(conversation.chat.model, options={"max_tokens": 3, "temperature": 0.0}))
    chat_sessions.resume(other, "", given={"max_tokens"})
    assert other.session == "first"
    assert other.files == conversation.files
    assert other.chat.options == {**OPTIONS, "max_tokens": 3}
    assert other.chat.messages == conversation.chat.messages
    assert (other.chat.strengths, other.chat.resting) == ({"a": 2.0}, {"b": 0.5})
    other.chat.set_options({"max_tokens": 6})
    texts = ["".join(piece.text for piece in one.chat.answer("more")) for one in (conversation, other)]
    assert texts[0] == texts[1]


def test_sessions_are_private_and_have_names(conversation: Conversation, cache: Path) -> None:
    (file,) = (cache / "sessions").glob("*.json")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    chat_sessions.rename(conversation, "second")
    assert chat_sessions.session_names() == ["second"]
    for name in ("second", "../second", ".hidden", "a/b", ""):
        with pytest.raises(InputError):
            chat_sessions.rename(conversation, name)
    conversation.session = "third"
    chat_sessions.keep(conversation)
    os.utime(chat_sessions.session_file("second"), (1e9, 1e9))
    assert chat_sessions.session_names() == ["third", "second"]
    assert chat_sessions.known_session("") == "third"
    with pytest.raises(InputError, match="no session is called 'fourth': there are third, second"):
        chat_sessions.known_session("fourth")
    assert len({chat_sessions.new_name() for _ in range(2)} - {"third"}) in (1, 2)


def test_two_sessions_never_share_a_file(
    conversation: Conversation, model: Model, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """Begun in the same second, or given a name that another one takes before they are written."""
    monkeypatch.setattr("time.strftime", lambda *_: "now")
    both = [Conversation(Chat(model, options=OPTIONS), session=chat_sessions.new_name()) for _ in range(2)]
    assert [one.session for one in both] == ["now", "now"], "neither is written yet"
    for i, one in enumerate(both):
        list(one.chat.answer(f"hello {i}"))
        assert not chat_sessions.is_kept(one)
        chat_sessions.keep(one)
        assert chat_sessions.is_kept(one)
    assert [one.session for one in both] == ["now", "now-1"]
    for i, one in enumerate(both):
        list(one.chat.answer("more"))
        chat_sessions.keep(one)
        assert one.session is not None
        entries = json.loads(chat_sessions.session_file(one.session).read_text("utf-8"))
        assert [m["content"] for m in entries["messages"][::2]] == [f"hello {i}", "more"]
    chat_sessions.session_file("other").touch(mode=0o600)  # which somebody is about to write
    assert set(chat_sessions.session_names()) == {"first", "now", "now-1"}
    with pytest.raises(InputError, match="there is a session other"):
        chat_sessions.rename(conversation, "other")
    assert conversation.session == "first"


def test_one_chat_at_a_time_goes_on_with_a_session(conversation: Conversation, model: Model) -> None:
    """The lock is of threads as of processes, and a chat that has begun the session has it too."""

    def refusal() -> str | None:
        """What another chat is told that would go on with it, before and after its model is loaded; None: nothing."""
        other = Conversation(Chat(model, options=OPTIONS))
        with ThreadPoolExecutor(1) as thread:
            try:
                thread.submit(chat_sessions.known_session, "", private=False).result()
            except InputError as error:
                with pytest.raises(InputError, match=str(error)):
                    thread.submit(chat_sessions.resume, other, "").result()
                assert not other.chat.messages
                return str(error)
            thread.submit(chat_sessions.resume, other, "").result()
            assert len(other.chat.messages) == 2
            thread.submit(chat_sessions.leave, other).result()
            return None

    in_use = "another chat goes on with the session first: end it there first"
    assert refusal() == in_use
    to_read = Conversation(Chat(model, options=OPTIONS), private=True)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(chat_sessions.resume, to_read, "first").result()
    assert to_read.chat.messages == conversation.chat.messages
    chat_sessions.leave(conversation)
    assert refusal() is None
    chat_sessions.resume(conversation, "first")
    assert refusal() == in_use
    chat_sessions.rename(conversation, "second")
    assert refusal() == in_use.replace("session first", "session second")
    carry_out(conversation, "new")
    assert refusal() is None
    assert not list(chat_sessions.session_file("first").parent.glob(".*.lock"))


def test_what_cannot_be_had_again_is_said(
    conversation: Conversation,
    controllers: list[Controller],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a.safetensors").unlink()
    controllers[0].save(tmp_path / "b.safetensors")
    chat_sessions.resume(conversation, "first")
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in said[:2]] == ["Note", "Note"]
    assert "b is left out" in said[0]
    assert "a is left out" in said[1]
    assert conversation.chat.strengths == {}
    assert len(conversation.chat.messages) == 2


def test_a_folder_that_cannot_be_written_is_no_reason_not_to_chat(
    conversation: Conversation, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (cache / "sessions").iterdir():
        file.unlink()
    (cache / "sessions").rmdir()
    (cache / "sessions").write_text("no folder")
    chat_sessions.keep(conversation)
    assert "Note: this session is not kept" in capsys.readouterr().err
    assert conversation.session is None


STEERED = {"concept": "a", "file": "a.safetensors", "strength": 1.0, "on": True}


@pytest.mark.parametrize(
    "entries",
    [
        {"options": None},
        {"steering": {}},
        {"options": {"temperature": "hot"}},
        {"options": {"temperature": True}},
        {"options": {"max_tokens": 1.5}},
        {"options": {"seed": []}},
        {"options": {"stop": [1]}},
        {"options": {"record": 1}},
        {"options": {"adaptive": "yes"}},
        {"steering": [{**STEERED, "strength": "much"}]},
        {"steering": [{**STEERED, "on": 1}]},
        {"steering": [{**STEERED, "file": None}]},
        {"steering": [{**STEERED, "more": 1}]},
        {"steering": ["a"]},
        {"steering": [None]},
        {"messages": [{"role": "robot", "content": "a"}]},
        {"model": 3},
    ],
)
def test_a_damaged_session_is_refused_and_changes_nothing(entries: dict[str, Any], conversation: Conversation) -> None:
    file = chat_sessions.session_file("first")
    sound = json.loads(file.read_text())
    read_session(file)
    file.write_text(json.dumps({**sound, **entries}))
    messages, strengths = list(conversation.chat.messages), conversation.chat.strengths
    with pytest.raises(InputError) as refusal:
        chat_sessions.resume(conversation, "first")
    assert "\n" not in str(refusal.value)
    assert "first.json" in str(refusal.value)
    assert (conversation.chat.messages, conversation.chat.strengths) == (messages, strengths)


def test_a_session_goes_on_in_a_pipe(conversation: Conversation, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert small(monkeypatch).fingerprint == conversation.chat.model.fingerprint
    given = ["chat", "tiny", "--resume", "first", "--seed", 4]
    result = run(*given, "--private", text="more\n/set\n/resume\nmore\n")
    assert result.exit_code == 0, result.output
    assert "2 messages of first. Steered: a 2." in result.stderr
    rows = [line.split()[:2] for line in result.stderr.splitlines()]
    assert ["temperature", "0.5"] in rows
    assert ["seed", "4"] in rows
    assert len(json.loads(chat_sessions.session_file("first").read_text())["messages"]) == 2
    assert run(*given, text="more\n").exit_code == 0
    assert len(json.loads(chat_sessions.session_file("first").read_text())["messages"]) == 4
    assert "no session is called 'other'" in refused("chat", "tiny", "--resume", "other", text="")
    assert run("chat", "tiny", "--seed", 1, text="hello\n").exit_code == 0
    assert chat_sessions.session_names() == ["first"]  # what comes through a pipe is not kept
