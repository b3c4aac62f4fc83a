"""The open-loop part of steering, as a control vector: what it adds to each block's output whatever the text is.

Methods that add fixed vectors are that and nothing else. A-LQR's push follows the text: its open-loop part is the mean
of u_k over neutral text, read token by token under closed-loop control. What that leaves of the control is measured on
other neutral text, with p, q and p_0 the next-token distributions in closed loop, with the vector, and unsteered:

    share left = 1 - sqrt(KL(p || q) / KL(p || p_0))

1 where the vector does to the predictions what the controller does, 0 where it brings them no closer; the root, since
a divergence grows with the square of a push, so that half of a push leaves a half. Distributions are compared, and not
the feature that the controller tracks, since the last layers' pushes reach no block that reads a feature, and not the
concept's words, which only a few concepts have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_lqr.backends.protocol import AffineLaw, Continued, Float32, Progress, Recorder
from mlx_lqr.errors import InputError
from mlx_lqr.files.control_vectors import ControlVectors
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.lqr.divergence import kl_divergence
from mlx_lqr.lqr.prompts import tokenise
from mlx_lqr.methods.control_vector import as_steering
from mlx_lqr.methods.recording import RecordedFeedback
from mlx_lqr.methods.registry import METHODS
from mlx_lqr.methods.running import law_on
from mlx_lqr.methods.steering import Steering, law_of
from mlx_lqr.tasks.read import bundled_lines

START = 4
"""Tokens of a sentence before the first that is steered."""
LENGTH = 12
"""Tokens of a sentence that are steered, at most."""


@dataclass(frozen=True)
class Left:
    """What a control vector leaves of a controller, measured on neutral text."""

    share: float
    """Of the closed loop's effect on the next token: 1 is all of it"""
    closed: float
    """KL(closed loop || unsteered) in nats a token"""
    vector: float
    """KL(with the vector || unsteered) in nats a token"""
    sentences: int


@dataclass(frozen=True, eq=False)
class OpenLoop:
    """A control vector, and what it leaves out."""

    vectors: ControlVectors
    left: Left | None
    """None where the vector is all that the method does"""
    left_out: float
    """|push| at block 0, for which the format has no place"""
    everywhere: bool
    """Whether the steering acts at every token of a prompt, as programs apply the vector"""


def open_loop(
    steering: Steering, strength: Sequence[float], model: Recorder | None = None, *, progress: Progress | None = None
) -> OpenLoop:
    """The control vector of a steering at a strength for each of its concepts.

    Args:
        model: what it was fitted on, needed for A-LQR. Without it the vector names the model by its name, and not by
            its architecture.

    Raises:
        InputError: steering of another model, of a method that no control vector can stand for, or that adds nothing
            after block 0; or A-LQR without a model.
    """
    if model is not None:
        steering.check_model(model)
    if not any(strength):
        raise InputError("strength 0 is not steered, so that there is nothing to export: give another --strength")
    push, described = constant_push(steering, strength), f"what {steering.method} adds"
    closed: Controller | None = None
    if push is None:
        if not isinstance(steering, Controller):
            formula = METHODS[steering.method].formula.replace("`", "")
            raise InputError(
                f"{steering.method} makes {formula} of a block's output y, which no vector does that is the same for "
                "every text: methods that add fixed vectors can be exported, and A-LQR by its mean push"
            )
        if model is None:
            raise InputError(
                "A-LQR pushes each text as far as it needs, and the mean of that is measured on the model: name the "
                "MODEL too, mlx-lqr export FILE MODEL --control-vector OUT"
            )
        closed = steering
        push, described = _mean_push(model, closed, strength, progress), "the mean push of A-LQR on neutral text"
    if not np.all(np.isfinite(push)):
        raise InputError("the pushes are not finite at this strength: give a lower --strength")
    directions: Mapping[int, Float32] = {k: push[k] for k in range(1, len(push)) if push[k].any()}
    if not directions:
        raise InputError("nothing is added after block 0, for which control vectors have no place: fit other layers")
    named = " and ".join(f"{concept} {one:g}" for concept, one in zip(steering.concepts, strength, strict=True))
    vectors = ControlVectors(
        directions,
        model_hint=steering.model_name if model is None else model.family,
        layer_count=steering.num_layers,
        concept=", ".join(steering.concepts),
        description=f"{described}, strength {named}",
        fingerprint=steering.fingerprint,
    )
    left = None if closed is None or model is None else _left(model, closed, strength, vectors, progress)
    return OpenLoop(vectors, left, float(np.linalg.norm(push[0])), steering.positions == "all")


def constant_push(steering: Steering, strength: Sequence[float]) -> Float32 | None:
    """What is added to each block's output, whatever the text is: (T, d); None where that depends on the text."""
    law = law_of(steering, strength)
    affines = law.affine() if law.site == "block" and isinstance(law, AffineLaw) else None
    if affines is None or any(one.read_input is not None or one.read_output is not None for one in affines.values()):
        return None
    push = np.zeros((steering.num_layers, steering.hidden_size), np.float32)
    for layer, one in affines.items():
        push[layer] = one.gain @ one.target
    return push


def _mean_push(
    model: Recorder, controller: Controller, strength: Sequence[float], progress: Progress | None
) -> Float32:
    """The mean of u_k over half of the sentences, in closed loop: (T, d)."""
    texts = _sentences(model)[::2]
    law = RecordedFeedback(controller, strength)
    decoder = model.decoder(law)
    decoder.fill([text[: START - 1] for text in texts], steered=controller.positions == "all")
    law.recording.take()  # nothing of what comes before the first token that counts
    for step, tokens in enumerate(zip(*(text[START - 1 :] for text in texts), strict=True)):
        decoder.step(list(tokens))
        if progress:
            progress("Mean push", step + 1, len(texts[0]) - START + 1)
    error = np.nan_to_num(law.recording.feature_error()).mean(axis=0)
    return np.einsum("tdm,tm->td", law.gain, error).astype(np.float32)


def _left(
    model: Recorder,
    controller: Controller,
    strength: Sequence[float],
    vectors: ControlVectors,
    progress: Progress | None,
) -> Left:
    """Measured on the sentences that the mean is not of."""
    texts = _sentences(model)[1::2]
    pairs: list[Continued] = [(text[:START], text[START:]) for text in texts]
    closed = model.logits_along(pairs, law=law_on(model, controller, strength), steer_all=controller.positions == "all")
    vector = model.logits_along(pairs, law=law_on(model, as_steering(vectors)), steer_all=True)
    plain = model.logits_along(pairs)
    if progress:
        progress("What is left", 1, 1)

    def divergence(these: Sequence[Float32], those: Sequence[Float32]) -> float:
        of_texts = [kl_divergence(one, other) for one, other in zip(these, those, strict=True)]
        return float(np.concatenate(of_texts).mean())

    moved = divergence(closed, plain)
    if moved == 0:
        raise InputError("the controller changes nothing on neutral text at this strength: give a higher --strength")
    share = 1 - math.sqrt(divergence(closed, vector) / moved)
    return Left(share, moved, divergence(vector, plain), len(texts))


def _sentences(model: Recorder) -> list[list[int]]:
    """The bundled neutral sentences that are long enough, all cut to one length."""
    read = [list(tokenise(model, line))[: START + LENGTH] for line in bundled_lines("neutral.txt")]
    length = min(max(map(len, read)), START + LENGTH)
    return [tokens for tokens in read if len(tokens) == length]
