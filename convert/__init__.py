"""Model formats in: GGUF files and Hugging Face checkpoints become MLX model folders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .folder import convert

__all__ = ["convert"]


def __getattr__(name: str) -> Any:
    """Import `convert` when it is first used: a model that is already converted needs no converter."""
    if name != "convert":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .folder import convert

    return convert
