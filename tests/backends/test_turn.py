"""The lock of those who compute goes round."""

from __future__ import annotations

import threading
import time

from mlx_lqr.backends.turn import Turn


def test_whoever_waits_comes_before_whoever_asks_again() -> None:
    turn, order = Turn(), []

    def other(name: str) -> None:
        with turn:
            order.append(name)

    threads = [threading.Thread(target=other, args=[name]) for name in ("second", "third")]
    with turn, turn:
        for count, thread in enumerate(threads, 1):
            thread.start()
            while turn.waiting < count:
                time.sleep(0.001)
        order.append("first")
    with turn:
        order.append("last")
    for thread in threads:
        thread.join()
    assert order == ["first", "second", "third", "last"]


def test_one_thread_at_a_time_is_in_it() -> None:
    turn, inside, most = Turn(), 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(200):
            with turn, turn:
                inside += 1
                most = max(most, inside)
                time.sleep(0)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, turn.waiting) == (1, 0)
