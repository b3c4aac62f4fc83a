"""What the comparison makes of its rows: corrected intervals, and a page that says what the results say."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.comparison import statistics
from benchmarks.comparison.page import write_page
from benchmarks.comparison.setting import FULL, SparingJudge
from benchmarks.comparison.tables import Told
from mlx_lqr.analysis import write_json
from mlx_lqr.lqr.strength import BUDGETS
from mlx_lqr.tasks.bootstrap import difference, estimate, mean
from mlx_lqr.tasks.generations import Judge
from mlx_lqr.tasks.steering import Steered


def test_corrected_intervals_are_those_of_the_normal_distribution() -> None:
    random = np.random.default_rng(0)
    n, budgets = 400, ("gentle", "normal", "strong")
    groups = range(n)
    ours = {budget: random.normal(1, 1, n) for budget in budgets}
    theirs = {(f"method {i}", budget): ours[budget] - random.normal(0.2, 1, n) for i in range(13) for budget in budgets}
    found = statistics.leads(
        {budget: mean(values, groups) for budget, values in ours.items()},
        {key: mean(values, groups) for key, values in theirs.items()},
    )
    corrected = NormalDist().inv_cdf(1 - 0.05 / len(theirs) / 2)
    assert corrected > 1.6 * NormalDist().inv_cdf(0.975)
    assert found.keys() == theirs.keys()
    widths = []
    for (method, budget), lead in found.items():
        change = ours[budget] - theirs[method, budget]
        half = corrected * change.std() / np.sqrt(n)
        assert lead.value == pytest.approx(change.mean())
        assert [lead.low, lead.high] == pytest.approx([change.mean() - half, change.mean() + half], abs=0.25 * half)
        widths.append((lead.high - lead.low) / (2 * half))
    assert np.mean(widths) == pytest.approx(1, abs=0.03)


def test_rows_of_one_prompt_stay_together_in_what_is_pooled() -> None:
    values = np.random.default_rng(1).normal(size=30)
    alone = mean(values, range(30))
    twice = statistics.pooled([alone, alone])  # two concepts that do the same to each prompt say no more than one
    assert estimate(twice).low == pytest.approx(estimate(alone).low)
    assert difference(twice, statistics.pooled([alone, mean(values - 1, range(30))])).value == pytest.approx(0.5)


def test_facts_are_interpolated_where_control_is_equal() -> None:
    points = [(0.1, 0.9), (0.3, 0.8), (0.3, 0.7), (0.5, 0.3)]
    assert statistics.at_control(0.2, points) == pytest.approx(0.85)
    assert statistics.at_control(0.4, points) == pytest.approx(0.5)
    assert statistics.at_control(0.05, points) == 0.9
    assert statistics.at_control(0.6, points) is None


def test_one_text_in_a_few_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def lengths(
        _: Judge, steered: object, written: Sequence[tuple[str, str]], *, chat: bool
    ) -> list[tuple[float, int]]:
        return [(float(len(text)), 1) for _, text in written]

    monkeypatch.setattr(Judge, "nll", lengths)
    written = [("", "x" * length) for length in range(1, 6)]
    measured = SparingJudge(None, 2).nll(Steered(None), written, chat=False)
    assert measured == [(1.0, 1), (0.0, 0), (3.0, 1), (0.0, 0), (5.0, 1)]


def synthetic(experiment: str, control: str, unsteered: dict[str, list[float]], told: list[Told]) -> Told:
    sizes = asdict(FULL)
    compared = sum("lead" in at for one in told for at in one["budgets"].values())
    return {"experiment": experiment, "version": "1", "backend": "mlx", "dtype": "float32", "sizes": sizes,
            "budgets": dict(BUDGETS), "prompts": [70, 70],
            "rows": {"answers": 300}, "control": control, "control_label": "share", "comparisons": compared,
            "unsteered": unsteered, "methods": told}  # fmt: skip


def told(method: str, values: Sequence[float], leads: Sequence[list[float]] = (), kl: float = 1.0) -> Told:
    """A method with this prevalence at each budget, and with 0.7, 0.6 and 0.4 of the facts right."""
    budgets: Told = {}
    for i, (budget, value) in enumerate(zip(BUDGETS, values, strict=True)):
        right = [0.7, 0.6, 0.4][i]
        metrics = {
            "prevalence": [value] * 3,
            "accuracy": [right] * 3,
            "perplexity": [20.0] * 3,
            "capability": [right] * 3,
        }
        budgets[budget] = {"metrics": metrics} | ({"lead": leads[i]} if leads else {})
    reached = {budget: kl * divergence for budget, divergence in BUDGETS.items()}
    source = {"setting": "last third", "strength": dict.fromkeys(BUDGETS, 2.5), "divergence": reached, "tried": {}}
    return {"method": method, "sources": {"dog": source}, "budgets": budgets}


def test_the_page_says_what_the_results_say(tmp_path: Path) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    docs.mkdir()
    chat = [
        told("alqr", (0.2, 0.4, 0.6)),
        told("spid", (0.1, 0.3, 0.5), [[0.1, 0.02, 0.2], [0.1, 0.01, 0.2], [0.1, -0.01, 0.2]]),
        told("actadd", (0.3, 0.3, 0.3), [[-0.1, -0.2, -0.01], [0.1, -0.1, 0.3], [0.3, 0.2, 0.4]], kl=0.3),
        told("angular", (0.1, 0.1, 0.1), [[0.1, -0.1, 0.2]] * 3, kl=1.5),
        {"method": "iti", "sources": {}, "budgets": {}, "failed": "there is no head"},
    ]
    start = {"prevalence": [0.05, 0.0, 0.1], "accuracy": [0.8, 0.7, 0.9], "perplexity": [18.0, 17.0, 19.0]}
    dog = [told("alqr", (0.2, 0.4, 0.6)), told("spid", (0.1, 0.3, 0.5), [[0.1, 0.0, 0.2]] * 3)]
    capable = {**start, "capability": [0.7, 0.5, 0.9]}
    refusal = synthetic("refusal-less", "answered_safe", {"answered_safe": [1.0, 0.9, 1.0]}, [])
    for key, result in (
        ("smollm2", synthetic("chat", "prevalence", start, chat)),
        ("smollm2", refusal),
        ("gemma", synthetic("concept-dog", "prevalence", capable, dog)),
    ):
        write_json(results / key / f"{result['experiment']}.json", result)
    lever = {"lever": "cost", "setting": "feature", "metrics": {"prevalence": [0.41, 0.3, 0.5], "seconds": 12}}
    (results / "ablation.json").write_text(json.dumps([lever]))
    text = write_page(results, docs).read_text()

    of_chat = text.split("## Chat: ")[1].split("\n## ")[0]
    assert "- **gentle**: A-LQR is ahead of spid; it is behind actadd; it cannot be told apart from angular." in of_chat
    assert "- **strong**: A-LQR is ahead of actadd; it cannot be told apart from spid and angular." in of_chat
    assert "\\* Even at the strongest sensible strength less than the budget is reached: actadd." in of_chat
    assert "† Even at the mildest strength tried more than the budget is spent: angular." in of_chat
    assert "| angular | 0.10 (0.10 to 0.10)† |" in of_chat
    assert "iti was not measured: there is no head." in of_chat
    assert "| **alqr** | 0.20 (0.20 to 0.20) | 0.40 (0.40 to 0.40) | 0.60 (0.60 to 0.60) |" in of_chat
    assert "| actadd | 0.30 (0.30 to 0.30)\\* |" in of_chat
    assert "**+0.30 (0.20 to 0.40)** |" in of_chat
    # at the strong budget spid has 0.5, halfway between A-LQR's 0.4 with 0.6 of the facts and its 0.6 with 0.4
    assert f"| strong | spid | 0.50 | {0.4 / 0.8:.2f} | {0.5 / 0.8:.2f} |" in of_chat
    assert f"| gentle | actadd | 0.30 | {0.7 / 0.8:.2f} | {0.65 / 0.8:.2f} |" in of_chat

    summary = text.split("## In short")[1].split("\n## ")[0]
    assert "| A-LQR against | chat |" in summary
    assert "| spid | + + = |" in summary
    assert "| actadd | - = + |" in summary
    assert "| angular | = = = |" in summary
    assert "Of 9 comparisons A-LQR is ahead in 3 and behind in 1; 5 cannot be told apart." in summary
    assert "Capability falls by more than 0.1 under alqr (strong) and spid (strong)." in text
    assert "| cost | feature | 0.41 (0.30 to 0.50) | 12 |" in text
    assert "there is nothing to gain, and no method was measured" in text.split("## Fewer refusals")[1]
    assert (docs / "comparison-concept-dog-gemma.svg").is_file()
