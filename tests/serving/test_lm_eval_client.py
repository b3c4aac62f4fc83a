"""lm-eval as a client of the server: the numbers of `mlx-lqr eval lm-eval`, and what else `echo` gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.backends import BACKENDS
from helpers.lm_eval_tasks import write_tasks
from helpers.serving import PROMPT, ask, chat_folder, controllers_of, listening
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

import mlx_lqr
from mlx_lqr import tasks
from mlx_lqr.backends.protocol import Model
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.methods.running import law_on
from mlx_lqr.runtime import steer
from mlx_lqr.serving import scoring
from mlx_lqr.serving.app import application
from mlx_lqr.serving.guard import Access
from mlx_lqr.serving.service import Service
from mlx_lqr.tasks import lm_eval

pytest.importorskip("tenacity", reason="lm-eval's clients need lm-eval[api]")
STRENGTH = 2.0


class ToldContexts(LocalCompletionsAPI):
    """lm-eval's own client, which also says where each context ends: `steer_from`, its last token's position."""

    _first: tuple[int, ...] = ()

    def batch_loglikelihood_requests(self, chunks: Any) -> Any:
        inputs, lengths, keys = super().batch_loglikelihood_requests(chunks)
        self._first = tuple(length - 1 for length in lengths)
        return inputs, lengths, keys

    def _create_payload(self, messages: Any, generate: bool = False, *args: Any, **kwargs: Any) -> dict[str, Any]:
        payload = super()._create_payload(messages, generate, *args, **kwargs)
        return payload if generate else {**payload, "steer_from": [*self._first]}


@dataclass
class Both:
    """One model, with mlx-lm's evaluator and behind a server."""

    evaluator: Any
    controllers: dict[str, Controller]
    """dog steers from the last token of a context on, hound everywhere"""
    port: int
    folder: Path

    def asking(self, client: type[LocalCompletionsAPI], concept: str | None) -> LocalCompletionsAPI:
        """lm-eval's client of the server; all that it needs of the model's folder is the tokenizer."""
        name = self.evaluator.model.name
        return client(
            base_url=f"http://127.0.0.1:{self.port}/v1/completions",
            model=name if concept is None else f"{name}@{concept}:{STRENGTH}",
            tokenizer=str(self.folder),
            tokenizer_backend="huggingface",
            batch_size=3,
        )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    folder = chat_folder(template=False)
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "w61", "eos_token": "w63"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    evaluator = lm_eval.load_evaluator(folder, dtype="float32", apply_chat_template=False, max_tokens=6)
    service = Service(mlx_lqr.load(folder, backend="mlx"), tmp_path_factory.mktemp("controllers"))
    dog = controllers_of(service.model)["dog"]
    controllers = {"dog": dog, "hound": replace(dog, concepts=("hound",), positions="all")}
    for name, controller in controllers.items():
        service.controllers.add(name, controller)
    with listening(application(service, Access())) as port:
        yield Both(evaluator, controllers, port, folder)
    service.close()


@pytest.mark.parametrize(
    ("concept", "client"), [(None, LocalCompletionsAPI), ("hound", LocalCompletionsAPI), ("dog", ToldContexts)]
)
def test_lm_eval_gets_the_numbers_of_eval_lm_eval(
    both: Both, concept: str | None, client: type[LocalCompletionsAPI]
) -> None:
    """Scores and whether they are what greedy decoding gives, and texts; contexts are short, long and none."""
    asking = both.asking(client, concept)
    scored = requests(
        "loglikelihood",
        *((context, after) for context in ("w1 w2 w3 w4 w5", "w7", "") for after in (" w8", " w9 w10 w11 w8")),
    )
    written = requests("generate_until", *((context, {"until": ["w12 "]}) for context in ("w1 w2 w3", "w9")))
    steered = steer(both.evaluator.model, both.controllers[concept], STRENGTH) if concept is not None else nullcontext()
    with steered:
        expected, texts = both.evaluator.loglikelihood(scored), both.evaluator.generate_until(written)
    got = asking.loglikelihood(scored)
    assert [score for score, _ in got] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    options = [{**one.args[1], "max_gen_toks": 6} for one in written]
    asked = requests("generate_until", *zip((one.args[0] for one in written), options, strict=True))
    assert [text.split() for text in asking.generate_until(asked)] == [text.split() for text in texts]
    if concept is not None:
        unsteered = both.evaluator.loglikelihood(scored)
        assert max(abs(a - b) for (a, _), (b, _) in zip(got, unsteered, strict=True)) > 0.1


def test_a_task_gives_the_same_metrics(both: Both, tmp_path: Path) -> None:
    rows = [
        {"question": "w1 w2 w3", "choices": ["w4", "w5 w6", "w7"], "answer": 1},
        {"question": "w8 w9", "choices": ["w10 w11", "w12"], "answer": 0},
    ]
    chosen = lm_eval.load_tasks(["our_choice", "our_scored"], write_tasks(tmp_path, rows))
    hound = tasks.NamedSteering("hound", both.controllers["hound"])
    expected = lm_eval.evaluate(both.evaluator, chosen, hound, [STRENGTH]).results[STRENGTH]
    asking = both.asking(LocalCompletionsAPI, "hound")
    results = simple_evaluate(asking, tasks=list(chosen.loaded), task_manager=chosen.manager, bootstrap_iters=0)
    for name, metric in (("our_choice", "acc,none"), ("our_scored", "perplexity,none")):
        assert results["results"][name][metric] == pytest.approx(expected[name][metric], rel=1e-4)


def requests(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, values, i) for i, values in enumerate(arguments)]


@pytest.fixture(scope="module", params=BACKENDS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, Any]]:
    """A model, and how it is asked."""
    service = Service(mlx_lqr.load(chat_folder(), backend=request.param), tmp_path_factory.mktemp("controllers"))
    service.controllers.add("dog", controllers_of(service.model)["dog"])
    with listening(application(service, Access())) as port:
        yield (
            service.model,
            lambda **fields: ask(port, "POST", "/v1/completions", {"model": service.name, "temperature": 0, **fields}),
        )
    service.close()


def logprobs_of(model: Model, tokens: list[int], law: Any, first: int) -> np.ndarray:
    """Of each next token, (n - 1, V), from runs of each prefix alone, token by token."""
    rows = []
    decoder = model.decoder(law)
    for i, token in enumerate(tokens[:-1]):
        if i < first:
            rows.append(model.logits(tokens[: i + 1]))
            decoder.fill([[token]], steered=False)
        else:
            logits = decoder.step([token])
            rows.append(np.array(logits.tolist(), np.float32)[0])
    raw = np.array(rows, np.float64)
    return raw - np.log(np.exp(raw).sum(1, keepdims=True))


@pytest.mark.parametrize("size", [1 << 26, 3 * 64])
@pytest.mark.parametrize(("steering", "first"), [({}, None), ({"dog": 2.0}, None), ({"dog": 2.0}, 3)])
def test_a_prompts_tokens_are_scored(
    tiny: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch, size: int, steering: dict[str, float], first: int | None
) -> None:
    model, asked = tiny
    monkeypatch.setattr(scoring, "LOGITS", size)
    tokens = [60, 1, 2, 3, 62, 5, 9]
    law = law_on(model, controllers_of(model)["dog"], 2.0) if steering else None
    expected = logprobs_of(model, tokens, law, first or 0)
    given = {} if first is None else {"steer_from": first}
    fields = {"prompt": tokens, "steering": steering, "echo": True, "logprobs": 2, **given}
    alone = asked(**fields, max_tokens=0).json["choices"][0]
    text = model.tokenizer.decode(tokens)
    assert (alone["text"], alone["finish_reason"]) == (text, "length")
    scored = alone["logprobs"]
    assert [token.strip() for token in scored["tokens"]] == [f"w{token}" for token in tokens]
    assert scored["token_logprobs"][0] is scored["top_logprobs"][0] is None
    assert scored["token_logprobs"][1:] == pytest.approx(
        [expected[i, token] for i, token in enumerate(tokens[1:])], abs=1e-4
    )
    for row, top in zip(expected, scored["top_logprobs"][1:], strict=True):
        assert {name.strip() for name in top} == {f"w{token}" for token in np.argsort(-row)[:2]}
        assert max(top.values()) == pytest.approx(row.max(), abs=1e-4)
    assert scored["text_offset"] == [0, *np.cumsum([len(token) for token in scored["tokens"]])[:-1].tolist()]
    plain = asked(prompt=tokens, steering=steering, max_tokens=4).json["choices"][0]["text"]
    whole = asked(**fields, max_tokens=4).json["choices"][0]
    assert whole["text"] == text + plain, "the answer is that without echo"
    assert len(whole["logprobs"]["tokens"]) == len(tokens) + 4
    assert whole["logprobs"]["token_logprobs"][: len(tokens)] == scored["token_logprobs"]
    events = asked(**fields, max_tokens=4, stream=True).events
    assert "".join(event["choices"][0]["text"] for event in events) == whole["text"]
    parts = [event["choices"][0]["logprobs"]["token_logprobs"] for event in events]
    assert [number for part in parts for number in part] == whole["logprobs"]["token_logprobs"]


def test_texts_are_echoed_and_what_says_nothing_is_refused(
    tiny: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = tiny
    answers = asked(prompt=[PROMPT, "w5"], n=2, echo=True, max_tokens=2).json["choices"]
    plain = asked(prompt=[PROMPT, "w5"], n=2, max_tokens=2).json["choices"]
    assert [one["text"] for one in answers] == [
        before + one["text"] for before, one in zip([PROMPT, PROMPT, "w5", "w5"], plain, strict=True)
    ]
    streamed = asked(prompt=PROMPT, echo=True, max_tokens=2, stream=True).events
    assert "".join(event["choices"][0]["text"] for event in streamed) == answers[0]["text"]
    asking = {"prompt": [[1, 2], [3, 4]], "echo": True, "logprobs": 0, "max_tokens": 1}
    assert asked(**asking, steer_from=[1, 0]).status == 200
    for fields, param in (
        ({"max_tokens": 0, "echo": False}, "max_tokens"),
        ({"max_tokens": 0, "logprobs": None}, "max_tokens"),
        ({"steer_from": 1, "echo": False}, "steer_from"),
        ({"steer_from": [1]}, "steer_from"),
        ({"steer_from": -1}, "steer_from.constrained-int"),
        ({"steer_from": 2}, None),
    ):
        response = asked(**{**asking, **fields})
        assert (response.status, response.json["error"]["param"]) == (400, param), response.json
    first = int(np.argmax(model.logits([1, 2])))
    monkeypatch.setattr(model.tokenizer, "end_tokens", {first})
    ended = asked(**{**asking, "prompt": [1, 2]}).json["choices"][0]
    assert (ended["finish_reason"], len(ended["logprobs"]["tokens"])) == ("stop", 3), "one for each token asked for"
