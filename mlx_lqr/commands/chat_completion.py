"""What Tab completes in a chat: commands, files, concepts, settings and sessions."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from shlex import quote, split

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from mlx_lqr.commands.chat_commands import COMMANDS
from mlx_lqr.commands.chat_sessions import session_names
from mlx_lqr.commands.chat_settings import SETTINGS
from mlx_lqr.commands.chat_state import Conversation
from mlx_lqr.concepts import bundled_concepts
from mlx_lqr.runtime.streams import printable


class ChatCompleter(Completer):
    """Completes what follows a slash. Names that would command a terminal are left out."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/"):
            return
        name, space, rest = text[1:].partition(" ")
        if not space:
            yield from _beginning_with(name, COMMANDS)
            return
        words = COMMANDS[name].words if name in COMMANDS else "nothing"
        if words == "bundled and files" and " " in rest:
            yield from self._quoted_files(rest, complete_event)
        elif words == "files":
            yield from self._files(rest, complete_event)
        else:
            yield from _beginning_with(rest, self._names(words))

    def _names(self, words: str) -> Iterable[str]:
        chat = self._conversation.chat
        if words == "bundled and files":
            return bundled_concepts()
        if words == "steering":
            return chat.strengths
        if words == "resting":
            return chat.resting
        if words == "settings":
            return SETTINGS
        return session_names() if words == "sessions" else ()

    def _files(self, typed: str, event: CompleteEvent) -> Iterable[Completion]:
        for one in self._paths.get_completions(Document(typed), event):
            if _is_harmless(one.text) and _is_harmless(one.display_text):
                yield one

    def _quoted_files(self, typed: str, event: CompleteEvent) -> Iterable[Completion]:
        """The last of several words, which are split as a shell splits them: a name that has to be is quoted."""
        begun = _last_word(typed)
        word = _plain(begun)
        for one in self._files(word, event):
            whole = word[: len(word) + one.start_position] + one.text
            home, slash, rest = whole.partition("/") if whole.startswith("~") else ("", "", whole)
            yield Completion(home + slash + quote(rest), start_position=-len(begun), display=one.display)


def _beginning_with(typed: str, names: Iterable[str]) -> Iterable[Completion]:
    for name in names:
        if name.startswith(typed) and _is_harmless(name):
            yield Completion(f"{name} ", start_position=-len(typed), display=name)


def _last_word(typed: str) -> str:
    """What has been typed of the last word, quotes and backslashes included."""
    begin, mark, escaped = 0, "", False
    for i, letter in enumerate(typed):
        if escaped:
            escaped = False
        elif letter == "\\" and mark != "'":
            escaped = True
        elif mark:
            mark = "" if letter == mark else mark
        elif letter in "\"'":
            mark = letter
        elif letter == " ":
            begin = i + 1
    return typed[begin:]


def _plain(word: str) -> str:
    """A word that may be unfinished, as it is meant."""
    for end in ("", "'", '"'):
        try:
            return "".join(split(word.removesuffix("\\") + end))
        except ValueError:  # a quote is still open
            continue
    return word


def _is_harmless(text: str) -> bool:
    return printable(text, sys.stdin) == text and "\n" not in text  # the terminal that it is typed on
