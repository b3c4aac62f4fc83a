"""Whether a model can do what is asked of it, and one line with the way out where it cannot.

require(model, DIFFERENTIABLE, "fit controllers")
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from mlx_lqr.backends import registry
from mlx_lqr.backends.protocol import Differentiable, HeadRecorder, Recorder, Runner
from mlx_lqr.errors import InputError

M = TypeVar("M")


@dataclass(frozen=True)
class Capability(Generic[M]):
    """What the models of some backends can do: the members of one of the protocols."""

    protocol: Any

    def is_of(self, model: object) -> bool:
        """Whether the model has all members. None is computed: a fingerprint reads all weights of a model's norms."""
        return all(inspect.getattr_static(model, name, _MISSING) is not _MISSING for name in self._members)

    @property
    def _members(self) -> set[str]:
        names = {name for kind in self.protocol.__mro__ for name in (*vars(kind), *inspect.get_annotations(kind))}
        return {name for name in names if not name.startswith("_")}


_MISSING = object()

RUNNER: Capability[Runner] = Capability(Runner)
RECORDER: Capability[Recorder] = Capability(Recorder)
HEAD_RECORDER: Capability[HeadRecorder] = Capability(HeadRecorder)
DIFFERENTIABLE: Capability[Differentiable] = Capability(Differentiable)


def require(model: Runner, capability: Capability[M], what: str) -> M:
    """The model, which has the capability.

    Args:
        what: what needs it, after "cannot".

    Raises:
        InputError: it has not.
    """
    if capability.is_of(model):
        return cast(M, model)
    backends = registry.backends()
    able = [backend.name for backend in backends if capability in backend.capabilities]
    title = next((backend.title for backend in backends if backend.name == model.backend), model.backend)
    raise InputError(
        f"{title} runs models but cannot {what}: load this one with --backend {' or '.join(able)} "
        f'(in Python, backend="{able[0]}")'
    )
