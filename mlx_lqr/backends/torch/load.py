"""A model folder (config.json, model*.safetensors) -> a transformers model. No code of the folder is run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from mlx_lqr.backends.borrowed import changed
from mlx_lqr.backends.checkpoint import model_folder
from mlx_lqr.backends.checkpoint.adapter import Adapter
from mlx_lqr.backends.checkpoint.adapter_folder import CONFIG as ADAPTER
from mlx_lqr.backends.checkpoint.config import ModelConfig
from mlx_lqr.backends.checkpoint.families import SETTINGS
from mlx_lqr.backends.checkpoint.model_folder import FAMILIES, check_dtype
from mlx_lqr.backends.checkpoint.weight_files import INDEX, SINGLE, Weights, weights_of
from mlx_lqr.backends.checkpoint.weight_shapes import check_shapes
from mlx_lqr.backends.torch.adapter import merge
from mlx_lqr.backends.torch.framework import out_of_memory
from mlx_lqr.backends.torch.library import config_from, config_of, knows_activation, model_class
from mlx_lqr.errors import InputError, first_line, quoted

_FAMILIES = sorted((*FAMILIES, "ministral"))
"""With what transformers makes of a Mistral with layers of two kinds."""


def is_listed(model_type: str) -> bool:
    """Whether it is of the families that go the fast way."""
    return model_type in _FAMILIES


def check_family(model_type: str) -> None:
    """Raise `InputError` for an architecture that is not known to carry one residual stream from block to block."""
    model_folder.check_family(model_type, _FAMILIES)


def chosen_device(device: str | None) -> torch.device:
    """The device of this name; by default a GPU where there is one.

    Raises:
        InputError: neither "cpu" nor "cuda", or a GPU that is not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise InputError(f"device must be cpu, cuda or cuda:NUMBER, not {device!r}")
    chosen = torch.device(device)
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            built = "" if torch.version.cuda else " (this torch is built without CUDA: see pytorch.org)"
            raise InputError(f"torch finds no CUDA GPU{built}: leave the device away, or say cpu")
        if (chosen.index or 0) >= count:
            raise InputError(f"there is no {device}: torch finds {count} GPU{'s' * (count > 1)}, counted from 0")
    return chosen


def load_module(
    folder: Path,
    config: dict[str, Any],
    meaning: ModelConfig,
    dtype: str | None,
    device: torch.device,
    adapter: Adapter | None = None,
) -> nn.Module:
    """Build the model and load its weights.

    Args:
        config: the folder's config.json.
        meaning: what it says.
        dtype: "float32", "float16" or "bfloat16"; None keeps the checkpoint's dtype on a GPU and takes float32 on the
            CPU.
        adapter: is merged into the weights.

    Raises:
        InputError: unsupported architecture, packed weights, or weights or an adapter that are missing, damaged or
            another model's.
    """
    check_dtype(dtype)
    _refuse_packed(folder, config)
    built_from = transformers_config(config, meaning)
    files = weights_of(folder)
    check_shapes(folder, meaning, files.shapes)
    built_from.tie_word_embeddings = built_from.tie_word_embeddings and _is_tied(files)
    wanted = _dtype_for(dtype, device)
    with _fitting(folder):
        if any(".switch_mlp." in name for name in files.files):
            module = _from_stacked_experts(folder, built_from, files, wanted)
        else:
            module = _from_pretrained(folder, built_from, files, wanted)
    if files.formats == {"mlx"} and meaning.family == "gemma3_text":
        # Whoever wrote this folder reckoned with mlx-lm, which rounds the embedding's scale in every dtype.
        scale = torch.tensor(math.sqrt(module.config.hidden_size)).bfloat16()
        module.get_input_embeddings().embed_scale.fill_(scale)
    module = module.to(device).eval().requires_grad_(False)
    if isinstance(wanted, torch.dtype) and module.dtype != wanted:
        raise changed("transformers", f"loads weights as {module.dtype} that were to be {wanted}")
    if adapter is not None:
        merge(module, adapter)
    if device.type == "cpu" and module.dtype == torch.float32:
        _lay_out_for_single_tokens(module)
    return module


def load_any(folder: Path, config: dict[str, Any], dtype: str | None, device: torch.device) -> Any:
    """Build a model of any architecture as transformers reads its config.json, and load its weights.

    Args:
        dtype: see `load_module`.

    Raises:
        InputError: packed weights, weights that mlx-lm has rewritten, or some that are missing, damaged or another
            model's.
    """
    check_dtype(dtype)
    _refuse_packed(folder, config)
    files = weights_of(folder)
    if files.formats == {"mlx"}:
        raise InputError(
            f"{folder} was written for MLX, whose weights of the type {quoted(config['model_type'])} may mean "
            "something else to transformers: give the Hugging Face checkpoint, or use the mlx backend"
        )
    try:
        built_from = config_from(folder, str(config["model_type"]))
    except Exception as error:  # of any of transformers' configs
        raise InputError(f"transformers cannot do what {folder}/config.json says: {first_line(error)}") from error
    with _fitting(folder):
        module = _from_pretrained(folder, built_from, files, _dtype_for(dtype, device))
    return module.to(device).eval().requires_grad_(False)


def _refuse_packed(folder: Path, config: dict[str, Any]) -> None:
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    if any("quantization" in part or "quantization_config" in part for part in parts):
        whose = "for MLX" if "quantization" in config else "in a format of its own"
        raise InputError(
            f"{folder} is quantised {whose}, which the torch backend cannot run: give the unquantised checkpoint (or "
            "the .gguf file), or use the mlx backend"
        )


def _dtype_for(dtype: str | None, device: torch.device) -> Any:
    return getattr(torch, dtype) if dtype is not None else torch.float32 if device.type == "cpu" else "auto"


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    """Around loading: what transformers raises is one line, and what it prints is left out."""
    try:
        with quietly():
            yield
    except Exception as error:  # of any of transformers' models
        if isinstance(error, InputError) or out_of_memory(error):
            raise
        raise InputError(f"the weights in {folder} do not fit its config.json: {first_line(error)}") from error


def _lay_out_for_single_tokens(module: nn.Module) -> None:
    """Store the wide weights column by column in memory, each as a view of the shape that it had.

    A decode step multiplies each weight by one vector, and BLAS goes along the weight's rows or its columns, whichever
    lies in memory. With many more outputs than inputs the columns are faster (SmolLM2: 43 instead of 51 ms a step).
    transformers' `save_pretrained` cannot write a tied head that is laid out so; it wants a module of its own loading.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear) and part.out_features > 1.5 * part.in_features:
            part.weight.data = part.weight.data.t().contiguous().t()


def transformers_config(config: dict[str, Any], meaning: ModelConfig) -> PretrainedConfig:
    """transformers' config with everything that `meaning` says written out, and nothing else of config.json but dtype
    and tokens.

    Raises:
        InputError: transformers cannot compute what the config says; the line names the key.
    """
    if meaning.rope_traditional:
        raise InputError("config.json says rope_traditional true, which transformers has not: use the mlx backend")
    if not knows_activation(meaning.activation):
        key = "hidden_activation" if "hidden_activation" in meaning.settings else "hidden_act"
        raise InputError(
            f"config.json says {key} {quoted(meaning.activation)}, which transformers does not know: use another model"
        )
    family, window, kinds = meaning.family, meaning.window, list(meaning.layer_types)
    if family == "mistral" and len(set(kinds)) > 1:
        family = "ministral"
    given: dict[str, Any] = {**meaning.settings, "pad_token_id": None}
    for key in SETTINGS[meaning.family]:
        if key == "layer_types" and family != "mistral":
            given[key] = kinds
        elif key == "use_sliding_window":
            given[key] = window is not None
        elif key == "sliding_window":
            given[key] = window
    nested = {kind: turn.parameters for kind, turn in meaning.rotations.items()}
    given["rope_parameters"] = deepcopy(nested if len(nested) > 1 else nested["full_attention"])
    given |= {key: value for key in _KEPT if (value := config.get(key)) is not None}
    try:
        built_from: PretrainedConfig = config_of(family, given)
        return built_from
    except Exception as error:  # of transformers' own checks of a config too, which are no ValueError
        line = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise InputError(f"transformers cannot do what config.json says: {line}") from error


_KEPT = ("architectures", "dtype", "torch_dtype", "bos_token_id", "eos_token_id")


def _from_pretrained(folder: Path, config: PretrainedConfig, files: Weights, dtype: Any) -> Any:
    usual = [folder / SINGLE] if (folder / SINGLE).is_file() else []  # what transformers takes before it looks for more
    by_name = files.unnamed is None and (files.paths == usual or (not usual and (folder / INDEX).is_file()))
    by_name = by_name and not (folder / ADAPTER).exists()  # which transformers would load too
    kind = AutoModelForCausalLM if by_name else model_class(config)
    module, report = kind.from_pretrained(
        str(folder) if by_name else None,
        config=config,
        state_dict=None if by_name else _tensors(files),
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    surplus = [name for name in report["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq")]
    for what, names in (
        ("lack", report["missing_keys"]),
        ("have, in another shape,", report["mismatched_keys"]),
        ("have, beyond what it has a place for,", surplus),
    ):
        if names:
            raise InputError(f"the weights in {folder} do not fit its config.json: they {what} {sorted(names)[0]}")
    return module


def _is_tied(files: Weights) -> bool:
    """Whether the head is the embeddings, or a copy of them: transformers goes by the weights, not by the config."""
    parts = []
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        if name not in files.files:
            return True
        with safe_open(files.files[name], framework="pt") as opened:
            parts.append(opened.get_tensor(name))
    return torch.equal(*parts)


def _tensors(files: Weights) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in files.paths:
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in files.of(file)}
    return tensors


def _from_stacked_experts(folder: Path, config: PretrainedConfig, files: Weights, dtype: Any) -> Any:
    """A mixture of experts whose weights mlx-lm has stacked: its names and shapes are not those of transformers."""
    weights = _tensors(files)
    renamed: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        ours = name.replace(".block_sparse_moe.", ".mlp.")
        place, _, part = ours.partition(".switch_mlp.")
        if part == "gate_proj.weight":
            up = weights[name.replace("gate_proj", "up_proj")]
            renamed[f"{place}.experts.gate_up_proj"] = torch.cat([weight, up], dim=1)
        elif part == "down_proj.weight":
            renamed[f"{place}.experts.down_proj"] = weight
        elif not part:
            renamed[ours] = weight
    if dtype == "auto":
        dtype = next(iter(renamed.values())).dtype
    module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing, unexpected = module.load_state_dict(renamed, strict=False)
    if wrong := sorted((set(missing) - tied) | set(unexpected)):
        raise InputError(f"the weights in {folder} do not fit its config.json: look at {wrong[0]}")
    return module


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bar and reports: what matters of them becomes an error here."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
