"""The commands of a chat, in one table: what /help lists, what is completed, and what each does."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_lqr.commands import chat_sessions
from mlx_lqr.commands.chat_answer import show_answer
from mlx_lqr.commands.chat_fit import fit_and_add
from mlx_lqr.commands.chat_settings import SETTINGS, set_value, setting_row
from mlx_lqr.commands.chat_state import Conversation, steering_line
from mlx_lqr.commands.chat_view import draw_comparison, draw_tracking
from mlx_lqr.commands.tables import show_definitions
from mlx_lqr.commands.values import expanded
from mlx_lqr.commands.wrapping import columns, tell
from mlx_lqr.concepts import bundled_concepts
from mlx_lqr.errors import InputError
from mlx_lqr.files.private import others_may_open
from mlx_lqr.runtime.arguments import asked_strength, load_controller, parse_controller, parse_strength

Words = Literal["files", "bundled and files", "steering", "resting", "settings", "sessions", "nothing"]
"""What the words after a command are, for their completion"""


@dataclass(frozen=True)
class ChatCommand:
    """Something that can be typed after a slash."""

    run: Callable[[Conversation, str], None]
    """Gets what follows the command's name."""
    arguments: str
    help: str
    words: Words = "nothing"


def answer(conversation: Conversation, text: str) -> None:
    """Answer a message."""
    show_answer(conversation.chat.answer(text), conversation.display)
    _note_excess(conversation)


def carry_out(conversation: Conversation, line: str) -> bool:
    """Carry out what follows a slash; True ends the chat.

    Raises:
        InputError: there is no such command, or it refuses.
    """
    name, _, rest = line.partition(" ")
    if name in LEAVING:
        return True
    if name not in COMMANDS:
        raise InputError(f"there is no command /{name}: /help lists them")
    COMMANDS[name].run(conversation, rest.strip())
    return False


def _regen(conversation: Conversation, rest: str) -> None:
    options = conversation.chat.options
    if conversation.chat.messages and (options.get("temperature") == 0 or options.get("seed") is not None):
        fixed = "temperature 0" if options.get("temperature") == 0 else "a seed"
        tell(f"Note: with {fixed} the same steering gives the same answer again: /set changes it")
    show_answer(conversation.chat.regenerate(), conversation.display)
    _note_excess(conversation)


def _undo(conversation: Conversation, rest: str) -> None:
    question = textwrap.shorten(conversation.chat.undo(), 60, placeholder="...")
    tell(f"Forgot {question!r} and its answer.")


def _new(conversation: Conversation, rest: str) -> None:
    conversation.chat.restart()
    chat_sessions.leave(conversation)
    if conversation.session is not None:
        conversation.session = chat_sessions.new_name()
    tell("A new conversation.")


def _set(conversation: Conversation, rest: str) -> None:
    name, _, value = rest.partition(" ")
    if value.strip():
        set_value(conversation, name, value.strip())
    show_definitions([setting_row(conversation, one) for one in ([name] if name else SETTINGS)], columns(sys.stderr))


def _concepts(conversation: Conversation, rest: str) -> None:
    chat = conversation.chat
    tell(f"Bundled, for /fit: {', '.join(bundled_concepts())}")
    for state, strengths in (("on", chat.strengths), ("off", chat.resting)):
        for name, strength in strengths.items():
            tell(f"{name} {strength:g}, {state}: {conversation.files.get(name, 'no file')}")
    if not chat.strengths and not chat.resting:
        tell("Loaded: none")


def _strength(conversation: Conversation, rest: str) -> None:
    chat = conversation.chat
    if rest:
        concept, _, strength = rest.rpartition(" ")
        asked = parse_strength(strength, "/strength 2, or /strength CONCEPT 2")
        named = chat.steerings(concept.strip() or None)
        chosen = {name: asked_strength(steering, asked) for name, steering in named.items()}
        for name, (number,) in chosen.items():
            chat.set_strength(number, name)
    tell(steering_line(chat))


def _add(conversation: Conversation, rest: str) -> None:
    choice = parse_controller(_file(rest, "/add dog.safetensors:2"))
    conversation.add(choice.file, *load_controller(choice))
    tell(steering_line(conversation.chat))


def _fit(conversation: Conversation, rest: str) -> None:
    tell(f"The controller: {fit_and_add(conversation, rest)}")
    tell(steering_line(conversation.chat))


def _off(conversation: Conversation, rest: str) -> None:
    conversation.chat.off(rest or None)
    tell(steering_line(conversation.chat))


def _on(conversation: Conversation, rest: str) -> None:
    conversation.chat.on(rest or None)
    tell(steering_line(conversation.chat))


def _compare(conversation: Conversation, rest: str) -> None:
    chat = conversation.chat
    draw_comparison([(steering_line(chat), chat.steered()), ("Not steered.", chat.unsteered())])


def _track(conversation: Conversation, rest: str) -> None:
    draw_tracking(conversation.chat.track(), conversation.chat.excess())


def _save(conversation: Conversation, rest: str) -> None:
    words = rest.split()
    force = "--force" in (words[:1] + words[-1:])
    file = _file(rest.removeprefix("--force").removesuffix("--force").strip() if force else rest, "/save chat.json")
    was_open = others_may_open(file)
    conversation.chat.save(file, force=force)
    tell(f"Wrote {file}")
    if was_open:
        say_private(file)


def _load(conversation: Conversation, rest: str) -> None:
    file = _file(rest, "/load chat.json")
    for note in conversation.chat.load(file):
        tell(f"Note: {note}")
    tell(f"{len(conversation.chat.messages)} messages of {file}. {steering_line(conversation.chat)}")


def _sessions(conversation: Conversation, rest: str) -> None:
    for name in chat_sessions.session_names():
        tell(f"{name}{' (this one)' if name == conversation.session else ''}")
    if conversation.session is None or conversation.private:
        tell("This chat is not kept.")


def _resume(conversation: Conversation, rest: str) -> None:
    chat_sessions.resume(conversation, rest)
    say_resumed(conversation)


def _name(conversation: Conversation, rest: str) -> None:
    if not rest:
        raise InputError("give a name: /name my-chat")
    chat_sessions.rename(conversation, rest)
    tell(f"This session is called {rest}.")


def _help(conversation: Conversation, rest: str) -> None:
    for group, names in GROUPS.items():
        tell(f"{group}:")
        rows = [(f"/{name} {COMMANDS[name].arguments}".rstrip(), COMMANDS[name].help) for name in names]
        show_definitions(rows, columns(sys.stderr), indent=2)
    tell(KEYS)


COMMANDS: dict[str, ChatCommand] = {
    "regen": ChatCommand(_regen, "", "another answer to the last question"),
    "undo": ChatCommand(_undo, "", "forget the last question and its answer"),
    "new": ChatCommand(_new, "", "begin a new conversation, with the same system prompt"),
    "set": ChatCommand(_set, "[NAME VALUE]", "set temperature, seed, system and others; alone: list them", "settings"),
    "strength": ChatCommand(
        _strength,
        "[CONCEPT] [2]",
        "set the strength of every concept or of one: a number, a multiple of the recommended one such as 1.5x, or "
        "gentle, normal or strong; alone: show them",
        "steering",
    ),
    "concepts": ChatCommand(_concepts, "", "the bundled concepts, and what is loaded at which strengths"),
    "add": ChatCommand(_add, "FILE[:2]", "steer with one more controller", "files"),
    "fit": ChatCommand(
        _fit,
        "NAME [POSITIVE NEGATIVE [FILE]]",
        "fit a bundled concept, or two files of prompts, and steer with it",
        "bundled and files",
    ),
    "off": ChatCommand(
        _off, "[CONCEPT]", "stop steering, or drop one concept; the strengths are remembered", "steering"
    ),
    "on": ChatCommand(_on, "[CONCEPT]", "steer again as before /off", "resting"),
    "compare": ChatCommand(_compare, "", "the last answer with and without steering, side by side"),
    "track": ChatCommand(_track, "", "for the last answer: feature against setpoint and the control, layer by layer"),
    "save": ChatCommand(_save, "[--force] FILE", "write the transcript (JSON); --force replaces any file", "files"),
    "load": ChatCommand(_load, "FILE", "go on with a transcript", "files"),
    "sessions": ChatCommand(_sessions, "", "the conversations that are kept, the last one first"),
    "resume": ChatCommand(_resume, "[NAME]", "go on with one of them; alone: the last one", "sessions"),
    "name": ChatCommand(_name, "NAME", "keep this conversation under a name"),
    "help": ChatCommand(_help, "", "this"),
    "quit": ChatCommand(lambda *_: None, "", "leave; also /exit, /bye or Ctrl-D"),
}
GROUPS: dict[str, Sequence[str]] = {
    "Conversation": ("regen", "undo", "new", "set"),
    "Steering": ("strength", "concepts", "add", "fit", "off", "on", "compare", "track"),
    "Files and sessions": ("save", "load", "sessions", "resume", "name"),
    "Other": ("help", "quit"),
}
LEAVING = ("quit", "exit", "bye")
KEYS = (
    "Enter sends. For a new line in a message press Alt-Enter or Ctrl-J, end the line with a backslash, or write the "
    'message between """ and """; lines that are pasted together stay together. Tab completes. Ctrl-C stops an answer, '
    "or clears what is being typed. In a pipe every line is a message or a command; a backslash at its end joins it to "
    "the next. If a message begins with a slash, put a space before it."
)


def say_private(file: str) -> None:
    """Say that a file was open to others."""
    tell(f"Note: others could open {file}: now its owner alone can")


def say_resumed(conversation: Conversation) -> None:
    """Say which session goes on."""
    count = len(conversation.chat.messages)
    tell(f"{count} messages of {conversation.session}. {steering_line(conversation.chat)}")


def _note_excess(conversation: Conversation) -> None:
    excess = conversation.chat.excess()
    if excess is not None and excess.ratio > 1:
        tell(f"Note: {excess}")


def _file(rest: str, example: str) -> str:
    if not rest:
        raise InputError(f"name a file: {example}")
    return expanded(rest)
