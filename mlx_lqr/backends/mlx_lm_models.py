"""mlx-lm's model classes without the 3 seconds that `import mlx_lm` takes.

`mlx_lm/__init__.py` imports its generation code and with it transformers; the model files need neither. So `mlx_lm`
enters `sys.modules` as a package whose `__init__` is postponed until somebody asks for something that it defines.
There is one copy of every class, whether or not mlx_lm is then used in full.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

from mlx_lqr.errors import InputError

_LIGHT = ("models", "sample_utils")
"""Submodules that may be imported while the package's `__init__` is postponed."""

FAMILIES = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
"""The model types whose blocks are known to carry one dense residual stream."""

_REMAPPED = {"mistral": "llama"}


def import_mlx_lm(submodule: str) -> ModuleType:
    """Import `mlx_lm.<submodule>` for one of the light submodules, at their own cost alone."""
    if "mlx_lm" not in sys.modules:
        spec = importlib.util.find_spec("mlx_lm")
        if spec is None:
            raise InputError("mlx-lm is not installed: pip install mlx-lm")
        package = _PostponedPackage("mlx_lm")
        package.__dict__.update(
            __spec__=spec,
            __path__=list(spec.submodule_search_locations or []),
            __file__=spec.origin,
            __package__="mlx_lm",
        )
        sys.modules["mlx_lm"] = package
    return importlib.import_module(f"mlx_lm.{submodule}")


def model_classes(model_type: str) -> tuple[Any, Any]:
    """The `Model` and `ModelArgs` classes of a supported family.

    Raises:
        InputError: another architecture, with the list of those supported.
    """
    if model_type not in FAMILIES:
        raise InputError(f"the architecture {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    module = import_mlx_lm(f"models.{_REMAPPED.get(model_type, model_type)}")
    return module.Model, module.ModelArgs


class _PostponedPackage(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        self._execute()
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system sets every submodule as an attribute of its package. One that is not light shows that the
        # package is wanted in full, where `__init__` decides what the name means (`mlx_lm.generate` is a function).
        if name not in _LIGHT and not name.startswith("__"):
            self._execute()
            self.__dict__.setdefault(name, value)
        else:
            self.__dict__[name] = value

    def _execute(self) -> None:
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
