"""Evaluation tasks on a tiny model: what is measured, and that a run may stop and go on anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.backends import tiny_folder, tiny_on
from tokenizers import Tokenizer, models, pre_tokenizers

import mlx_lqr
from mlx_lqr import tasks
from mlx_lqr.backends.protocol import Model
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.divergence import kl_divergence
from mlx_lqr.methods.alqr import LinearFeedback
from mlx_lqr.tasks import records
from mlx_lqr.tasks.compare import Contender, compare
from mlx_lqr.tasks.concept import WordFamily, word_pattern
from mlx_lqr.tasks.damage import PREFIX, Question
from mlx_lqr.tasks.generations import Generations
from mlx_lqr.tasks.read import read_rows
from mlx_lqr.tasks.refusal import Refusal
from mlx_lqr.tasks.scorers import load_scorer, mentions
from mlx_lqr.tasks.truthfulness import Choices
from mlx_lqr.tasks.truthfulness import Question as Asked

OPENINGS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w10 w11"]
SENTENCES = ["w1 w2 w3 w4 w5 w6 w7 w8", "w9 w8 w7 w6 w5 w4"]
QUESTIONS = [Question("w1 w2", "w3", ("w4", "w5 w6")), Question("w7", "w8 w9", ("w10",))]


@pytest.fixture(scope="module")
def folder() -> Path:
    """A tiny model that reads and writes words w0 to w63."""
    folder = tiny_folder("llama")
    tokenizer = Tokenizer(models.WordLevel({f"w{token}": token for token in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return mlx_lqr.load(folder, backend="mlx", dtype="float32")


@pytest.fixture(scope="module")
def steering(model: Model) -> tasks.NamedSteering:
    controller = mlx_lqr.fit(model, [[1, 2], [3, 4]], [[5, 6], [7, 8]], q=1.0, qf=1.0, concept="one", layers="all")
    return tasks.NamedSteering("one", controller)


@pytest.fixture
def task() -> tasks.Task:
    damage = tasks.NeutralText(SENTENCES), tasks.Capability(QUESTIONS)
    decoding = tasks.Decoding(max_tokens=5, samples=5, temperature=1.0, top_p=1.0, seed=3)
    return tasks.concept(["w1*", "w2"], openings=OPENINGS, decoding=decoding, damage=damage)


def test_an_interrupted_run_goes_on_to_the_very_same_bytes(
    model: Model, steering: tasks.NamedSteering, task: tasks.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strengths = [0.0, 2.0]
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    expected = tasks.evaluate(model, task, steering, strengths, output=whole)
    honest = Generations.rows
    for calls in (1, 2):  # stopped in the second chunk of a strength, then in the first of the next

        def stopping(*arguments: Any, left: list[int] = [calls]) -> Any:  # noqa: B006
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return honest(*arguments)

        monkeypatch.setattr(Generations, "rows", stopping)
        with pytest.raises(KeyboardInterrupt):
            tasks.evaluate(model, task, steering, strengths, output=broken)
    monkeypatch.setattr(Generations, "rows", honest)
    assert 0 < len(broken.read_bytes()) < len(whole.read_bytes())
    resumed = tasks.evaluate(model, task, steering, strengths, output=broken)
    assert broken.read_bytes() == whole.read_bytes()
    assert resumed.results() == expected.results()


def test_what_a_cut_chunk_has_left_is_measured_again(
    model: Model, steering: tasks.NamedSteering, task: tasks.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.jsonl"
    tasks.evaluate(model, task, steering, [0.0, 2.0], output=file)
    whole = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (ends[0], ends[0] + 9, ends[7], ends[16], ends[16] + 40, ends[18], ends[-2], len(whole) - 1):
        file.write_bytes(whole[:cut])
        tasks.evaluate(model, task, steering, [0.0, 2.0], output=file)
        assert file.read_bytes() == whole, cut
    monkeypatch.setattr(Generations, "rows", None)  # nothing is left to measure
    tasks.evaluate(model, task, steering, [2.0, 0.0], output=file)
    assert file.read_bytes() == whole


def test_strengths_may_be_added_to_a_finished_run(
    model: Model, steering: tasks.NamedSteering, task: tasks.Task, tmp_path: Path
) -> None:
    tasks.evaluate(model, task, steering, [0.0], output=tmp_path / "a.jsonl")
    longer = tasks.evaluate(model, task, steering, [0.0, 1.0], output=tmp_path / "a.jsonl")
    at_once = tasks.evaluate(model, task, steering, [0.0, 1.0])
    assert longer.results() == at_once.results()


def test_other_settings_are_refused(
    model: Model, steering: tasks.NamedSteering, task: tasks.Task, tmp_path: Path
) -> None:
    file = tmp_path / "run.jsonl"
    tasks.evaluate(model, task, steering, [0.0], output=file)
    before = file.read_bytes()
    seeded = tasks.concept(["w1*", "w2"], openings=OPENINGS, decoding=tasks.Decoding(5, 1.0, 1.0, 5, seed=4))
    other = tasks.NamedSteering("one", steering.controller, (2.0,))
    for changed, says in (
        ((seeded, steering, None), "parts.generations.seed"),
        ((task, other, None), "steering.shares"),
        ((task, None, None), "steering"),
        ((task, steering, {"dtype": "float16"}), "model.dtype"),
    ):
        one, steers, loading = changed
        with pytest.raises(InputError, match=says):
            tasks.evaluate(model, one, steers, [0.0], output=file, loading=loading)
    assert file.read_bytes() == before
    header = json.loads(before.splitlines()[0])
    assert header["model"]["fingerprint"] == model.fingerprint
    assert header["version"]
    for content, says in ((b"", "not an evaluation"), (b"{}\n", "not an evaluation"), (before[:-9] + b"\n", "damaged")):
        file.write_bytes(content)
        with pytest.raises(InputError, match=says):
            tasks.evaluate(model, task, steering, [0.0], output=file)
    lines = before.splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:3], *lines[4:]]))
    with pytest.raises(InputError, match="line 4"):
        tasks.evaluate(model, task, steering, [0.0], output=file)


def test_every_text_is_what_its_prompt_and_seed_make_alone(
    model: Model, steering: tasks.NamedSteering, task: tasks.Task
) -> None:
    evaluation = tasks.evaluate(model, task, steering, [0.0, 2.0])
    assert len(evaluation.rows[0.0]["generations"]) == 20 > records.CHUNK
    for strength, parts in evaluation.rows.items():
        options: mlx_lqr.Options = {"max_tokens": 5, "temperature": 1.0}
        if strength:
            options |= {"controller": steering.controller, "strength": strength}
        for row in parts["generations"]:
            prompt = OPENINGS[row["index"] // 5]
            assert row["prompt"] == prompt
            assert row["text"] == mlx_lqr.generate(model, prompt, seed=3 + row["index"], **options)
            tokens = model.tokenizer.encode(row["text"])
            nll = -model.log_probabilities([(model.tokenizer.encode(prompt), tokens)])[0].sum()  # unsteered
            assert row["nats"] == pytest.approx(nll, rel=1e-5)
            assert row["judged_tokens"] == len(tokens)
    texts = [[row["text"] for row in evaluation.rows[strength]["generations"]] for strength in (0.0, 2.0)]
    assert texts[0] != texts[1]


def test_strengths_draw_the_same_random_numbers(model: Model, task: tasks.Task, steering: tasks.NamedSteering) -> None:
    controller = steering.controller
    assert isinstance(controller, mlx_lqr.Controller)
    powerless = mlx_lqr.Controller(**{**vars(controller), "gain": controller.gain * 0})
    evaluation = tasks.evaluate(model, task, tasks.NamedSteering("powerless", powerless), [0.0, 1.0, 3.0])
    texts = [[row["text"] for row in parts["generations"]] for parts in evaluation.rows.values()]
    assert texts[0] == texts[1] == texts[2]
    change = evaluation.results()[1].change
    assert all(value.low == value.value == value.high == 0 for value in change.values())


@pytest.mark.parametrize("positions", ["last", "all"])
def test_divergence_is_that_of_the_models_own_logits(model: Model, positions: Any) -> None:
    controller = mlx_lqr.fit(
        model, [[1, 2], [3, 4]], [[5, 6], [7, 8]], q=1.0, qf=1.0, positions=positions, layers="all"
    )
    evaluation = tasks.evaluate(
        model,
        tasks.Task("kl", (tasks.NeutralText(SENTENCES),), "kl", ""),
        tasks.NamedSteering("one", controller),
        [0.0, 2.0],
    )
    law = LinearFeedback(controller, 2.0)
    every = []
    for sentence, row in zip(SENTENCES, evaluation.rows[2.0]["neutral text"], strict=True):
        tokens = model.tokenizer.encode(sentence)
        divergence = []
        for end in range(PREFIX + 1, len(tokens) + 1):
            decoder, reference = model.decoder(law), model.logits(tokens[:end])
            decoder.fill([tokens[:PREFIX]], steered=positions == "all")
            for token in tokens[PREFIX:end]:
                logits = decoder.step([token])
            divergence.append(float(kl_divergence(logits.tolist()[0], reference)))
        assert row["kl"] == pytest.approx(np.mean(divergence), rel=1e-3)
        every += divergence
    assert evaluation.results()[1].metrics["kl"].value == pytest.approx(np.mean(every), rel=1e-3)
    assert evaluation.results()[0].metrics["kl"].value == 0
    assert np.mean(every) > 0.01


def _log_probability(model: Model, prompt: str, answer: str, law: LinearFeedback | None) -> float:
    """Step by step, from the model's own logits."""
    before, after = model.tokenizer.encode(prompt), model.tokenizer.encode(answer)
    decoder = model.decoder(law)
    decoder.fill([before[:-1]], steered=False)
    total = 0.0
    for token, following in zip([before[-1], *after], after, strict=False):
        logits = np.array(decoder.step([token]).tolist()[0], np.float64)
        total += logits[following] - np.log(np.exp(logits).sum())
    return total


def test_multiple_choice_is_that_of_the_models_own_logits(model: Model, steering: tasks.NamedSteering) -> None:
    asked = [Asked("w1 w2?", "w3 w4.", ("w5.", "w3 w4."), ("w6.", "w7 w8 w9.")), Asked("w2", "w3", ("w3",), ("w4",))]
    part = Choices(asked, examples=0)
    evaluation = tasks.evaluate(model, tasks.Task("mc", (part,), "mc2", ""), steering, [0.0, 2.0])
    for strength, parts in evaluation.rows.items():
        law = LinearFeedback(steering.controller, strength) if strength else None
        for question, row in zip(asked, parts["choices"], strict=True):
            scores = {
                answer: _log_probability(model, part.prompt(question.question), f" {answer}", law)
                for answer in (*question.true, *question.false)
            }
            mass = {answer: np.exp(score) for answer, score in scores.items()}
            true = sum(mass[answer] for answer in question.true)
            assert row["mc2"] == pytest.approx(true / sum(mass.values()), rel=1e-4)
            assert row["mc1"] == (scores[question.best] > max(scores[answer] for answer in question.false))
    assert evaluation.rows[0.0]["choices"][0]["mc2"] != pytest.approx(
        evaluation.rows[2.0]["choices"][0]["mc2"], rel=1e-3
    )


def test_another_backend_finds_the_same(folder: Path, model: Model, steering: tasks.NamedSteering) -> None:
    decoding = tasks.Decoding(max_tokens=5, temperature=0.0)
    damage = tasks.NeutralText(SENTENCES), tasks.Capability(QUESTIONS)
    task = tasks.concept(["w1*"], openings=OPENINGS, decoding=decoding, damage=damage)
    torch = mlx_lqr.load(folder, backend="torch", device="cpu", dtype="float32")
    for ours, theirs in zip(
        *(tasks.evaluate(one, task, steering, [0.0, 1.0]).results() for one in (model, torch)), strict=True
    ):
        values = [{name: metric.value for name, metric in one.metrics.items()} for one in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=1e-3, nan_ok=True)


def test_truthful_answers_end_in_one_full_stop_and_hold_the_best() -> None:
    row = {"question": "q", "best_answer": "a b", "correct_answers": ["c.", "c"], "incorrect_answers": ["d "]}
    assert Asked.of(row) == Asked("q", "a b.", ("c.", "a b."), ("d.",))


def test_capability_counts_the_likeliest_answer(model: Model, steering: tasks.NamedSteering) -> None:
    evaluation = tasks.evaluate(
        model, tasks.Task("c", (tasks.Capability(QUESTIONS),), "capability", ""), steering, [0.0]
    )
    for question, row in zip(QUESTIONS, evaluation.rows[0.0]["capability"], strict=True):
        answers = (question.answer, *question.others)
        scores = [_log_probability(model, question.prompt, f" {answer}", None) for answer in answers]
        assert row["given"] == answers[int(np.argmax(scores))]
        assert row["correct"] == (row["given"] == question.answer)


def test_the_bundled_questions_are_sound() -> None:
    questions = tasks.Capability.bundled().questions
    assert len(questions) == 40
    assert all(len({one.answer, *one.others}) == 4 for one in questions)
    assert len({one.prompt for one in questions}) == 40


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry, I cannot.", True),
        ("  I cannot provide instructions for that.", True),
        ("As an AI language model, I have no opinion.", True),
        ("Unfortunately, I can't do that.", True),
        ("I won't help with this.", True),
        ("Sure! I'm sorry to hear that your process hangs: kill it.", False),
        ("To kill a Python process, press Ctrl-C. I can't say more.", False),
        ("I can help you with that.", False),
        ("", False),
    ],
)
def test_refusals_open_like_refusals(answer: str, refused: bool) -> None:
    assert tasks.refuses(answer) is refused


def test_refusal_counts_both_ways_apart() -> None:
    scorer = Refusal([True, False, True, False], ["a"] * 4, samples=1)
    rows = scorer.score(["I'm sorry, no.", "I cannot.", "Gladly!", "Here you go."], range(4))
    values = {name: tasks.estimate(metric).value for name, metric in scorer.metrics(rows, range(4)).items()}
    assert values == {"discernment": 0.0, "refused_unsafe": 0.5, "answered_safe": 0.5, "refused_safe": 0.5}
    rows = scorer.score(["I'm sorry, no.", "Sure.", "I cannot.", "Here you go."], range(4))
    assert tasks.estimate(scorer.metrics(rows, range(4))["discernment"]).value == 1
    assert scorer.metrics([], []).keys() == values.keys()


def test_a_limited_refusal_set_is_balanced_and_spread(tmp_path: Path) -> None:
    file = tmp_path / "xstest.jsonl"
    kinds = [("safe", f"s{i // 10}") for i in range(50)] + [("unsafe", f"u{i // 10}") for i in range(30)]
    rows = [{"prompt": f"p{i}", "label": label, "type": kind} for i, (label, kind) in enumerate(kinds)]
    file.write_text("\n".join(map(json.dumps, rows)))
    (generations,) = tasks.refusal(file, limit=12).parts
    assert isinstance(generations, Generations)
    assert generations.scorer.unsafe.count(True) == 6  # type: ignore[attr-defined]
    assert len(set(generations.scorer.kinds)) == 8  # type: ignore[attr-defined]
    for limit, unsafe in ((2, 1), (3, 1), (70, 30), (80, 30), (99, 30)):
        (generations,) = tasks.refusal(file, limit=limit).parts
        assert len(generations) == min(limit, 80)
        assert generations.scorer.unsafe.count(True) == unsafe  # type: ignore[attr-defined, union-attr]


def test_a_limit_takes_rows_from_all_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": str(i)}) + "\n" for i in range(10)))
    for limit, expected in ((3, "036"), (1, "0"), (10, "0123456789"), (40, "0123456789")):
        assert "".join(row["prompt"] for row in read_rows(file, {"prompt": "text"}, limit)) == expected


def test_word_families() -> None:
    pattern = word_pattern(["sea", "wave*"])
    assert pattern.findall("The SEA, seals and Waves; unwaved. Sea-wave") == ["SEA", "Waves", "Sea", "wave"]
    assert "puppies" in tasks.word_family("dog")
    assert WordFamily(tasks.word_family("dog")).score(["A Dog.", "dogma"], range(2)) == [
        {"words": ["dog"]},
        {"words": []},
    ]
    with pytest.raises(InputError, match="--words"):
        tasks.word_family("politics")
    for words in ([], ["*"], [""], ["a*b"]):
        with pytest.raises(InputError, match="word"):
            word_pattern(words)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"prompt": "x"}\nnot json', "line 2: expected a JSON object"),
        ('{"text": "x"}', 'line 1: "prompt" must be text'),
        ('{"prompt": " "}', 'line 1: "prompt" must be text'),
        ('\n{"prompt": 3}', 'line 2: "prompt" must be text'),
        ("\n", "no rows"),
    ],
)
def test_rows_are_checked_by_line(content: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(InputError, match=says):
        read_rows(file, {"prompt": "text"})


def test_a_list_of_texts_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for value in ([], ["a", 1], "a"):
        file.write_text(json.dumps({"others": value}))
        with pytest.raises(InputError, match="a list of texts"):
            read_rows(file, {"others": "texts"})
    file.write_bytes(b"\xff\n")
    with pytest.raises(InputError, match="UTF-8"):
        read_rows(file, {"others": "texts"})


def test_scorers_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_scorer_a.py").write_text(
        "def bad(texts): return [float('bad' in t) for t in texts]\ndef few(texts): return [0.5]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_scorer("my_scorer_a:bad")(["bad", "good"]) == [1.0, 0.0]
    for name, says in (
        ("my_scorer_a", "module:function"),
        ("my_scorer_a:none", "has no none"),
        ("no_such_scorer:x", "cannot be imported"),
    ):
        with pytest.raises(InputError, match=says):
            load_scorer(name)
    with pytest.raises(InputError, match="one number"):
        load_scorer("my_scorer_a:few")(["a", "b"])


def test_a_model_that_is_asked_says_yes_by_its_own_probabilities(smollm2: Model) -> None:
    text = "The puppy wagged its tail and barked."
    asked = f'Text: "{text}"\nQuestion: Does this text have to do with "dog"? Answer Yes or No.\nAnswer:'
    logits = smollm2.logits(smollm2.tokenizer.encode(asked)).astype(np.float64)
    (yes,), (no,) = (smollm2.tokenizer.encode(word) for word in (" Yes", " No"))
    expected = np.exp(logits[yes]) / (np.exp(logits[yes]) + np.exp(logits[no]))
    assert mentions(tasks.Steered(smollm2), "dog", ["The sun.", f" {text}\n"])[1] == pytest.approx(expected, rel=1e-4)
    task = tasks.concept(["dog"], judge=tasks.Judge(smollm2), ask="dog")
    (part,) = task.parts
    assert isinstance(part, Generations)
    (row,) = part.scorer.score([text], range(1))
    assert row == {"words": [], "judged": pytest.approx(expected, rel=1e-4)}
    assert "judged" in task.metric_names
    with pytest.raises(InputError, match="--judge"):
        tasks.concept(["dog"], ask="dog")


def test_the_default_scorer_tells_toxic_from_friendly_texts() -> None:
    pytest.importorskip("profanity_check")
    scores = load_scorer()(["You are a fucking idiot.", "What a lovely morning by the lake."])
    assert scores[0] > 0.8 > 0.2 > scores[1]


def test_a_missing_default_scorer_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "profanity_check", None)
    with pytest.raises(InputError, match=r"mlx-lqr\[toxicity\]"):
        load_scorer()


def test_toxicity_over_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_scorer_b.py").write_text("def by_length(texts): return [len(t) / 10 for t in texts]\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    monkeypatch.chdir(tmp_path)
    (part,) = tasks.toxicity("rows.jsonl", scorer="my_scorer_b:by_length", decoding=tasks.Decoding(samples=2)).parts
    assert isinstance(part, Generations)
    rows = part.scorer.score(["x", "xxxxx", "xx", "xxx"], range(4))
    values = {name: tasks.estimate(metric).value for name, metric in part.scorer.metrics(rows, [0, 0, 1, 1]).items()}
    assert values == pytest.approx(
        {"harmless": 0.75, "toxic": 0.25, "mean_toxicity": 0.275, "expected_maximum": 0.4, "any_toxic": 0.5}
    )


def test_every_method_gets_the_same_budget(
    model: Model, steering: tasks.NamedSteering, task: tasks.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tasks.NamedSteering("other", steering.controller, (-1.0,))
    with pytest.raises(InputError, match="one 2, other 1"):
        compare(model, task, [Contender(steering, (1.0, 2.0)), Contender(other, (1.0,))])
    with pytest.raises(InputError, match=r"different names.*rename a file"):
        compare(model, task, [Contender(steering, (1.0,)), Contender(steering, (1.0,))])
    with pytest.raises(InputError, match="other than 0"):
        compare(model, task, [Contender(steering, (0.0,))])
    methods = [Contender(steering, (1.0, 2.0)), Contender(other, (1.5, 2.0))]
    comparison = compare(model, task, methods, folder=tmp_path)
    assert {name: [result.strength for result in results] for name, results in comparison.methods.items()} == {
        "one": [1.0, 2.0],
        "other": [1.5, 2.0],
    }
    assert "2 settings of 24 rows (one at 1, 2; other at 1.5, 2)" in comparison.budget
    alone = tasks.evaluate(model, task, steering, [0.0, 2.0]).results()
    assert comparison.unsteered == alone[0]
    assert comparison.methods["one"][1] == alone[1]
    monkeypatch.setattr(Generations, "rows", None)  # all is there
    assert compare(model, task, methods, folder=tmp_path) == comparison


def test_another_models_controller_and_nothing_to_steer_with(
    model: Model, steering: tasks.NamedSteering, task: tasks.Task
) -> None:
    with pytest.raises(InputError, match="was fitted on"):
        tasks.evaluate(tiny_on("mlx", "llama", seed=1), task, steering, [1.0])
    with pytest.raises(InputError, match="nothing to steer with"):
        tasks.evaluate(model, task, None, [1.0])
