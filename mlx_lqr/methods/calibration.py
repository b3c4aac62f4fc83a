"""How hard a steering may push: the strengths at which the model's next-token distributions have moved by a budget.

Steering is calibrated on texts that have nothing to do with its concept: plain sentences, and the unsteered model's own
answers to plain questions (continuations of openings, for a model without a chat template). The divergence at a
strength is KL(steered || unsteered) of the next token in nats, averaged over the positions of the sentences and over
those of the answers, and then over both. It grows with the strength, by about its square at first, so that few passes
find the strength for each budget. Strengths of different methods mean different things; at the same divergence methods
can be compared (as steering-lite does).

The response says whether that pushes towards the concept at all: how much likelier the positive prompts have become
against the negative ones, in nats a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_lqr.backends.protocol import OVERFLOWED, Continued, Float32, Kept, Law, Progress, Recorder
from mlx_lqr.errors import InputError, OverflowingError
from mlx_lqr.lqr.divergence import kl_divergence, log_normaliser
from mlx_lqr.lqr.prompts import Prompt, tokenise
from mlx_lqr.lqr.strength import BUDGETS, Budget, Calibration
from mlx_lqr.methods.registry import METHODS
from mlx_lqr.methods.running import law_on
from mlx_lqr.methods.steering import Steering

SENTENCES = (
    "The meeting was moved to Thursday because the room had been booked twice.",
    "She wrote the number on a small piece of paper and put it on the table.",
    "Most of the houses in this street were built before the second world war.",
    "To change the battery, open the cover on the back with a small screwdriver.",
    "He asked whether the report would be ready before the end of the week.",
    "The price of bread has risen by a third since the beginning of last year.",
)
QUESTIONS = (
    "How do I write a short letter of thanks?",
    "What is the capital of Portugal?",
    "Can you give me an idea for dinner tonight?",
    "How many days are there in a week?",
    "Tell me something interesting.",
    "Which language is spoken in Austria?",
)
OPENINGS = (
    "When the door opened, everybody",
    "The most important thing about",
    "In the morning they decided to",
    "According to the article, the city",
    "My brother told me that he",
    "It took three years to build the",
)
START = 4
"""Tokens of a sentence before the first position that is measured."""
LENGTH = 12
"""Tokens of a sentence or an answer that are measured, at most."""
TOLERANCE = 0.1
"""Of a budget: strengths whose divergence is as near to it are taken."""
PASSES = 6
"""At how many strengths the divergence is measured for one budget, at most."""
LEAST = 0.02
"""Of the first strength that is tried: where this is beyond a budget, none is within it."""
SAMPLE = 4
"""Prompts of each kind that the response is measured on, at most."""
NO_RESPONSE = 0.01
"""Nats a token: steering that changes the prompts' likelihoods by less does nothing for the concept."""


def calibrate(
    model: Recorder,
    steering: Steering,
    *,
    budgets: Mapping[Budget, float] = BUDGETS,
    progress: Progress | None = None,
) -> Calibration:
    """The strengths of one concept's steering that reach the budgets.

    Takes as long as a few dozen tokens on each of a dozen texts. A controller that is adapted to each prompt is
    measured with its stored gains.

    Args:
        model: what `load` returned.
        steering: of one concept, fitted on this model.
        budgets: the divergence for each name, in nats a token.
        progress: called as progress("Calibration", done, total).

    Raises:
        InputError: steering of several concepts or of another model, a budget that is not above zero, or steering that
            changes nothing at any strength.
    """
    if len(steering.concepts) != 1:
        raise InputError("a calibration is of one concept: calibrate each alone, then combine them")
    for name, budget in budgets.items():
        if not (math.isfinite(budget) and budget > 0):
            raise InputError(f"a budget must be above zero, not {name} = {budget!r}")
    steering.check_model(model)
    texts = Texts.of(model, _first_steered(steering))

    def divergence(strength: float) -> float:
        try:
            return texts.divergence(law_on(model, steering, strength), steer_all=steering.positions == "all")
        except OverflowingError:
            return math.inf

    scale = METHODS[steering.method].strengths
    search = Search(divergence, *scale.span, first=scale.suggested)
    for done, budget in enumerate(sorted(budgets.values())):
        search.reach(budget)
        if progress:
            progress("Calibration", done + 1, len(budgets))
    strengths = {name: search.found(budget) for name, budget in budgets.items()}  # which know of every pass
    if not any(search.known[strength] for strength in strengths.values()):
        raise InputError("steering changes nothing at any strength: there is nothing to calibrate")
    return Calibration(strengths, {name: search.known[strength] for name, strength in strengths.items()})


def response(
    model: Recorder, steering: Steering, strength: float, positive: Sequence[Prompt], negative: Sequence[Prompt]
) -> float:
    """How much likelier a strength makes the positive prompts against the negative ones, in nats a token.

    Measured on the second half of up to `SAMPLE` prompts of each kind, after the first half. About 0 where steering
    does nothing for the concept, or where prompts have no second half.

    Raises:
        InputError: steering of another model.
        OverflowingError: activations overflow at this strength.
    """
    halves = [list(_halves(model, prompts[:SAMPLE])) for prompts in (positive, negative)]
    if not all(halves):
        return 0.0
    law, steer_all = law_on(model, steering, strength), steering.positions == "all"
    pairs, kept = [pair for own in halves for pair in own], Kept(_first_steered(steering))
    steered = model.log_probabilities(pairs, law=law, steer_all=steer_all, kept=kept)
    unsteered = model.log_probabilities(pairs, kept=kept)
    count = len(halves[0])
    means = [np.concatenate(part).mean() for one in (steered, unsteered) for part in (one[:count], one[count:])]
    return float(means[0] - means[2] - (means[1] - means[3]))


def _halves(model: Recorder, prompts: Sequence[Prompt]) -> Iterator[Continued]:
    """The first half of each prompt that has two, and the second."""
    for prompt in prompts:
        tokens = tokenise(model, prompt)
        if len(tokens) > 1:
            yield tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]


def recommended(
    model: Recorder,
    steering: Steering,
    budget: Budget,
    prompts: tuple[Sequence[Prompt], Sequence[Prompt]],
    progress: Progress | None = None,
) -> tuple[Steering, list[str]]:
    """The steering with its strength for each budget, of which it recommends the one for this budget.

    What was fitted is not lost where no strength can be found: then nothing is recommended.

    Args:
        model: what `load` returned.
        steering: of one concept, fitted on this model.
        budget: the one whose strength is recommended.
        prompts: positive and negative, as it was fitted on.
        progress: as for `calibrate`.

    Returns:
        The steering, and a sentence for each doubt about it.
    """
    try:
        found = calibrate(model, steering, progress=progress)
        felt = response(model, steering, found.at("strong"), *prompts)
    except InputError as error:
        return steering, [f"no strength is recommended: {error}"]
    doubts = []
    if abs(felt) < NO_RESPONSE:
        doubts.append(
            f"even at strength {found.at('strong'):g}, the strong budget, the positive prompts become likelier than "
            f"the negative ones by {felt:.3f} nats a token only: steering hardly does anything for "
            f"{steering.concepts[0]}; give other prompts, or other layers"
        )
    return steering.calibrated(found, budget), doubts


def _first_steered(steering: Steering) -> int:
    return min(steering.active_layers, default=0)


@dataclass(frozen=True, eq=False)
class Texts:
    """What divergences are measured on, and the unsteered model's logits there."""

    model: Recorder
    kinds: Sequence[Sequence[Continued]]
    """Sentences, and answers"""
    reference: Sequence[Sequence[Float32]]
    _normalisers: Sequence[Sequence[np.ndarray]]
    """Of the reference"""
    _kept: Sequence[Kept]

    @classmethod
    def of(cls, model: Recorder, first: int = 0) -> Texts:
        """Sentences that are read, and answers that the model writes unsteered.

        Args:
            first: the first layer that is steered; what comes before it is read once.
        """
        read = [tokenise(model, sentence)[: START + LENGTH] for sentence in SENTENCES]
        sentences = [(own[:START], own[START:]) for own in read if len(own) > START]
        tokenizer = model.tokenizer
        if tokenizer.has_chat_template:
            asked = [tokenise(model, tokenizer.chat([{"role": "user", "content": text}])) for text in QUESTIONS]
        else:
            asked = [tokenise(model, text) for text in OPENINGS]
        kinds = [kind for kind in (sentences, list(_answers(model, asked))) if kind]
        kept = [Kept(first) for _ in kinds]
        reference = [model.logits_along(kind, kept=own) for kind, own in zip(kinds, kept, strict=True)]
        return cls(model, kinds, reference, [list(map(log_normaliser, own)) for own in reference], kept)

    def divergence(self, law: Law, *, steer_all: bool = False) -> float:
        """Nats a token.

        Raises:
            OverflowingError: activations overflow under this law.
        """
        of_kinds = []
        for kind, kept, *unsteered in zip(self.kinds, self._kept, self.reference, self._normalisers, strict=True):
            steered = self.model.logits_along(kind, law=law, steer_all=steer_all, kept=kept)
            of_kinds.append(np.concatenate(list(map(kl_divergence, steered, *unsteered))).mean())
        return float(np.mean(of_kinds))


def _answers(model: Recorder, prompts: Sequence[Sequence[int]]) -> Iterator[Continued]:
    """Each prompt with the likeliest tokens after it, up to the end of the answer or `LENGTH`."""
    decoder, end = model.decoder(), model.tokenizer.end_tokens
    decoder.fill([prompt[:-1] for prompt in prompts], steered=False)
    tokens, columns = [prompt[-1] for prompt in prompts], []
    for _ in range(LENGTH):
        tokens = decoder.sample(decoder.step(tokens))
        columns.append(tokens.tolist())
        if OVERFLOWED in columns[-1]:
            raise decoder.overflow(prompts[columns[-1].index(OVERFLOWED)], 0)
    for prompt, answer in zip(prompts, zip(*columns, strict=True), strict=True):
        length = next((i for i, token in enumerate(answer) if token in end), LENGTH)
        yield prompt, answer[:length]


class Search:
    """Looks for strengths between mild and strong; what is measured for one budget serves the next.

    Args:
        divergence: of a strength, infinite where activations overflow.
        mild, strong: from no steering to the strongest strength that is sensible, in whichever direction that is.
        first: a strength to begin with.
    """

    def __init__(self, divergence: Callable[[float], float], mild: float, strong: float, *, first: float) -> None:
        self.known: dict[float, float] = {}
        """Divergences by strength"""
        self._divergence = divergence
        self._mild, self._strong = mild, strong
        self._first = (first - mild) / (strong - mild)
        self._doses = {0.0: 0.0}
        """Divergences by dose, the share of the way from mild to strong"""

    def reach(self, budget: float) -> float:
        """The strength whose divergence is nearest to the budget of those that do not exceed it beyond `TOLERANCE`.

        Feedback on a feature may go beyond the budget however small the strength is, since it holds the feature: then
        it is the least one that is tried. Where the strongest strength stays below the budget, it is that one.
        """
        least = LEAST * self._first
        for _ in range(PASSES):
            within = self._within(budget)
            beyond = min((dose for dose in self._doses if dose > within), default=None)
            if within == 1 or self._doses[within] >= budget * (1 - TOLERANCE) or beyond == least:
                break
            dose = self._further(within, budget) if beyond is None else self._between(within, beyond, budget)
            self._measure(max(dose, least))
        return self.found(budget)

    def found(self, budget: float) -> float:
        """What `reach` returns, by what is known so far. It does not fall where the budget rises."""
        return self._strength(self._within(budget) or min(dose for dose in self._doses if dose > 0))

    def _within(self, budget: float) -> float:
        """The largest dose from which on down every divergence is within the budget."""
        beyond = [dose for dose, divergence in self._doses.items() if divergence > budget * (1 + TOLERANCE)]
        return max(dose for dose in self._doses if dose < min(beyond, default=math.inf))

    def _between(self, low: float, high: float, budget: float) -> float:
        """Where the root of the divergence, taken to be a line from `low` to `high`, meets that of the budget."""
        roots = [math.sqrt(self._doses[dose]) for dose in (low, high)]
        share = (math.sqrt(budget) - roots[0]) / (roots[1] - roots[0]) if math.isfinite(roots[1]) else 0.5
        return low + min(max(share, 0.1), 0.9) * (high - low)

    def _further(self, dose: float, budget: float) -> float:
        """Beyond every dose tried, as far as the divergence so far says, and not more than three times as far."""
        if dose == 0:
            return self._first
        ratio = budget / self._doses[dose] if self._doses[dose] > 0 else math.inf
        return min(1.0, dose * min(3.0, max(1.5, math.sqrt(ratio))))

    def _measure(self, dose: float) -> None:
        strength = self._strength(dose)
        if strength not in self.known:
            self.known[strength] = self._divergence(strength)
        self._doses[dose] = self.known[strength]

    def _strength(self, dose: float) -> float:
        return float(f"{self._mild + dose * (self._strong - self._mild):.4g}")
