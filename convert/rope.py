"""RoPE scaling from a GGUF file, as the `rope_scaling` dictionary of a Hugging Face or MLX config.

Linear scaling and YaRN are in the metadata, and the factors of longrope are two tensors. Llama 3's scaling is in
neither: llama.cpp's converter evaluates it and stores the tensor rope_freqs, a factor for the wavelength of each rotary
frequency,

    wavelen < O / H: 1      wavelen > O / L: F      between: 1 / ((1 - s) / F + s),  s = (O / wavelen - L) / (H - L)

(F factor, L low_freq_factor, H high_freq_factor, O original_max_position_embeddings). Here the formula is solved for
the four numbers and the result compared with the tensor. Only L / O and H / O matter, so L = 1 is no restriction.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_lqr.errors import InputError, quoted

from .gguf_file import GGUFFile

FACTORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
FACTOR_TENSORS = (FACTORS, LONG, SHORT)
_LLAMA_3 = (1.0, 4.0, 8192)  # L, H, O of every Llama 3 so far
_LLAMA_4 = (1.0, 1.0, 8192)  # of Scout, where nothing is between


def rope_scaling(file: GGUFFile, arch: str, dims: int, theta: float) -> dict[str, Any] | None:
    """The scaling that `file` asks for, or None. `dims` is how many dimensions of a head turn.

    Raises:
        InputError: MLX cannot do it, or it cannot be recovered.
    """
    kind = file.value(f"{arch}.rope.scaling.type", str, "none")
    factor = file.value(f"{arch}.rope.scaling.factor", float, file.value(f"{arch}.rope.scale_linear", float, 1.0))
    if kind == "none" and f"{arch}.rope.scale_linear" in file.metadata:
        kind = "linear"  # the form in files of 2023
    if LONG in file.tensors or SHORT in file.tensors:
        return _longrope(file, arch, dims)
    if FACTORS in file.tensors:
        if kind != "none":
            raise InputError(f"{file.path} scales RoPE both by {kind} and by {FACTORS}: this model is not supported")
        return recover_llama3(file.read(FACTORS).ravel(), dims, theta)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):  # 0 means 1 in llama.cpp
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(file, f"{arch}.rope.scaling.", factor)
    raise InputError(f"{file.path} scales RoPE by {quoted(kind)}: supported are linear, yarn, longrope and Llama 3's")


def recover_llama3(factors: NDArray[np.float32], head_dim: int, theta: float) -> dict[str, Any]:
    """The scaling whose per-frequency `factors` (head_dim / 2,) are given.

    Raises:
        InputError: no such scaling gives these factors.
    """
    if factors.shape != (head_dim // 2,) or not np.isfinite(factors).all():
        raise InputError(
            f"{FACTORS} does not hold {head_dim // 2} factors for heads of {head_dim}: download the model again"
        )
    measured = factors.astype(np.float64)
    inverse_wavelen = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    factor = _tidy(float(measured.max()))
    candidates = [_LLAMA_3, _LLAMA_4]
    between = (measured > 1) & (measured < measured.max())
    if between.sum() >= 2:
        # s is linear in 1 / wavelen: slope O / (H - L), intercept -L / (H - L)
        smooth = (1 / measured[between] - 1 / factor) / (1 - 1 / factor)
        slope, intercept = np.polyfit(inverse_wavelen[between], smooth, 1)
        if slope > 0 > intercept:
            candidates.append((1.0, _tidy(1 - 1 / float(intercept)), round(-float(slope / intercept))))
    for low, high, original in candidates:
        if np.allclose(_llama3_factors(inverse_wavelen, factor, low, high, original), measured, rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise InputError(f"{FACTORS} does not follow Llama 3's formula: convert the original model instead of this GGUF")


def _llama3_factors(
    inverse_wavelen: NDArray[np.float64], factor: float, low: float, high: float, original: int
) -> NDArray[np.float64]:
    if high == low:
        return np.where(original * inverse_wavelen < low, factor, 1.0)
    smooth = np.clip((original * inverse_wavelen - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / factor + smooth)


def _yarn(file: GGUFFile, prefix: str, factor: float) -> dict[str, Any]:
    extrapolation = file.value(prefix + "yarn_ext_factor", float, 1.0)
    attention = file.value(prefix + "yarn_attn_factor", float, file.value(prefix + "attn_factor", float, 1.0))
    if (extrapolation, attention) != (1.0, 1.0):
        raise InputError(
            f"{file.path} scales RoPE by YaRN with its own attention factor: MLX cannot do that, use another model"
        )
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": file.value(prefix + "original_context_length", int),
        "beta_fast": file.value(prefix + "yarn_beta_fast", float, 32.0),
        "beta_slow": file.value(prefix + "yarn_beta_slow", float, 1.0),
    }


def _longrope(file: GGUFFile, arch: str, dims: int) -> dict[str, Any]:
    original = file.value(f"{arch}.rope.scaling.original_context_length", int)
    context = file.value(f"{arch}.context_length", int)
    if FACTORS in file.tensors or not 1 < original <= context:
        raise InputError(
            f"{file.path} scales RoPE from {original} to {context} tokens by {LONG}, and cannot: download it again"
        )
    scaling: dict[str, Any] = {"type": "longrope", "rope_type": "longrope"}
    for key, name in (("short_factor", SHORT), ("long_factor", LONG)):
        if name not in file.tensors:
            raise InputError(f"{file.path} lacks the tensor {name}: download it again")
        factors = file.read(name).ravel()
        if factors.shape != (dims // 2,) or not (np.isfinite(factors) & (factors > 0)).all():
            raise InputError(f"{name} does not hold {dims // 2} factors for RoPE of {dims}: download the model again")
        scaling[key] = [float(str(factor)) for factor in factors]
    scaling["original_max_position_embeddings"] = original
    # llama.cpp's converter works transformers' formula out and stores the number
    usual = math.sqrt(1 + math.log(context / original) / math.log(original))
    stored = file.value(f"{arch}.rope.scaling.attn_factor", float, 1.0)
    if not math.isclose(stored, usual, rel_tol=1e-5):
        scaling["attention_factor"] = stored
    return scaling


def _tidy(number: float) -> float:
    """`number` rounded to a whole number if float32 rounding can explain the difference, otherwise as it is."""
    return float(round(number)) if abs(number - round(number)) < 1e-3 * number else number
