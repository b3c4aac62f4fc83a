"""mlx-lm's evaluator, by which lm-eval runs its tasks on a model of mlx-lm. Importing this needs lm-eval."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from mlx_lm.evaluate import DEFAULT_MAX_TOKENS, MLXLM

from mlx_lqr.backends.borrowed import check_borrowed
from mlx_lqr.backends.checkpoint.adapter import Adapter
from mlx_lqr.backends.checkpoint.config import ModelConfig, model_config
from mlx_lqr.backends.checkpoint.model_folder import check_dtype, read_config
from mlx_lqr.backends.checkpoint.weight_files import weights_of
from mlx_lqr.backends.mlx.adapter import merge
from mlx_lqr.backends.mlx.family import complete
from mlx_lqr.backends.mlx.library import is_measured
from mlx_lqr.backends.mlx.load import arguments_for, as_mlx_lm_reads, cast, flattened
from mlx_lqr.backends.mlx.measured_model import MeasuredModel, prepare
from mlx_lqr.backends.mlx.model import MLXModel
from mlx_lqr.backends.text.text_tokenizer import at_border
from mlx_lqr.errors import InputError, first_line

_NEVER = "\ud800"
"""Half of a character, which is in no text, for mlx-lm must have something to stop at"""
_Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a context and of what follows it; they add up to the whole's, as mlx-lm adds up texts."""
_OLD = tuple(int(number) for number in metadata.version("mlx-lm").split(".")[:2]) < (0, 32)
"""Whether it is the last mlx-lm for Python 3.10, whose evaluator has mistakes that newer ones have not"""


class Evaluator(MLXLM):
    """mlx-lm's evaluator of a model that it has loaded, and that can be steered."""

    _max_tokens: int | None

    def __init__(
        self, folder: Path, name: str, dtype: str | None = None, adapter: Adapter | None = None, **options: Any
    ) -> None:
        """Load the model as mlx-lm does, in the dtype that it has elsewhere in this library.

        Args:
            folder, name, dtype, adapter: see `mlx.load`.
            **options: `MLXLM`'s own.

        Raises:
            InputError: a folder that cannot be evaluated, or an architecture that cannot be steered.
        """
        check_borrowed("mlx evaluator")
        check_dtype(dtype)
        config = read_config(folder)
        self._load(folder, config, options)
        self.model: MLXModel
        if is_measured(str(config["model_type"])):
            adapter = prepare(self._model, dtype, adapter)
            self.model = MeasuredModel(self._model, config, name, adapter=adapter)
        else:
            self.model = self._listed(model_config(config), name, dtype, adapter)
        self.options = {**options, "use_chat_template": bool(self.use_chat_template), "dtype": dtype}
        """What its answers depend on"""

    def _load(self, folder: Path, config: dict[str, Any], options: dict[str, Any]) -> None:
        """Have mlx-lm load the model."""
        files = weights_of(folder)
        measured = is_measured(str(config["model_type"]))
        given = flattened(config) if measured else config | arguments_for(folder, model_config(config), files)
        if _OLD:
            options["batch_size"] = 1  # in a batch, it adds a score of the padding after the shorter texts
        try:
            with as_mlx_lm_reads(folder, given, files) as view:
                super().__init__(str(view), **options)
        except (OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"mlx-lm cannot load {folder}: {first_line(error)}") from error

    def _listed(self, meaning: ModelConfig, name: str, dtype: str | None, adapter: Adapter | None) -> MLXModel:
        complete(self._model, meaning)
        cast(self._model, dtype)
        if adapter is not None:
            merge(self._model, adapter)
        mx.eval(self._model.parameters())
        model = MLXModel(self._model, name)
        model.context_length, model.rolls = meaning.context_length, meaning.rolls
        model.adapter = adapter
        return model

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the model's chat template; what a template without a system role says goes to the user.

        Raises:
            InputError: a template that refuses the conversation.
        """
        try:
            return super().apply_chat_template(chat_history, add_generation_prompt)
        except Exception as error:  # whatever a template brings about
            folded = _without_system(chat_history)
            if folded is None:
                raise InputError(f"the model's chat template refuses the conversation: {first_line(error)}") from error
        warnings.warn("the chat template has no system role: its text begins the user's message instead", stacklevel=2)
        return self.apply_chat_template(folded, add_generation_prompt)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """log p of each continuation after its context, and whether it is what greedy decoding gives.

        Context and continuation are tokenised as one (see `at_border`). An empty context is the model's first token;
        one that is too long for the model loses its beginning.

        Raises:
            InputError: a continuation that does not fit the model's context, or activations that overflow.
        """
        by_context: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_context.setdefault(request.args[0], []).append(number)
        pairs: dict[int, _Pair] = {}
        for context, numbers in by_context.items():
            texts = [requests[number].args[1] for number in numbers]
            before, each = at_border(self._ids, context, texts, self._first_token)
            longest = max(map(len, each))
            room = self.model.context_length + 1 - longest  # the last token is predicted, not read
            if room < 1:
                raise InputError(
                    f"a continuation has {longest} tokens and the model's context {self.model.context_length}: leave "
                    "the task out"
                )
            pairs |= {number: (tuple(before[-room:]), tuple(ids)) for number, ids in zip(numbers, each, strict=True)}
        scored = self._scored([pairs[number] for number in range(len(requests))])
        _check_finite([score for score, _ in scored])
        return scored

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """log p of each text after its first token. One that is too long for the model is read in parts.

        Raises:
            InputError: activations that overflow.
        """
        texts = [self._ids(request.args[0]) for request in requests]
        scores = [0.0] * len(texts)
        usual = [number for number, ids in enumerate(texts) if 1 < len(ids) <= self.model.context_length]
        in_one = super().loglikelihood_rolling([requests[number] for number in usual]) if usual else []
        for number, score in zip(usual, in_one, strict=True):
            scores[number] = score
        for number, ids in enumerate(texts):
            if len(ids) > self.model.context_length:
                windows = get_rolling_token_windows(ids[1:], ids[0], self.model.context_length, context_len=1)
                parts = [make_disjoint_window(window) for window in windows]
                scores[number] = sum(score for score, _ in self._scored([(tuple(a), tuple(b)) for a, b in parts]))
        _check_finite(scores)
        return scores

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What the model writes after each context; an empty one is the first token.

        Raises:
            InputError: a context that the model's own does not hold, which mlx-lm would run all the same.
        """
        prepared = []
        for context, options in (request.args for request in requests):
            until = options.get("until") or [_NEVER]
            own = {**options, "until": [until] if isinstance(until, str) else until}
            if _OLD:  # it looks for lm-eval's cap under another name, and misses it
                own.setdefault("max_gen_tokens", own.get("max_gen_toks", DEFAULT_MAX_TOKENS))
            length = len(self._ids(context))
            if length > self.model.context_length:
                raise InputError(
                    f"a context has {length} tokens and the model's holds {self.model.context_length}: take fewer "
                    "solved examples (--num-shots)"
                )
            if not length:
                context = self.tokenizer.bos_token or self.tokenizer.eos_token
            if context is None:
                raise InputError("a context is empty, and the model has no token to begin with: leave the task out")
            prepared.append(SimpleNamespace(args=(context, own)))
        return super().generate_until(prepared)

    @property
    def _first_token(self) -> int | None:
        beginning = self.tokenizer.bos_token_id
        return beginning if beginning is not None else self.tokenizer.eos_token_id

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenize([text])[0])

    def _tokenize(self, texts: Sequence[str | tuple[int, ...]]) -> list[tuple[int, ...]]:
        """mlx-lm's own, which leaves alone what is tokenised already."""
        return [text if isinstance(text, tuple) else super(Evaluator, self)._tokenize([text])[0] for text in texts]

    def _scored(self, pairs: Sequence[_Pair]) -> list[tuple[float, bool]]:
        """mlx-lm's scores of continuations, the tokens of both given; nothing has the score 0."""
        some = [number for number, (_, after) in enumerate(pairs) if after]
        held, self._max_tokens = self._max_tokens, self.model.context_length  # it is for texts that are written
        try:
            scored = super().loglikelihood([SimpleNamespace(args=pairs[number]) for number in some]) if some else []
        finally:
            self._max_tokens = held
        scores = dict(zip(some, scored, strict=True))
        return [scores.get(number, (0.0, True)) for number in range(len(pairs))]


def _without_system(history: list[dict[str, str]]) -> list[dict[str, str]] | None:
    """The conversation with its system's text at the beginning of the user's; None where there is no such text."""
    if len(history) < 2 or [message["role"] for message in history[:2]] != ["system", "user"]:
        return None
    system, user = history[0]["content"].strip(), history[1]
    return [{**user, "content": f"{system}\n\n{user['content']}"}, *history[2:]]


def _check_finite(scores: Sequence[float]) -> None:
    if not all(math.isfinite(score) for score in scores):
        raise InputError("the activations overflow at this strength: lower the strength, or load with dtype float32")
