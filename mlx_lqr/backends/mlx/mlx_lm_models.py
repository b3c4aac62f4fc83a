"""mlx-lm's model classes without the 3 seconds that `import mlx_lm` takes.

`mlx_lm/__init__.py` imports its generation code and with it transformers; the model files need neither. So they are
imported below a stand-in for the package, which then goes. Whoever imports `mlx_lm` afterwards gets the real package
with these very
modules in it: there is one copy of every class.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from mlx_lqr.backends.checkpoint.model_folder import FAMILIES, check_family
from mlx_lqr.errors import InputError

_SINCE = {"qwen3_moe": (0, 32)}
"""Families that older versions of mlx-lm have, but cannot differentiate."""

REMAPPED = {"mistral": "llama"}


def import_mlx_lm(submodule: str) -> ModuleType:
    """Import `mlx_lm.<submodule>` at its own cost alone, where it needs nothing of the package's `__init__`."""
    if "mlx_lm" in sys.modules:
        return importlib.import_module(f"mlx_lm.{submodule}")
    with _stand_in():
        return importlib.import_module(f"mlx_lm.{submodule}")


def is_supported(model_type: str) -> bool:
    """Whether the family can be steered with the mlx-lm that is installed."""
    installed = tuple(int(number) for number in metadata.version("mlx-lm").split(".")[:2])
    return model_type in FAMILIES and installed >= _SINCE.get(model_type, (0, 0))


def model_classes(model_type: str) -> tuple[Any, Any]:
    """The `Model` and `ModelArgs` classes of a supported family.

    Raises:
        InputError: another architecture, with the list of those supported.
    """
    check_family(model_type)
    if not is_supported(model_type):
        needed = ".".join(map(str, _SINCE[model_type]))
        raise InputError(f"{model_type} needs mlx-lm {needed}: pip install -U mlx-lm (with Python 3.11 or newer)")
    module = import_mlx_lm(f"models.{REMAPPED.get(model_type, model_type)}")
    return module.Model, module.ModelArgs


@contextmanager
def _stand_in() -> Iterator[None]:
    """An empty package that knows only where mlx_lm's files are."""
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None:
        raise InputError("mlx-lm is not installed: pip install mlx-lm")
    package = ModuleType("mlx_lm")
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["mlx_lm"] = package
    try:
        yield
    finally:
        del sys.modules["mlx_lm"]
        if not any(isinstance(finder, _RealPackage) for finder in sys.meta_path):
            sys.meta_path.insert(0, _RealPackage())


class _RealPackage(MetaPathFinder, Loader):
    """Finds the real mlx_lm once, and gives it the submodules that were imported before it as attributes."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "mlx_lm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            self._loader = spec.loader
            spec.loader = self
        return spec

    def exec_module(self, module: ModuleType) -> None:
        assert self._loader is not None
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        for name, submodule in list(sys.modules.items()):
            parent, _, child = name.rpartition(".")
            if parent == "mlx_lm":
                setattr(module, child, submodule)
        self._loader.exec_module(module)
