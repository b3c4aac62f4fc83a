"""What the library knows of a backend before any model is loaded, and without importing its framework."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mlx_lqr.backends.checkpoint.adapter import Adapter
from mlx_lqr.backends.protocol import Runner

if TYPE_CHECKING:
    from mlx_lqr.backends.capabilities import Capability


class Suitability(IntEnum):
    """How well a backend suits this machine; "auto" takes the one that suits it best."""

    NOT_INSTALLED = 0
    ON_REQUEST = 1
    """For whoever names it, and for files that it alone reads as they are."""
    CPU = 2
    GPU = 3
    MADE_FOR_IT = 4
    """The machine's own GPU, which no other backend uses as well."""


class Backend(ABC):
    """One way to run language models; each folder beside this file has one, as `BACKEND` in its `backend.py`."""

    name: ClassVar[str]
    """The folder's name, by which it is chosen."""
    title: ClassVar[str]
    capabilities: ClassVar[frozenset[Capability[Any]]]
    """What its models can do beyond running."""
    takes_device: ClassVar[bool]
    """Whether the caller may say where it computes."""
    spreads: ClassVar[bool]
    """Whether several processes under `mlx.launch` can share a model."""
    adopts: ClassVar[str]
    """Which models of its framework `adopt` takes, as a message names them; empty where it takes none."""
    reads_gguf: ClassVar[bool] = False
    """Whether it runs GGUF files as they are, and nothing else; others run folders."""

    @abstractmethod
    def suitability(self) -> Suitability:
        """How well it suits this machine."""

    @abstractmethod
    def check_installed(self) -> None:
        """Raise `InputError` where a package that it needs is missing or too old."""

    @abstractmethod
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
        """The model in a folder of config.json, safetensors and tokenizer files, or in a GGUF file (`reads_gguf`).

        Args:
            folder: it, or the file.
            device: None where the backend takes none.
            adapter: what the model is to compute with; it is a part of its fingerprint.
            pipeline: whether processes that share the model are to have blocks each; False where none can share it.

        Raises:
            InputError: an unsupported architecture, a device that is not there, files that are missing or damaged, or
                an adapter of another model.
        """

    def reads(self, file: Path) -> bool:
        """Whether it is installed and can run the model in a GGUF file, as far as the file's header tells."""
        return False

    def said(self, text: str | None) -> str | None:
        """What rank 0 of several processes says, on all of them; called after a model has been loaded."""
        return text

    @abstractmethod
    def adopt(self, model: Any) -> Runner | None:
        """The framework's own model object, wrapped; None for anything else.

        Raises:
            InputError: a model of this framework with an architecture that is not supported.
        """
