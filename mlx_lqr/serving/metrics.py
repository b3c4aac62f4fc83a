"""What the server counts, as Prometheus reads it (text format 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

from mlx_lqr.serving.engine import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds"""
RATE = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
"""Tokens a second"""


class Histogram:
    """How many observations were at most as large as each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip([*map(repr, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum!r}"
        yield f"{name}_count {total}"


class Metrics:
    """Counts of the event loop's thread; the engine's own are read when they are asked for."""

    def __init__(self) -> None:
        self.first_token = Histogram(FIRST_TOKEN)
        self.rate = Histogram(RATE)
        self._responses: Counter[tuple[str, int]] = Counter()

    def count(self, route: str, status: int) -> None:
        """Count a response. A route is a path as the application declares it, not as a client writes it."""
        self._responses[route, status] += 1

    def text(self, stats: Stats) -> str:
        """All that is counted."""
        lines: list[str] = []

        def add(name: str, kind: str, help: str, samples: Iterator[str]) -> None:
            lines.extend([f"# HELP {name} {help}", f"# TYPE {name} {kind}", *samples])

        responses = (
            (f'route="{route}",status="{status}"', number)
            for (route, status), number in sorted(self._responses.items())
        )
        add(
            "mlx_lqr_responses_total",
            "counter",
            "Responses by route and status; 499 where the client went away.",
            (f"mlx_lqr_responses_total{{{labels}}} {number}" for labels, number in responses),
        )
        for name, help, number in _of(stats):
            add(name, "counter" if name.endswith("_total") else "gauge", help, iter([f"{name} {number}"]))
        for name, help, histogram in (
            ("mlx_lqr_first_token_seconds", "From a request to the first token of its answer.", self.first_token),
            ("mlx_lqr_tokens_per_second", "Of an answer, from its first token on.", self.rate),
        ):
            add(name, "histogram", help, histogram.lines(name))
        return "\n".join([*lines, ""])


def _of(stats: Stats) -> list[tuple[str, str, int]]:
    """What the engine counts: name, meaning and number."""
    return [
        ("mlx_lqr_answers_running", "Answers being written.", stats.running),
        ("mlx_lqr_answers_waiting", "Requests that wait for a slot.", stats.waiting),
        ("mlx_lqr_answers_finished_total", "Answers that came to their end.", stats.finished),
        ("mlx_lqr_answers_cancelled_total", "Answers that nobody waited for.", stats.cancelled),
        ("mlx_lqr_answers_failed_total", "Answers that ended with an error.", stats.failed),
        ("mlx_lqr_prompt_tokens_total", "Tokens of prompts.", stats.prompt_tokens),
        ("mlx_lqr_cached_tokens_total", "Tokens of prompts that were not run again.", stats.cached_tokens),
        ("mlx_lqr_generated_tokens_total", "Tokens of answers.", stats.generated_tokens),
    ]
