"""mlx-lqr chat: a conversation on a terminal or through a pipe, whose steering can be changed while it goes on."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import click
from click.core import ParameterSource

from mlx_lqr import launched
from mlx_lqr.commands import chat_sessions
from mlx_lqr.commands.chat_answer import Display
from mlx_lqr.commands.chat_commands import answer, carry_out, say_resumed
from mlx_lqr.commands.chat_input import (
    Reader,
    as_text,
    edited_lines,
    lines_of_the_first_process,
    piped_lines,
    unquoted,
)
from mlx_lqr.commands.chat_state import Conversation, steering_line
from mlx_lqr.commands.help import OUTPUT, TEXT, command, option, together
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
from mlx_lqr.commands.running import load_to_run
from mlx_lqr.commands.wrapping import tell
from mlx_lqr.errors import InputError
from mlx_lqr.launched import refuse_several
from mlx_lqr.methods.steering import combine
from mlx_lqr.runtime import Options
from mlx_lqr.runtime.arguments import ControllerChoice, load_controller
from mlx_lqr.runtime.chat import Chat
from mlx_lqr.runtime.streams import keys_unseen


@command()
@together(
    model_argument,
    option("--system", metavar="TEXT", heading=TEXT, help="A system prompt."),
    option(
        "--resume",
        metavar="[NAME]",
        is_flag=False,
        flag_value="",
        heading=TEXT,
        help="Go on with the conversation kept under NAME, or with the last one; options given here come first.",
    ),
    option("--private", is_flag=True, heading=TEXT, help="Keep neither the conversation nor what is typed."),
    controller_option(),
    adaptive_option,
    decoding_options(512),
    option("--markdown", is_flag=True, heading=OUTPUT, help="Draw answers as Markdown on a terminal."),
    option("--stats", is_flag=True, heading=OUTPUT, help="Say after each answer how fast its tokens came."),
    loading_options,
)
def chat(
    model: str,
    controllers: tuple[ControllerChoice, ...],
    adaptive: bool | None,
    system: str | None,
    resume: str | None,
    private: bool,
    markdown: bool,
    stats: bool,
    loading: Loading,
    **decoding: Any,
) -> None:
    """Talk to a model, steered or not.

    Messages are put into the model's own chat template. Type /help for what else there is to do.
    """
    if resume is not None:
        refuse_several("a session is resumed")
        resume = chat_sessions.known_session(resume, private=private)
    parsed = [(choice.file, *load_controller(choice, model)) for choice in controllers]
    if parsed:
        combine([controller for _, controller, _ in parsed])  # refuses those that do not go together
    with progress_bars() as progress:
        steerings = [controller for _, controller, _ in parsed]
        loaded = load_to_run(model, loading, progress, steerings=steerings, adaptive=adaptive)
    if not loaded.tokenizer.has_chat_template:
        raise InputError(
            f"{loaded.name} has no chat template (a base model?): use `mlx-lqr generate`, which takes plain text"
        )
    options: Options = {"adaptive": adaptive, **decoding}  # type: ignore[typeddict-item]
    conversation = Conversation(Chat(loaded, options=options), Display(markdown, stats), private=private)
    click.get_current_context().call_on_close(lambda: chat_sessions.leave(conversation))
    if resume is not None:
        chat_sessions.resume(conversation, resume, _given())
    if system:
        conversation.chat.system_prompt = as_text(system)
    for file, controller, strength in parsed:
        conversation.add(file, controller, strength)
    if sys.stdin is None:
        raise InputError("there is no input: run this in a terminal, or pipe messages in")
    # The line editor draws on a terminal, never into a pipe that takes the answers.
    alone = launched.count() == 1
    interactive = alone and sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())
    if interactive or not alone:
        tell(f"{loaded.name}. {steering_line(conversation.chat)} /help lists the commands.")
    if resume is not None:
        say_resumed(conversation)
    if interactive:
        _on_a_terminal(conversation, model)
    else:
        _converse(conversation, piped_lines if alone else lines_of_the_first_process(loaded.backend))


def _on_a_terminal(conversation: Conversation, model: str) -> None:
    """Converse on a terminal, and say how to go on with what is kept."""
    if conversation.session is None:
        conversation.session = chat_sessions.new_name()
    with keys_unseen():  # what is typed during an answer goes to the next prompt
        _converse(conversation, edited_lines(conversation), interactive=True)
    if chat_sessions.is_kept(conversation):
        say(f"Go on with it: mlx-lqr chat {shlex.quote(model)} --resume {conversation.session}", err=True)


def _given() -> set[str]:
    """The options that the command line has."""
    context = click.get_current_context()
    return {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}


def _converse(conversation: Conversation, read: Reader, interactive: bool = False) -> None:
    """Answer messages and carry out commands until there are no more. In a pipe the first mistake ends it."""
    while (line := read()) is not None:
        try:
            if line.startswith("/"):
                if carry_out(conversation, line[1:].strip()):
                    break
            elif message := unquoted(line) if interactive else line.strip():
                answer(conversation, message)
        except KeyboardInterrupt:
            if launched.count() > 1:  # not all of them have stopped at the same token
                raise
            tell("[stopped]")
        except InputError as error:
            tell(f"Error: {error}")
            if not interactive:
                raise click.exceptions.Exit(2) from error
        except (RuntimeError, MemoryError) as error:  # out of memory: the transcript can still be saved
            if not interactive:
                raise
            tell(f"Error: {error}")
        chat_sessions.keep(conversation)
