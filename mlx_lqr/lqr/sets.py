"""What is wrong with two sets of prompts, before and after a direction is computed from them.

A direction is the mean of one set less the mean of the other, read at each prompt's last token. Whatever else the sets
differ in, such as their length or their last full stop, becomes part of it and is steered along with the concept.
Nothing here prints or refuses: each finding is one sentence that names the numbers and says what to do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mlx_lqr.backends.protocol import Runner
from mlx_lqr.lqr.contrast import Contrast
from mlx_lqr.lqr.prompts import Prompt, tokenise_sets

FEW_PROMPTS = 8
"""Below it a direction is more that of the very sentences than that of what they have in common."""
LONGER = 1.25
"""How many times as long one set's prompts may be, in mean tokens."""
SHARE = 0.25
"""By how much the shares of prompts of one form may differ: its ending, its first letter, the chat template."""
LAST_TOKEN = 0.5
"""The same of the most frequent last token, which may well be the concept's own in a few prompts."""
REPEATED = 0.1
"""Which share of a set may be other prompts of it over again."""
LEAST_WORDS = 5
"""Shorter prompts are not compared word by word: "I love dogs" and "I love cats" are two prompts."""
SEPARATES = 0.8
"""Cohen's d of held-out prompts from which on a direction means something. Sets that differ by chance alone stay below
it: 70 prompts of each kind reach 0.6 on SmolLM2. The bundled concepts have 1.6 to 6 in its last third of layers."""


def review_prompts(model: Runner, positive: Sequence[Prompt], negative: Sequence[Prompt]) -> list[str]:
    """What the two sets differ in besides the concept, and other reasons why a direction from them may mean little.

    Reported are sets of fewer than 8 prompts, a mean length that differs by more than a quarter, endings, last tokens,
    first letters and chat templates that one set has and the other has not, and prompts that repeat one another.

    Args:
        model: what `load` returned; its tokenizer is all that is used.
        positive, negative: prompts with and without the concept; strings or token ids.

    Returns:
        One sentence for each finding, with the numbers and what to do; none for sets that are alike.

    Raises:
        InputError: a set is empty, both sets are the same, or a prompt cannot be used.
    """
    tokens = tokenise_sets(model, positive, negative)
    texts = _texts(model, positive), _texts(model, negative)
    found = [_few(tokens), _length(tokens), _ending(texts), _last_token(model, tokens, texts)]
    found += [_first_letter(texts), _template(model, texts), _repeated(texts), _in_both(texts)]
    return [one for one in found if one is not None]


def review_separation(contrast: Contrast, layers: Iterable[int]) -> str | None:
    """A sentence where the direction tells held-out prompts apart at none of these layers, at input or output.

    None where it does, and for sets of a single prompt, from which nothing can be held out.
    """
    chosen = list(layers)
    if contrast.held_out is None or not chosen:
        return None
    best = float(np.max([contrast.held_out[[k, k + 1]] for k in chosen]))
    if best >= SEPARATES:
        return None
    return (
        f"the direction hardly tells apart prompts that it was not computed from: {best:.1f} standard deviations at "
        f"best at the layers that are steered, and {SEPARATES:g} is little; give more prompts, or sets that differ "
        "more clearly in the concept"
    )


Sides = tuple[list[str], list[str]]


def _texts(model: Runner, prompts: Sequence[Prompt]) -> list[str]:
    return [
        prompt if isinstance(prompt, str) else model.tokenizer.decode(list(prompt), skip_special_tokens=False)
        for prompt in prompts
    ]


def _few(tokens: tuple[list[list[int]], list[list[int]]]) -> str | None:
    counts = [len(side) for side in tokens]
    if min(counts) >= FEW_PROMPTS:
        return None
    return (
        f"{counts[0]} positive and {counts[1]} negative prompts are few: the direction will be more about these "
        "sentences than about the concept; give 20 or more of each"
    )


def _length(tokens: tuple[list[list[int]], list[list[int]]]) -> str | None:
    means = [float(np.mean([len(prompt) for prompt in side])) for side in tokens]
    if max(means) <= LONGER * min(means):
        return None
    longer, shorter = ("positive", "negative") if means[0] > means[1] else ("negative", "positive")
    return (
        f"the {longer} prompts are longer, {max(means):.0f} tokens on average against {min(means):.0f}, so the "
        f"direction is one of length too; shorten them or write longer {shorter} ones"
    )


def _ending(texts: Sides) -> str | None:
    shares = [Counter(_last_sign(text) for text in side) for side in texts]
    sign, (positive, negative) = _widest(shares, texts)
    if abs(positive - negative) <= SHARE:
        return None
    ending = ("are questions" if sign == "?" else f"end in {sign}") if sign else "end without . ! or ?"
    return (
        f"{positive:.0%} of the positive prompts {ending} and {negative:.0%} of the negative, and it is there that the "
        "direction is read; give both sets the same endings"
    )


def _last_token(model: Runner, tokens: tuple[list[list[int]], list[list[int]]], texts: Sides) -> str | None:
    if _ending(texts) is not None:  # which says it
        return None
    shares = [Counter(prompt[-1] for prompt in side) for side in tokens]
    token, (positive, negative) = _widest(shares, tokens)
    if abs(positive - negative) <= LAST_TOKEN:
        return None
    piece = model.tokenizer.decode([token], skip_special_tokens=False)
    return (
        f"{positive:.0%} of the positive prompts end in the token {piece!r} and {negative:.0%} of the negative, so the "
        "direction is mostly that token's; let the prompts of both sets go on to the same last token, such as a full "
        "stop"
    )


def _first_letter(texts: Sides) -> str | None:
    positive, negative = (_share(text.lstrip()[:1].islower() for text in side) for side in texts)
    if abs(positive - negative) <= SHARE:
        return None
    return (
        f"{positive:.0%} of the positive prompts begin with a small letter and {negative:.0%} of the negative; begin "
        "both in the same way"
    )


def _template(model: Runner, texts: Sides) -> str | None:
    if not model.tokenizer.has_chat_template:
        return None
    mark = _user_mark(model)
    if mark is None:
        return None
    positive, negative = (_share(mark in text for text in side) for side in texts)
    if abs(positive - negative) <= SHARE:
        return None
    return (
        f"{positive:.0%} of the positive prompts are in the chat template ({mark}) and {negative:.0%} of the negative; "
        "put all of them into it or none"
    )


def _repeated(texts: Sides) -> str | None:
    counts = [_repeats(side) for side in texts]
    if not any(count > REPEATED * len(side) for count, side in zip(counts, texts, strict=True)):
        return None
    return (
        f"{counts[0]} of the {len(texts[0])} positive and {counts[1]} of the {len(texts[1])} negative prompts repeat "
        "another of their set but for one word at most, and count for little; vary them"
    )


def _in_both(texts: Sides) -> str | None:
    shared = {_words(text) for text in texts[0]} & {_words(text) for text in texts[1]}
    if not shared:
        return None
    return f"prompts that stand in both sets add nothing to the direction; leave them out ({len(shared)} do)"


def _widest(shares: Sequence[Counter[Any]], sides: Sequence[Sequence[object]]) -> tuple[Any, tuple[float, float]]:
    """The entry whose shares of the two sides differ most, the rarest of several, and these shares."""

    def of_both(entry: object) -> tuple[float, float]:
        positive, negative = (count[entry] / len(side) for count, side in zip(shares, sides, strict=True))
        return positive, negative

    entries = sorted({*shares[0], *shares[1]}, key=str)
    widest = max(entries, key=lambda entry: (round(abs(np.subtract(*of_both(entry))), 9), -sum(of_both(entry))))
    return widest, of_both(widest)


def _last_sign(text: str) -> str:
    """., ! or ?, inside closing quotation marks and brackets too; "" for any other ending."""
    last = text.rstrip().rstrip("\"')]}\u201d\u2019\u00bb")[-1:]
    return last if last in (".", "!", "?") else ""


def _share(of: Iterable[bool]) -> float:
    return float(np.mean(list(of)))


def _user_mark(model: Runner) -> str | None:
    """What stands right before a user's words in the chat template, up to the blank before it."""
    said = "mlx-lqr"
    before = model.tokenizer.chat_text([{"role": "user", "content": said}]).partition(said)[0].split()
    return before[-1] if before else None


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


def _repeats(texts: Sequence[str]) -> int:
    """How many of the texts have all their words in common with an earlier one, or all but the one at some place."""
    seen: set[tuple[str, ...]] = set()
    count = 0
    for text in texts:
        words = _words(text)
        keys = [words] if len(words) < LEAST_WORDS else [(*words[:i], "", *words[i + 1 :]) for i in range(len(words))]
        count += any(key in seen for key in keys)
        seen.update(keys)
    return count
