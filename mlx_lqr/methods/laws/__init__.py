"""Control laws, each written once for every backend.

A law is an expression in `@ * + - > **` and slices, which NumPy, MLX and torch arrays share; a backend only places the
arrays (`place`) and calls the law with each block's input and output.
"""

from mlx_lqr.methods.laws.adjustable import AdjustableLaw, check_strength
from mlx_lqr.methods.laws.choice import law_of
from mlx_lqr.methods.laws.feedback import LinearFeedback, RecordedFeedback, Recording

__all__ = ["AdjustableLaw", "LinearFeedback", "RecordedFeedback", "Recording", "check_strength", "law_of"]
