"""mlx-lm's evaluator, by which lm-eval runs its tasks on a model of mlx-lm. Importing this needs lm-eval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.evaluate import DEFAULT_MAX_TOKENS, MLXLM

from mlx_lqr.backends.borrowed import check_borrowed
from mlx_lqr.backends.mlx import MLXModel
from mlx_lqr.backends.mlx_lm_models import model_classes
from mlx_lqr.backends.mlx_load import cast, flattened
from mlx_lqr.backends.model_folder import check_dtype, read_config
from mlx_lqr.errors import InputError

_OLD = tuple(int(number) for number in metadata.version("mlx-lm").split(".")[:2]) < (0, 32)
"""Whether it is the last mlx-lm for Python 3.10, whose evaluator has mistakes that newer ones have not"""


class Evaluator(MLXLM):
    """mlx-lm's evaluator of a model that it has loaded, and that can be steered."""

    def __init__(self, folder: Path, name: str, dtype: str | None = None, **options: Any) -> None:
        """Load the model as mlx-lm does, in the dtype that it has elsewhere in this library.

        Args:
            folder, name, dtype: see `mlx.load`.
            **options: `MLXLM`'s own.

        Raises:
            InputError: a folder that cannot be evaluated, or an architecture that cannot be steered.
        """
        check_borrowed("mlx evaluator")
        check_dtype(dtype)
        config = read_config(folder)
        model_classes(str(config["model_type"]))
        _check_rope(folder, config)
        if _OLD:
            options["batch_size"] = 1  # in a batch, it adds a score of the padding after the shorter texts
        try:
            super().__init__(str(folder), **options)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"mlx-lm cannot load {folder}: {str(error).partition(chr(10))[0]}") from error
        cast(self._model, dtype)
        mx.eval(self._model.parameters())
        self.model = MLXModel(self._model, name)
        self.options = {**options, "use_chat_template": bool(self.use_chat_template), "dtype": dtype}
        """What its answers depend on"""

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests)
        _check_finite([score for score, _ in found])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        found: list[float] = super().loglikelihood_rolling(requests)
        _check_finite(found)
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        if _OLD:
            for request in requests:  # it looks for lm-eval's cap under another name, and misses it
                options = request.args[1]
                options.setdefault("max_gen_tokens", options.get("max_gen_toks", DEFAULT_MAX_TOKENS))
        return super().generate_until(requests)


def _check_rope(folder: Path, config: dict[str, Any]) -> None:
    """Refuse what mlx-lm's loader would silently read with its default RoPE base (see `flattened`)."""
    given = {key: value for key, value in config.items() if key != "rope_parameters"}
    if {key: value for key, value in flattened(config).items() if key != "rope_parameters"} != given:
        raise InputError(f"mlx-lm does not read how {folder} words its RoPE: convert it first (mlx-lqr convert)")


def _check_finite(scores: Sequence[float]) -> None:
    """Minus infinity is what mlx-lm gives for a continuation that leaves no room for its context."""
    if any(math.isnan(score) for score in scores):
        raise InputError("the activations overflow at this strength: lower the strength, or load with dtype float32")
