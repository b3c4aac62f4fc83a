"""How llama.cpp stores what MLX has in another layout, and the way back."""

from __future__ import annotations

import numpy as np

from mlx_lqr.convert.architectures.row import Array, Config, Stored
from mlx_lqr.errors import InputError


def unpermute(rows: Array, heads: int) -> Array:
    """Undo the row order of llama.cpp's Llama, which rotates neighbouring rows of a head instead of its two halves."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    halves: Array = pairs.swapaxes(1, 2).reshape(rows.shape)
    return halves


def joined(parts: list[Array], config: Config) -> Array:
    """Rows below rows."""
    return np.concatenate(parts)


def same(parts: list[Array], config: Config) -> Array:
    return parts[0]


def flat(parts: list[Array], config: Config) -> Array:
    """A norm that is stored by groups."""
    return parts[0].ravel()


def _logarithm(parts: list[Array], config: Config) -> Array:
    """llama.cpp stores -exp(A_log)."""
    if not (parts[0] < 0).all():
        raise InputError("ssm_a holds values that are not negative: download the model again")
    return np.log(-parts[0])


COMMON = (
    Stored(r"\.A_log", _logarithm),
    Stored(r"\.dt_bias", same, ("ssm_dt.bias",)),
    Stored(r"\.(e_score_correction_bias|expert_bias)", same, ("exp_probs_b.bias",)),
)
"""Of all architectures."""

STACKED = r"\.(?:mlp|block_sparse_moe|feed_forward|mixer)\.switch_mlp\."
"""mlx-lm stacks the experts of a layer as llama.cpp does; the maps have `.mlp.experts.` for that."""


def tiled(values: Array, config: Config, width: int, axis: int = 0) -> Array:
    """Value heads in the order of MLX, grouped by their key head, from that of llama.cpp: one of each group in turn.

    Args:
        width: how many rows, or columns, a head has.
        axis: that of the heads, all of it.
    """
    groups, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    moved = np.moveaxis(values, axis, 0)
    shape = moved.shape
    moved = moved.reshape(heads // groups, groups, width, *shape[1:]).swapaxes(0, 1).reshape(shape)
    return np.moveaxis(moved, 0, axis)


def _keys(config: Config) -> int:
    """Rows of queries and keys together."""
    return int(2 * config["linear_num_key_heads"] * config["linear_key_head_dim"])


def _tiled_after_keys(parts: list[Array], config: Config) -> Array:
    cut = _keys(config)
    values = tiled(parts[0][cut:], config, config["linear_value_head_dim"])
    return np.concatenate([parts[0][:cut], values])


def _tiled_rows(parts: list[Array], config: Config) -> Array:
    return tiled(parts[0], config, config["linear_value_head_dim"])


def _tiled_columns(parts: list[Array], config: Config) -> Array:
    return tiled(parts[0], config, config["linear_value_head_dim"], axis=1)


def _tiled_heads(parts: list[Array], config: Config) -> Array:
    return tiled(parts[0], config, 1)


def _tiled_logarithm(parts: list[Array], config: Config) -> Array:
    return tiled(_logarithm(parts, config), config, 1)


GATED_DELTA = (
    Stored(r"\.in_proj_qkv\.weight", _tiled_after_keys, ("attn_qkv.weight",)),
    Stored(r"\.linear_attn\.conv1d\.weight", _tiled_after_keys),
    Stored(r"\.in_proj_z\.weight", _tiled_rows, ("attn_gate.weight",)),
    Stored(r"\.in_proj_a\.weight", _tiled_heads, ("ssm_alpha.weight",)),
    Stored(r"\.in_proj_b\.weight", _tiled_heads, ("ssm_beta.weight",)),
    Stored(r"\.linear_attn\.out_proj\.weight", _tiled_columns),
    Stored(r"\.dt_bias", _tiled_heads, ("ssm_dt.bias",)),
    Stored(r"\.A_log", _tiled_logarithm),
)
"""Qwen3.5: where there are more heads of values than of keys, llama.cpp has them in another order."""


def qkvz(parts: list[Array], config: Config) -> Array:
    """Qwen3-Next: queries, keys, values and gates by the heads of keys; llama.cpp has one kind after another."""
    groups, cut = config["linear_num_key_heads"], _keys(config)
    rows = [parts[0][: cut // 2], parts[0][cut // 2 : cut], parts[0][cut:], parts[1]]
    grouped = [kind.reshape(groups, kind.shape[0] // groups, *kind.shape[1:]) for kind in rows]
    return np.concatenate(grouped, axis=1).reshape(-1, *parts[0].shape[1:])


def keys_out(parts: list[Array], config: Config) -> Array:
    """DeepSeek V2's kv_b_proj by heads, keys before values, of the two that llama.cpp makes of it.

    (heads, rank, keys) and (heads, values, rank).
    """
    keys, values = parts
    both = np.concatenate([keys.swapaxes(1, 2), values], axis=1)
    return both.reshape(-1, both.shape[-1])


def in_one(parts: list[Array], config: Config) -> Array:
    """Queries, keys and values of Ling, in one array, of three with neighbouring rows turning."""
    queries, keys, values = parts
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    return np.concatenate([unpermute(queries, heads), unpermute(keys, kv_heads), values])


def by_heads(parts: list[Array], config: Config) -> Array:
    """GPT-NeoX: query, key and value of a head, then those of the next; llama.cpp has all queries first."""
    heads = config["num_attention_heads"]
    kinds = parts[0].reshape(3, heads, -1, *parts[0].shape[1:])
    return kinds.swapaxes(0, 1).reshape(parts[0].shape)


def interleaved(parts: list[Array], config: Config) -> Array:
    """InternLM 2's wqkv: the queries of a key head, its key and its value, then those of the next."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rows = [unpermute(parts[0], heads), unpermute(parts[1], kv_heads), parts[2]]
    grouped = [kind.reshape(kv_heads, -1, *kind.shape[1:]) for kind in rows]
    return np.concatenate(grouped, axis=1).reshape(-1, *parts[0].shape[1:])
