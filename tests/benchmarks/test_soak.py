"""A small soak: mixed requests over HTTP, many at a time, on every backend; and that it would see what is wrong."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers.backends import BACKENDS
from helpers.serving import chat_folder, controllers_of

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

import mlx_lqr  # noqa: E402
from benchmarks import soak  # noqa: E402

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [5, 3, 5, 8], [*range(10, 40)], [7]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_requests_leave_nothing_and_get_what_is_theirs(backend: str) -> None:
    model: Any = mlx_lqr.load(chat_folder(), backend=backend)  # type: ignore[arg-type]
    outcome = soak.soak(model, controllers_of(model), PROMPTS, 60)
    assert outcome.wrong == []
    assert set(outcome.counts) == {*soak.ENDINGS}


def test_a_soak_sees_wrong_tokens_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = mlx_lqr.load(chat_folder(), backend="mlx")
    release, generate = threading.Event(), mlx_lqr.generate
    monkeypatch.setattr(mlx_lqr, "generate", lambda *args, **kwargs: generate(*args, **kwargs) + " w1")
    started: list[threading.Thread] = []
    ask = soak._asked

    def leaking(*args: Any) -> Any:
        if not started:
            started.append(threading.Thread(target=release.wait, name="left behind"))
            started[0].start()
        return ask(*args)

    monkeypatch.setattr(soak, "_asked", leaking)
    outcome = soak.soak(model, controllers_of(model), PROMPTS, 10, growth=-1e6)
    release.set()
    started[0].join()
    wrong = "\n".join(outcome.wrong)
    for sign in ("in place of", "threads are left: left behind", "memory grew by"):
        assert sign in wrong
