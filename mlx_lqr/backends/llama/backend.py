"""llama.cpp as a backend, by llama-cpp-python: small devices, and GGUF files as they are."""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from mlx_lqr.backends.backend import Backend, Suitability
from mlx_lqr.backends.capabilities import RECORDER
from mlx_lqr.backends.checkpoint.adapter import Adapter
from mlx_lqr.backends.protocol import Runner
from mlx_lqr.errors import InputError

PACKAGE = "llama-cpp-python"
OLDEST, TOO_NEW = (0, 3, 30), (0, 4)
"""The versions that it is made for, as in pyproject.toml."""


class Llama(Backend):
    """GGUF files in llama.cpp."""

    name = "llama"
    title = "llama.cpp"
    capabilities = frozenset({RECORDER})
    takes_device = False
    spreads = False
    adopts = ""
    reads_gguf = True

    def suitability(self) -> Suitability:
        """It runs no folders, so that it suits whoever names it, and GGUF files (see `mlx_lqr.loading`)."""
        installed = importlib.util.find_spec("llama_cpp") is not None
        return Suitability.ON_REQUEST if installed else Suitability.NOT_INSTALLED

    def check_installed(self) -> None:
        if importlib.util.find_spec("llama_cpp") is None:
            raise InputError(f'the llama backend needs {PACKAGE}, which is not installed: pip install "mlx-lqr[llama]"')
        installed = metadata.version(PACKAGE)
        numbers = tuple(int(digits) for digits in re.findall(r"\d+", installed)[:3])
        if not OLDEST <= numbers < TOO_NEW:
            raise InputError(
                f"the llama backend needs {PACKAGE} from {'.'.join(map(str, OLDEST))} to below "
                f'{".".join(map(str, TOO_NEW))}, not {installed}: pip install -U "mlx-lqr[llama]"'
            )

    def load(
        self,
        folder: Path,
        name: str,
        *,
        dtype: str | None,
        device: str | None,
        adapter: Adapter | None,
        pipeline: bool,
    ) -> Runner:
        if dtype is not None:
            raise InputError("llama.cpp runs a GGUF file in its own dtype: leave --dtype out, or use --backend mlx")
        if adapter is not None:
            raise InputError("llama.cpp runs no adapters of mlx-lm's or PEFT's formats: use --backend mlx")
        from mlx_lqr.backends.llama.model import LlamaModel

        return LlamaModel(folder, name)

    def reads(self, file: Path) -> bool:
        if self.suitability() is Suitability.NOT_INSTALLED:
            return False
        self.check_installed()
        from mlx_lqr.backends.llama.gguf import ARCHITECTURES, architecture_of

        return architecture_of(file) in ARCHITECTURES

    def adopt(self, model: Any) -> Runner | None:
        return None


BACKEND = Llama()
