"""docs/comparison.md: tables, pictures and every sentence with a number in it, from the results alone.

How it was measured is told by the template method.md, and what a person has found out by findings.md, as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.comparison.experiments import EXPERIMENTS, Experiment
from benchmarks.comparison.measure import load_results
from benchmarks.comparison.methods import PAPER
from mlx_lqr.errors import InputError
from mlx_lqr.files.atomic import writing

PAGE = "comparison.md"
DAMAGE = ("perplexity", "distinct_2", "repetition", "kl", "capability")
NAMES = {
    "prevalence": "prevalence",
    "harmless": "not toxic",
    "mean_toxicity": "mean toxicity",
    "mc1": "MC1",
    "mc2": "MC2",
    "closer_to_true": "closer to true",
    "discernment": "unsafe - safe",
    "refused_unsafe": "refused, unsafe",
    "refused_safe": "refused, safe",
    "answered_safe": "answered, safe",
    "distinct_2": "distinct-2",
    "kl": "KL",
}
TITLES = {"smollm2": "SmolLM2-135M-Instruct", "gemma": "Gemma 3 270M"}
Result = dict[str, Any]
"""One experiment's result on one model, as measure.py writes it."""


def write_page(output: Path, docs: Path) -> Path:
    """Write the page and its pictures; return its path.

    Raises:
        InputError: no results in the output folder.
    """
    results = load_results(output)
    if not results:
        raise InputError(f"there are no results in {output}: measure first (python -m benchmarks.comparison run)")
    path = docs / PAGE
    sections = [_head(results)]
    for experiment in EXPERIMENTS:
        own = [result for result in results if result["experiment"] == experiment.name]
        if own:
            sections.append(_experiment(experiment, own, docs))
    sections += [_text("findings.md"), _budget(results)]
    with writing(path) as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", "utf-8")
    return path


def _head(results: Sequence[Result]) -> str:
    first = results[0]
    sizes, decoding = first["sizes"], first["decoding"]
    judged = "; ".join(f"where {_model(key)} is steered {_judge(key)} judges" for key in TITLES)
    values = {
        "version": first["version"],
        "limit": first["limit"],
        "judged": judged,
        "tune": decoding["tune"],
        "report": decoding["report"],
        **sizes,
    }
    return _text("method.md").format_map(values)


def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text("utf-8").strip()


def _experiment(experiment: Experiment, results: Sequence[Result], docs: Path) -> str:
    parts = [f"## {experiment.title}", f"Fitted on {experiment.origin}."]
    for result in results:
        parts += [f"### {_model(result['key'])}", _rows(result), _table(experiment, result), _verdict(result)]
        if experiment.curve and _by_control(result):
            parts.append(_curve(experiment, result, docs))
    return "\n\n".join(part for part in parts if part)


def _rows(result: Result) -> str:
    def count(rows: dict[str, int]) -> str:
        return ", ".join(f"{number} {name}" for name, number in rows.items())

    return f"Rows: {count(result['rows'])}; while tuning {count(result['tuning_rows'])}."


def _table(experiment: Experiment, result: Result) -> str:
    columns = [result["control"], *(name for name in experiment.columns if name != result["control"]), *DAMAGE]
    lines = [
        f"| method | strength | {' | '.join(NAMES.get(name, name) for name in columns)} | A-LQR leads by |",
        "|---" * (len(columns) + 3) + "|",
        f"| unsteered | | {' | '.join(_number(result['unsteered'][name]) for name in columns)} | |",
    ]
    for one in _by_control(result):
        cells = [_number(one["metrics"][name]) for name in columns]
        lead = one.get("against_alqr", {}).get(result["control"])
        against = _number([-lead[0], -lead[2], -lead[1]]) if lead else ""
        name = f"**{one['method']}**" if one["method"] == "alqr" else one["method"]
        lines.append(f"| {name} | {one['best']['strength']:g} | {' | '.join(cells)} | {against} |")
    return "\n".join(lines)


def _by_control(result: Result) -> list[Result]:
    """The methods that have something to report, the one with the most control first."""
    reported = [one for one in result["methods"] if one["best"]]
    return sorted(reported, key=lambda one: -one["metrics"][result["control"]][0])


def _verdict(result: Result) -> str:
    """What the paired differences say, in sentences."""
    control, limit = result["control"], result["limit"]
    sentences = []
    reported = _by_control(result)
    rivals = [one for one in reported if "against_alqr" in one]
    above = [one["method"] for one in rivals if one["against_alqr"][control][1] > 0]
    below = [one["method"] for one in rivals if one["against_alqr"][control][2] < 0]
    alike = [one["method"] for one in rivals if one["method"] not in (*above, *below)]
    for methods, words in (
        (below, "A-LQR controls more than"),
        (alike, "A-LQR cannot be told apart from"),
        (above, "A-LQR controls less than"),
    ):
        if methods:
            sentences.append(f"{words} {_listed(methods)}.")
    unsteered = result["unsteered"]["perplexity"][0]
    over = {one["method"]: one["metrics"]["perplexity"][0] / unsteered for one in reported}
    beyond = [f"{name} ({ratio:.2f})" for name, ratio in over.items() if ratio > limit]
    if beyond:
        sentences.append(
            f"On the reported rows the perplexity is more than {limit:g} times the unsteered one's under "
            f"{_listed(beyond)}."
        )
    missing = [one["method"] for one in result["methods"] if not one["best"]]
    if missing:
        sentences.append(f"No trial within the limit: {_listed(missing)}.")
    return " ".join(sentences)


def _curve(experiment: Experiment, result: Result, docs: Path) -> str:
    from mlx_lqr.analysis import plots

    points = [
        plots.Tradeoff(
            one["method"],
            at["strength"],
            at["metrics"][result["control"]][0],
            at["metrics"]["perplexity"][0],
            tuple(at["metrics"][result["control"]][1:]),
            tuple(at["metrics"]["perplexity"][1:]),
        )
        for one in result["methods"]
        if one["best"] and (len(one["curve"]) > 1 or one["method"] == PAPER)
        for at in one["curve"]
    ]
    name = f"comparison-{experiment.name}-{result['key']}"
    figure = plots.control_against_damage(points, result["control_label"], f"perplexity under {_judge(result['key'])}")
    plots.save_all({name: figure}, docs, kinds=("svg",))
    return f"![{experiment.title}, {_model(result['key'])}: control against perplexity]({name}.svg)"


def _budget(results: Sequence[Result]) -> str:
    """Every method's number of evaluations, and what they led to."""
    lines = [
        "## What the budget was spent on",
        "",
        "`within` counts the trials within the limit on perplexity.",
        "",
        "| experiment | model | method | evaluations | within | recommended | control while tuning |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for one in result["methods"]:
            within = [trial for trial in one["trials"] if trial["within"]]
            best, control = "", ""
            if one["best"]:
                best = f"{one['best']['setting']}, at {one['best']['strength']:g}"
                control = f"{one['best']['control'][0]:.2f}"
            cells = [
                result["experiment"],
                _model(result["key"]),
                one["method"],
                str(len(one["trials"])),
                str(len(within)),
            ]
            lines.append(f"| {' | '.join([*cells, best, control])} |")
    return "\n".join(lines)


def _model(key: str) -> str:
    return TITLES[key]


def _judge(key: str) -> str:
    """The other model."""
    return next(title for other, title in TITLES.items() if other != key)


def _number(interval: Sequence[float | None]) -> str:
    value, low, high = (float("nan") if end is None else end for end in interval)
    digits = 1 if abs(value) >= 9.95 else 2
    value, low, high = (round(end, digits) + 0.0 for end in (value, low, high))  # no -0.00
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
