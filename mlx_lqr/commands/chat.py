"""mlx-lqr chat"""

from __future__ import annotations

import sys
from collections.abc import Callable

import click

from mlx_lqr.cache import cache_folder
from mlx_lqr.commands.options import (
    adaptive_option,
    controller_option,
    dtype_option,
    model_argument,
    parse_controller,
    progress_bars,
)
from mlx_lqr.errors import InputError
from mlx_lqr.loading import load
from mlx_lqr.runtime.chat import Chat

HELP = """\
/strength 2        set the strength of every concept; /strength dog 2 sets one
/add FILE[:2]      steer with one more controller
/off               steer no more
/save FILE         write the transcript (JSON)
/new               forget the conversation
/help              this
/quit              leave (or Ctrl-D); Ctrl-C stops an answer"""


@click.command()
@model_argument
@controller_option
@adaptive_option
@click.option("--system", help="A system prompt.")
@click.option("-n", "--max-tokens", default=512, show_default=True, help="Tokens an answer at most.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the most likely token each time.")
@click.option(
    "--top-p", default=1.0, show_default=True, help="Sample from the likeliest tokens with this total probability."
)
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@dtype_option
def chat(
    model: str,
    controllers: tuple[str, ...],
    adaptive: bool,
    system: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    dtype: str | None,
) -> None:
    """Talk to MODEL, steered or not, in its own chat template. Type /help for the commands."""
    parsed = [parse_controller(text) for text in controllers]
    with progress_bars() as progress:
        loaded = load(model, dtype=dtype, progress=progress)
    if not loaded.tokenizer.has_chat_template:
        raise InputError(
            f"{loaded.name} has no chat template (a base model?): use `mlx-lqr generate`, which takes plain text"
        )
    session = Chat(loaded, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, adaptive=adaptive)
    if system:
        session.messages.append({"role": "system", "content": system})
    for controller, strength in parsed:
        session.add(controller, strength)
    interactive = sys.stdin.isatty()
    read = _line_editor() if interactive else _piped_lines()
    if interactive:
        click.echo(f"{loaded.name}. {_state(session)} /help lists the commands.", err=True)
    while (line := read()) is not None:
        try:
            if line.startswith("/"):
                if _command(session, line):
                    break
            elif line.strip():
                _answer(session, line)
        except InputError as error:
            click.echo(f"Error: {error}", err=True)
            if not interactive:
                raise click.exceptions.Exit(2) from error


def _answer(session: Chat, text: str) -> None:
    pieces = session.answer(text)
    try:
        for piece in pieces:
            click.echo(piece.text, nl=False)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
        click.echo(" [stopped]", nl=False, err=True)
    click.echo()


def _command(session: Chat, line: str) -> bool:
    """Carry out a line that starts with a slash; True ends the chat."""
    name, _, rest = line[1:].strip().partition(" ")
    rest = rest.strip()
    if name in ("quit", "exit"):
        return True
    if name == "help":
        click.echo(HELP, err=True)
    elif name == "strength":
        concept, _, number = rest.rpartition(" ")
        try:
            session.set_strength(float(number), concept.strip() or None)
        except ValueError as error:
            raise (
                error
                if isinstance(error, InputError)
                else InputError(f"strength must be a number, not {number!r}: /strength 2, or /strength CONCEPT 2")
            ) from None
        click.echo(_state(session), err=True)
    elif name == "add":
        session.add(*parse_controller(rest))
        click.echo(_state(session), err=True)
    elif name == "off":
        session.off()
        click.echo(_state(session), err=True)
    elif name == "save":
        if not rest:
            raise InputError("name a file: /save chat.json")
        session.save(rest)
        click.echo(f"Wrote {rest}", err=True)
    elif name == "new":
        session.messages = [message for message in session.messages if message["role"] == "system"]
        click.echo("A new conversation.", err=True)
    else:
        raise InputError(f"there is no command /{name}: /help lists them")
    return False


def _state(session: Chat) -> str:
    if not session.strengths:
        return "Not steered."
    return "Steered: " + ", ".join(f"{name} {strength:g}" for name, strength in session.strengths.items()) + "."


def _piped_lines() -> Callable[[], str | None]:
    """One message a line; None at the end."""
    return lambda: line.rstrip("\n") if (line := sys.stdin.readline()) else None


def _line_editor() -> Callable[[], str | None]:
    """Line editing with history; Ctrl-C clears the line, Ctrl-D ends."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory

    cache_folder().mkdir(parents=True, exist_ok=True)
    editor: PromptSession[str] = PromptSession(history=FileHistory(str(cache_folder() / "chat_history")))

    def read() -> str | None:
        while True:
            try:
                return editor.prompt("> ")
            except KeyboardInterrupt:
                continue
            except EOFError:
                return None

    return read
