"""Prompts -> mean last-token activations -> the direction of a concept at every layer.

e_k = mean+_k - mean-_k over the last-token residual streams z_k of positive and negative prompts; mu_k = norm(e_k) and
v_k = e_k / mu_k (difference of means, arXiv 2604.19018). Where mu_k = 0 the direction is zero and nothing is
controlled: always so at layer 0 when all prompts end in the same token.

How well a layer tells the sets apart is mu_k over the pooled standard deviation of v_k . z_k within them (Cohen's d,
1988). Where it is small, the feature of any text lies many mu_k up or down, and a setpoint there orders large pushes
that mean nothing: layers="auto" leaves these layers alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import numpy as np

from mlx_lqr.backends.base import Float32, Model, Progress
from mlx_lqr.errors import InputError
from mlx_lqr.prompts import read_prompts as read_prompts
from mlx_lqr.prompts import text_lines
from mlx_lqr.riccati import check_layers

Prompt = str | Sequence[int]
"""Text (tokenised as it is, no chat template) or token ids."""
Layers = Iterable[int] | Literal["auto", "all"] | None
"""Where to steer: these layers, those that tell the prompts apart ("auto", `choose_layers`), all, or the default."""

SEPARATING = 0.8
"""With layers="auto" a layer is controlled whose separation is this share of the best one's. SmolLM2: 24 to 29 of 30
for "dog", 22 to 29 for "formal", 15 to 21 for "refusal"."""


@dataclass(frozen=True, eq=False)
class Contrast:
    """What two sets of prompts tell apart, for a model of T blocks of width d (all float32).

    `direction` holds e_k, unnormalised: its norm over a row is mu_k.
    """

    mean_positive: Float32
    """(T, d): mean z_k over the positive prompts, at the input of each block."""
    mean_negative: Float32
    """(T, d)"""
    direction: Float32
    """(T, d): e_k = mean_positive - mean_negative"""
    output_direction: Float32
    """(d,): the same difference for z_T, the last block's output"""
    prompt_counts: tuple[int, int]
    """How many positive and negative prompts."""
    fingerprint: str = ""
    model_name: str = ""
    spread: Float32 | None = None
    """(T + 1,): pooled standard deviation of v_k . z_k within the sets, at z_0..z_T; None for two single prompts"""

    @property
    def magnitude(self) -> Float32:
        """mu_k = norm(e_k): (T,)"""
        return np.linalg.norm(self.direction, axis=-1)

    @property
    def output_magnitude(self) -> float:
        """mu_T = norm(e_T)"""
        return float(np.linalg.norm(self.output_direction))

    @property
    def unit_direction(self) -> Float32:
        """v_k = e_k / mu_k, zero where mu_k is zero: (T, d)"""
        return unit(self.direction)

    @property
    def separation(self) -> Float32:
        """mu_k over the spread within the sets, at z_0..z_T; zero where mu_k is zero: (T + 1,)

        Raises:
            InputError: there is no spread to measure it against.
        """
        if self.spread is None:
            raise InputError('layers "auto" compares the prompts of a set with one another: give more than one of each')
        magnitude = np.append(self.magnitude, np.float32(self.output_magnitude))
        with np.errstate(divide="ignore"):
            return np.divide(magnitude, self.spread, out=np.zeros_like(magnitude), where=magnitude > 0)


def contrast(
    model: Model,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    progress: Progress | None = None,
) -> Contrast:
    """Run both sets of prompts through the model and take the difference of their mean last-token activations.

    Raises:
        InputError: a set is empty, both sets are the same, a prompt has no tokens or exceeds the model's context, or
            the activations do not tell the sets apart.
    """
    return contrast_of(model, *activations(model, *tokenise_sets(model, positive, negative), progress))


def activations(
    model: Model, positive: Sequence[Sequence[int]], negative: Sequence[Sequence[int]], progress: Progress | None = None
) -> tuple[Float32, Float32]:
    """z_0..z_T at the last token of each prompt of two sets, as token ids: (n, T + 1, d) and (m, T + 1, d)

    Raises:
        InputError: values that are not finite.
    """
    found = model.residuals([*positive, *negative], progress=progress)
    check_finite(found)
    return found[: len(positive)], found[len(positive) :]


def contrast_of(model: Model, positive: Float32, negative: Float32) -> Contrast:
    """The contrast of two sets of prompts from their `activations`.

    Raises:
        InputError: the activations do not tell the sets apart.
    """
    mean_positive, mean_negative = positive.mean(axis=0, dtype=np.float64), negative.mean(axis=0, dtype=np.float64)
    difference = np.where(_same_multiset(positive, negative), 0.0, mean_positive - mean_negative)
    if not difference[:-1].any():
        raise InputError("the activations of the positive and the negative prompts do not differ")
    return Contrast(
        mean_positive[:-1].astype(np.float32),
        mean_negative[:-1].astype(np.float32),
        difference[:-1].astype(np.float32),
        difference[-1].astype(np.float32),
        (len(positive), len(negative)),
        model.fingerprint,
        model.name,
        _spread(positive, negative, difference),
    )


def check_finite(found: Float32, what: str = "activations") -> None:
    """Refuse activations (n, T, ...) that are not finite, and say at which layer."""
    if not np.all(np.isfinite(found)):
        layer = int(np.argwhere(~np.isfinite(found))[:, 1].min())
        raise InputError(f"the {what} at layer {layer} are not finite: load the model with dtype float32")


def unit(vectors: np.ndarray) -> np.ndarray:
    """Each row of vectors (..., d) at length 1, or zero where it is zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)


def choose_layers(layers: Layers, contrast: Contrast) -> tuple[int, ...]:
    """The layers to control.

    Args:
        layers: "auto": where the separation is at least `SEPARATING` times that of the best layer. None is "auto" too,
            but for two single prompts, which leave the separation open: the last third, where steering costs least.

    Raises:
        InputError: no layers, none of the model's, or sets too small for "auto".
    """
    T = len(contrast.direction)
    if layers is None and contrast.spread is None:
        layers = range(2 * T // 3, T)
    if layers is None or (isinstance(layers, str) and layers == "auto"):
        return separating(contrast.separation[:-1])
    return check_layers(layers, T)


def separating(separation: Float32) -> tuple[int, ...]:
    """The places, of those with these separations, that tell the sets apart about as well as the best one does."""
    return tuple(int(k) for k in np.flatnonzero(separation >= SEPARATING * separation.max()))


def tokenise(model: Model, prompt: Prompt, *, any_length: bool = False) -> list[int]:
    """Token ids of a prompt, checked: not empty, in the vocabulary and, unless `any_length`, in the model's context."""
    tokens = model.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
    if not tokens:
        raise InputError("a prompt is empty: give it at least one token")
    if min(tokens) < 0 or max(tokens) >= model.vocab_size:
        raise InputError(f"token ids must be between 0 and {model.vocab_size - 1} for this model")
    if len(tokens) > model.context_length and not any_length:
        raise InputError(
            f"the prompt has {len(tokens)} tokens and the model's context {model.context_length}: shorten the prompt"
        )
    return tokens


def tokenise_sets(
    model: Model, positive: Sequence[Prompt], negative: Sequence[Prompt]
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of two sets of prompts, checked: each prompt as in `tokenise`, no set empty, the two not the same."""
    sets = _tokenise_set(model, positive, "positive"), _tokenise_set(model, negative, "negative")
    if sorted(sets[0]) == sorted(sets[1]):
        raise InputError("the positive and the negative prompts are the same: there is nothing to tell apart")
    return sets


_POSITIVE, _NEGATIVE = ".positive.txt", ".negative.txt"


def bundled_concepts() -> list[str]:
    """The names of the contrast sets that come with the library."""
    root = resources.files("mlx_lqr.concepts")
    return sorted(entry.name.removesuffix(_POSITIVE) for entry in root.iterdir() if entry.name.endswith(_POSITIVE))


def bundled_prompts(concept: str) -> tuple[list[str], list[str]]:
    """The positive and negative prompts of a bundled contrast set."""
    if concept not in bundled_concepts():
        raise InputError(f"no bundled concept {concept!r}: choose one of {', '.join(bundled_concepts())}")
    root = resources.files("mlx_lqr.concepts")
    positive, negative = (
        text_lines(root.joinpath(concept + ending).read_text("utf-8")) for ending in (_POSITIVE, _NEGATIVE)
    )
    return positive, negative


def _tokenise_set(model: Model, prompts: Sequence[Prompt], name: str) -> list[list[int]]:
    if isinstance(prompts, str):
        raise InputError(f"the {name} prompts must be a list of prompts, not one string")
    if not prompts:
        raise InputError(f"there are no {name} prompts: give at least one")
    return [tokenise(model, prompt) for prompt in prompts]


def _spread(positive: Float32, negative: Float32, difference: np.ndarray) -> Float32 | None:
    """The pooled standard deviation of the features v_k . z_k of two sets (n, T + 1, d) within them: (T + 1,)"""
    freedom = len(positive) + len(negative) - 2
    if freedom == 0:
        return None
    directions = unit(difference)
    squares = sum(
        ((feature - feature.mean(axis=0)) ** 2).sum(axis=0)
        for feature in (np.einsum("nkd,kd->nk", found, directions) for found in (positive, negative))
    )
    return np.sqrt(squares / freedom).astype(np.float32)


def _same_multiset(positive: Float32, negative: Float32) -> np.ndarray:
    """(T + 1, 1): whether a layer saw the very same activations, in the same proportions, in both sets.

    Their means then differ by rounding alone, and a direction made of rounding errors must not be steered along. This
    is the case at layer 0 (the embedding of the last token) wherever both sets end in the same tokens.
    """
    verdict = np.zeros((positive.shape[1], 1), bool)
    for k in range(positive.shape[1]):
        shares = []
        for residuals in (positive[:, k], negative[:, k]):
            rows, counts = np.unique(residuals, axis=0, return_counts=True)
            shares.append((rows, counts / len(residuals)))
        (rows, share), (other_rows, other_share) = shares
        verdict[k] = (
            len(rows) == len(other_rows) and np.array_equal(rows, other_rows) and np.allclose(share, other_share)
        )
    return verdict
