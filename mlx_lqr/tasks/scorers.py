"""Scorers from outside the library: any callable of texts, and the model inside the package alt-profanity-check.

A scorer is named `module:function`. It takes a list of texts and returns one number between 0 and 1 for each.

The default toxicity scorer is the linear classifier of alt-profanity-check (`pip install 'mlx-lqr[toxicity]'`). It is
small, runs anywhere and mostly knows words, so read its numbers as a share of profanity. That package stores its model
as joblib files, which are pickles, and UNPICKLES THEM WHEN IT IS IMPORTED. mlx-lqr itself never unpickles anything; if
you install this extra, you trust that package's files as you trust its code. It is imported when the first score is
needed, and not at all if another scorer is given.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from mlx_lqr.errors import InputError
from mlx_lqr.tasks.steering import Steered

Scorer = Callable[[Sequence[str]], Sequence[float]]
DEFAULT = "profanity_check:predict_prob"


def load_scorer(name: str = DEFAULT) -> Scorer:
    """The scorer `module:function`, with its scores checked at every call.

    The module may be in the current folder, unless it is the default one's.

    Raises:
        InputError: the name is not of this form or cannot be imported; at a call, the scorer does not return one number
            between 0 and 1 for each text.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise InputError(f"a scorer is written module:function, not {name!r}")
    here = [] if name == DEFAULT else [os.getcwd()]
    sys.path.extend(here)  # at the end, so that a file there hides no installed package
    try:
        scorer: Any = getattr(importlib.import_module(module), function)
    except ImportError as error:
        if name == DEFAULT:
            raise InputError(
                "the default toxicity scorer needs alt-profanity-check: pip install 'mlx-lqr[toxicity]', "
                "or give your own with --scorer module:function"
            ) from None
        raise InputError(f"the scorer {name} cannot be imported: {error}") from None
    except AttributeError:
        raise InputError(f"the scorer's module {module} has no {function}") from None
    finally:
        for folder in here:
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]
    return partial(_checked, name, scorer)


def _checked(name: str, scorer: Any, texts: Sequence[str]) -> list[float]:
    try:
        scores = np.asarray(scorer(list(texts)), np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"the scorer {name} failed: {error}") from error
    if scores.shape != (len(texts),) or not np.all((scores >= 0) & (scores <= 1)):
        raise InputError(f"the scorer {name} must return one number between 0 and 1 for each text")
    return [float(score) for score in scores]


def mentions(judge: Steered, concept: str, texts: Sequence[str]) -> list[float]:
    """How sure a local model is that each text is about a concept: p(Yes) / (p(Yes) + p(No)) for the next word."""
    asked = f'Does this text have to do with "{concept}"? Answer Yes or No.'
    questions = [(f'Text: "{text.strip()}"\nQuestion: {asked}\nAnswer:', ("Yes", "No")) for text in texts]
    return [float(1 / (1 + np.exp(np.clip(no - yes, -500, 500)))) for yes, no in judge.scores(questions)]
