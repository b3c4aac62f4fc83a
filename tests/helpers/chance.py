"""Tokens drawn without a seed: a test that does so by mistake fails, and one that means to says so."""

from __future__ import annotations

import pytest

from mlx_lqr.backends.framework import Framework
from mlx_lqr.backends.protocol import Sampling, fresh_seed
from mlx_lqr.backends.sampling import Sampler

CHAT = "mlx_lqr.runtime.chat.fresh_seed"
DRAWS = "mlx_lqr.backends.sampling.fresh_seed"
_begin = Sampler.__init__


def refuse_unseeded(patch: pytest.MonkeyPatch) -> None:
    """From now on whoever draws tokens gives a seed, or takes the likeliest (temperature 0)."""

    def begin(self: Sampler, framework: Framework, sampling: Sampling) -> None:
        assert sampling.seed is not None or sampling.temperature == 0, "give a seed, or temperature 0"
        _begin(self, framework, sampling)

    patch.setattr(Sampler, "__init__", begin)
    patch.setattr(CHAT, lambda: None)


def allow_unseeded(patch: pytest.MonkeyPatch, seed: int | None = None) -> None:
    """From now on tokens are drawn without a seed as they are for users, or where `seed` is given with that one."""
    patch.setattr(Sampler, "__init__", _begin)
    for place in (CHAT, DRAWS):
        patch.setattr(place, fresh_seed if seed is None else lambda: seed)
