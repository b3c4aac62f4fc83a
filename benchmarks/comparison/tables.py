"""The tables of docs/comparison.md, and every sentence with a number in it, from results as measure.py writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.comparison.experiments import EXPERIMENTS, Experiment
from benchmarks.comparison.measure import DAMAGE
from benchmarks.comparison.methods import CHOSEN_AT, METHODS, OURS, OWN
from benchmarks.comparison.statistics import Verdict, at_control, verdict

NAMES = {
    "prevalence": "prevalence",
    "accuracy": "facts right",
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
    "kl": "KL, neutral text",
}
NEAR = (0.8, 1.25)
"""A divergence outside these shares of its budget is marked."""
BELOW, BEYOND = "\\*", "†"
LESS_CAPABLE = 0.1
WORDS: Mapping[Verdict, str] = {"+": "is ahead of", "-": "is behind", "=": "cannot be told apart from"}
Result = dict[str, Any]
"""One experiment's result on one model."""
Told = dict[str, Any]
"""What such a result has of one method."""


def control_table(result: Result) -> str:
    """Control at each budget, and how far A-LQR leads."""
    budgets = list(result["budgets"])
    blank = " |" * len(budgets)
    lines = [
        f"| method | {' | '.join([*budgets, *(f'A-LQR leads by, {budget}' for budget in budgets)])} |",
        "|---" * (1 + 2 * len(budgets)) + "|",
        f"| unsteered | {' | '.join([number(result['unsteered'][result['control']])] * len(budgets))} |{blank}",
    ]
    for one in by_control(result):
        cells = [_control(result, one, budget) for budget in budgets] + [_lead(one, budget) for budget in budgets]
        lines.append(f"| {_bold(one['method'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cost_table(experiment: Experiment, result: Result) -> str:
    """What was chosen, what damage it reaches at each budget, and what else changes at the normal one."""
    columns = [name for name in (*experiment.columns, *DAMAGE) if name in result["unsteered"]]
    lines = [
        f"| method | setting | strength | KL reached | {' | '.join(NAMES.get(name, name) for name in columns)} |",
        "|---" * (4 + len(columns)) + "|",
        f"| unsteered | | | | {' | '.join(number(result['unsteered'][name]) for name in columns)} |",
    ]
    for one in by_control(result):
        if "metrics" in (at := one["budgets"][CHOSEN_AT]):
            settings = {source["setting"] for source in one["sources"].values()}
            strengths = [source["strength"][CHOSEN_AT] for source in one["sources"].values()]
            cells = [
                settings.pop() if len(settings) == 1 else "",
                f"{strengths[0]:.3g}" if len(strengths) == 1 else "",
                " / ".join(f"{reached(one, budget):.2f}" for budget in result["budgets"]),
                *(number(at["metrics"][name]) for name in columns),
            ]
            lines.append(f"| {_bold(one['method'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(result: Result) -> str:
    """What the corrected differences say, a line for each budget, and what else is to be known."""
    lines = []
    for budget in result["budgets"]:
        groups: dict[Verdict, list[str]] = {sign: [] for sign in WORDS}
        for one in by_control(result):
            if sign := sign_of(one, budget):
                groups[sign].append(one["method"])
        told = [f"{WORDS[sign]} {listed(names)}" for sign, names in groups.items() if names]
        if told:
            lines.append(f"- **{budget}**: A-LQR {'; it '.join(told)}.")
    return "\n\n".join(part for part in ("\n".join(lines), " ".join(_remarks(result))) if part)


def _remarks(result: Result) -> Iterator[str]:
    if not result["methods"]:
        without = result["unsteered"][result["control"]][0]
        yield f"Control is {without:.2f} without steering: there is nothing to gain, and no method was measured."
    if any(one.get("kept") for one in result["methods"]):
        yield "A-LQR alone was measured anew; the other rows are those of the run before, on the same prompts."
    for mark, words in (
        (BELOW, "Even at the strongest sensible strength less than the budget is reached"),
        (BEYOND, "Even at the mildest strength tried more than the budget is spent"),
    ):
        marked = [one["method"] for one in by_control(result) if mark in _marks(result, one)]
        if marked:
            yield f"{mark} {words}: {listed(marked)}."
    if "capability" in result["unsteered"]:
        least = result["unsteered"]["capability"][0] - LESS_CAPABLE
        less = [
            f"{one['method']} ({budget})"
            for one in by_control(result)
            for budget, at in one["budgets"].items()
            if "metrics" in at and at["metrics"]["capability"][0] < least - 1e-9
        ]
        if less:
            yield f"Capability falls by more than {LESS_CAPABLE:g} under {listed(less)}."
    for one in result["methods"]:
        if "failed" in one:
            yield f"{one['method']} was not measured: {one['failed']}."
        for budget, at in one["budgets"].items():
            if "failed" in at:
                yield f"{one['method']} was not measured at the {budget} budget: {at['failed']}."


def facts_table(result: Result) -> str:
    """How many facts are kept where A-LQR controls as much as the best baseline does at each budget."""
    start = (result["unsteered"]["prevalence"][0], result["unsteered"]["accuracy"][0])
    ours = next((one for one in result["methods"] if one["method"] == OURS), None)
    rivals = [one for one in result["methods"] if one["method"] not in OWN]
    if ours is None or not rivals or start[1] == 0:
        return ""
    points = [start, *(_point(ours, budget) for budget in result["budgets"] if _measured(ours, budget))]
    lines = [
        "How many facts are left, as a share of those that are right without steering, where A-LQR has the same "
        "control as the baseline with the most of it (straight lines between A-LQR's budgets):",
        "",
        "| budget | best baseline | its control | its facts left | A-LQR's facts left |",
        "|---|---|---|---|---|",
    ]
    for budget in result["budgets"]:
        measured = [one for one in rivals if _measured(one, budget)]
        if measured:
            best = max(measured, key=lambda one: _point(one, budget)[0])
            control, left = _point(best, budget)
            own = at_control(control, points)
            kept = "does not control as much" if own is None else f"{own / start[1]:.2f}"
            lines.append(f"| {budget} | {best['method']} | {control:.2f} | {left / start[1]:.2f} | {kept} |")
    return "\n".join(lines)


def summary_table(results: Sequence[Result]) -> str:
    """Every method against A-LQR in every experiment of one model, a sign for each budget."""
    ordered = [result for one in EXPERIMENTS for result in results if result["experiment"] == one.name]
    ordered = [result for result in ordered if result["comparisons"]]
    signs = {
        (one["method"], result["experiment"]): [sign_of(one, budget) or "." for budget in result["budgets"]]
        for result in ordered
        for one in result["methods"]
    }
    names = [result["experiment"].removeprefix("concept-") for result in ordered]
    lines = [f"| A-LQR against | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for method in METHODS:
        if method != OURS and any(row == method for row, _ in signs):
            cells = [" ".join(signs.get((method, result["experiment"]), [])) for result in ordered]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    every = [sign for (method, _), each in signs.items() if method != OURS for sign in each]
    counts = {sign: every.count(sign) for sign in WORDS}
    lines += [
        "",
        f"Of {sum(counts.values())} comparisons A-LQR is ahead in {counts['+']} and behind in {counts['-']}; "
        f"{counts['=']} cannot be told apart.",
    ]
    return "\n".join(lines)


def ablation_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What each lever of A-LQR is worth: rows of {lever, setting, metrics}, metrics by name, numbers or intervals."""
    columns = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    lines = [
        f"| lever | setting | {' | '.join(NAMES.get(name, name) for name in columns)} |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for row in rows:
        cells = [_plain(row["metrics"].get(name)) for name in columns]
        lines.append(f"| {row['lever']} | {row['setting']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_control(result: Result) -> list[Told]:
    """The methods that were measured, those with the most control at the normal budget first."""
    measured = [one for one in result["methods"] if any(_measured(one, budget) for budget in result["budgets"])]

    def control(one: Told) -> float:
        at = one["budgets"][CHOSEN_AT]
        return float(at["metrics"][result["control"]][0]) if "metrics" in at else float("-inf")

    return sorted(measured, key=control, reverse=True)


def reached(one: Told, budget: str) -> float:
    """The KL at a budget, the mean over what is steered for."""
    each = [source["divergence"][budget] for source in one["sources"].values()]
    return float(sum(each) / len(each))


def mark_of(result: Result, one: Told, budget: str) -> str:
    """What says that a method is not at its budget."""
    share = reached(one, budget) / result["budgets"][budget]
    return BELOW if share < NEAR[0] else BEYOND if share > NEAR[1] else ""


def sign_of(one: Told, budget: str) -> Verdict | None:
    """Whether A-LQR is ahead of a method at a budget; None where this was not measured."""
    lead = one["budgets"].get(budget, {}).get("lead")
    return verdict(*lead[1:]) if lead and None not in lead else None


def number(interval: Sequence[float | None], *, sign: bool = False) -> str:
    """A number with its interval."""
    value, low, high = (float("nan") if end is None else end for end in interval)
    digits = 1 if abs(value) >= 9.95 else 2
    value, low, high = (round(end, digits) + 0.0 for end in (value, low, high))  # no -0.00
    first = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return f"{first} ({low:.{digits}f} to {high:.{digits}f})"


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _plain(metric: Any) -> str:
    if metric is None:
        return ""
    return number(metric) if isinstance(metric, list) else f"{metric:.3g}"


def _measured(one: Told, budget: str) -> bool:
    return "metrics" in one["budgets"].get(budget, {})


def _point(one: Told, budget: str) -> tuple[float, float]:
    metrics = one["budgets"][budget]["metrics"]
    return metrics["prevalence"][0], metrics["accuracy"][0]


def _control(result: Result, one: Told, budget: str) -> str:
    if not _measured(one, budget):
        return ""
    told = number(one["budgets"][budget]["metrics"][result["control"]])
    return told + mark_of(result, one, budget)


def _marks(result: Result, one: Told) -> list[str]:
    return [mark_of(result, one, budget) for budget in result["budgets"] if _measured(one, budget)]


def _lead(one: Told, budget: str) -> str:
    sign = sign_of(one, budget)
    if sign is None:
        return ""
    told = number(one["budgets"][budget]["lead"], sign=True)
    return told if sign == "=" else f"**{told}**"


def _bold(method: str) -> str:
    return f"**{method}**" if method == OURS else method
