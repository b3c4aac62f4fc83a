"""A model folder (config.json, model*.safetensors) -> an mlx-lm module. No code of the folder is run."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lqr.backends.checkpoint.adapter import Adapter
from mlx_lqr.backends.checkpoint.config import ModelConfig
from mlx_lqr.backends.checkpoint.model_folder import check_dtype
from mlx_lqr.backends.checkpoint.weight_files import INDEX, Weights, weights_of
from mlx_lqr.backends.checkpoint.weight_shapes import check_shapes
from mlx_lqr.backends.mlx.adapter import merge
from mlx_lqr.backends.mlx.device import on_gpu, on_linux
from mlx_lqr.backends.mlx.family import ALWAYS_TIED, arguments, complete
from mlx_lqr.backends.mlx.library import model_classes, settings_read
from mlx_lqr.errors import InputError, first_line

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def load_module(
    folder: Path,
    config: dict[str, Any],
    meaning: ModelConfig,
    dtype: str | None,
    adapter: Adapter | None = None,
    keep: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Build the module and load its weights.

    Args:
        config: the folder's config.json.
        meaning: what it says.
        dtype: "float32", "float16" or "bfloat16" for everything that is not packed; None keeps the checkpoint's dtype
            on a GPU and takes float32 on the CPU, where 16-bit products are 10 to 30 times slower.
        adapter: is merged into the weights, or runs beside those that are packed.
        keep: leaves in the module what this process is to have, before any weight is read.

    Raises:
        InputError: unsupported architecture, or weights or an adapter that are missing, damaged or another model's.
    """
    check_dtype(dtype)
    Model, ModelArgs = model_classes(meaning.family)
    files = weights_of(folder)
    given = arguments_for(folder, meaning, files)
    weights = _read_weights(files)
    if given["tie_word_embeddings"]:
        for part in ("weight", "scales", "biases"):
            weights.pop(f"lm_head.{part}", None)
    try:
        module = Model(ModelArgs.from_dict(given))
        complete(module, meaning)
        weights = module.sanitize(weights) if hasattr(module, "sanitize") else weights
        if quantization := config.get("quantization"):
            _quantize(module, quantization, weights)
        elif "quantization_config" in config:
            raise InputError(
                f"{folder} is quantised in a format other than MLX's: convert it from an unquantised checkpoint"
            )
        module.eval()
        module.load_weights(list(weights.items()))
        weights.clear()  # the module holds them now, and may let go of some below
    except InputError:
        raise
    except Exception as error:  # of any of mlx-lm's modules
        raise InputError(f"the weights in {folder} do not fit its config.json: {first_line(error)}") from error
    cast(module, dtype)
    if keep is not None:
        keep(module)
    try:
        mx.eval(module.parameters())
    except RuntimeError as error:
        raise InputError(f"the weights in {folder} cannot be read: {first_line(error)}") from error
    if adapter is not None:
        merge(module, adapter)
    if on_linux() and not on_gpu() and keep is None:
        _lay_out_for_single_tokens(module)
    return module


def arguments_for(folder: Path, meaning: ModelConfig, files: Weights) -> dict[str, Any]:
    """What mlx-lm's `ModelArgs` is made of for these weights.

    A head of its own is used, whatever the config says of tied embeddings: so does transformers.

    Raises:
        InputError: mlx-lm's class cannot compute what the config says, or the weights are of other sizes than it says.
    """
    given = arguments(meaning)
    check_shapes(folder, meaning, files.shapes)
    if given["tie_word_embeddings"] and "lm_head.weight" in files.files:
        given["tie_word_embeddings"] = _is_tied(meaning.family, files)
    return given


@contextmanager
def as_mlx_lm_reads(folder: Path, config: dict[str, Any], files: Weights) -> Iterator[Path]:
    """The model in `folder` as a folder for mlx-lm's own loader, with this config and nothing but these weight files.

    What is lazily read from it stays readable afterwards.

    Raises:
        InputError: a file holds more than is the model's, which mlx-lm would read too.
    """
    if files.unnamed is not None:
        file, tensor = files.unnamed
        raise InputError(f"{file} holds {tensor}, which {INDEX} does not name: download the model again")
    with tempfile.TemporaryDirectory() as place:
        view = Path(place)
        for file in folder.iterdir():
            if file.name not in ("config.json", INDEX) and file.suffix != ".safetensors":
                (view / file.name).symlink_to(file.resolve())
        for number, file in enumerate(files.paths):
            (view / f"model-{number}.safetensors").symlink_to(file.resolve())
        (view / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield view


def cast(module: nn.Module, dtype: str | None) -> None:
    """Give everything that is not packed this dtype; None keeps it on a GPU and takes float32 on the CPU."""
    if dtype is not None or not on_gpu():
        module.set_dtype(DTYPES[dtype or "float32"])


def check_computed(module: nn.Module, dtype: mx.Dtype) -> None:
    """Refuse what MLX or mlx-lm would compute wrongly, or not at all, with activations of this dtype.

    Raises:
        InputError: naming the dtypes to load the model in.
    """
    if dtype == mx.float16 and hasattr(sys.modules[type(module).__module__], "clip_residual"):
        raise InputError("the activations of Gemma 3 overflow float16, where mlx-lm cuts them: load it with bfloat16")
    leaves = [leaf for _, leaf in tree_flatten(module.leaf_modules(), is_leaf=nn.Module.is_module)]
    experts = [leaf for leaf in leaves if hasattr(leaf, "num_experts")]
    if not on_gpu() and any(getattr(leaf, "global_scale", None) is not None for leaf in experts):
        raise InputError("on the CPU, MLX multiplies no experts packed with a global scale: quantise it without")
    dense = any("scales" not in leaf for leaf in experts)
    if dtype != mx.float32 and dense and not on_gpu():
        raise InputError("on the CPU, MLX multiplies experts in float32 alone: load it with dtype float32")


def _lay_out_for_single_tokens(module: nn.Module) -> None:
    """Store the wide weights, and the head's, column by column in memory, each as a view of the shape that it had.

    A decode step multiplies each weight by one vector. BLAS does this by the weight's rows or by its columns, whichever
    lies in memory; with many more outputs than inputs the columns take half the time (MKL, SmolLM2: 8 to 10 ms of a
    step of 50 ms). Products with many vectors take the same time either way, or a little more.
    """
    tied = getattr(module, "lm_head", None) is None
    for _, leaf in tree_flatten(module.leaf_modules(), is_leaf=nn.Module.is_module):
        is_head = tied and type(leaf) is nn.Embedding
        if is_head or (type(leaf) is nn.Linear and leaf.weight.shape[0] > 1.5 * leaf.weight.shape[1]):
            leaf.weight = _by_columns(leaf.weight)
            mx.eval(leaf.weight)


_ROWS = 512
"""That are laid out at a time: their columns are then read from the processor's cache"""


def _by_columns(weight: mx.array) -> mx.array:
    return mx.concatenate([weight[i : i + _ROWS].T for i in range(0, len(weight), _ROWS)], axis=1).T


def flattened(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with what transformers 5 nests or renames, as mlx-lm's older models look for it.

    They know nothing of `rope_parameters` and would silently take their default RoPE base. transformers reads both.
    """
    flat = dict(config)
    if isinstance(text := config.get("text_config"), dict):
        flat["text_config"] = flattened(text)
    rope = config.get("rope_parameters")
    read = settings_read(config)
    if isinstance(rope, dict) and read is not None and "rope_parameters" not in read:
        del flat["rope_parameters"]
        rotary: dict[str, Any] = {}
        if isinstance(rope.get("sliding_attention"), dict):
            rotary["rope_local_base_freq"] = rope["sliding_attention"].get("rope_theta")
            rope = rope.get("full_attention", {})
        rotary |= {key: rope.get(key) for key in ("rope_theta", "partial_rotary_factor")}
        if rope.get("rope_type", "default") != "default":
            rotary["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        flat |= {key: value for key, value in rotary.items() if value is not None and flat.get(key) is None}
    kinds = config.get("layer_types")
    if config.get("model_type") == "gemma3_text" and isinstance(kinds, list) and "full_attention" in kinds:
        period = kinds.index("full_attention") + 1
        if any((kind == "full_attention") != (index % period == 0) for index, kind in enumerate(kinds, start=1)):
            raise InputError("the sliding layers are in no regular order: mlx-lm cannot do that, use another model")
        flat["sliding_window_pattern"] = period
    return flat


def _read_weights(files: Weights) -> dict[str, mx.array]:
    weights: dict[str, mx.array] = {}
    for file in files.paths:
        opened = _opened(file)
        weights |= {name: opened[name] for name in files.of(file)}
    return weights


def _opened(file: Path) -> dict[str, mx.array]:
    """The arrays of a file, none of which is read yet."""
    try:
        opened: dict[str, mx.array] = mx.load(str(file))
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise InputError(f"{file} is damaged or incomplete ({reason}): fetch or convert the model again") from error
    return opened


def _is_tied(family: str, files: Weights) -> bool:
    """Whether the head is the embeddings once more."""
    parts = []
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        if name not in files.files:
            return False
        parts.append(_opened(files.files[name])[name])
    if parts[0].shape == parts[1].shape and mx.array_equal(*parts).item():
        return True
    if family in ALWAYS_TIED:
        raise InputError(
            f"the weights have an lm_head.weight of their own, although config.json says tie_word_embeddings true: "
            f"mlx-lm's {family} has none, use the torch backend"
        )
    return False


def _quantize(module: nn.Module, quantization: dict[str, Any], weights: dict[str, mx.array]) -> None:
    """Make quantised modules where the checkpoint has packed weights."""

    def packed(path: str, leaf: nn.Module) -> bool | dict[str, Any]:
        own = quantization.get(path)
        return own if isinstance(own, dict) else hasattr(leaf, "to_quantized") and f"{path}.scales" in weights

    nn.quantize(
        module,
        group_size=quantization["group_size"],
        bits=quantization["bits"],
        mode=quantization.get("mode", "affine"),
        class_predicate=packed,
    )
