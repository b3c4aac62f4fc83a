"""Conversations that are kept by name, so that `--resume` goes on with them.

Each is a file in the folder `sessions` of the cache folder, which its owner alone can open: a transcript with the
options of decoding and the controllers (`runtime.session`). One chat at a time goes on with a session: it has the lock
of the file, which the operating system takes back however the chat ends.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from mlx_lqr.commands.chat_state import Conversation
from mlx_lqr.commands.wrapping import tell
from mlx_lqr.errors import InputError
from mlx_lqr.files.cache import cache_folder
from mlx_lqr.files.locks import locked
from mlx_lqr.files.private import only_mine
from mlx_lqr.loading import load_steering
from mlx_lqr.methods.steering import Steering
from mlx_lqr.runtime.session import SteeredBy, read_session, save_session
from mlx_lqr.runtime.transcript import read_transcript

_NAME = re.compile(r"\w[\w.-]{0,99}")
_ENDING = ".json"


def new_name() -> str:
    """A name that no session has: the time. Whoever keeps a session of this name first, has it (see `keep`)."""
    now = time.strftime("%Y-%m-%d-%H%M%S")
    taken = {*session_names()}
    return next(name for name in _numbered(now) if name not in taken)


def session_names() -> list[str]:
    """The names of all sessions, the last one first."""
    try:
        listed = [(file.stat(), file.name) for file in _folder().glob(f"*{_ENDING}")]
    except OSError:
        return []
    files = [
        (status.st_mtime, name) for status, name in listed if status.st_size
    ]  # an empty one is about to be written
    return [name.removesuffix(_ENDING) for _, name in sorted(files, reverse=True)]


def session_file(name: str) -> Path:
    """Where a session of this name is kept.

    Raises:
        InputError: it cannot be a name.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"a session cannot be called {name!r}: use letters, digits, dots and dashes")
    return _folder() / f"{name}{_ENDING}"


def known_session(name: str, *, private: bool = True) -> str:
    """The name of a session; of the last one where the name is empty.

    Args:
        private: it is to be read alone.

    Raises:
        InputError: there is none, or it is not to be read alone and another chat goes on with it.
    """
    names = session_names()
    if not names:
        raise InputError("no session is kept yet: a chat on a terminal is one")
    name = name or names[0]
    if name not in names:
        raise InputError(f"no session is called {name!r}: there are {', '.join(names[:10])}")
    if not private:
        with _lock(name):
            pass
    return name


def keep(conversation: Conversation) -> None:
    """Write the session, if it is to be kept and something was said. Where that cannot be, it is said once.

    No other session's file is written over: where another one has taken the name since, this one gets the next.
    """
    said = any(one["role"] == "assistant" for one in conversation.chat.messages)
    if conversation.session is None or conversation.private or not (said or is_kept(conversation)):
        return
    try:
        if conversation.claimed != conversation.session:
            leave(conversation)
            conversation.session = conversation.claimed = _claimed(conversation.session)
            conversation.lock.enter_context(_lock(conversation.session))
        save_session(session_file(conversation.session), conversation.chat, conversation.files)
    except (InputError, OSError) as error:
        tell(f"Note: this session is not kept: {error}")
        conversation.session = None


def is_kept(conversation: Conversation) -> bool:
    """Whether the conversation is in a file to go on with."""
    if conversation.session is None or conversation.private:
        return False
    return conversation.claimed == conversation.session and session_file(conversation.session).exists()


def leave(conversation: Conversation) -> None:
    """Let other chats go on with the session."""
    conversation.claimed = None
    conversation.lock.close()


def rename(conversation: Conversation, name: str) -> None:
    """Keep the session under another name.

    Raises:
        InputError: it is not kept, there is a session of that name, or it cannot be one.
    """
    if conversation.session is None or conversation.private:
        raise InputError("this chat is not kept, so it has no name: start it on a terminal, without --private")
    old, new = session_file(conversation.session), session_file(name)
    taken = f"there is a session {name}: choose another name, or go on with it (/resume {name})"
    if name in session_names():
        raise InputError(taken)
    try:
        if is_kept(conversation):
            if not _claim(new):
                raise InputError(taken)
            os.replace(old, new)
            leave(conversation)
            conversation.claimed = name
            conversation.lock.enter_context(_lock(name))
    except OSError as error:
        raise InputError(f"cannot write {new}: {error.strerror or error}") from error
    conversation.session = name


def resume(conversation: Conversation, name: str, given: Collection[str] = ()) -> None:
    """Go on with a session: its messages, options, controllers and strengths. What has changed since is said.

    Args:
        name: of the session; empty for the last one.
        given: options that stay as they are.

    Raises:
        InputError: there is no such session, it is damaged, or another chat goes on with it. The conversation then
            stays as it is.
    """
    name = known_session(name)
    with ExitStack() as lock:
        if not conversation.private and conversation.claimed != name:
            lock.enter_context(_lock(name))
        _take_over(conversation, name, given)
        if conversation.claimed != name:
            leave(conversation)
            conversation.lock = lock.pop_all()
    conversation.session = conversation.claimed = name


def _take_over(conversation: Conversation, name: str, given: Collection[str]) -> None:
    file, chat = session_file(name), conversation.chat
    session = read_session(file)
    read_transcript(file)
    kept: Any = {key: value for key, value in session.options.items() if key not in given}
    chat.set_options(kept)
    chat.unload()
    conversation.files.clear()
    for one in sorted(session.steering, key=lambda one: one.on):  # what is off need not go with what is on
        try:
            conversation.add(one.file, _alone(one), one.strength)
            if not one.on:
                chat.off(one.concept)
        except InputError as error:
            tell(f"Note: {one.concept} is left out: {error}")
    for note in chat.load(file):
        tell(f"Note: {note}")


def _alone(one: SteeredBy) -> Steering:
    """What steers towards the concept, from its file."""
    for steering in load_steering(one.file).split():
        if steering.concepts == (one.concept,):
            return steering
    raise InputError(f"{one.file} has no concept {one.concept!r} any more")


def _claimed(name: str) -> str:
    """This name, or the next one that no session has; from now on it is taken."""
    return next(one for one in _numbered(name) if _claim(session_file(one)))


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}-{i}" for i in itertools.count(1))


def _claim(file: Path) -> bool:
    """Make a session's file, empty; False where there is one.

    Raises:
        OSError: it cannot be made.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        open(file, "xb", opener=only_mine).close()
    except FileExistsError:
        return False
    return True


def _lock(name: str) -> AbstractContextManager[None]:
    """Inside this context no other chat goes on with the session.

    Raises:
        InputError: another chat does already.
    """
    return locked(session_file(name), taken=f"another chat goes on with the session {name}: end it there first")


def _folder() -> Path:
    return cache_folder() / "sessions"
