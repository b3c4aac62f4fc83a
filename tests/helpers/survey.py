"""What can be done with a model of an architecture, tried from its folder on: the way that a user goes.

`tried` loads, fits with both costs, generates, decodes a batch and chats. What comes out is compared where there is
another way to it: a batch with its prompts one by one, a chat with a conversation decoded anew.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

import mlx_lqr  # first, so that MLX gets its BLAS
from helpers.decoding import answered_anew
from mlx_lqr import InputError
from mlx_lqr.backends.protocol import Model
from mlx_lqr.errors import first_line
from mlx_lqr.runtime import Chat

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm import utils as library

POSITIVE, NEGATIVE = [[1, 2, 3, 9, 7], [4, 5, 6, 8, 7]], [[6, 7, 3, 2, 8], [8, 3, 1, 1, 8]]
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 6, 7]]
QUESTIONS = ("w1 w2 w3", "w4 w5")
TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
WORDS = 64
TOKENS, STRENGTH = 6, 2.0
STEPS = ("load", "fit state", "fit feature", "generate", "batch", "chat")


@dataclass
class Trial:
    """How far one model came."""

    steps: dict[str, str] = field(default_factory=dict)
    """Step -> "yes", or why not."""
    model: Model | None = None
    controller: mlx_lqr.Controller | None = None

    @property
    def works(self) -> bool:
        return all(self.steps.get(step) == "yes" for step in STEPS)

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` returns; None where it fails."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                result = work()
        except InputError as error:
            self.steps[name] = f"refused: {error}"
        except (Exception, SystemExit) as error:
            line = first_line(error) if isinstance(error, Exception) else str(error)
            self.steps[name] = f"CRASH: {type(error).__name__}: {line}"
        else:
            self.steps[name] = "yes"
            return result
        return None


def tried(folder: Path) -> Trial:
    """Every step of the way with the model in a folder."""
    trial = Trial()
    model = trial.model = trial.step("load", lambda: mlx_lqr.load(folder, backend="mlx"))
    if model is None:
        return trial
    for cost in ("state", "feature"):
        trial.controller = trial.step(
            f"fit {cost}", lambda cost=cost: mlx_lqr.fit(model, POSITIVE, NEGATIVE, cost=cost, layers="all", q=1.0)
        )
    controller = trial.controller
    if controller is not None:
        alone = trial.step("generate", lambda: [steered(model, prompt, controller) for prompt in PROMPTS])
        trial.step("batch", lambda: _batch_agrees(model, controller, alone))
        trial.step("chat", lambda: _chat_agrees(model, controller))
    return trial


def steered(model: Model, prompt: list[int], controller: mlx_lqr.Controller) -> list[int | None]:
    """The tokens after a prompt."""
    pieces = mlx_lqr.stream(model, prompt, controller=controller, strength=STRENGTH, max_tokens=TOKENS, temperature=0)
    return [piece.token for piece in pieces]


def _batch_agrees(model: Model, controller: mlx_lqr.Controller, alone: list[list[int | None]]) -> None:
    answers: list[list[int | None]] = [[] for _ in PROMPTS]
    options = {"controller": controller, "strength": STRENGTH, "max_tokens": TOKENS, "temperature": 0}
    for i, piece in mlx_lqr.batch_stream(model, PROMPTS, **options):
        answers[i].append(piece.token)
    if answers != alone:
        raise AssertionError("other tokens than each prompt alone")


def _chat_agrees(model: Model, controller: mlx_lqr.Controller) -> None:
    chat = Chat(model, options={"max_tokens": TOKENS, "temperature": 0})
    chat.add(controller, STRENGTH)
    for question in QUESTIONS:
        answer = [piece.token for piece in chat.answer(question)]
        if answer != answered_anew(chat):
            raise AssertionError("other tokens than decoded anew")


def written(config: dict[str, Any], folder: Path, *, seed: int = 0, packed: dict[str, Any] | None = None) -> Path:
    """A folder with a random model of this config and a tokenizer of words.

    Args:
        packed: `group_size`, `bits` and `mode` to quantise it with, as mlx_lm.convert does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    module = random_module(config, seed)
    if packed is not None:
        module, config = library.quantize_model(module, config, **packed, quant_predicate=_chosen_by(module))
    weights = {name: weight for name, weight in tree_flatten(module.parameters()) if isinstance(weight, mx.array)}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _chosen_by(module: nn.Module) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
    """How mlx-lm's model wants its parts packed, but for those that are too narrow for the groups that it wants."""
    wanted = getattr(module, "quant_predicate", None) or (lambda path, part: True)

    def predicate(path: str, part: nn.Module) -> bool | dict[str, Any]:
        how: bool | dict[str, Any] = wanted(path, part)
        too_narrow = isinstance(how, dict) and part.weight.shape[-1] % how["group_size"] > 0
        return False if too_narrow else how

    return predicate


def random_module(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """mlx-lm's model of a config; what begins as zeros or ones is random too, so that every part matters."""
    mx.random.seed(seed)
    family = config["model_type"]
    names = vars(library).get("MODEL_ARCHITECTURE_REMAPPING", {})
    named = [names[family, kind] for kind in config.get("architectures", ()) if (family, kind) in names]
    family = next(iter(named), library.MODEL_REMAPPING.get(family, family))
    architecture: Any = importlib.import_module(f"mlx_lm.models.{family}")
    module: nn.Module = architecture.Model(architecture.ModelArgs.from_dict(config))

    def drawn(_: str, weight: Any) -> Any:
        if not isinstance(weight, mx.array) or not mx.issubdtype(weight.dtype, mx.floating):
            return weight
        if weight.ndim == 1:
            return weight + 0.2 * mx.random.normal(weight.shape)
        return weight if mx.any(weight).item() else mx.random.normal(weight.shape) * weight.shape[-1] ** -0.5

    module.update(tree_map_with_path(drawn, module.parameters()))
    module.eval()
    mx.eval(module.parameters())
    return module
