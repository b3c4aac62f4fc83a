"""Which turns of a long conversation a model still reads, where its context is to roll.

Whole turns are forgotten, once in a while: what is kept has to be read again from its beginning, for every token after
those that are gone has another place. In between, only what is new is run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlx_lqr.backends.text.text_tokenizer import Message

ROOM = 4
"""One part in so many of the context is left for an answer, or what the answer may take, where that is less."""
KEPT = 2
"""Where there is no such room, the rest takes at most one part in so many of the context."""


def remembered(
    messages: Sequence[Message],
    forgotten: int,
    read: Callable[[Sequence[Message]], list[int]],
    context: int,
    max_tokens: int,
) -> tuple[list[int], int]:
    """The prompt of a conversation whose last message is to be answered, and how many messages it goes without.

    The system prompt and the last message are never forgotten.

    Args:
        forgotten: how many of the oldest messages after the system prompt are already, whole turns of two.
        read: the tokens of messages.
        context: how many tokens the model's context holds.
        max_tokens: of the answer.
    """
    first = int(messages[0]["role"] == "system")
    last = len(messages) - first - 1

    def prompt_without(count: int) -> list[int]:
        return read([*messages[:first], *messages[first + count :]])

    forgotten = min(forgotten, last)
    prompt, limit = prompt_without(forgotten), context - min(max_tokens, context // ROOM)
    while len(prompt) > limit and forgotten < last:
        limit = context // KEPT
        forgotten += 2
        prompt = prompt_without(forgotten)
    return prompt, forgotten
