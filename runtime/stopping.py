"""Texts that end an answer, found across the borders of streamed pieces."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_lqr.errors import InputError


class StopStrings:
    """Passes text on, holding back what may be the beginning of a stop string."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    @staticmethod
    def check(stop: str | Sequence[str]) -> tuple[str, ...]:
        """`stop` as a tuple of non-empty strings."""
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(text, str) and text for text in stops):
            raise InputError(f"stop must be a text or several, none of them empty, not {stop!r}")
        return stops

    def add(self, text: str) -> tuple[str, bool]:
        """The text that is certain to be no part of a stop string, and whether one was found (then that was all)."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            text, self._held = self._held[: min(found)], ""
            return text, True
        longest = max((self._overlap(stop) for stop in self._stops), default=0)
        certain = len(self._held) - longest
        text, self._held = self._held[:certain], self._held[certain:]
        return text, False

    def rest(self) -> str:
        """What is still held back when nothing more comes."""
        text, self._held = self._held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of the held text begin `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0)
