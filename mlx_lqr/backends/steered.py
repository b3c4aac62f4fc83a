"""Which of a framework's models are steered in place at present, so that none is steered twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from mlx_lqr.errors import InputError

P = TypeVar("P")


class SteeredModules(Generic[P]):
    """The modules that are steered, each with what tells which positions are (P).

    Args:
        exchange: puts functions of the framework's library in the place of its own, and returns what puts them back.
            Once for all models, or blocks that overlap would put back each other's functions.
    """

    def __init__(self, exchange: Callable[[], Callable[[], None]]) -> None:
        self._exchange = exchange
        self._positions: dict[int, P] = {}
        self._lock = threading.Lock()
        self._put_back: Callable[[], None]

    def get(self, module: Any) -> P | None:
        return self._positions.get(id(module))

    @contextmanager
    def including(self, module: Any, positions: P) -> Iterator[None]:
        """Inside this context the module is one of them.

        Raises:
            InputError: it is one already.
        """
        with self._lock:
            if id(module) in self._positions:
                raise InputError("the model is already steered: combine the controllers (Controller.combine)")
            if not self._positions:
                self._put_back = self._exchange()
            self._positions[id(module)] = positions
        try:
            yield
        finally:
            with self._lock:
                del self._positions[id(module)]
                if not self._positions:
                    self._put_back()
