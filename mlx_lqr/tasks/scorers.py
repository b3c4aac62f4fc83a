"""Scorers from outside the library: any callable of texts, and the model inside the package alt-profanity-check.

A scorer is named `module:function`; it takes a list of texts and returns as many numbers between 0 and 1.

The default toxicity scorer is the linear classifier of alt-profanity-check (`pip install 'mlx-lqr[toxicity]'`). It is
small, runs anywhere and knows mostly words: take its numbers as a share of profanity. That package stores its model as
joblib files, which are pickles, and UNPICKLES THEM WHEN IT IS IMPORTED. mlx-lqr itself never unpickles anything;
whoever installs this extra trusts that package's own files as one trusts its code. It is imported when it is first
asked for a score, and not at all where another scorer is given.
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
    """The scorer `module:function`, its answers checked whenever it is called.

    The module may stand in the current folder.

    Raises:
        InputError: not of this form, or not there; later, an answer that is not one number between 0 and 1 for each
            text.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise InputError(f"a scorer is written module:function, not {name!r}")
    sys.path.append(os.getcwd())  # at the end: a file there takes no installed package's place
    try:
        found: Any = getattr(importlib.import_module(module), function)
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
        sys.path.remove(os.getcwd())
    return partial(_checked, name, found)


def _checked(name: str, scorer: Any, texts: Sequence[str]) -> list[float]:
    try:
        scores = np.asarray(scorer(list(texts)), np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"the scorer {name} failed: {error}") from error
    if scores.shape != (len(texts),) or not np.all((scores >= 0) & (scores <= 1)):
        raise InputError(f"the scorer {name} must return one number between 0 and 1 for each text")
    return [float(score) for score in scores]


def mentions(judge: Steered, concept: str, texts: Sequence[str]) -> list[float]:
    """How sure a local model is that texts have to do with a concept: p(Yes) over p(Yes) + p(No) for the next word."""
    asked = f'Does this text have to do with "{concept}"? Answer Yes or No.'
    questions = [(f'Text: "{text.strip()}"\nQuestion: {asked}\nAnswer:', ("Yes", "No")) for text in texts]
    return [float(1 / (1 + np.exp(np.clip(no - yes, -500, 500)))) for yes, no in judge.scores(questions)]
