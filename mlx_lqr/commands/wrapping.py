"""Text that comes in pieces, wrapped between words at a terminal's width as it comes.

A word is held back until it is complete, so nothing that was shown has to be taken back. Cells are counted, not
characters: a Chinese character takes two, a combining mark none.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Callable
from typing import Any

from mlx_lqr.commands.output import say
from mlx_lqr.runtime.streams import is_terminal, printable

COLUMNS = 80
"""Of a terminal that does not say how wide it is, and of what is none"""
TAB = 8
"""Cells between tab stops"""
GLUE = "\u00a0\u202f\u2007\u2060"
"""Spaces that hold words together"""
JOINER = "\u200d"


class Wrapper:
    """Puts line ends between words. What `add` and `finish` return, one after the other, is the text to show.

    Args:
        width: asked for every word, since a window may be resized.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self._width = width
        self._column = 0
        """Cells of the line so far"""
        self._spaces = ""
        self._word = ""
        self._torn = False
        """Whether the word is one that is longer than a line, of which the beginning is shown already"""

    def add(self, text: str) -> str:
        """What can be shown once this text has come."""
        shown = ""
        for character in text:
            if character == "\n":
                shown += self._take_word() + "\n"
                self._column, self._spaces, self._torn = 0, "", False
            elif character.isspace() and character not in GLUE:
                shown += self._take_word()
                self._spaces, self._torn = self._spaces + character, False
            else:
                if self._word and self._may_end(character):
                    shown += self._take_word()
                self._word += character
        return shown

    def finish(self) -> str:
        """What was held back."""
        return self._take_word()

    def _may_end(self, following: str) -> bool:
        """Whether what is held back can be shown before this character. A text without spaces does not wait for one."""
        if _extends(following) or self._word[-1] == JOINER:
            return False
        self._torn = self._torn or len(self._word) > self._width()
        return self._torn or _may_break(self._word[-1], following)

    def _take_word(self) -> str:
        word, spaces = self._word, self._spaces
        if not word:
            return ""
        self._word = self._spaces = ""
        width, cells = max(2, self._width()), _cells(word)
        gap = _gap(spaces, self._column)
        if self._column + gap + cells <= width:
            self._column += gap + cells
            return spaces + word
        begun, self._column = ("\n" if self._column else ""), 0
        if cells <= width:
            self._column = cells
            return begun + word
        return begun + self._broken(word, width)

    def _broken(self, word: str, width: int) -> str:
        """A word that is longer than a line, in lines that it fills."""
        lines = [""]
        for cluster in _clusters(word):
            if _cells(lines[-1] + cluster) > width:
                lines.append("")
            lines[-1] += cluster
        self._column = _cells(lines[-1])
        return "\n".join(lines)


def columns(stream: Any) -> int:
    """How wide the terminal is that a stream writes to."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or COLUMNS
    except (AttributeError, OSError, ValueError):
        return COLUMNS


def tell(message: str) -> None:
    """Print a message on stderr, wrapped where that is a terminal."""
    if is_terminal(sys.stderr):
        wrapper = Wrapper(lambda: columns(sys.stderr))
        message = wrapper.add(printable(message, sys.stderr)) + wrapper.finish()
    say(message, err=True)


def _may_break(before: str, after: str) -> bool:
    """Whether a line may end between two characters that no space parts: where one of them is Chinese or Japanese, or
    a wide symbol. No line begins with a full stop or a closing bracket, and none ends with an opening one."""
    if unicodedata.category(after) in ("Pe", "Pf", "Po") or unicodedata.category(before) in ("Ps", "Pi"):
        return False
    return _is_wide(before) or _is_wide(after)


def _is_wide(character: str) -> bool:
    """Wide, and not Korean, whose words have spaces between them."""
    return unicodedata.east_asian_width(character) in "WF" and not unicodedata.name(character, "").startswith("HANGUL")


def _extends(character: str) -> bool:
    """Whether a character belongs to the one before: marks, joiners, the skin colours of emoji."""
    return unicodedata.category(character) in ("Mn", "Me", "Cf") or "\U0001f3fb" <= character <= "\U0001f3ff"


def _clusters(word: str) -> list[str]:
    """The characters of a word, each with what belongs to it."""
    clusters: list[str] = []
    for character in word:
        if clusters and (_extends(character) or clusters[-1].endswith(JOINER)):
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters


def _gap(spaces: str, column: int) -> int:
    """The cells that spaces take from a column on."""
    end = column
    for space in spaces:
        end += TAB - end % TAB if space == "\t" else _cells(space)
    return end - column


def _cells(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)
