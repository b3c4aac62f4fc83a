"""The list of evaluation tasks: one line each."""

from __future__ import annotations

from collections.abc import Mapping

from mlx_lqr.tasks.chat import CHAT
from mlx_lqr.tasks.concept import CONCEPT
from mlx_lqr.tasks.kind import TaskKind
from mlx_lqr.tasks.refusal import REFUSAL
from mlx_lqr.tasks.toxicity import TOXICITY
from mlx_lqr.tasks.truthfulness import TRUTHFULNESS

TASKS: Mapping[str, TaskKind] = {
    kind.name: kind
    for kind in (
        CONCEPT,
        CHAT,
        TOXICITY,
        TRUTHFULNESS,
        REFUSAL,
    )
}
