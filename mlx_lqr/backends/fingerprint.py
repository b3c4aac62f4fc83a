"""What tells models apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def fingerprint_of(sizes: tuple[int, int, int], norms: Iterable[tuple[str, bytes]], adapter: str | None = None) -> str:
    """A digest of a model's sizes, of its blocks' norm weights, and of its adapter, which leaves the norms as they are.

    Args:
        sizes: the number of its layers, its width and its vocabulary's size.
        norms: by name ("LAYER.path.to.weight"), rounded to bfloat16, the coarsest dtype in use.
        adapter: its own digest.
    """
    digest = hashlib.sha256(" ".join(map(str, sizes)).encode())
    for _, weight in sorted(norms):
        digest.update(weight)
    if adapter is not None:
        digest.update(adapter.encode())
    return digest.hexdigest()[:16]
