"""What a row of the table of architectures is made of.

Names of tensors come from the maps of the `gguf` package and shapes from mlx-lm's model class, so a further
architecture is a row and, where it has settings or a layout of its own, a function or two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
from numpy.typing import NDArray

from mlx_lqr.convert.gguf_file import GGUFFile
from mlx_lqr.errors import InputError
from mlx_lqr.files.json_text import LARGEST

Config = dict[str, Any]
Array = NDArray[np.float32]
SLIDING, FULL = "sliding_attention", "full_attention"
SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN = 1, 2, 3  # llama.cpp's numbers for what a router does with its scores


class Stated:
    """The metadata of a file below the name of its architecture.

    Raises:
        InputError: it states a number of blocks that the file cannot have.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.arch = file.value("general.architecture", str)
        self.blocks = file.value(f"{self.arch}.block_count", int)
        self.layers = self.blocks - file.value(f"{self.arch}.nextn_predict_layers", int, 0)
        """Without the blocks after the last that predict further tokens, which nothing here runs."""
        if not 1 <= self.layers <= self.blocks <= len(file.tensors):
            raise InputError(
                f"{file.path} states {self.blocks} blocks but holds {len(file.tensors)} tensors: download it again"
            )

    def get(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.arch}.{key}")

    def whole(self, key: str, default: int | None = None) -> int:
        """An integer; where it is stated for each layer, the largest."""
        value = self.get(key)
        if isinstance(value, list):
            return max(self.each(key))
        return self.file.value(f"{self.arch}.{key}", int, default)

    def size(self, key: str) -> int:
        """An integer that no model has without at least one."""
        size = self.whole(key)
        if not 1 <= size <= LARGEST:
            raise InputError(f"{self.file.path} states {self.arch}.{key} as {size}: download it again")
        return size

    def real(self, key: str, default: float | None = None) -> float:
        return self.file.value(f"{self.arch}.{key}", float, default)

    def flag(self, key: str, default: bool | None = None) -> bool:
        return self.file.value(f"{self.arch}.{key}", bool, default)

    def each(self, key: str) -> list[Any]:
        """A number for each layer, whether it is stated once or for each.

        Raises:
            InputError: there are fewer or more, or something else.
        """
        value = self.get(key)
        if value is None:
            value = self.file.metadata.get(key)  # a few keys are not below the architecture
        values = value if isinstance(value, list) else [value] * self.blocks
        if len(values) != self.blocks or not all(isinstance(item, (int, float)) for item in values):
            raise InputError(
                f"{self.file.path} does not state {self.arch}.{key} for each of its {self.blocks} blocks: "
                "convert the original model to GGUF again"
            )
        return values[: self.layers]

    def holds(self, part: str) -> bool:
        """Whether a tensor has this in its name."""
        return any(part in name for name in self.file.tensors)

    def refuse(self, what: str) -> InputError:
        return InputError(f"{self.file.path} {what}: use another model")


def layer_types(stated: Stated, period: int | None = None) -> list[str]:
    """Which layers slide: those flagged in the metadata, or all but every `period`-th."""
    pattern = stated.get("attention.sliding_window_pattern")
    if pattern is None:
        pattern = period
    if pattern is None:
        raise InputError(
            f"{stated.file.path} does not state {stated.arch}.attention.sliding_window_pattern: "
            "convert the original model to GGUF again"
        )
    if isinstance(pattern, list):
        slides = [bool(item) for item in stated.each("attention.sliding_window_pattern")]
    else:
        pattern = pattern if pattern == period else stated.whole("attention.sliding_window_pattern")
        slides = [pattern == 0 or (index + 1) % pattern != 0 for index in range(stated.layers)]
    return [SLIDING if item else FULL for item in slides]


def experts(stated: Stated) -> tuple[int, int]:
    """How many experts there are, and how many a token uses."""
    count, used = stated.whole("expert_count"), stated.whole("expert_used_count")
    if not 1 <= used <= count:
        raise InputError(f"{stated.file.path} states that a token uses {used} of {count} experts: download it again")
    return count, used


def routed_by(stated: Stated, *known: int, absent: int | None = None) -> int:
    """What the router does with its scores, one of those that the class in MLX knows.

    Args:
        absent: what it is where the metadata does not say.
    """
    value = stated.whole("expert_gating_func", absent)
    if value not in known:
        raise stated.refuse(f"is a model with {stated.arch}.expert_gating_func {value}, which cannot be converted")
    return value


def groups(stated: Stated) -> Config:
    return {"n_group": stated.whole("expert_group_count", 1), "topk_group": stated.whole("expert_group_used_count", 1)}


Settings = Callable[[Stated, Config], Config]
Make = Callable[[list[Array], Config], Array]


@dataclass(frozen=True)
class Stored:
    """How llama.cpp stores the weights of MLX whose name has an end that `name`, a regular expression, matches.

    `tensors` are the names below that of the block, if not that of the maps; `metadata` is a key with a value for each
    block instead. `make` turns what is stored into MLX's weight.
    """

    name: str
    make: Make
    tensors: tuple[str, ...] = ()
    metadata: str | None = None


@dataclass(frozen=True)
class Architecture:
    """What an architecture of llama.cpp is in MLX.

    `settings` completes the config of a file. `mixture`: whether it has experts (None: that is not what tells two rows
    of a name apart); `only` tells further ones apart, and the first that holds is taken. `nested`: the model type of
    the text model, where the config has that inside.

    How weights are stored: `renames` has MLX's names where the maps have others, `stored` other layouts, `unused`
    tensors that the class has no use for. `neighbours_turn`: RoPE turns neighbouring rows of a head together, so the
    rows of queries and keys are stored in another order. `whole_norms`: norms are stored as what is multiplied by, and
    MLX adds 1 to its own.

    What the config is not held to: `partial_rope`: RoPE may turn a part of each head alone. `own_heads`, `own_rope`:
    settings states all about heads, or the scaling of RoPE. `by_layer`: sizes may differ by layer. `understands`: keys
    of the metadata that most classes cannot compute.
    """

    name: str
    model_type: str
    transformers_class: str
    settings: Settings
    mixture: bool | None = False
    only: Callable[[Stated], bool] | None = None
    renames: tuple[tuple[str, str], ...] = ()
    stored: tuple[Stored, ...] = ()
    neighbours_turn: bool = False
    whole_norms: bool = False
    partial_rope: bool = False
    own_heads: bool = False
    own_rope: bool = False
    by_layer: bool = False
    understands: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    nested: str | None = None

    @property
    def tensors(self) -> MODEL_ARCH:
        """The gguf package's name of it.

        Raises:
            InputError: the installed one is older than the architecture.
        """
        for tensors, name in MODEL_ARCH_NAMES.items():
            if name == self.name:
                return MODEL_ARCH(tensors)
        raise InputError(f"the gguf package does not know the architecture {self.name!r}: pip install -U gguf")

    def written(self, config: Config) -> Config:
        """The config as it is written."""
        if self.nested is None:
            return config
        return {
            "architectures": config["architectures"],
            "model_type": self.model_type,
            "text_config": config | {"model_type": self.nested},
        }
