"""Everything that commands draw, with a name that not every encoding has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_lqr.commands import chat_view
from mlx_lqr.commands.tables import show_table
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.lqr.tracking import Tracking
from mlx_lqr.runtime.tracking import TrackedAnswer

NAME = "\N{DOG FACE}"


class Drawn:
    """As much of a controller as a drawing asks for."""

    concepts, num_layers = (NAME,), 2

    def ends_at(self, strength: Sequence[float]) -> np.ndarray:
        return np.ones((2, 1), np.float32)

    magnitude, offset = np.ones((2, 1), np.float32), np.zeros((2, 1), np.float32)


def show() -> None:
    some = Tracking(np.full((2, 1), 0.5, np.float32), np.ones((2, 1), np.float32))
    controller: Controller = Drawn()  # type: ignore[assignment]
    chat_view.draw_tracking(TrackedAnswer(controller, (1.0,), some, some, np.ones((2, 3, 1), np.float32)))
    chat_view.draw_comparison([(NAME, iter([]))])
    show_table(["task", "±"], [[NAME, "1"]])
    print(NAME)
