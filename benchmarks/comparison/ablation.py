"""What each part of A-LQR's recipe is worth: one part changed at a time, at the same budget of damage.

Everything is read off texts that the unsteered model has written, token by token: how much probability the words of the
concept get, in answers in the chat and in texts, and in how many answers to factual questions every token stays the
likeliest. That tells parts apart that no affordable number of generated answers would. Questions and openings are those
that are for tuning.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import mlx_lqr
from mlx_lqr import tasks
from mlx_lqr.backends.protocol import Array, Continued, Law, Model
from mlx_lqr.files.atomic import writing
from mlx_lqr.lqr.concept_prompts import framed
from mlx_lqr.lqr.divergence import log_softmax
from mlx_lqr.lqr.layers import choose_layers
from mlx_lqr.lqr.prompts import Prompt, tokenise
from mlx_lqr.lqr.strength import BUDGETS
from mlx_lqr.methods.alqr import STRENGTHS, LinearFeedback
from mlx_lqr.methods.calibration import Search, Texts
from mlx_lqr.runtime import Options, batch_stream
from mlx_lqr.tasks.chat import bundled_questions
from mlx_lqr.tasks.concept import bundled_openings, word_pattern
from mlx_lqr.tasks.generations import chat_prompt

CONCEPTS = ("dog", "ocean", "church")
BUDGET = BUDGETS["normal"]
TOKENS = 16
JACOBIAN_PROMPTS = 4
Fitted = tuple[mlx_lqr.Controller, type[LinearFeedback]]


class OneWay(LinearFeedback):
    """Pushes only towards the concept."""

    def _error(self, layer: int, z: Array) -> Array:
        error = super()._error(layer, z)
        return error * (error > 0)


class Capped(LinearFeedback):
    """Pushes no harder than strength 1 does at the negative prompts' level."""

    def _error(self, layer: int, z: Array) -> Array:
        error, most = super()._error(layer, z), float(self.controller.setpoint[layer, 0])
        return error - (error - most) * (error > most)


SURE = 0.9


def unsure(model: Model) -> type[LinearFeedback]:
    """Leaves alone the tokens where the model is sure of the next: the norm and the head, applied to the input of the
    first steered block, give one token more than `SURE`. For models with tied embeddings."""
    body: Any = model.module.model  # type: ignore[attr-defined]
    norm = copy(body.norm)  # which the library reads nothing off

    def likeliest(z: Array) -> Array:
        if model.backend == "torch":
            head = body.embed_tokens.weight
            return (norm(z).to(head.dtype) @ head.mT).float().softmax(-1).amax(-1, keepdim=True)
        import mlx.core as mx

        return mx.softmax(body.embed_tokens.as_linear(norm(z)), axis=-1).max(-1, keepdims=True)

    class Unsure(LinearFeedback):
        def _error(self, layer: int, z: Array) -> Array:
            if layer == self.layers[0]:
                self._free = likeliest(z) < SURE
            return super()._error(layer, z) * self._free

    return Unsure


class AfterBlock(LinearFeedback):
    """Measures at the block's output, which it changes."""

    def _steered(self, layer: int, z: Array, output: Array) -> Array:
        return super()._steered(layer, output, output)


@dataclass(eq=False)
class Bench:
    """One concept on one model."""

    model: Model
    sets: tuple[Sequence[Prompt], Sequence[Prompt]]

    def __post_init__(self) -> None:
        self.plain = self._prepared(self.sets)
        self.chat = self._prepared(framed(self.model, self.sets))

    def _prepared(self, sets: tuple[Sequence[Prompt], Sequence[Prompt]]) -> tuple[mlx_lqr.Contrast, mlx_lqr.Jacobians]:
        return mlx_lqr.contrast(self.model, *sets), mlx_lqr.linearize(self.model, sets[0][:JACOBIAN_PROMPTS])

    def fit(self, *, plain: bool = False, law: type[LinearFeedback] = LinearFeedback, **options: Any) -> Fitted:
        from mlx_lqr.lqr.fit import solve_controller

        contrast, jacobians = self.plain if plain else self.chat
        return solve_controller(contrast, jacobians, algebra=self.model.algebra, **options), law

    def close(self) -> tuple[int, ...]:
        """The layers where a push for the concept works at least 0.8 times as well as at the best one."""
        return choose_layers("auto", *self.chat, least=0.8)

    def separating(self, *, plain: bool = False) -> list[int]:
        """The layers where the prompts that the direction was computed from are told apart."""
        separation = (self.plain if plain else self.chat)[0].separation[:-1]
        return [int(k) for k in np.flatnonzero(separation >= 0.8 * separation.max())]

    def after_block(self) -> Fitted:
        """u_k = alpha_{k+1} (S_{k+1} + R)^-1 S_{k+1} v_{k+1}, by the feature cost."""
        (contrast, jacobians), (controller, _) = self.chat, self.fit(readout="direction", feedback=1.0, push="free")
        T, d = contrast.direction.shape
        e = np.vstack([contrast.direction, contrast.output_direction[None]]).astype(np.float64)
        mu = np.linalg.norm(e, axis=1)
        v = e / np.maximum(mu, 1e-12)[:, None]
        q, gain = controller.weights.q, np.zeros((T, d, 1), np.float32)
        S = q * np.outer(v[T], v[T]) / mu[T] ** 2
        for k in reversed(range(controller.active_layers[0], T)):
            cost_to_go = np.linalg.solve(S + np.eye(d) / mu[k + 1] ** 2, S)
            if k in controller.active_layers:
                gain[k, :, 0] = cost_to_go @ v[k + 1]
                S = S - S @ cost_to_go
            A = np.asarray(jacobians[k], np.float64)
            S = q * np.outer(v[k], v[k]) / mu[k] ** 2 + A.T @ S @ A
        level = np.append(np.einsum("kd,kd->k", v[1:T], contrast.mean_negative[1:]), self._output_level(v[T]))
        shifted = replace(
            controller,
            direction=v[1:, :, None].astype(np.float32),
            gain=gain,
            setpoint=mu[1:, None].astype(np.float32),
            offset=level[:, None].astype(np.float32),
        )
        return shifted, AfterBlock

    def _output_level(self, v: np.ndarray) -> float:
        """v_T . mean-_T"""
        negative = [tokenise(self.model, one) for one in framed(self.model, self.sets)[1]]
        return float(self.model.residuals(negative)[:, -1].mean(0) @ v)


LEVERS: Sequence[tuple[str, str, Callable[[Bench], Fitted]]] = (
    ("the recipe", "as `fit` does it", lambda bench: bench.fit()),
    ("prompts", "as plain texts", lambda bench: bench.fit(plain=True)),
    ("readout", "the direction", lambda bench: bench.fit(readout="direction")),
    ("cost", "state", lambda bench: bench.fit(cost="state")),
    ("layers", "0.8 times as good as the best", lambda bench: bench.fit(layers=bench.close())),
    ("layers", "by separation in sample", lambda bench: bench.fit(layers=bench.separating())),
    ("layers", "the last third", lambda bench: bench.fit(layers=_last_third(bench.model.num_layers))),
    ("layers", "the last one", lambda bench: bench.fit(layers=[-1])),
    (
        "setpoint",
        "paper, and its feedback and push",
        lambda bench: bench.fit(setpoint="paper", readout="direction", feedback=1.0, push="free"),
    ),
    ("feedback", "the whole, as the paper has it", lambda bench: bench.fit(feedback=1.0)),
    ("feedback", "a half", lambda bench: bench.fit(feedback=0.5)),
    ("feedback", "a quarter", lambda bench: bench.fit(feedback=0.25)),
    ("feedback", "a tenth", lambda bench: bench.fit(feedback=0.1)),
    ("feedback", "a hundredth", lambda bench: bench.fit(feedback=0.01)),
    ("push", "in any direction, as the paper has it", lambda bench: bench.fit(push="free")),
    (
        "push, feedback, layers",
        "in any direction, a half, 0.8 times as good as the best",
        lambda bench: bench.fit(push="free", feedback=0.5, layers=bench.close()),
    ),
    ("q/r", "0.3", lambda bench: bench.fit(q=0.3, qf=0.3)),
    ("q/r", "3", lambda bench: bench.fit(q=3.0, qf=3.0)),
    ("q/r", "100", lambda bench: bench.fit(q=100.0, qf=100.0)),
    ("measured", "after the block, by the direction, whole feedback", lambda bench: bench.after_block()),
    ("push", "only towards the concept", lambda bench: bench.fit(law=OneWay)),
    ("push", "as strength 1 at the negative level at most", lambda bench: bench.fit(law=Capped)),
    ("tokens", f"not where one has {SURE:g} already", lambda bench: bench.fit(law=unsure(bench.model))),
    (
        "all of it",
        "plain texts, direction, state cost, separation in sample, whole feedback, any direction, q/r 3",
        lambda bench: bench.fit(
            plain=True,
            readout="direction",
            cost="state",
            layers=bench.separating(plain=True),
            feedback=1.0,
            push="free",
            q=3.0,
            qf=3.0,
        ),
    ),
)
"""(lever, setting, how it is fitted), the recipe first."""


def _last_third(T: int) -> range:
    return range(2 * T // 3, T)


@dataclass(eq=False)
class Reading:
    """Texts of the unsteered model, and what is read off them under a law."""

    model: Model

    def __post_init__(self) -> None:
        model = self.model
        openings: list[Prompt] = list(bundled_openings("tuning"))
        self.texts = {"text": list(self._written(openings, 0.8))}
        self.facts: list[Continued] = []
        if model.tokenizer.has_chat_template:
            asked, facts = bundled_questions("tuning")
            self.texts["chat"] = list(self._written([chat_prompt(model, question) for question in asked], 0.8))
            answers = self._written([chat_prompt(model, fact.question) for fact in facts], 0.0)
            decode = model.tokenizer.decode
            self.facts = [one for fact, one in zip(facts, answers, strict=True) if fact.is_in(decode(one[1]))]

    def _written(self, prompts: Sequence[Prompt], temperature: float) -> Iterator[Continued]:
        answers: list[list[int]] = [[] for _ in prompts]
        drawing: Options = {"max_tokens": TOKENS, "temperature": temperature, "frequency_penalty": 0.0, "seed": 0}
        for i, piece in batch_stream(self.model, prompts, **drawing):
            if piece.token is not None:
                answers[i].append(piece.token)
        for prompt, answer in zip(prompts, answers, strict=True):
            if answer:
                yield tokenise(self.model, prompt), answer

    def read(self, law: Law, family: Sequence[int]) -> dict[str, float]:
        """The probability of the family's tokens in each kind of texts, and the share of facts that are kept."""
        found = {}
        for kind, pairs in self.texts.items():
            logits = self.model.logits_along([(before, after[:-1]) for before, after in pairs], law=law)
            found[kind] = float(np.concatenate([np.exp(log_softmax(own))[:, family].sum(-1) for own in logits]).mean())
        if self.facts:
            logits = self.model.logits_along([(before, after[:-1]) for before, after in self.facts], law=law)
            kept = [
                bool((own.argmax(-1) == np.asarray(one[1])).all()) for own, one in zip(logits, self.facts, strict=True)
            ]
            found["kept"] = float(np.mean(kept))
        return found


def ablate(models: Mapping[str, Model], output: Path, say: Callable[[str], None]) -> Path:
    """Measure every lever on every model; what is in the output's rows already is not measured again."""
    rows_file = output.with_suffix(".jsonl")
    output.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in rows_file.read_text("utf-8").splitlines()] if rows_file.is_file() else []
    measured = {(row["model"], row["concept"], row["lever"], row["setting"]): row["found"] for row in known}
    for name, model in models.items():
        reading, texts = Reading(model), Texts.of(model)
        for concept in CONCEPTS:
            missing = [one for one in LEVERS if (name, concept, one[0], one[1]) not in measured]
            if not missing:
                continue
            bench, family = Bench(model, mlx_lqr.bundled_prompts(concept)), _family(model, concept)
            for lever, setting, fit in missing:
                say(f"{name}, {concept}: {lever}, {setting}")
                controller, law = fit(bench)
                placed = partial(law, controller)
                search = Search(_divergence(texts, placed), 0.0, 12.0, first=STRENGTHS.suggested)
                strength = search.reach(BUDGET)
                found = reading.read(placed(strength), family)
                found |= {"kl": search.known[strength], "strength": strength}
                measured[name, concept, lever, setting] = found
                row = {"model": name, "concept": concept, "lever": lever, "setting": setting, "found": found}
                with rows_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    rows = [_row(lever, setting, models, measured) for lever, setting, _ in LEVERS]
    with writing(output) as temporary:
        temporary.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    return output


def _divergence(texts: Texts, law: Callable[[float], Law]) -> Callable[[float], float]:
    return lambda strength: texts.divergence(law(strength))


def _row(lever: str, setting: str, models: Mapping[str, Model], measured: Mapping[Any, Any]) -> dict[str, Any]:
    """A row of the table: geometric means of probabilities over the concepts, in per cent, and the mean of the rest."""
    metrics = {}
    for name in models:
        own = [measured[name, concept, lever, setting] for concept in CONCEPTS]
        for kind in ("chat", "text"):
            if kind in own[0]:
                mean = np.exp(np.mean([np.log(max(one[kind], 1e-9)) for one in own]))
                metrics[f"{name}: concept in {kind}, %"] = round(100 * float(mean), 2)
        if "kept" in own[0]:
            metrics[f"{name}: facts kept"] = round(float(np.mean([one["kept"] for one in own])), 2)
        metrics[f"{name}: KL"] = round(float(np.mean([one["kl"] for one in own])), 3)
    return {"lever": lever, "setting": setting, "metrics": metrics}


def _family(model: Model, concept: str) -> list[int]:
    """The tokens that are a word of the concept's family by themselves."""
    pattern = word_pattern(tasks.word_family(concept))
    return [i for i in range(model.vocab_size) if pattern.fullmatch(model.tokenizer.decode([i]).strip())]
