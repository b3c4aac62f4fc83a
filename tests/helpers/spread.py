"""Numbers of a model, in one process or in several; as a script, run by `mlx.launch`, it writes those of models.

spread.py OUT.npz FOLDER[:pipeline] ...
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

import mlx_lqr
from mlx_lqr.backends.protocol import Model
from mlx_lqr.launched import count, rank

PROMPT = [5, 9, 2, 33, 7, 51, 20, 11, 3]
PROMPTS = [PROMPT, [4, 8], [30, 1, 17, 6, 40]]
POSITIVE, NEGATIVE = [[1, 2, 3], [4, 5]], [[6, 7], [8]]


def numbers(model: Any, name: str, *, brief: bool) -> dict[str, np.ndarray]:
    """What the model computes, by names that begin with this one.

    Args:
        brief: without what needs many passes.
    """
    trace = model.trace(PROMPT)
    rows = np.random.default_rng(0).standard_normal((3, model.hidden_size)).astype(np.float32)
    controller = mlx_lqr.fit(model, POSITIVE, NEGATIVE, cost="feature", q=1.0, layers="all", concept="c")
    entries: dict[str, Any] = {
        "fingerprint": list(model.fingerprint.encode()),
        "residuals": model.residuals(PROMPTS),
        "trace": trace.residual,
        "gain": controller.gain,
        "setpoint": controller.setpoint,
        "tokens drawn": _of(mlx_lqr.stream(model, PROMPT, **{**_steered(controller), "temperature": 1.0, "seed": 3})),
    }
    for k in (0, model.num_layers - 1):
        entries[f"vjp {k}"] = model.vjp(trace, k, rows)
    if not brief:
        entries["along"] = np.concatenate(model.logits_along([(PROMPT[:3], PROMPT[3:]), (PROMPTS[1], [7])]))
        entries["jvp"] = model.jvp(trace, 1, rows)
        entries["block"] = model.block(trace, 1, trace.residual[1] + rows)
        entries["jacobian"] = model.jacobian(trace, 1)
        entries |= _answers(model, controller)
    return {f"{name} {entry}": np.asarray(values) for entry, values in entries.items()}


def _steered(controller: mlx_lqr.Controller) -> mlx_lqr.Options:
    return {"controller": controller, "strength": 2.0, "max_tokens": 4, "temperature": 0}


def _answers(model: Model, controller: mlx_lqr.Controller) -> dict[str, list[int | None]]:
    """Token ids of answers, steered or not, one alone or side by side."""
    steered = _steered(controller)
    together = mlx_lqr.batch_stream(model, PROMPTS, **steered)
    return {
        "tokens": _of(mlx_lqr.stream(model, PROMPT, max_tokens=4, temperature=0)),
        "tokens recorded": _of(mlx_lqr.stream(model, PROMPT, record=mlx_lqr.Recording(), **steered)),
        "tokens adapted": _of(mlx_lqr.stream(model, PROMPT, adaptive=True, **steered)),
        "tokens together": [number for i, piece in together for number in (i, piece.token)],
    }


def _of(pieces: Iterable[mlx_lqr.Piece]) -> list[int | None]:
    return [piece.token for piece in pieces]


def main(out: str, *sources: str) -> None:
    collected: dict[str, np.ndarray] = {}
    for number, source in enumerate(sources):
        folder, _, kind = source.partition(":")
        model = mlx_lqr.load(folder, backend="mlx", pipeline=kind == "pipeline")
        collected |= numbers(model, str(number), brief=count() > 2)
    if rank() == 0:
        np.savez(out, **collected)


if __name__ == "__main__":
    main(*sys.argv[1:])
