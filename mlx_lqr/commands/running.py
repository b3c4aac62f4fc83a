"""Loading for commands that run a model and fit nothing: a GGUF file may run in an engine made for such files."""

from __future__ import annotations

from collections.abc import Iterable

from mlx_lqr.backends import registry
from mlx_lqr.backends.protocol import Model, Progress
from mlx_lqr.commands.options import Loading
from mlx_lqr.commands.output import say
from mlx_lqr.loading import load, running_backend
from mlx_lqr.methods.running import adapts
from mlx_lqr.methods.steering import Steering


def chosen_to_run(
    model: str, loading: Loading, steerings: Iterable[Steering] = (), adaptive: bool | None = None
) -> Loading:
    """How a model is loaded by a command that only runs it; see `load_to_run`."""
    options = loading["dtype"], loading["device"], loading["adapter"], loading["pipeline"]
    as_it_is = not any(options) and not any(adapts(steering, adaptive) for steering in steerings)
    return {**loading, "backend": running_backend(model, loading["backend"], as_it_is=as_it_is)}


def load_to_run(
    model: str,
    loading: Loading,
    progress: Progress,
    *,
    steerings: Iterable[Steering] = (),
    adaptive: bool | None = None,
) -> Model:
    """Load a model on the backend that suits a command which only runs it. A person is told where that is another than
    for everything else.

    Args:
        steerings, adaptive: what is to steer it.
    """
    chosen = chosen_to_run(model, loading, steerings, adaptive)
    if chosen["backend"] != loading["backend"]:
        say(f"Note: {registry.backend(chosen['backend']).title} runs this file (--backend mlx for MLX)", err=True)
    return load(model, **chosen, progress=progress)
