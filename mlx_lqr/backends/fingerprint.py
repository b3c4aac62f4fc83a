"""What tells models apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def fingerprint_of(sizes: tuple[int, int, int], norms: Iterable[tuple[str, bytes]]) -> str:
    """A digest of a model's sizes and of its blocks' norm weights.

    Args:
        sizes: the number of its layers, its width and its vocabulary's size.
        norms: by name ("LAYER.path.to.weight"), rounded to bfloat16, the coarsest dtype in use.
    """
    digest = hashlib.sha256(" ".join(map(str, sizes)).encode())
    for _, weight in sorted(norms):
        digest.update(weight)
    return digest.hexdigest()[:16]
