"""Where the lines of a chat come from: a terminal, on which they are edited, or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable

from mlx_lqr import launched
from mlx_lqr.backends import registry
from mlx_lqr.commands.chat_commands import say_private
from mlx_lqr.commands.chat_state import Conversation
from mlx_lqr.errors import InputError
from mlx_lqr.files.cache import cache_folder
from mlx_lqr.files.private import keep_private

Reader = Callable[[], str | None]
"""The next message or command, None after the last one"""
QUOTES = '"""'


def piped_lines() -> str | None:
    """The next line of a pipe, or several that are joined by backslashes.

    Raises:
        InputError: it is not UTF-8 text.
    """
    lines: list[str] = []
    while raw := sys.stdin.buffer.readline():
        try:
            line = raw.decode("utf-8").removeprefix("\ufeff").rstrip("\r\n")
        except UnicodeDecodeError:
            raise InputError("what comes through the pipe is not UTF-8 text") from None
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])
    return "\n".join(lines) if lines else None


def lines_of_the_first_process(backend: str) -> Reader:
    """The lines that the first of several processes reads, on all of them."""
    said = registry.backend(backend).said
    return lambda: said(piped_lines() if launched.rank() == 0 else None)


def edited_lines(conversation: Conversation) -> Reader:
    """Messages of one line or several that are edited on the terminal; Ctrl-C clears what is typed, Ctrl-D ends.

    Tab completes the chat's commands, concepts and sessions. What is typed is kept for the next chat too, unless this
    one is private.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output
    from prompt_toolkit.shortcuts import CompleteStyle

    from mlx_lqr.commands.chat_completion import ChatCompleter

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif _is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    typed: History = InMemoryHistory()
    if not conversation.private:
        file = cache_folder() / "chat_history"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if keep_private(file):
                say_private(str(file))
            typed = FileHistory(str(file))
        except OSError:  # a home that cannot be written is no reason not to chat
            pass
    editor: PromptSession[str] = PromptSession(
        history=typed,
        key_bindings=keys,
        multiline=True,
        prompt_continuation="  ",
        completer=ChatCompleter(conversation),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        output=create_output(always_prefer_tty=True),
    )

    def read() -> str | None:
        while True:
            try:
                return as_text(editor.prompt("> "))
            except KeyboardInterrupt:
                continue
            except EOFError:
                return None

    return read


def unquoted(message: str) -> str:
    """A message without the triple quotes that stand around it."""
    text = message.strip()
    if not text.startswith(QUOTES):
        return text
    return text.removeprefix(QUOTES).removesuffix(QUOTES).strip()


def as_text(typed: str) -> str:
    """What was typed, with question marks for bytes that are not text."""
    return typed.encode("utf-8", "replace").decode("utf-8")


def _is_open(text: str) -> bool:
    """Whether triple quotes begin a message and do not end it yet."""
    text = text.strip()
    return text.startswith(QUOTES) and QUOTES not in text[len(QUOTES) :]
