"""The chat task: open questions show the concept, factual ones whether answers are right still."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.backends import smollm2_on
from helpers.command_line import refused, run

from mlx_lqr import InputError, tasks
from mlx_lqr.runtime import Chat
from mlx_lqr.tasks.chat import Fact, bundled_questions
from mlx_lqr.tasks.concept import word_family, word_pattern

OPEN = ["What should I do at the weekend?", "Write a short poem about autumn."]
FACTS = [Fact("What is the capital of France?", ("Paris",)), Fact("What is 2 + 2?", ("4", "four"))]


def test_no_question_serves_two_purposes() -> None:
    """Each is fitted on, tuned on or reported, and there are enough of both kinds."""
    seen: list[str] = []
    for purpose in ("fitting", "tuning", "evaluation"):
        questions, facts = bundled_questions(purpose)  # type: ignore[arg-type]
        assert min(len(questions), len(facts)) >= {"fitting": 20, "tuning": 30, "evaluation": 50}[purpose]
        seen += [*questions, *(fact.question for fact in facts)]
    assert len(seen) == len(set(seen)) == 200
    assert all(text == text.strip() and text.isascii() for text in seen)


NOT_ASKED_FOR = [
    "anger",
    "cat",
    "church",
    "cloud",
    "dog",
    "fantasy",
    "football",
    "joy",
    "love",
    "ocean",
    "pirate",
    "space",
]


@pytest.mark.parametrize("concept", NOT_ASKED_FOR)
def test_no_open_question_asks_for_a_bundled_concept(concept: str) -> None:
    """Or an answer that takes up the question would count."""
    pattern = word_pattern(word_family(concept))
    for purpose in ("fitting", "tuning", "evaluation"):
        assert not [text for text in bundled_questions(purpose)[0] if pattern.search(text)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answers", "text", "right"),
    [
        (("Paris",), "The capital of France is Paris.", True),
        (("Paris",), "PARIS", True),
        (("Paris",), "The Parisians know.", False),
        (("4", "four"), "2 + 2 = 4", True),
        (("4", "four"), "It is 42.", False),
        (("4", "four"), "Twenty-four, or 24.", True),  # a word is what no letter or figure stands beside
        (("South America",), "in South America", True),
        (("H2O",), "It is h2o, of course", True),
        (("H2O",), "", False),
    ],
)
def test_a_fact_is_found_as_whole_words(answers: tuple[str, ...], text: str, right: bool) -> None:
    assert Fact("?", answers).is_in(text) == right


def test_no_question_answers_itself() -> None:
    for purpose in ("fitting", "tuning", "evaluation"):
        for fact in bundled_questions(purpose)[1]:  # type: ignore[arg-type]
            assert not fact.is_in(fact.question), fact


def test_counts_what_the_same_model_answers_in_a_chat() -> None:
    model = smollm2_on("mlx")
    decoding = tasks.Decoding(max_tokens=12, temperature=0.0)
    task = tasks.chat(["weekend*", "autumn*"], questions=OPEN, facts=FACTS, decoding=decoding)
    evaluation = tasks.evaluate(model, task, None, [0.0])
    metrics = evaluation.results()[0].metrics

    def answer(question: str) -> str:
        return "".join(
            piece.text for piece in Chat(model, options={"max_tokens": 12, "temperature": 0}).answer(question)
        )

    pattern = word_pattern(["weekend*", "autumn*"])
    assert metrics["prevalence"].value == np.mean([bool(pattern.search(answer(text))) for text in OPEN])
    assert metrics["accuracy"].value == np.mean([fact.is_in(answer(fact.question)) for fact in FACTS])
    assert metrics["accuracy"].value > 0
    assert {"perplexity", "repetition", "tokens", "distinct_2"} <= set(metrics)


def test_questions_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("open.jsonl").write_text('{"question": "Tell me a story."}\n')
    Path("facts.jsonl").write_text(json.dumps({"question": "What is the capital of Spain?", "answers": ["Madrid"]}))
    Path("sums.jsonl").write_text(json.dumps({"prompt": "2 + 3 =", "answer": "5", "others": ["4"]}))
    files: tuple[Any, ...] = ("--questions", "open.jsonl", "--facts", "facts.jsonl", "--capability", "sums.jsonl")
    command = ("eval", "chat", "demo", "--words", "once", *files, "-n", 6, "-o", "results")
    result = run(*command, "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in next(Path("results").glob("*.jsonl")).read_text().splitlines()]
    prompts = [row["prompt"] for row in rows if "prompt" in row and "text" in row]
    assert prompts == ["Tell me a story.", "What is the capital of Spain?"]
    Path("facts.jsonl").write_text('{"question": "What is the capital of Spain?"}')
    assert "line 1" in refused(*command)
    assert "answers" in refused(*command)


def test_words_are_asked_for_where_none_are_known() -> None:
    assert "--words" in refused("eval", "chat", "demo", "-o", "results")
    with pytest.raises(InputError, match="questions"):
        tasks.chat(["sea"], questions=[])
