"""What Tab makes of what has been typed in a chat, read as the command reads it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from mlx_lqr.commands.chat_completion import ChatCompleter
from mlx_lqr.commands.chat_state import Conversation


def completed(typed: str) -> list[str]:
    """The lines that Tab offers."""
    completer = ChatCompleter(Conversation(chat=None))  # type: ignore[arg-type]  # files need none
    offered = completer.get_completions(Document(typed), CompleteEvent())
    return [typed[: len(typed) + one.start_position] + one.text for one in offered]


@pytest.mark.parametrize("name", ["plain.txt", "with a space.txt", "it's.txt", 'a "quoted" one.txt', "back\\slash.txt"])
@pytest.mark.parametrize("open_quote", ["", "'", '"'])
def test_files_after_fit_are_quoted_as_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, open_quote: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a folder" / name).touch()
    folder = open_quote + "a folder/" if open_quote else "a\\ folder/"
    (line,) = completed(f"/fit pirate {folder}{name[:1]}")
    assert shlex.split(line) == ["/fit", "pirate", f"a folder/{name}"]
    (both,) = completed(f"{line} {folder}")
    assert shlex.split(both) == ["/fit", "pirate", f"a folder/{name}", f"a folder/{name}"]
    assert completed(f"/add {tmp_path}/a f")[0].endswith("/a folder"), "a line that is one file has no quotes"
