"""mlx-lqr chat: a conversation on a terminal or through a pipe, whose steering can be changed while it goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from mlx_lqr import launched
from mlx_lqr.backends import registry
from mlx_lqr.commands.chat_view import draw_comparison, draw_tracking
from mlx_lqr.commands.help import TEXT, command, option
from mlx_lqr.commands.options import (
    Loading,
    adaptive_option,
    controller_option,
    decoding_options,
    loading_options,
    model_argument,
)
from mlx_lqr.commands.output import say
from mlx_lqr.commands.progress import progress_bars
from mlx_lqr.errors import InputError
from mlx_lqr.files.cache import cache_folder
from mlx_lqr.files.private import keep_private, others_may_open
from mlx_lqr.loading import load
from mlx_lqr.methods.steering import combine
from mlx_lqr.runtime import Options
from mlx_lqr.runtime.arguments import (
    ControllerChoice,
    asked_strength,
    load_controller,
    parse_controller,
    parse_strength,
)
from mlx_lqr.runtime.chat import Chat
from mlx_lqr.runtime.streams import keys_unseen

HELP = """\
/strength 2         set the strength of every concept; /strength dog 2 sets one, /strength shows them
/strength 1.5x      the same in multiples of the recommended strength; or gentle, normal, strong
/add FILE[:2]       steer with one more controller
/off                stop steering; /off dog drops one concept
/compare            the last answer with and without steering, side by side
/track              for the last answer: feature against setpoint and the control, layer by layer
/save FILE          write the transcript (JSON); /load FILE goes on with one; /save --force FILE replaces any file
/new                begin a new conversation, with the same system prompt
/help               this
/quit               leave (or Ctrl-D)
Enter sends. For a new line in a message press Alt-Enter (or Esc, Enter), or end the line with a backslash;
lines that are pasted together stay together. Ctrl-C stops an answer, or clears what is being typed.
In a pipe every line is a message or a command; a backslash at its end joins it to the next.
If a message begins with a slash, put a space before it."""


@command()
@model_argument
@option("--system", metavar="TEXT", heading=TEXT, help="A system prompt.")
@controller_option()
@adaptive_option
@decoding_options(512)
@loading_options
def chat(
    model: str,
    controllers: tuple[ControllerChoice, ...],
    adaptive: bool | None,
    system: str | None,
    loading: Loading,
    **decoding: Any,
) -> None:
    """Talk to a model, steered or not.

    Messages are put into the model's own chat template. Type /help for what else there is to do.
    """
    parsed = [load_controller(choice, model) for choice in controllers]
    if parsed:
        combine([controller for controller, _ in parsed])  # refuses those that do not go together
    with progress_bars() as progress:
        loaded = load(model, **loading, progress=progress)
    if not loaded.tokenizer.has_chat_template:
        raise InputError(
            f"{loaded.name} has no chat template (a base model?): use `mlx-lqr generate`, which takes plain text"
        )
    options: Options = {"adaptive": adaptive, **decoding}  # type: ignore[typeddict-item]
    session = Chat(loaded, options=options)
    if system:
        session.messages.append({"role": "system", "content": _text(system)})
    for controller, strength in parsed:
        session.add(controller, strength)
    if sys.stdin is None:
        raise InputError("there is no input: run this in a terminal, or pipe messages in")
    # The line editor draws on a terminal, never into a pipe that takes the answers.
    alone = launched.count() == 1
    interactive = alone and sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())
    read = _line_editor() if interactive else _piped_lines if alone else _of_the_first_process(loaded.backend)
    if interactive or not alone:
        say(f"{loaded.name}. {_state(session)} /help lists the commands.", err=True)
    _converse(session, read, interactive)


def _converse(session: Chat, read: Callable[[], str | None], interactive: bool) -> None:
    """Answer messages and carry out commands until there are no more. In a pipe the first mistake ends it."""
    while (line := read()) is not None:
        try:
            with keys_unseen() if interactive else nullcontext():  # keys typed meanwhile go to the next prompt
                if line.startswith("/"):
                    if _command(session, line[1:].strip()):
                        break
                elif line.strip():
                    _answer(session, line.strip())
        except KeyboardInterrupt:
            if launched.count() > 1:  # not all of them have stopped at the same token
                raise
            say("[stopped]", err=True)
        except InputError as error:
            say(f"Error: {error}", err=True)
            if not interactive:
                raise click.exceptions.Exit(2) from error
        except (RuntimeError, MemoryError) as error:  # out of memory: the transcript can still be saved
            if not interactive:
                raise
            say(f"Error: {error}", err=True)


def _answer(session: Chat, text: str) -> None:
    pieces = session.answer(text)
    begun = False
    try:
        for piece in pieces:
            begun = True
            say(piece.text, nl=False)
        begun = True
    finally:
        if begun:
            say()
    excess = session.excess()
    if excess is not None and excess.ratio > 1:
        say(f"Note: {excess}", err=True)


def _command(session: Chat, line: str) -> bool:
    """Carry out what follows a slash; True ends the chat."""
    name, _, rest = line.partition(" ")
    if name in ("quit", "exit"):
        return True
    if name not in _COMMANDS:
        raise InputError(f"there is no command /{name}: /help lists them")
    _COMMANDS[name](session, rest.strip())
    return False


def _help(session: Chat, rest: str) -> None:
    say(HELP, err=True)


def _strength(session: Chat, rest: str) -> None:
    if rest:
        concept, _, strength = rest.rpartition(" ")
        asked = parse_strength(strength, "/strength 2, or /strength CONCEPT 2")
        named = session.steerings(concept.strip() or None)
        chosen = {name: asked_strength(steering, asked) for name, steering in named.items()}
        for name, (number,) in chosen.items():
            session.set_strength(number, name)
    say(_state(session), err=True)


def _add(session: Chat, rest: str) -> None:
    session.add(*load_controller(parse_controller(_file(rest, "/add dog.safetensors:2"))))
    say(_state(session), err=True)


def _off(session: Chat, rest: str) -> None:
    session.off(rest or None)
    say(_state(session), err=True)


def _compare(session: Chat, rest: str) -> None:
    draw_comparison([(_state(session), session.steered()), ("Not steered.", session.unsteered())])


def _track(session: Chat, rest: str) -> None:
    draw_tracking(session.track(), session.excess())


def _save(session: Chat, rest: str) -> None:
    words = rest.split()
    force = "--force" in (words[:1] + words[-1:])
    file = _file(rest.removeprefix("--force").removesuffix("--force").strip() if force else rest, "/save chat.json")
    was_open = others_may_open(file)
    session.save(file, force=force)
    say(f"Wrote {file}", err=True)
    if was_open:
        _say_private(file)


def _load(session: Chat, rest: str) -> None:
    file = _file(rest, "/load chat.json")
    for note in session.load(file):
        say(f"Note: {note}", err=True)
    say(f"{len(session.messages)} messages of {file}. {_state(session)}", err=True)


def _new(session: Chat, rest: str) -> None:
    session.restart()
    say("A new conversation.", err=True)


_COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "add": _add,
    "compare": _compare,
    "help": _help,
    "load": _load,
    "new": _new,
    "off": _off,
    "save": _save,
    "strength": _strength,
    "track": _track,
}


def _file(rest: str, example: str) -> str:
    if not rest:
        raise InputError(f"name a file: {example}")
    try:
        return str(Path(rest).expanduser())
    except RuntimeError:  # ~name, of a user who does not exist here
        return rest


def _say_private(file: str) -> None:
    say(f"Note: others could open {file}: now its owner alone can", err=True)


def _text(typed: str) -> str:
    """What was typed, with question marks for bytes that are not text."""
    return typed.encode("utf-8", "replace").decode("utf-8")


def _state(session: Chat) -> str:
    if not session.strengths:
        return "Not steered."
    named = ", ".join(f"{name} {strength:g}" for name, strength in session.strengths.items())
    return f"Steered: {named}." if any(session.strengths.values()) else f"Not steered: {named}."


def _piped_lines() -> str | None:
    """The next message, one line or several joined by backslashes; None at the end."""
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


def _of_the_first_process(backend: str) -> Callable[[], str | None]:
    """The lines that the first of several processes reads, on all of them."""
    said = registry.backend(backend).said
    return lambda: said(_piped_lines() if launched.rank() == 0 else None)


def _line_editor() -> Callable[[], str | None]:
    """Editing of one line or several, with history; Ctrl-C clears what is typed, Ctrl-D ends."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    kept = cache_folder() / "chat_history"
    history: History
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        if keep_private(kept):
            _say_private(str(kept))
        history = FileHistory(str(kept))
    except OSError:  # a home that cannot be written is no reason not to chat
        history = InMemoryHistory()
    editor: PromptSession[str] = PromptSession(
        history=history,
        key_bindings=keys,
        multiline=True,
        prompt_continuation="  ",
        output=create_output(always_prefer_tty=True),
    )

    def read() -> str | None:
        while True:
            try:
                return _text(editor.prompt("> "))
            except KeyboardInterrupt:
                continue
            except EOFError:
                return None

    return read
