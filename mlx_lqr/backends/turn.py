"""A lock that goes round: threads get it in the order in which they ask for it.

With Python's own locks a thread that lets go and at once asks again mostly gets the lock again, so that a long piece of
work in many small steps, such as a fit, would hold up another thread's tokens until it is done.
"""

from __future__ import annotations

import threading
from collections import deque


class Turn:
    """A context manager that one thread at a time is in; that thread may enter it again at will."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        """Of what follows"""
        self._holder: int | None = None
        self._depth = 0
        self._waiting: deque[tuple[int, threading.Lock]] = deque()
        """Threads in the order in which they have asked, each with what is released when it is its turn"""

    @property
    def waiting(self) -> int:
        """How many threads wait for it."""
        return len(self._waiting)

    def __enter__(self) -> None:
        me, gate = threading.get_ident(), threading.Lock()
        try:
            with self._guard:
                if self._holder in (None, me):
                    self._holder = me
                    self._depth += 1
                    return
                gate.acquire()
                self._waiting.append((me, gate))
            gate.acquire()
        except BaseException:  # Ctrl-C, in the main thread
            self._withdraw(me, gate)
            raise

    def __exit__(self, *_: object) -> None:
        with self._guard:
            self._depth -= 1
            if self._depth:
                return
            self._holder = None
            if self._waiting:
                self._holder, gate = self._waiting.popleft()
                self._depth = 1
                gate.release()

    def _withdraw(self, me: int, gate: threading.Lock) -> None:
        """Wait no more, or let go of what has just been got."""
        with self._guard:
            waits = (me, gate) in self._waiting
            if waits:
                self._waiting.remove((me, gate))
        if not waits and self._holder == me:
            self.__exit__()
