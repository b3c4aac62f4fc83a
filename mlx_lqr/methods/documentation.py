"""The documentation's table of methods, made from the registry."""

from __future__ import annotations

from typing import Any

from mlx_lqr.methods.method import Method, Option
from mlx_lqr.methods.registry import METHODS

HEAD = (
    "`--method`",
    "what it is",
    "`y` becomes",
    "options of its own",
    "`--positions`",
    "`--layers`",
    "strength",
    "to begin with",
)
_LAYERS = {"auto": "where the prompts are told apart", "all": "all", "middle": "the middle one"}


def table() -> str:
    """Every method in a Markdown table: paper, formula, options, and what strengths mean."""
    rows = [HEAD, ["---"] * len(HEAD), *(_row(METHODS[name]) for name in METHODS)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(method: Method[Any]) -> list[str]:
    papers = "; ".join(paper.markdown for paper in method.papers)
    return [
        f"`{method.name}`",
        method.title + (f": {papers}" if papers else ""),
        method.formula,
        ", ".join(_option(option) for option in method.options),
        f"`{method.positions}`",
        _LAYERS[method.layers],
        method.strengths.meaning,
        f"{method.strengths.suggested:g}",
    ]


def _option(option: Option) -> str:
    if option.off:
        return f"`--{option.off}`"
    flag = f"`--{option.name.replace('_', '-')}`"
    if isinstance(option.default, bool) or option.default is None:
        return flag
    return f"{flag} ({option.default:g})" if isinstance(option.default, int | float) else f"{flag} ({option.default})"
