"""Tokens from logits in torch: the filters of `Sampling`, and random numbers of each sequence's own."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence

import torch

from mlx_lqr.backends.protocol import LEAST_TEMPERATURE, Sampling


class Sampler:
    """Draws a token for each of B sequences, as it would be drawn for that sequence alone."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._seed = sampling.seed if sampling.seed is not None else secrets.randbits(32)
        self._generators: list[torch.Generator] = []
        """One a row, made when the number of sequences is known."""

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """A token (B,) from each row of logits (B, V)."""
        sampling = self.sampling
        if sampling.temperature == 0:
            return logits.argmax(dim=-1)
        logprobs = _filtered(torch.log_softmax(logits.float(), dim=-1), sampling)
        if not self._generators:
            self._generators = [
                torch.Generator(logits.device).manual_seed(self._seed + row) for row in range(len(logits))
            ]
        uniform = torch.stack(
            [torch.rand(logits.shape[-1], generator=own, device=logits.device) for own in self._generators]
        )
        # The largest of log p plus Gumbel noise is a draw from p.
        relative = logprobs - logprobs.amax(dim=-1, keepdim=True)  # at low temperatures, only 0 stays finite
        scaled = relative / max(sampling.temperature, LEAST_TEMPERATURE)
        return (scaled - torch.log(-torch.log(uniform))).argmax(dim=-1)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences alone."""
        if self._generators:
            self._generators = [self._generators[row] for row in rows]


def penalised(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """The logits (B, V) with those of the tokens `seen` (B, V) made less likely (Sampling.repetition_penalty)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _filtered(logprobs: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Log-probabilities (B, V) with those that the filters exclude at minus infinity, one filter after another."""
    if sampling.top_p < 1:
        ascending, order = logprobs.sort(dim=-1)
        outside = ascending.exp().cumsum(dim=-1) <= 1 - sampling.top_p
        outside[..., -1] = False
        logprobs = logprobs.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -math.inf)
    if sampling.min_p > 0:
        least = logprobs.amax(dim=-1, keepdim=True) + math.log(sampling.min_p)
        logprobs = logprobs.masked_fill(logprobs < least, -math.inf)
    if 0 < sampling.top_k < logprobs.shape[-1]:
        likeliest = logprobs.topk(sampling.top_k, dim=-1).indices
        outside = torch.ones_like(logprobs, dtype=torch.bool).scatter(-1, likeliest, False)
        logprobs = logprobs.masked_fill(outside, -math.inf)
    return logprobs
