"""Texts that end an answer, also where they are split over several streamed pieces."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_lqr.errors import InputError


class StopStrings:
    """Passes text on, but holds back text that may be the beginning of a stop string."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    @staticmethod
    def check(stop: str | Sequence[str]) -> tuple[str, ...]:
        """`stop` as a tuple of non-empty strings.

        Raises:
            InputError: an empty string, or something that is no string.
        """
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(text, str) and text for text in stops):
            raise InputError(f"stop must be one text or several, none of them empty, not {stop!r}")
        return stops

    def add(self, text: str) -> tuple[str, bool]:
        """The text that is surely not part of a stop string, and whether one has come (then nothing follows)."""
        self._held += text
        starts = [start for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if starts:
            text, self._held = self._held[: min(starts)], ""
            return text, True
        longest = max((self._overlap(stop) for stop in self._stops), default=0)
        certain = len(self._held) - longest
        text, self._held = self._held[:certain], self._held[certain:]
        return text, False

    def rest(self) -> str:
        """The text still held back, at the end."""
        text, self._held = self._held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of the held text begin `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0)
