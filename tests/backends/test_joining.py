"""Sequences that join a batch and leave it get the tokens that each would get alone, steered in its own way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from helpers.backends import BACKENDS, tiny_on
from helpers.controllers import NEGATIVE, POSITIVE, controller_for
from helpers.decoding import decoded

import mlx_lqr
from mlx_lqr.backends.mlx import decoder as mlx_decoder
from mlx_lqr.backends.mlx import step as mlx_step
from mlx_lqr.backends.protocol import GREEDY, Law, Model, Sampling
from mlx_lqr.methods.alqr import LinearFeedback
from mlx_lqr.methods.steering import law_of

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
FAMILIES = ("llama", "mistral", "gemma2", "gemma3_text", "smollm3", "mixtral")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@dataclass
class Sequence:
    """A prompt that joins at a step, and how many tokens it gets."""

    start: int
    prompt: list[int]
    count: int
    law: Any = None
    """Makes its law anew."""
    sampling: Sampling = GREEDY

    def own_law(self) -> Law | None:
        return None if self.law is None else self.law()

    def alone(self, model: Model) -> list[int]:
        return decoded(model, self.prompt, law=self.own_law(), sampling=self.sampling, max_tokens=self.count)


def together(model: Model, sequences: list[Sequence]) -> list[list[int]]:
    """The tokens of each, decoded in one batch that they join and leave."""
    answers: list[list[int]] = [[] for _ in sequences]
    running: list[int] = []
    decoder: Any = None
    tokens: Any = None
    step = 0
    while any(len(answer) < one.count for answer, one in zip(answers, sequences, strict=True)):
        if running:
            tokens = decoder.sample(decoder.step(tokens))
        for i, one in enumerate(sequences):
            if one.start == step:
                joining = model.decoder(one.own_law(), one.sampling)
                joining.fill([one.prompt[:-1]], steered=False)
                first = joining.sample(joining.step(one.prompt[-1:]))
                decoder, tokens = (decoder, decoder.join(joining, tokens, first)) if running else (joining, first)
                running.append(i)
        for i, token in zip(running, tokens.tolist() if running else [], strict=True):
            answers[i].append(token)
        rows = [row for row, i in enumerate(running) if len(answers[i]) < sequences[i].count]
        if rows and len(rows) < len(running):
            tokens = decoder.keep(rows, tokens)
        running = [running[row] for row in rows]
        step += 1
    return answers


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("steered", [False, True])
def test_the_last_one_of_a_batch_goes_back_to_compiled_steps(
    family: str, steered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose strength is set in the batch and after it, and whom another one joins again."""
    monkeypatch.setattr(mlx_decoder, "COMPILE_AFTER", 3)
    monkeypatch.setattr(mlx_step, "STEP", 8)
    model = tiny_on("mlx", family)
    controller = controller_for(model)
    strengths = {6: 1.0, 20: -2.0}
    compiled: list[bool] = []

    def tokens_of(*, joined: bool) -> list[int]:
        law = LinearFeedback(controller, 2.0) if steered else None
        decoder: Any = model.decoder(law)
        decoder.fill([PROMPT[:-1]], steered=False)
        token: Any = decoder.sample(decoder.step(PROMPT[-1:]))
        drawn = [token.tolist()[0]]
        for step in range(40):
            if joined and step in (4, 30):
                other = model.decoder(LinearFeedback(controller, -1.0))
                other.fill([[7, 8]], steered=False)
                first = other.sample(other.step([9]))
                token = decoder.join(other, token, first) if step == 4 else other.join(decoder, first, token)
                decoder = decoder if step == 4 else other
            if joined and step in (10, 34):
                token = decoder.keep([0 if step == 10 else 1], token)
            if law is not None and step in strengths:
                law.strength = strengths[step]
            token = decoder.sample(decoder.step(token))
            drawn.append(token.tolist()[1 if joined and 30 <= step < 34 else 0])
            if joined:
                compiled.append(decoder._fixed is not None)
        return drawn

    assert tokens_of(joined=True) == tokens_of(joined=False)
    assert compiled == [2 <= step < 4 or 13 <= step < 30 or step >= 37 for step in range(40)]


def mixed(model: Model) -> list[Sequence]:
    """Unsteered, steered by controllers of one and of two concepts and of other methods, inside attention too, drawn
    with several settings; longer than the windows of the tiny models, and as many as make the batch close up."""
    a, b = (controller_for(model, concept) for concept in "ab")
    late = controller_for(model, layers=[2])
    spid = mlx_lqr.fit_baseline(model, "spid", POSITIVE, NEGATIVE, numbers={"kd": 0.4})
    actadd = mlx_lqr.fit_baseline(model, "actadd", POSITIVE, NEGATIVE, layers="all")
    iti = mlx_lqr.fit_baseline(model, "iti", POSITIVE, NEGATIVE)
    drawn = Sampling(temperature=1.2, top_p=0.95, seed=7)
    return [
        Sequence(0, PROMPT, 9),
        Sequence(0, PROMPT[:3], 30, lambda: LinearFeedback(a, 2.0)),
        Sequence(1, [5], 12, lambda: law_of(spid, 2.0), drawn),
        Sequence(3, PROMPT * 3, 25, lambda: LinearFeedback(mlx_lqr.Controller.combine(a, b), [1.5, -1.0])),
        Sequence(4, PROMPT[::-1], 14, lambda: law_of(actadd, 1.0), replace(drawn, seed=8)),
        Sequence(4, PROMPT[2:], 20, None, Sampling(temperature=0, repetition_penalty=1.6)),
        Sequence(7, [7, 7, 2], 15, lambda: law_of(iti, 3.0), Sampling(temperature=0, frequency_penalty=1.5)),
        Sequence(31, PROMPT, 8, lambda: LinearFeedback(late, 1.0), replace(drawn, temperature=0.9, top_k=20)),
        Sequence(38, PROMPT[1:6], 10),
        Sequence(47, PROMPT[1:7], 6),
        Sequence(60, PROMPT[1:5], 6),
    ]


@every_backend
@pytest.mark.parametrize("family", FAMILIES)
def test_joining_and_leaving_changes_no_token(backend: str, family: str) -> None:
    model = tiny_on(backend, family)
    sequences = mixed(model)
    expected = [one.alone(model) for one in sequences]
    assert together(model, sequences) == expected
    assert len({tuple(tokens[:6]) for tokens in expected}) > 7
