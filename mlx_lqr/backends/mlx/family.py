"""What a config.json says beyond what mlx-lm's model class of the family reads, put into the built module.

mlx-lm's classes fix the activation, know a plain rotary embedding where transformers knows all kinds, and let few
families slide. Here a module built without any of these gets them: every block its own mask and kind of cache, its
own rotation, and its MLP's activation.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lqr.backends.borrowed import changed
from mlx_lqr.backends.checkpoint.config import ModelConfig
from mlx_lqr.backends.checkpoint.rotation import Rotation
from mlx_lqr.backends.mlx.library import attention_mask, model_classes, window_caches
from mlx_lqr.errors import InputError, quoted

Activation = Callable[[mx.array], mx.array]

ACTIVATIONS: dict[str, Activation] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "gelu": nn.gelu,
    "gelu_python": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "quick_gelu": nn.gelu_fast_approx,
    "relu": nn.relu,
}
"""By the names that transformers has for them."""
_BUILT_IN = {"gemma": nn.gelu, "gemma2": nn.gelu_approx, "gemma3_text": nn.gelu_approx}
"""What mlx-lm's class of the family applies; all others apply silu."""
_WITHOUT: dict[str, Any] = {
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "mlp_bias": False,
    "rope_traditional": False,
    "tie_word_embeddings": False,
}
"""What a class computes that does not read the key."""
ALWAYS_TIED = ("gemma", "gemma2")
"""The families whose class has no head but the embeddings."""


def arguments(config: ModelConfig) -> dict[str, Any]:
    """What mlx-lm's `ModelArgs` of the family is made of.

    Raises:
        InputError: mlx-lm's class cannot compute what the config says; the line names the key.
    """
    _, ModelArgs = model_classes(config.family)
    read = {field.name for field in fields(ModelArgs)}
    without = _WITHOUT | ({"tie_word_embeddings": True} if config.family in ALWAYS_TIED else {})
    given = {**config.settings, "rope_traditional": config.rope_traditional}
    for key, value in given.items():
        if key in read:
            refused = key.endswith("softcapping") and value is None
        else:
            refused = key in without and value != without[key]
        if refused and not (config.family == "gemma3_text" and key == "tie_word_embeddings"):  # it looks at the weights
            raise InputError(
                f"config.json says {key} {json.dumps(value)}, which mlx-lm's {config.family} cannot do{_INSTEAD}"
            )
    head_dim, heads = given["head_dim"], given["num_attention_heads"]
    if "head_dim" not in read and head_dim * heads != given["hidden_size"]:
        raise InputError(
            f"config.json says head_dim {head_dim} with hidden_size {given['hidden_size']} and num_attention_heads "
            f"{heads}, which mlx-lm's {config.family} cannot do{_INSTEAD}"
        )
    if config.activation not in ACTIVATIONS:
        key = "hidden_activation" if "hidden_activation" in given else "hidden_act"
        raise InputError(
            f"config.json says {key} {quoted(config.activation)}: "
            f"the mlx backend knows {', '.join(ACTIVATIONS)}{_INSTEAD}"
        )
    rotation = next(iter(config.rotations.values()))
    return given | {
        "model_type": config.family,
        "rope_theta": rotation.theta,
        "partial_rotary_factor": rotation.parameters.get("partial_rotary_factor", 1.0),
        "sliding_window_pattern": 1,
        **dict.fromkeys(("layer_types", "rope_parameters", "rope_scaling", "sliding_window")),  # see `complete`
    }


_INSTEAD = ": use the torch backend (--backend torch), or another model"


def complete(module: nn.Module, config: ModelConfig) -> None:
    """Give a module that was built from `arguments` what the config says beyond them."""
    built_in = _BUILT_IN.get(config.family, nn.silu)
    activation = ACTIVATIONS[config.activation]
    plain = config.rotations["full_attention"]
    for block, rotation in zip(module.layers, config.layer_rotations, strict=True):
        if activation is not built_in:
            _activate(block, activation)
        if rotation is not None and "rope" not in block.self_attn:
            raise changed("mlx-lm", f"has no rope in the attention of {config.family}")
        if rotation is not None and rotation != Rotation("default", plain.theta, rotation.dims, {}):
            block.self_attn.rope = _rope(rotation, config.rope_traditional)
    if any(window is not None for window in config.windows):
        _slide(module, config.windows)


def _rope(rotation: Rotation, traditional: bool) -> nn.Module:
    if rotation.kind == "default":
        return nn.RoPE(rotation.dims, traditional=traditional, base=rotation.theta)
    return ScaledRoPE(rotation, traditional)


class ScaledRoPE(nn.Module):
    """A rotary embedding of any frequencies."""

    def __init__(self, rotation: Rotation, traditional: bool) -> None:
        super().__init__()
        self.dims, self.traditional, self.scale = rotation.dims, traditional, rotation.scale
        self.limit = rotation.limit
        self._freqs = mx.array(1 / rotation.frequencies, mx.float32)

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        if self.limit is not None and isinstance(offset, int) and offset + x.shape[-2] > self.limit:
            raise InputError(f"this model's RoPE is another one beyond {self.limit} tokens: give a shorter text")
        turned: mx.array = mx.fast.rope(
            x, self.dims, traditional=self.traditional, base=None, scale=1.0, offset=offset, freqs=self._freqs
        )
        if self.scale == 1:
            return turned
        if self.dims == x.shape[-1]:
            return turned * self.scale
        return mx.concatenate([turned[..., : self.dims] * self.scale, turned[..., self.dims :]], axis=-1)


def _activate(block: nn.Module, activation: Activation) -> None:
    """Let the block's MLP, or its experts, apply this activation."""
    gates = 0
    for _, part in block.named_modules():
        gates += "gate_up_proj" in part or "gate_proj" in part
        if "gate_up_proj" in part:
            _recast(
                part, lambda self, x: self.down_proj(_gated(activation, *mx.split(self.gate_up_proj(x), 2, axis=-1)))
            )
        elif "gate_proj" in part and hasattr(part, "activation"):  # experts, by mlx-lm's switch layers
            part.activation = _Gate(activation)
        elif "gate_proj" in part:
            _recast(part, lambda self, x: self.down_proj(_gated(activation, self.gate_proj(x), self.up_proj(x))))
    if not gates:
        raise changed("mlx-lm", f"has no gate_proj in {type(block).__name__}")


def _gated(activation: Activation, gate: mx.array, x: mx.array) -> mx.array:
    return activation(gate) * x


class _Gate(nn.Module):
    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self._activation = activation

    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        return _gated(self._activation, gate, x)


def _slide(module: nn.Module, windows: list[int | None]) -> None:
    """Let every block see its window, whatever mask and caches the model would make."""
    _recast(module, make_cache=lambda self: window_caches(windows))
    for block, window in zip(module.layers, windows, strict=True):
        as_array = hasattr(block.self_attn, "attn_logit_softcapping")  # Gemma 2's attention takes no name for a mask
        _recast(block, _with_own_mask(type(block), window, as_array))


def _with_own_mask(kind: type[nn.Module], window: int | None, as_array: bool) -> Callable[..., mx.array]:
    def call(self: nn.Module, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        held = getattr(cache, "max_size", None)  # a context that rolls may be shorter than the window
        seen = window if window is None or held is None or held >= window else None
        own = attention_mask(x, cache, seen, as_array=as_array)
        output: mx.array = kind.__call__(self, x, own, cache)
        return output

    return call


def _recast(part: nn.Module, call: Callable[..., Any] | None = None, **methods: Callable[..., Any]) -> None:
    """Exchange methods of this one module."""
    if call is not None:
        methods["__call__"] = call
    kind = type(part)
    object.__setattr__(part, "__class__", type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__}))
