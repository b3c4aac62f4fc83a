"""lm-eval's tasks through mlx-lm's evaluator: unsteered as mlx-lm gives them, steered as our own functions do."""

from __future__ import annotations

import importlib
import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers.architectures import CONFIGS
from helpers.architectures import folder_of as folder_of_architecture
from helpers.backends import tiny_folder
from helpers.command_line import refused, run
from helpers.every_tokenizer import folder_of, tokenizer_of
from helpers.lm_eval_tasks import KINDS, ROWS, write_tasks
from helpers.tiny_configs import BASE, FACTORS, PROMPT, plain_logits, weights_folder, with_config
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from mlx_lm.evaluate import MLXLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import mlx_lqr
from mlx_lqr import InputError, tasks
from mlx_lqr.backends.mlx.evaluator import Evaluator
from mlx_lqr.backends.protocol import Model
from mlx_lqr.convert.sources import demo_model
from mlx_lqr.tasks import lm_eval


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def chosen(own: Path) -> lm_eval.Tasks:
    return lm_eval.load_tasks([f"our_{name}" for name in KINDS], own)


@pytest.fixture(scope="module")
def demo() -> Evaluator:
    return lm_eval.load_evaluator("demo", apply_chat_template=False, max_tokens=12)


def tiny_evaluator(family: str) -> tuple[Evaluator, Model]:
    """mlx-lm's evaluator and our own model of one folder, whose words are w0 to w63."""
    if family in CONFIGS:  # on no list
        folder = folder_of_architecture(family, Path(tempfile.mkdtemp()))
        return lm_eval.load_evaluator(folder), mlx_lqr.load(folder, backend="mlx", dtype="float32")
    folder = tiny_folder(family, tie_word_embeddings=False)
    tokenizer = Tokenizer(models.WordLevel({f"w{token}": token for token in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return lm_eval.load_evaluator(folder), mlx_lqr.load(folder, backend="mlx", dtype="float32")


NEAR = 1e-3
"""Of a perplexity: mlx-lm adds up MLX's own log-probabilities, off by up to 3e-4 over a vocabulary on a CPU."""


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, values, i) for i, values in enumerate(arguments)]


def scores_of(steered: tasks.Steered, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Our own scores of continuations."""
    encoded = [steered.model.tokenizer.continuations(context, [text]) for context, text in pairs]
    return [float(logp.sum()) for logp in steered.log_probabilities([(before, one) for before, (one,) in encoded])]


def in_steps_of(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have mlx-lm's evaluator call the model for so many tokens at once."""
    monkeypatch.setattr(MLXLM._process_prompt, "__defaults__", (size,))
    monkeypatch.setattr(MLXLM._score_fn, "__defaults__", (None, size))


def test_unsteered_results_are_those_of_mlx_lms_evaluator(
    demo: Evaluator, chosen: lm_eval.Tasks, dog: Path, own: Path
) -> None:
    results = lm_eval.evaluate(demo, chosen, tasks.named_steering([(str(dog), 1.0)]), [0.0]).results[0.0]
    theirs = MLXLM(str(demo_model()), **{name: demo.options[name] for name in demo.options if name != "dtype"})
    manager = lm_eval.load_tasks(list(chosen.loaded), own).manager
    expected = simple_evaluate(theirs, tasks=list(chosen.loaded), task_manager=manager)["results"]
    assert results == json.loads(json.dumps(expected))
    assert results["our_scored"]["perplexity,none"] > 1
    assert results == lm_eval.evaluate(demo, chosen).results[0.0]


@pytest.mark.parametrize("family", ["qwen3_next", "gpt_oss"])
def test_models_on_no_list_are_evaluated_as_by_mlx_lm(family: str, tmp_path: Path) -> None:
    folder = folder_of_architecture(family, tmp_path / family)
    theirs = MLXLM(str(folder), batch_size=8, use_chat_template=False)
    ours = lm_eval.load_evaluator(folder, apply_chat_template=False)
    for kind, arguments in (
        ("loglikelihood", [("w1 w2 w3", " w4 w5"), ("w1 w2 w3", " w6"), ("w7", " w8 w9")]),
        ("loglikelihood_rolling", [("w1 w2 w3 w4",), ("w9 w8",)]),
        ("generate_until", [("w1 w2", {"until": ["w0"], "max_gen_toks": 4})]),
    ):
        asked = requests(kind, *arguments)
        assert getattr(ours, kind)(asked) == getattr(theirs, kind)(asked), kind


def test_steered_results_are_those_of_our_own_scores(
    demo: Evaluator, chosen: lm_eval.Tasks, dog: Path, smollm2: Model
) -> None:
    steering = tasks.named_steering([(str(dog), 0.5)])
    results = lm_eval.evaluate(demo, chosen, steering, [0.0, 6.0]).results
    for strength, by_task in results.items():
        steered = tasks.Steered(smollm2, steering, strength)
        scores = steered.scores([(row["question"], row["choices"]) for row in ROWS])
        right = [int(np.argmax(of)) == row["answer"] for of, row in zip(scores, ROWS, strict=True)]
        assert by_task["our_choice"]["acc,none"] == np.mean(right)
        answers = [of[row["answer"]] for of, row in zip(scores, ROWS, strict=True)]
        assert by_task["our_scored"]["perplexity,none"] == pytest.approx(np.exp(-np.mean(answers)), rel=NEAR)
        texts = [smollm2.tokenizer.encode(row["question"]) for row in ROWS]
        whole = sum(
            float(
                smollm2.log_probabilities([(text[:1], text[1:])], law=steered.law, steer_all=steered.steer_all)[0].sum()
            )
            for text in texts
        )
        words = sum(len(row["question"].split()) for row in ROWS)
        assert by_task["our_text"]["word_perplexity,none"] == pytest.approx(np.exp(-whole / words), rel=NEAR)
    perplexities = [by_task["our_scored"]["perplexity,none"] for by_task in results.values()]
    assert abs(np.log(perplexities[1] / perplexities[0])) > 0.1


@pytest.mark.parametrize(
    ("family", "positions", "step"),
    [
        *itertools.product(["llama", "gemma3_text"], ["last", "all"], [1, 2, 5, 2048]),
        *(("qwen3_next", "last", 5), ("qwen3_next", "all", 2048), ("llama4", "last", 2)),
    ],
)
def test_log_likelihoods_are_steered_as_ours_in_any_steps(
    family: str, positions: Any, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator, model = tiny_evaluator(family)
    controller = mlx_lqr.fit(
        model, [[1, 2, 3], [4, 5]], [[6, 7], [8]], q=1.0, positions=positions, layers="all", cost="state"
    )
    steered = tasks.Steered(model, tasks.NamedSteering("one", controller), 3.0)
    pairs = [
        ("w5 w17 w3 w42 w8 w29 w11 w60 w2", " w33 w21 w40 w7 w9"),
        ("w5 w17 w3 w42 w8 w29 w11 w60 w2", " w33"),
        ("w1", " w2 w3 w4"),
    ]
    in_steps_of(step, monkeypatch)
    plain = evaluator.loglikelihood(requests("loglikelihood", *pairs))
    with mlx_lqr.steer(evaluator.model, controller, 3.0):
        scores = evaluator.loglikelihood(requests("loglikelihood", *pairs))
        whole = evaluator.loglikelihood_rolling(requests("loglikelihood_rolling", ("w9 w8 w7 w6",), ("w4 w3 w2 w1",)))
    expected = scores_of(steered, pairs)
    assert [score for score, _ in scores] == pytest.approx(expected, abs=1e-4)
    assert np.abs(np.subtract(expected, [score for score, _ in plain])).min() > 5e-3
    assert whole == pytest.approx(scores_of(steered, [("w9", " w8 w7 w6"), ("w4", " w3 w2 w1")]), abs=1e-4)
    greedy = mlx_lqr.generate(model, "w1", controller=controller, strength=3.0, max_tokens=3, temperature=0)
    with mlx_lqr.steer(evaluator.model, controller, 3.0):
        (_, likely), (_, unlikely) = evaluator.loglikelihood(
            requests("loglikelihood", ("w1", greedy), ("w1", " w2 w3 w4"))
        )
    assert (likely, unlikely) == (True, greedy == " w2 w3 w4")


PAIRS = [
    ("Question: what is 2 + 2? Answer: ", "4"),
    ("Question: what is 2 + 2? Answer: ", "the dog"),
    ("Question: what is 2 + 2? Answer:", " the dog"),
    ("Hello ", " world"),
    ("Hel", "lo there"),
    ("", "Once upon"),
    ("", "x"),
    (" ", "Hello"),
    ("Hello", ""),
]


def bare_folder(kind: str, *, bos: bool, size: int = 32) -> Path:
    """A tiny model with a tokenizer of this kind, with a BOS token or without any."""
    tokenizer = tokenizer_of(kind)
    made = tiny_folder("llama", vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=size, seed=4)
    folder_of(kind, made, chat_template="{{ messages[0].content }}", **({} if bos else {"bos_token": None}))
    if not bos:
        tokenizer.post_processor = None  # type: ignore[assignment]
        tokenizer.save(str(made / "tokenizer.json"))
    return made


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("kind", ["byte-level", "llama", "metaspace"])
def test_contexts_that_end_anywhere_are_scored_as_transformers_reads_the_whole(kind: str, bos: bool) -> None:
    made = bare_folder(kind, bos=bos)
    evaluator = lm_eval.load_evaluator(made, apply_chat_template=False, max_tokens=2)
    theirs, network = AutoTokenizer.from_pretrained(made), AutoModelForCausalLM.from_pretrained(made).float()
    long = " ".join(["Once upon a time, there was a dog"] * 6)

    def score(before: list[int], after: list[int]) -> float:
        ids = torch.tensor([[*before, *after]])
        with torch.no_grad():
            logits = network(ids[:, :-1]).logits[0].double().log_softmax(-1)
        return sum(float(logits[len(before) - 1 + i, token]) for i, token in enumerate(after))

    scores = evaluator.loglikelihood(requests("loglikelihood", *PAIRS, (long, " The sea")))
    first = theirs.encode("<s>" if bos else "</s>", add_special_tokens=False)[:1]
    for (context, text), (value, _) in zip([*PAIRS, (long, " The sea")], scores, strict=True):
        own = theirs.encode(context)
        wholes = [theirs.encode(context + after) for before, after in [*PAIRS, (long, " The sea")] if before == context]
        common = next((n for n in range(len(own), 0, -1) if all(whole[:n] == own[:n] for whole in wholes)), 0)
        whole = theirs.encode(context + text)
        before, after = (own[:common] or first), whole[common:]
        assert value == pytest.approx(score(before[-(33 - len(after)) :], after) if after else 0.0, abs=1e-3)
    texts = ["Once upon a time", "x", "", long]
    whole_scores = evaluator.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)))
    for text, value in zip(texts[:3], whole_scores, strict=False):
        ids = theirs.encode(text)
        assert value == pytest.approx(score(ids[:1], ids[1:]) if len(ids) > 1 else 0.0, abs=1e-3)
    ids, total = theirs.encode(long), 0.0
    for end in range(1, len(ids), 32):  # each token once, with as much before it as fits
        after = ids[end : end + 32]
        total += score(ids[:end][-(33 - len(after)) :], after)
    assert whole_scores[3] == pytest.approx(total, abs=1e-2)
    with pytest.raises(InputError, match="the model's context 32"):
        evaluator.loglikelihood(requests("loglikelihood", ("x", long)))
    written = evaluator.generate_until(requests("generate_until", ("", {"until": "qqq"}), ("x", {})))
    assert len(written) == 2
    with pytest.raises(InputError, match="fewer solved examples"):
        evaluator.generate_until(requests("generate_until", (long, {"until": ["."]})))


REFUSING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)


def test_what_a_template_refuses_to_the_system_is_the_users(here: Path) -> None:
    made = bare_folder("byte-level", bos=True, size=128)
    (made / "chat_template.jinja").write_text(REFUSING)
    evaluator = lm_eval.load_evaluator(made)
    asked = [{"role": "user", "content": "How are you?"}]
    system = {"role": "system", "content": "Be brief. "}
    with pytest.warns(UserWarning, match="no system role"):
        assert evaluator.apply_chat_template([system, *asked]) == "<user>Be brief.\n\nHow are you?<assistant>"
    with pytest.raises(InputError, match="refuses the conversation: System role not supported"):
        evaluator.apply_chat_template([system])
    config = json.loads((here / "own/choice.yaml").read_text()) | {
        "description": "Choose well. ",
        "doc_to_text": "{{question}} ",
        "target_delimiter": "",
    }
    (here / "own/choice.yaml").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="no system role"):
        evaluation = lm_eval.evaluate(evaluator, lm_eval.load_tasks(["our_choice"], here / "own"))
    asked = [f"<user>Choose well.\n\n{row['question']} <assistant>" for row in ROWS]
    scores = tasks.Steered(mlx_lqr.load(made, backend="mlx", dtype="float32"))
    right = []
    for prompt, row in zip(asked, ROWS, strict=True):
        ids = scores.model.tokenizer.encode(prompt, add_special_tokens=False)
        before, each = scores.model.tokenizer.continuations(ids, row["choices"])
        values = [float(one.sum()) for one in scores.log_probabilities([(before, one) for one in each])]
        right.append(int(np.argmax(values)) == row["answer"])
    assert evaluation.results[0.0]["our_choice"]["acc,none"] == pytest.approx(np.mean(right))


def test_written_texts_are_steered_as_ours(demo: Evaluator, dog: Path, smollm2: Model) -> None:
    steering = tasks.named_steering([(str(dog), 1.0)])
    prompts = ["Once upon a time,", "My neighbor told me that"]
    arguments = [(prompt, {"until": ["."]}) for prompt in prompts]
    with mlx_lqr.steer(demo.model, steering.controller, 3.0):
        texts = demo.generate_until(requests("generate_until", *arguments))
    expected = tasks.Steered(smollm2, steering, 3.0).texts(prompts, {"max_tokens": 12, "temperature": 0})
    # some of mlx-lm's detokenizers drop a leading space
    assert [text.strip() for text in texts] == [text.split(".")[0].strip() for text, _ in expected]
    assert texts != demo.generate_until(requests("generate_until", *arguments))


def test_the_evaluator_is_as_before_afterwards(dog: Path, demo: Evaluator) -> None:
    controller = mlx_lqr.load_steering(str(dog))
    functions = MLXLM._process_prompt, MLXLM._score_fn
    pair = requests("loglikelihood", ("Once upon a", " time there"))
    before = demo.loglikelihood(pair)
    with mlx_lqr.steer(demo.model, controller, 3.0):
        assert demo.loglikelihood(pair) != before
        assert functions[0] is not MLXLM._process_prompt
    assert (MLXLM._process_prompt, MLXLM._score_fn) == functions
    assert demo.loglikelihood(pair) == before


def test_only_the_steered_models_evaluator_is_steered(dog: Path, demo: Evaluator) -> None:
    evaluator, model = tiny_evaluator("llama")
    pair = requests("loglikelihood", ("Once upon a", " time there"))
    before = demo.loglikelihood(pair)
    controller = mlx_lqr.fit(model, [[1, 2, 3], [4, 5]], [[6, 7], [8]], q=1.0, layers="all")
    with mlx_lqr.steer(evaluator.model, controller, 2.0):
        assert demo.loglikelihood(pair) == before


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with tasks in `own`."""
    (tmp_path / "own").mkdir()
    write_tasks(tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_reports_writes_and_goes_on(dog: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command: list[Any] = ["eval", "lm-eval", "demo", "-c", dog, "--strengths", "3", "--limit", 2, "-o", "out"]
    command += ["--tasks", "our_choice,our_written", "--include-path", "own", "--num-shots", 1]
    result = run(*command, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    summary = json.loads(result.stdout)
    assert json.loads((here / "out/lm-eval-dog.summary.json").read_text()) == summary
    assert [entry["strength"] for entry in summary["strengths"]] == [0, 3]
    assert all(entry["results"]["our_choice"]["sample_len"] == 2 for entry in summary["strengths"])
    assert summary["model"]["use_chat_template"] is True
    assert summary["settings"]["num_shots"] == 1
    assert "Generation: 12 tokens" in result.stderr, "two texts of the task's own length"
    assert summary["steering"]["concepts"] == ["dog"]
    monkeypatch.setattr(lm_eval, "_run", None)  # nothing is run a second time
    lines = run(*command).stdout.splitlines()
    assert lines[0].split()[:4] == ["lm-eval", "unsteered", "strength", "3"]
    assert lines[1].startswith("our_choice acc ")
    assert "± " in lines[1]
    assert "settings.limit" in refused(*[3 if word == 2 else word for word in command])
    write_tasks(here / "own", ROWS[:2])
    result = run(*command)
    assert result.exit_code == 2
    assert "other settings (parts.our_choice.digest" in result.stderr.splitlines()[-1]  # below the data's progress bar


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tasks", "our_nothing"], "lm-eval has no task our_nothing"),
        (["--tasks", ","], "name at least one"),
        (["--tasks", "broken"], "cannot load the task broken"),
        (["--tasks", "our_choice", "--include-path", "missing"], "missing is not a folder"),
        (["--tasks", "our_choice", "--backend", "torch"], "torch"),
        (["--tasks", "our_choice", "--strengths", "lots"], "write --strengths 1,2,3"),
        (["--tasks", "our_choice", "-c", "missing.safetensors"], "no file missing"),
        (["--tasks", "our_choice", "--num-shots", "-1"], "num-shots"),
        ([], "--tasks"),
    ],
)
def test_mistakes(options: list[str], says: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"task": "broken", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}
    (here / "own/broken.yaml").write_text(json.dumps({**broken, "test_split": "test", "doc_to_text": "{{question}}"}))
    command = importlib.import_module("mlx_lqr.commands.lm_eval")  # the attribute of this name is the command
    monkeypatch.setattr(command, "load_evaluator", None)  # refused before a model is loaded
    assert says in refused("eval", "lm-eval", "demo", "--include-path", "own", *options, "-o", "out")
    assert not (here / "out").exists()


def test_without_lm_eval_its_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    assert "pip install 'mlx-lqr[lm-eval]'" in refused("eval", "lm-eval", "demo", "--tasks", "arc_easy", "-o", tmp_path)
    with pytest.raises(InputError, match="not installed"):
        lm_eval.load_evaluator("demo")


def test_activations_that_overflow_are_no_score(demo: Evaluator, chosen: lm_eval.Tasks, dog: Path) -> None:
    with pytest.raises(InputError, match="overflow at this strength: lower the strength"):
        lm_eval.evaluate(demo, chosen, tasks.named_steering([(str(dog), 1.0)]), [1e38])


@pytest.mark.parametrize("family", ["gemma2", "phi3"])
def test_what_mlx_lm_would_drop_of_a_config_is_computed(family: str, tmp_path: Path) -> None:
    config = dict(BASE[family])
    rope = {"rope_type": "longrope", **FACTORS} if family == "phi3" else {"rope_type": "default"}
    config["rope_parameters"] = rope | {"rope_theta": config.pop("rope_theta")}
    folder = with_config(weights_folder(family), config, tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    logits = lm_eval.load_evaluator(folder, dtype="float32").model.logits_along([(PROMPT[:1], PROMPT[1:])])[0]
    assert np.abs(logits - plain_logits(folder)).max() < 1e-3 * np.abs(logits).max()


def test_what_cannot_be_steered_is_refused(demo: Evaluator, chosen: lm_eval.Tasks, tmp_path: Path) -> None:
    folder = tiny_folder("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nothing"}))
    with pytest.raises(InputError, match="'nothing' is not supported"):
        lm_eval.load_evaluator(folder)
    with pytest.raises(InputError, match="nothing to steer with"):
        lm_eval.evaluate(demo, chosen, None, [1.0])
    _, other = tiny_evaluator("llama")
    controller = mlx_lqr.fit(other, [[1, 2, 3], [4, 5]], [[6, 7], [8]], layers="all")
    with pytest.raises(InputError):
        lm_eval.evaluate(demo, chosen, tasks.NamedSteering("other", controller), [1.0])


def test_weights_have_the_dtype_they_have_elsewhere(demo: Evaluator) -> None:
    assert demo.model.module.model.norm.weight.dtype == mx.float32
    half = lm_eval.load_evaluator(demo_model(), dtype="bfloat16")
    assert half.model.module.model.norm.weight.dtype == mx.bfloat16


def test_no_metric_comes_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = pytest.importorskip("evaluate")
    (tmp_path / "rouge").mkdir()
    (tmp_path / "rouge" / "rouge.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    with lm_eval._no_metric_from_here(), pytest.raises(InputError, match="has a rouge"):
        evaluate.load("rouge")
    assert not (tmp_path / "ran").exists()
