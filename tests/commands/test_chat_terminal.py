"""A chat as a person sees it: on a terminal, with what is typed, completed and stopped, and gone on with later."""

from __future__ import annotations

import json
import stat
from pathlib import Path

from helpers.terminal import Terminal, chat_on_a_terminal
from wcwidth import wcswidth

from mlx_lqr.backends.protocol import Model
from mlx_lqr.convert.sources import demo_model

STOP, UP, END = "\x03", "\x1b[A", "\x04"


def test_a_chat_and_how_it_goes_on(tmp_path: Path, smollm2: Model, dog: Path) -> None:
    (tmp_path / "demo").symlink_to(demo_model().parent)
    given = "-n", "400", "--temperature", "0", "-c", f"{dog}:1.5"
    with chat_on_a_terminal(*given, cache=tmp_path, columns=40) as chat:
        chat.until_prompt()
        converse(chat, tmp_path, dog)
    files = [tmp_path / "chat_history", tmp_path / "sessions" / "mine.json"]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600, 0o600]
    with chat_on_a_terminal("--resume", cache=tmp_path, columns=60) as chat:
        chat.until_prompt()
        go_on(chat)


def converse(chat: Terminal, cache: Path, dog: Path) -> None:
    """Several lines in a message, an answer that is stopped, another one, completion, and typing ahead."""
    begin = len(chat.lines)
    chat.type('"""Tell me\ra long story."""\r')
    chat.until_lines(begin + 6)
    chat.type(STOP)
    chat.until_prompt(begin)
    question, shown = chat.lines[begin - 1 : begin + 1], chat.lines[begin + 1 : -1]
    assert question == ['> """Tell me', '  a long story."""']
    assert shown.pop() == "[stopped]"
    assert max(map(wcswidth, shown)) <= 40
    said = last_messages(cache)
    assert said[0] == "Tell me\na long story."
    assert " ".join(shown).split() == said[1].split()  # no word was broken, and what was shown is kept
    chat.enter("/set max_t\t12")
    *_, again = chat.enter("/reg\t")
    assert last_messages(cache)[1].endswith(again)
    assert said[1].startswith(last_messages(cache)[1])  # the same one, since it is not drawn, with fewer tokens
    assert chat.enter("/stren\td\t2.5") == ["Steered: dog 2.5."]
    assert chat.enter("/off do\t") == ["Not steered."]
    assert chat.enter("/on\t") == ["Steered: dog 2.5."]
    assert chat.enter(f"/add {dog.parent}/d\t:1")[-1] == "Steered: dog 1."
    before = last_messages(cache)
    row = len(chat.lines)
    chat.type("And then?\r")
    chat.until_lines(row + 1)
    chat.type("/undo\r")  # while the answer is written
    chat.until("Forgot 'And then?' and its answer.")
    chat.until_prompt(row + 2)
    assert last_messages(cache) == before
    chat.enter("/name mine")
    chat.type(END)
    chat.until("Go on with it: mlx-lqr chat demo --resum\ne mine")  # one line, to be copied
    assert chat.process.wait(60) == 0


def go_on(chat: Terminal) -> None:
    """The session is there, what was typed is there, and tables fit the window whatever its width."""
    assert "2 messages of mine. Steered: dog 1." in chat.lines
    chat.type(UP)
    chat.until("> /name mine")
    chat.type(STOP)
    chat.until_prompt(chat.lines.index("> /name mine"))
    assert chat.enter("/set max_tokens")[0].split()[:2] == ["max_tokens", "12"]
    chat.enter("What barks?")
    for columns in (40, 200):
        chat.resize(columns)
        rows = chat.enter("/track")
        assert [int(row.split()[0]) for row in rows if row.strip()[:1].isdigit()] == [*range(30)]
        assert any("┃" in row for row in rows)
        assert ("without" in rows[1 if columns == 200 else 2]) == (columns == 200)
    chat.enter("/new")
    assert chat.enter("/resume mi\t") == ["4 messages of mine. Steered: dog 1."]
    chat.type("/bye\r")
    chat.until("Go on with it")
    assert chat.process.wait(60) == 0


def last_messages(cache: Path) -> list[str]:
    """The last question and answer of the one session."""
    (file,) = (cache / "sessions").glob("*.json")
    return [message["content"] for message in json.loads(file.read_text())["messages"][-2:]]
