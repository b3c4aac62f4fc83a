"""Loading for commands that run a model and fit nothing: a GGUF file may run in an engine made for such files."""

from __future__ import annotations

from collections.abc import Iterable

from mlx_lqr.backends import registry
from mlx_lqr.backends.protocol import Model, Progress
from mlx_lqr.commands.options import Loading
from mlx_lqr.commands.output import say
from mlx_lqr.loading import load, running_backend
from mlx_lqr.methods.running import runs_on_any_backend
from mlx_lqr.methods.steering import Steering


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
    options = loading["dtype"], loading["device"], loading["adapter"], loading["pipeline"]
    as_it_is = not any(options) and all(runs_on_any_backend(steering, adaptive) for steering in steerings)
    chosen = running_backend(model, loading["backend"], as_it_is=as_it_is)
    if chosen != loading["backend"]:
        say(f"Note: {registry.backend(chosen).title} runs this file (--backend mlx for MLX)", err=True)
    asked: Loading = {**loading, "backend": chosen}
    return load(model, **asked, progress=progress)
