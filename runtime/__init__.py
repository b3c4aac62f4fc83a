"""The minimal runtime: decode a prompt token by token while a controller steers, stream the text, hold a chat."""

from mlx_lqr.runtime.chat import Chat
from mlx_lqr.runtime.generate import Options, Piece, batch_generate, batch_stream, generate, stream
from mlx_lqr.runtime.steer import steer

__all__ = ["Chat", "Options", "Piece", "batch_generate", "batch_stream", "generate", "steer", "stream"]
