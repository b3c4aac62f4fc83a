"""docs/comparison.md, from the results alone.

How it was measured is told by the template method.md, and what a person has found out by findings.md, as it is. Where
results/ablation.json is there, its table has a section.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.comparison.experiments import CHAT, EXPERIMENTS, Experiment
from benchmarks.comparison.measure import load_results
from benchmarks.comparison.methods import OURS, OWN
from benchmarks.comparison.tables import (
    Result,
    ablation_table,
    by_control,
    control_table,
    cost_table,
    facts_table,
    summary_table,
    verdicts,
)
from mlx_lqr.errors import InputError
from mlx_lqr.files.atomic import writing

PAGE = "comparison.md"
ABLATION = "ablation.json"
TITLES = {"smollm2": "SmolLM2-135M-Instruct", "gemma": "Gemma 3 270M"}
DRAWN = 2
"""Rivals in a picture, those with the most control at the normal budget"""


def write_page(results: Path, docs: Path) -> Path:
    """Write the page and its pictures; return its path.

    Raises:
        InputError: no results in the folder.
    """
    measured, ablation = load_results(results), results / ABLATION
    if not measured and not ablation.is_file():
        raise InputError(f"there are no results in {results}: measure first (python -m benchmarks.comparison run)")
    path = docs / PAGE
    sections = [_head(measured), _summary(measured), _text("findings.md")] if measured else ["# Methods compared"]
    for experiment in EXPERIMENTS:
        own = [result for result in measured if result["experiment"] == experiment.name]
        if own:
            sections.append(_experiment(experiment, own, docs))
    if ablation.is_file():
        sections += [_text("ablation.md"), ablation_table(json.loads(ablation.read_text("utf-8")))]
    with writing(path) as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", "utf-8")
    return path


def _head(results: Sequence[Result]) -> str:
    first = results[0]
    judged = "; ".join(f"where {_model(key)} is steered, {_judge(key)} judges" for key in TITLES)
    budgets = ", ".join(f"{name} {budget:g}" for name, budget in first["budgets"].items())
    computed = {name: first[name] for name in ("version", "backend", "dtype")}
    values = {**first["sizes"], **computed, "judged_by": judged, "budgets": budgets}
    return _text("method.md").format_map(values)


def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text("utf-8").strip()


def _summary(results: Sequence[Result]) -> str:
    parts = [
        "## In short",
        f"A sign for each budget ({', '.join(results[0]['budgets'])}): `+` A-LQR has more control, `-` less, `=` they "
        "cannot be told apart, `.` not measured. Control is at equal damage, and the intervals behind the signs are "
        "corrected for the number of comparisons.",
    ]
    for key, title in TITLES.items():
        own = [result for result in results if result["key"] == key]
        if any(result["comparisons"] for result in own):
            parts += [f"### {title}, all experiments", summary_table(own)]
    return "\n\n".join(parts)


def _experiment(experiment: Experiment, results: Sequence[Result], docs: Path) -> str:
    parts = [f"## {experiment.title}", f"Fitted on {experiment.origin}."]
    for result in results:
        parts += [f"### {_model(result['key'])}", _rows(result)]
        if by_control(result):
            parts.append(control_table(result))
        parts.append(verdicts(result))
        if by_control(result):
            parts.append(cost_table(experiment, result))
        if experiment is CHAT:
            parts.append(facts_table(result))
        if experiment.curve and by_control(result):
            parts.append(_curve(experiment, result, docs))
    return "\n\n".join(part for part in parts if part)


def _rows(result: Result) -> str:
    rows = ", ".join(f"{number} {name}" for name, number in result["rows"].items())
    positive, negative = result["prompts"]
    sentence = f"Control is the {result['control_label']}. Rows: {rows}; fitted on {positive} and {negative} prompts."
    if result["comparisons"]:
        sentence += f" {result['comparisons']} comparisons."
    return sentence


def _curve(experiment: Experiment, result: Result, docs: Path) -> str:
    from mlx_lqr.analysis import plots

    ranked = by_control(result)
    rivals = [one["method"] for one in ranked if one["method"] not in OWN][:DRAWN]
    points = [
        plots.Tradeoff(
            one["method"],
            source["strength"][budget],
            at["metrics"][result["control"]][0],
            at["metrics"]["perplexity"][0],
            tuple(at["metrics"][result["control"]][1:]),
            tuple(at["metrics"]["perplexity"][1:]),
        )
        for one in ranked
        if one["method"] in (OURS, *rivals)
        for source in one["sources"].values()
        for budget, at in one["budgets"].items()
        if "metrics" in at
    ]
    name = f"comparison-{experiment.name}-{result['key']}"
    figure = plots.control_against_damage(points, result["control_label"], f"perplexity under {_judge(result['key'])}")
    plots.save_all({name: figure}, docs, kinds=("svg",))
    return f"![{experiment.title}, {_model(result['key'])}: control against perplexity]({name}.svg)"


def _model(key: str) -> str:
    return TITLES[key]


def _judge(key: str) -> str:
    """The other model."""
    return next(title for other, title in TITLES.items() if other != key)
