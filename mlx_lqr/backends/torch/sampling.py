"""Tokens from logits in torch: the filters of `Sampling`, and random numbers of each sequence's own."""

from __future__ import annotations

import math

import torch

from mlx_lqr.backends.protocol import LEAST_TEMPERATURE, Sampling
from mlx_lqr.backends.sampling import LIKELIEST, GeneratorSampler
from mlx_lqr.backends.torch.framework import TorchFramework


class TorchSampler(GeneratorSampler):
    """Draws with a generator for each sequence."""

    def __init__(self, framework: TorchFramework, sampling: Sampling) -> None:
        super().__init__(framework, sampling)
        self._device = framework.device

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(seed)

    def _likeliest(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(dim=-1)

    def _pick(self, logits: torch.Tensor) -> torch.Tensor:
        sampling = self.sampling
        filters = sampling.top_p < 1 or sampling.min_p > 0 or sampling.top_k > 0
        if sampling.temperature == 0 or not filters or logits.device.type != "cpu":
            return super()._pick(logits)
        uniform = torch.stack([torch.rand(1, generator=one, dtype=torch.float64) for one in self._of(len(logits))])
        return self._by_rank(logits.float(), uniform, LIKELIEST)

    def _by_rank(self, logits: torch.Tensor, uniform: torch.Tensor, count: int) -> torch.Tensor:
        """A token (B,) from each row of logits (B, V), by a uniform number each (B, 1), as `_filtered` and `_drawn` do.

        On the CPU, whole vocabularies of sorting and of random numbers take longer than a small model does, so only the
        `count` likeliest tokens are looked at, and more of them where the filters may leave more.
        """
        whole = 4 * count >= logits.shape[-1]  # where sorting all is quicker than looking for so many
        descending, order = logits.sort(dim=-1, descending=True) if whole else logits.topk(count, dim=-1)
        kept = _filtered(descending - logits.logsumexp(dim=-1, keepdim=True), self.sampling)
        relative = (kept - kept[:, :1]) / max(self.sampling.temperature, LEAST_TEMPERATURE)
        mass = relative.double().exp().cumsum(dim=-1)
        rank = torch.searchsorted(mass, uniform * mass[:, -1:], right=True).clamp(max=order.shape[-1] - 1)
        tokens = order.gather(-1, rank)[:, 0]
        if not whole and bool((short := kept[:, -1].isfinite()).any()):
            tokens[short] = self._by_rank(logits[short], uniform[short], 8 * count)
        return tokens

    def _filtered(self, logits: torch.Tensor) -> torch.Tensor:
        logprobs = _filtered(torch.log_softmax(logits.float(), dim=-1), self.sampling)
        return logprobs - logprobs.amax(dim=-1, keepdim=True)

    def _drawn(self, logprobs: torch.Tensor) -> torch.Tensor:
        own = self._of(len(logprobs))
        uniform = torch.stack([torch.rand(logprobs.shape[-1], generator=one, device=self._device) for one in own])
        # The largest of log p plus Gumbel noise is a draw from p.
        return (logprobs - torch.log(-torch.log(uniform))).argmax(dim=-1)


def _filtered(logprobs: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Log-probabilities (B, V) with those that the filters exclude at minus infinity, one filter after another."""
    if sampling.top_p < 1:
        logprobs = logprobs.masked_fill(outside_top_p(logprobs, sampling.top_p), -math.inf)
    if sampling.min_p > 0:
        least = logprobs.amax(dim=-1, keepdim=True) + math.log(sampling.min_p)
        logprobs = logprobs.masked_fill(logprobs < least, -math.inf)
    if 0 < sampling.top_k < logprobs.shape[-1]:
        likeliest = logprobs.topk(sampling.top_k, dim=-1).indices
        outside = torch.ones_like(logprobs, dtype=torch.bool).scatter(-1, likeliest, False)
        logprobs = logprobs.masked_fill(outside, -math.inf)
    return logprobs


def outside_top_p(logprobs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Whether the tokens that are likelier already have `top_p` of the mass: (B, V)."""
    descending, order = logprobs.sort(dim=-1, descending=True)
    likelier = descending.exp().cumsum(dim=-1) - descending.exp()
    return torch.ones_like(logprobs, dtype=torch.bool).scatter(-1, order, likelier >= top_p)
