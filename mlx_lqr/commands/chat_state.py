"""What a chat's commands work on, and what they say about it."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field

from mlx_lqr.commands.chat_answer import Display
from mlx_lqr.methods.steering import Steering
from mlx_lqr.runtime.chat import Chat
from mlx_lqr.runtime.generate import Strength


@dataclass
class Conversation:
    """A chat, how it is shown, and where it is kept."""

    chat: Chat
    display: Display = field(default_factory=Display)
    session: str | None = None
    """The name under which it is kept, if it has one"""
    claimed: str | None = None
    """The name whose file is this conversation's own"""
    lock: ExitStack = field(default_factory=ExitStack)
    """Held while the file is claimed"""
    private: bool = False
    """Nothing is kept."""
    files: dict[str, str] = field(default_factory=dict)
    """Concept -> the file of its controller"""

    def add(self, file: str, steering: Steering, strength: Strength = None) -> None:
        """Steer with what a file holds.

        Raises:
            InputError: see `Chat.add`.
        """
        self.chat.add(steering, strength)
        self.files.update(dict.fromkeys(steering.concepts, os.path.abspath(file)))


def steering_line(chat: Chat) -> str:
    """What steers, in a line."""
    if not chat.strengths:
        return "Not steered."
    named = ", ".join(f"{name} {strength:g}" for name, strength in chat.strengths.items())
    return f"Steered: {named}." if any(chat.strengths.values()) else f"Not steered: {named}."
