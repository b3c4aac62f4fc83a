"""An answer as Markdown while it is written: finished blocks stay, and the last one is drawn anew as it grows."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from mlx_lqr.runtime.streams import printable

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


def show_markdown(texts: Iterable[str]) -> None:
    """Draw Markdown that comes in pieces on the terminal that stdout is.

    A block that is higher than the window shows its end while it grows, and all of it when it is finished.
    """
    console = Console(highlight=False)
    live: Live | None = None
    written = ""
    try:
        for text in texts:
            written += text
            if live is None:
                live = _live(console)
            finished, written = split_finished(written)
            if finished:
                live.update(_Drawn(finished, whole=True), refresh=True)
                live.stop()
                console.line()
                live = None
            else:
                live.update(_Drawn(written), refresh=True)
    finally:
        if live is not None:
            live.update(_Drawn(written, whole=True))
            live.stop()


def split_finished(text: str) -> tuple[str, str]:
    """The blocks that nothing can change any more, and the last one: a blank line ends a block, but not in a fence."""
    fence = ""
    end = position = 0
    for line in text.splitlines(keepends=True):
        position += len(line)
        mark = _FENCE.match(line)
        if fence:
            closes = mark is not None and mark[1].startswith(fence) and not line.strip().strip(fence[0])
            fence = "" if closes else fence
        elif mark is not None:
            fence = mark[1]
        elif not line.strip() and line.endswith("\n") and text[:position].strip():
            end = position
    return text[:end], text[end:]


def _live(console: Console) -> Live:
    live = Live(_Drawn(""), console=console, auto_refresh=False, vertical_overflow="visible")
    live.start()
    return live


class _Drawn:
    """Markdown as lines of the console, none of which commands a terminal; only as many as fit, if it is not whole."""

    def __init__(self, text: str, *, whole: bool = False) -> None:
        self._text = text
        self._whole = whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = printable(self._text.strip("\n"), console.file)
        lines = console.render_lines(Markdown(text, hyperlinks=False), options, pad=False)
        for line in lines if self._whole else lines[-max(1, console.height - 1) :]:
            for segment in line:
                yield Segment(printable(segment.text, console.file), segment.style)
            yield Segment.line()
