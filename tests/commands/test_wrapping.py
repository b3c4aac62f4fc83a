"""Answers on a terminal: wrapped between words as they come, and Markdown that ends as if it had come at once."""

from __future__ import annotations

import io
import random
import re
import textwrap
from collections.abc import Iterator

import pyte
import pytest
from rich.console import Console
from rich.markdown import Markdown
from wcwidth import wcswidth

from mlx_lqr.commands import chat_markdown
from mlx_lqr.commands.chat_markdown import show_markdown, split_finished
from mlx_lqr.commands.wrapping import Wrapper

PROSE = (
    "The sea and ships: it's a story of adventure, exploration (and of the relentless pursuit of knowledge). From the "
    "majestic ships that sailed across the seas to the humble sailors who navigated the treacherous waters.\n\n"
    "A second paragraph, which is short.\nA line."
)
SCRIPTS = "Café e\u0301clair, 你好世界、这是一个「很短的」测试。 日本語のテキスト。 👩‍👩‍👧👍🏽❤️ ก็ทำ 한국어 단어들은 "


def in_pieces(text: str, seed: int) -> Iterator[str]:
    chance = random.Random(seed)
    while text:
        count = chance.randint(1, 6)
        yield text[:count]
        text = text[count:]


def wrapped(text: str, width: int, seed: int = 0) -> str:
    wrapper = Wrapper(lambda: width)
    return "".join(map(wrapper.add, in_pieces(text, seed))) + wrapper.finish()


@pytest.mark.parametrize("width", [14, 40, 79, 200])
def test_prose_is_wrapped_as_if_it_had_come_at_once(width: int) -> None:
    expected = [textwrap.fill(line, width, break_on_hyphens=False) for line in PROSE.split("\n")]
    assert wrapped(PROSE, width, seed=width) == "\n".join(expected)


@pytest.mark.parametrize("width", [6, 7, 20])
def test_every_script_fits_and_no_character_is_torn(width: int) -> None:
    lines = wrapped(SCRIPTS, width).split("\n")
    assert all(0 < wcswidth(line) <= width for line in lines)  # another library's cells
    assert "".join(lines).replace(" ", "") == SCRIPTS.replace(" ", "")
    assert "e\u0301" in "".join(lines)
    for whole in ("Café", "e\u0301clair", "👩‍👩‍👧", "👍🏽", "❤️", "ก็", "단어들은"):
        assert any(whole.strip() in line for line in lines) or wcswidth(whole) > width
    assert not any(line[0] in "、。」\u0301" for line in lines)


def test_words_longer_than_a_line_fill_lines_and_indentation_stays() -> None:
    assert (
        wrapped("see https://example.org/a/long/address now", 12) == "see\nhttps://exam\nple.org/a/lo\nng/address\nnow"
    )
    assert len(Wrapper(lambda: 12).add("x" * 40)) > 30  # what has no spaces is shown while it comes
    assert wrapped("def f():\n\treturn 1\n    x", 40) == "def f():\n\treturn 1\n    x"
    assert wrapped("\tabcd efgh", 13) == "\tabcd\nefgh"  # a tab goes to the next of every eight cells


def test_a_window_may_be_resized_meanwhile() -> None:
    width = 10
    wrapper = Wrapper(lambda: width)
    shown = wrapper.add("one two three ")
    width = 30
    assert shown + wrapper.add("four five six seven ") == "one two\nthree four five six seven"
    width = 10
    assert wrapper.add("eight ") == "\neight"


DOCUMENT = (
    "# Title\n\nSome *text* that is long enough to be wrapped, with `code`.\n\n1. one\n\n2. two\n\n"
    "```python\nfor i in x:\n\n    print(i)\n```\n\n- a\n- b\n\nThe end."
)


def screen_of(texts: Iterator[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that are not blank on a terminal after Markdown has come in pieces."""
    sent = io.StringIO()
    sent.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(
        chat_markdown,
        "Console",
        lambda **options: Console(file=sent, force_terminal=True, width=40, height=30, _environ={}, **options),
    )
    show_markdown(texts)
    screen = pyte.Screen(40, 200)
    pyte.Stream(screen).feed(sent.getvalue().replace("\n", "\r\n"))
    return [line.rstrip() for line in screen.display if line.strip()]


def test_markdown_in_pieces_ends_as_if_it_had_come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = screen_of(in_pieces(DOCUMENT, 1), monkeypatch)
    whole = Console(file=io.StringIO(), width=40, _environ={})
    whole.print(Markdown(DOCUMENT))
    assert shown == [line.rstrip() for line in whole.file.getvalue().splitlines() if line.strip()]  # type: ignore[attr-defined]


def test_markdown_never_commands_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    harmful = "a \x1b]0;title\x07 b &#8238;c [text](http://x.org/\x1b[2J) &#27;[2J"
    shown = " ".join(screen_of(iter([harmful]), monkeypatch))
    assert r"\x1b]0;title\x07" in shown
    assert r"\u202e" in shown
    assert "http://x.org/" in shown  # a link shows where it leads


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("a\nb", ""),
        ("a\n\nb", "a\n\n"),
        ("```\na\n\nb", ""),
        ("```\na\n\n```\n\nb", "```\na\n\n```\n\n"),
        ("\n\na", ""),
    ],
)
def test_a_block_is_finished_by_a_blank_line_outside_a_fence(text: str, finished: str) -> None:
    assert split_finished(text) == (finished, text.removeprefix(finished))


def test_blocks_are_what_the_whole_is() -> None:
    written, blocks = "", []
    for text in in_pieces(DOCUMENT, 2):
        finished, written = split_finished(written + text)
        blocks.append(finished)
    assert "".join(blocks) + written == DOCUMENT
    assert len([block for block in blocks if block]) == len(re.split(r"\n\n(?!    )", DOCUMENT)) - 1
