"""What tells models apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from mlx_lqr.backends.protocol import Runner


def fingerprint_of(model: Runner, norms: Iterable[tuple[str, bytes]]) -> str:
    """A digest of a model's sizes and of its blocks' norm weights.

    Args:
        norms: by name ("LAYER.path.to.weight"), rounded to bfloat16, the coarsest dtype in use.
    """
    digest = hashlib.sha256(f"{model.num_layers} {model.hidden_size} {model.vocab_size}".encode())
    for _, weight in sorted(norms):
        digest.update(weight)
    return digest.hexdigest()[:16]
