"""Show an answer while it is written: wrapped on a terminal, as Markdown where wanted, and as it is in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from mlx_lqr.commands.output import say
from mlx_lqr.commands.wrapping import Wrapper, columns, tell
from mlx_lqr.runtime import Piece
from mlx_lqr.runtime.streams import is_terminal, printable


@dataclass
class Display:
    """How answers are shown."""

    markdown: bool = False
    """On a terminal; anything else gets the text."""
    stats: bool = False
    """Say after each answer how many tokens it has, and how fast they came."""


def show_answer(pieces: Iterator[Piece], display: Display) -> None:
    """Write an answer to stdout as it comes, with the end of its line. Nothing is written if the first piece fails."""
    timed = Timed(pieces)
    if display.markdown and is_terminal(sys.stdout):
        from mlx_lqr.commands.chat_markdown import show_markdown

        show_markdown(piece.text for piece in timed)
    else:
        _show_text(timed)
    if display.stats:
        tell(f"[{timed}]")


def _show_text(pieces: Iterable[Piece]) -> None:
    wrapper = Wrapper(lambda: columns(sys.stdout)) if is_terminal(sys.stdout) else None
    begun = False
    try:
        for piece in pieces:
            begun = True
            say(piece.text if wrapper is None else wrapper.add(printable(piece.text, sys.stdout)), nl=False)
        begun = True
    finally:
        if begun:
            say("" if wrapper is None else wrapper.finish())


@dataclass
class Timed:
    """Passes pieces on, and notes when their tokens came."""

    pieces: Iterator[Piece]
    times: list[float] = field(default_factory=list, init=False)
    """Seconds from the beginning to each token"""

    def __iter__(self) -> Iterator[Piece]:
        begin = time.monotonic()
        for piece in self.pieces:
            if piece.token is not None:
                self.times.append(time.monotonic() - begin)
            yield piece

    def __str__(self) -> str:
        """The count of tokens, the rate after the first one, and how long that took."""
        count = len(self.times)
        if not count:
            return "no tokens"
        counted = f"{count} token{'s' if count > 1 else ''}"
        spent = self.times[-1] - self.times[0]
        rate = f", {(count - 1) / spent:.1f} tokens/s" if spent > 0 else ""
        return f"{counted}{rate}, the first after {self.times[0]:.2f} s"
