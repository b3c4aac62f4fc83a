"""Answering many at once: requests decoded side by side, each steered in its own way."""

from mlx_lqr.serving.engine import Engine, Ticket
from mlx_lqr.serving.requests import Event, Full, PromptScores, Request, Stats, Tracking

__all__ = ["Engine", "Event", "Full", "PromptScores", "Request", "Stats", "Ticket", "Tracking"]
