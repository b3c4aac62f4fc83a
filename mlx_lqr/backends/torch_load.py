"""A model folder (config.json, model*.safetensors) -> a transformers model. No code of the folder is run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from mlx_lqr.backends import model_folder
from mlx_lqr.backends.borrowed import changed
from mlx_lqr.backends.model_folder import FAMILIES, check_dtype
from mlx_lqr.errors import InputError

_FAMILIES = sorted((*FAMILIES, "ministral"))
"""With what transformers makes of a Mistral with layers of two kinds."""


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


def load_module(folder: Path, config: dict[str, Any], dtype: str | None, device: torch.device) -> nn.Module:
    """Build the model and load its weights.

    Args:
        config: the folder's config.json.
        dtype: "float32", "float16" or "bfloat16"; None keeps the checkpoint's dtype on a GPU and takes float32 on the
            CPU.

    Raises:
        InputError: unsupported architecture, packed weights, or weights that are missing, damaged or another model's.
    """
    check_dtype(dtype)
    check_family(str(config["model_type"]))
    if "quantization" in config or "quantization_config" in config:
        whose = "for MLX" if "quantization" in config else "in a format of its own"
        raise InputError(
            f"{folder} is quantised {whose}, which the torch backend cannot run: give the unquantised checkpoint (or "
            "the .gguf file), or use the mlx backend"
        )
    if config.get("use_bidirectional_attention"):
        raise InputError(f"{folder} attends in both directions: it is no model that writes from left to right")
    names, is_mlx = _weight_names(folder)
    wanted: Any = getattr(torch, dtype) if dtype is not None else torch.float32 if device.type == "cpu" else "auto"
    try:
        with _quietly():
            if any(".switch_mlp." in name for name in names):
                module = _from_stacked_experts(folder, names, wanted)
            else:
                module = _from_pretrained(folder, wanted)
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, AttributeError, AssertionError) as error:
        if isinstance(error, InputError) or out_of_memory(error):
            raise
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the weights in {folder} do not fit its config.json: {line}") from error
    if is_mlx and config["model_type"] == "gemma3_text":
        # Whoever wrote this folder reckoned with mlx-lm, which rounds the embedding's scale in every dtype.
        scale = torch.tensor(math.sqrt(module.config.hidden_size)).bfloat16()
        module.get_input_embeddings().embed_scale.fill_(scale)
    module = module.to(device).eval().requires_grad_(False)
    if isinstance(wanted, torch.dtype) and module.dtype != wanted:
        raise changed("transformers", f"loads weights as {module.dtype} that were to be {wanted}")
    if device.type == "cpu" and module.dtype == torch.float32:
        _lay_out_for_single_tokens(module)
    return module


def _lay_out_for_single_tokens(module: nn.Module) -> None:
    """Store the wide weights column by column in memory, each as a view of the shape that it had.

    A decode step multiplies each weight by one vector, and BLAS goes along the weight's rows or its columns, whichever
    lies in memory. With many more outputs than inputs the columns are faster (SmolLM2: 43 instead of 51 ms a step).
    transformers' `save_pretrained` cannot write a tied head that is laid out so; it wants a module of its own loading.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear) and part.out_features > 1.5 * part.in_features:
            part.weight.data = part.weight.data.t().contiguous().t()


def _from_pretrained(folder: Path, dtype: Any) -> Any:
    module, report = AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    for what, found in (("lack", report["missing_keys"]), ("have, in another shape,", report["mismatched_keys"])):
        if found:
            raise InputError(f"the weights in {folder} do not fit its config.json: they {what} {sorted(found)[0]}")
    return module


def _from_stacked_experts(folder: Path, names: dict[str, Path], dtype: Any) -> Any:
    """A mixture of experts whose weights mlx-lm has stacked: its names and shapes are not those of transformers."""
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(set(names.values())):
        with safe_open(file, framework="pt") as opened:
            weights |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
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


def _weight_names(folder: Path) -> tuple[dict[str, Path], bool]:
    """Name -> file of every tensor, and whether the files say that they are MLX's."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise InputError(f"{folder} has no model*.safetensors (pickled weights are never read)")
    names: dict[str, Path] = {}
    formats: set[str | None] = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names |= dict.fromkeys(opened.keys(), file)
                formats.add((opened.metadata() or {}).get("format"))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is damaged or incomplete: fetch or convert the model again") from error
    return names, formats == {"mlx"}


@contextmanager
def _quietly() -> Iterator[None]:
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


def out_of_memory(error: BaseException) -> bool:
    """Whether torch has failed to get memory, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def memory_for(what: str, advice: str) -> Iterator[None]:
    """Turn torch's failure to get memory inside this context into one line that says what to lower."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise InputError(f"not enough memory for {what}: {advice}") from error
