"""Model formats in: GGUF files and Hugging Face checkpoints become MLX model folders."""

from .folder import convert

__all__ = ["convert"]
