"""A config.json, understood before any backend loads: what it says is done by the backend, or refused here.

mlx-lm's and transformers' model classes read the keys that they know, drop the others and have defaults of their own
for those that are missing. Here every key that changes a number is written out, in transformers' words and with its
meaning; the backends build from that alone. Keys that nobody knows bring a warning and no refusal: checkpoints carry
notes of the tools that made them, and transformers, whose reading counts, ignores them too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_lqr.backends.checkpoint.families import HARMLESS, NULLABLE, OTHERS_COMPUTE, ROPE_THETA, SETTINGS
from mlx_lqr.backends.checkpoint.model_folder import check_family
from mlx_lqr.backends.checkpoint.rotation import Rotation, rotation
from mlx_lqr.errors import InputError, quoted
from mlx_lqr.files.json_text import LARGEST

ENDLESS = 1 << 30
"""The context's length where a config does not say how long it may be."""
FULL, SLIDING = "full_attention", "sliding_attention"

_TRUE_OR_FALSE = frozenset(
    key for settings in SETTINGS.values() for key, value in settings.items() if isinstance(value, bool)
)
_REALS = frozenset({"rms_norm_eps", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"})
_OTHER_TYPES = frozenset({"hidden_act", "hidden_activation", "layer_types", "mlp_only_layers", "no_rope_layers"})
_MAY_BE_ZERO = frozenset({"max_window_layers", "num_experts"})


@dataclass(frozen=True)
class ModelConfig:
    """What the blocks of a model compute.

    `settings` has every key of the family, written out; `layer_types` says of each layer whether it slides, `window`
    how many tokens those that do see; `rotations` are by layer type, and `rotated` says which layers turn at all.
    """

    family: str
    settings: dict[str, Any]
    layer_types: tuple[str, ...]
    window: int | None
    rotations: dict[str, Rotation]
    rotated: tuple[bool, ...]
    rope_traditional: bool = False
    """mlx-lm's own: neighbouring dimensions of a head turn together, and not those of its halves."""

    @property
    def activation(self) -> str:
        return str(self.settings["hidden_activation" if "hidden_activation" in self.settings else "hidden_act"])

    @property
    def windows(self) -> list[int | None]:
        """How many of the newest tokens each layer sees; None for all."""
        return [self.window if kind == SLIDING else None for kind in self.layer_types]

    @property
    def layer_rotations(self) -> list[Rotation | None]:
        return [
            self.rotations.get(kind, self.rotations[FULL]) if turns else None
            for kind, turns in zip(self.layer_types, self.rotated, strict=True)
        ]

    @property
    def context_length(self) -> int:
        """Up to how many tokens the computation is the one that is done here."""
        limits = [turn.limit for turn in self.rotations.values() if turn.limit is not None]
        return min([int(self.settings["max_position_embeddings"]), *limits])

    @property
    def rolls(self) -> bool:
        """Whether the context can roll: not where the embeddings of positions depend on how many there are."""
        return all(turn.limit is None for turn in self.rotations.values())


def model_config(config: Mapping[str, Any]) -> ModelConfig:
    """What a config.json of a supported family says.

    Raises:
        InputError: something that no backend does, or that contradicts itself; the line names the key.
    """
    family = str(config["model_type"])
    check_family(family)
    _check_keys(family, config)
    settings = _completed(family, config)
    if family == "gemma" and settings["hidden_act"] == "gelu":
        settings["hidden_act"] = "gelu_pytorch_tanh"  # a slip of Gemma's first configs, which transformers mends
    rotated = _rotated(settings)
    kinds, window = _sliding(family, config, settings, rotated)
    rotations = _rotations(family, config, settings)
    for key in ("sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern", "layer_types"):
        settings.pop(key, None)  # `layer_types` and `window` say it all
    traditional = config.get("rope_traditional", False)
    return ModelConfig(family, settings, tuple(kinds), window, rotations, rotated, bool(traditional))


def context_of(config: Mapping[str, Any]) -> tuple[int, bool]:
    """`context_length` and `rolls` of a config that has been read by someone else already.

    Some classes of mlx-lm do not keep how long a context may be: with them it has no end, as in mlx-lm itself.

    Raises:
        InputError: a length that is no number of tokens, or a setting of RoPE that is no table.
    """
    length = _length(config, "max_position_embeddings") or ENDLESS
    rope = _table(config, "rope_parameters") or _table(config, "rope_scaling")
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    rolls = True
    for part in kinds:
        kind = part.get("rope_type", part.get("type"))
        if kind == "longrope":
            length = min(length, _length(part, "original_max_position_embeddings") or length)
        rolls = rolls and kind not in ("dynamic", "longrope")
    return length, rolls


def explicit(meaning: ModelConfig) -> dict[str, Any]:
    """The keys of a config.json that leaves nothing to the defaults of whoever reads it, but for its layers' types."""
    full = meaning.rotations[FULL]
    settings = {**meaning.settings, "rope_theta": full.theta}
    if SLIDING in meaning.rotations:
        settings["rope_local_base_freq"] = meaning.rotations[SLIDING].theta
    if "sliding_window" in SETTINGS[meaning.family]:
        settings["sliding_window"] = meaning.window
    return settings


def check_rolling(rolls: bool, rolling: bool) -> None:
    """Raise `InputError` for a context that is to roll and cannot."""
    if rolling and not rolls:
        raise InputError(
            "this model's context cannot roll: its RoPE is another one beyond its length; let the answer end there"
        )


def _check_keys(family: str, config: Mapping[str, Any]) -> None:
    unknown: list[str] = []
    for key, value in config.items():
        if key in SETTINGS[family] or key.startswith("_") or key.endswith("_token_id"):
            continue
        if key in OTHERS_COMPUTE and not (family == "gemma3_text" and key == "rope_local_base_freq"):
            if value and value != OTHERS_COMPUTE[key]:
                raise InputError(
                    f"config.json says {key} {quoted(value)}, which models of the type {family!r} do not compute: "
                    "set it to null if the model does without, or use another model"
                )
        elif key not in HARMLESS and key not in OTHERS_COMPUTE and value not in (None, False, 0, "", [], {}):
            unknown.append(key)
    if unknown:
        names = ", ".join(sorted(unknown)[:4]) + (" and others" if len(unknown) > 4 else "")
        warnings.warn(
            f"config.json has {names}, of which models of the type {family!r} know nothing: ignored",
            RuntimeWarning,
            stacklevel=3,
        )


def _completed(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of the family, with the type that it needs."""
    settings: dict[str, Any] = {}
    if family == "qwen3_moe" and "num_experts" not in config and "num_local_experts" in config:
        config = {**config, "num_experts": config["num_local_experts"]}
    for key, default in SETTINGS[family].items():
        value = settings[key] = config.get(key, default)
        if value is None:
            if key in NULLABLE or default is None:
                continue
            raise InputError(f"config.json says {key} null, which says nothing: remove it or state it")
        if key in _TRUE_OR_FALSE:
            wrong = not isinstance(value, bool)
        elif key in _REALS:
            wrong = isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf
        elif key in ("hidden_act", "hidden_activation"):
            wrong = not isinstance(value, str)
        elif key in _OTHER_TYPES:
            wrong = not isinstance(value, list)
        else:
            smallest = 0 if key in _MAY_BE_ZERO else 1
            wrong = isinstance(value, bool) or not isinstance(value, int) or value < smallest
        if wrong:
            raise InputError(f"config.json says {key} {quoted(value)}, which cannot be: download the model again")
    heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
    if settings["num_key_value_heads"] is None:
        settings["num_key_value_heads"] = heads
    if heads % settings["num_key_value_heads"]:
        raise InputError(
            f"config.json says num_attention_heads {heads} over num_key_value_heads "
            f"{settings['num_key_value_heads']}, which does not divide: download the model again"
        )
    if settings["head_dim"] is None:
        if hidden % heads:
            raise InputError(
                f"config.json says hidden_size {hidden} over num_attention_heads {heads} and no head_dim: "
                "download the model again"
            )
        settings["head_dim"] = hidden // heads
    if settings["head_dim"] % 2:
        raise InputError(
            f"config.json says head_dim {settings['head_dim']}, but RoPE needs an even one: use another model"
        )
    if "num_experts_per_tok" in settings:
        count = "num_experts" if "num_experts" in settings else "num_local_experts"
        if settings["num_experts_per_tok"] > settings[count] > 0:
            raise InputError(
                f"config.json says num_experts_per_tok {settings['num_experts_per_tok']} of {count} {settings[count]}: "
                "download the model again"
            )
    if settings.get("mlp_only_layers", ()) is None:
        settings["mlp_only_layers"] = []
    return settings


def _rotated(settings: dict[str, Any]) -> tuple[bool, ...]:
    """Which layers have RoPE; writes SmolLM3's list out."""
    layers = settings["num_hidden_layers"]
    if "no_rope_layers" not in settings:
        return (True,) * layers
    interval = settings.pop("no_rope_layer_interval")
    given = settings["no_rope_layers"]
    if given is None:
        given = [int((index + 1) % interval != 0) for index in range(layers)]
    if len(given) != layers or any(item not in (0, 1) for item in given):
        raise InputError(f"config.json's no_rope_layers must be 0 or 1 for each of num_hidden_layers {layers}")
    settings["no_rope_layers"] = [int(item) for item in given]
    return tuple(bool(item) for item in given)


def _sliding(
    family: str, config: Mapping[str, Any], settings: dict[str, Any], rotated: tuple[bool, ...]
) -> tuple[list[str], int | None]:
    """Every layer's type, and the window of those that slide."""
    layers, window = settings["num_hidden_layers"], settings.get("sliding_window")
    if not settings.get("use_sliding_window", True):
        window = None
    if "sliding_window" not in settings:
        kinds = [FULL] * layers
    elif family == "gemma2":
        kinds = [SLIDING if (index + 1) % 2 else FULL for index in range(layers)]
    elif family == "gemma3_text":
        kinds = [SLIDING if (index + 1) % settings["sliding_window_pattern"] else FULL for index in range(layers)]
    elif window is None:
        kinds = [FULL] * layers
    elif "max_window_layers" in settings:
        kinds = [SLIDING if index >= settings["max_window_layers"] else FULL for index in range(layers)]
    elif family == "smollm3":
        kinds = [FULL if turns else SLIDING for turns in rotated]
    else:
        kinds = [SLIDING] * layers
    given = config.get("layer_types")
    if given is not None:
        if not isinstance(given, list) or any(kind not in (FULL, SLIDING) for kind in given) or len(given) != layers:
            raise InputError(
                f"config.json's layer_types must be {FULL} or {SLIDING} for each of num_hidden_layers {layers}: "
                "use another model"
            )
        if "layer_types" in settings:
            kinds = given
        elif given != kinds:
            raise InputError(
                f"config.json's layer_types has {quoted(given)}, but all layers of a {family!r} are "
                f"{kinds[0]} here: remove it, or use another model"
            )
    if SLIDING not in kinds:
        return kinds, None
    if window is None:
        switch = (
            "use_sliding_window is false" if not settings.get("use_sliding_window", True) else "sliding_window is null"
        )
        raise InputError(f"config.json's layer_types has layers that slide, but {switch}: state the window")
    return kinds, window


def _length(config: Mapping[str, Any], key: str) -> int | None:
    """How many tokens a setting says; None where it is null, 0 or not there."""
    value = config.get(key)
    if value in (None, 0):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= LARGEST:
        raise InputError(f"config.json says {key} {quoted(value)}, which is no length: download the model again")
    return int(value)


def _table(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The settings in a setting; none where it is null or not there."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise InputError(f"config.json says {key} {quoted(value)}, which is no table: download the model again")
    return value or {}


def _rotations(family: str, config: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, Rotation]:
    head_dim, context = settings["head_dim"], settings["max_position_embeddings"]
    theta = config.get("rope_theta", ROPE_THETA.get(family, 1e4))
    for key in ("rope_theta", "rope_local_base_freq"):
        stated = config.get(key, theta)
        if isinstance(stated, bool) or not isinstance(stated, (int, float)) or not 0 < stated < math.inf:
            raise InputError(f"config.json says {key} {quoted(stated)}, which cannot be: download the model again")
    scaling, nested = _table(config, "rope_scaling"), _table(config, "rope_parameters")
    by_kind = any(isinstance(value, dict) for value in nested.values())
    shared = {"head_dim": head_dim, "context": context, "original": None, "partial": False}
    if family == "gemma3_text":
        if nested and not by_kind:
            raise InputError(f"config.json's rope_parameters must state {FULL} and {SLIDING} apart: convert it again")
        full = {**(nested.get(FULL) or {}), **scaling}
        if "rope_type" not in full and full.get("type", "default") != "default":
            raise InputError("config.json's rope_scaling states its type, where Gemma 3 reads rope_type: rename it")
        if full.get("truncate") is False:
            raise InputError("config.json's rope_scaling says truncate false, which Gemma 3 does not read: remove it")
        sliding = nested.get(SLIDING) or {}
        local = config.get("rope_local_base_freq", 1e4)
        return {
            FULL: rotation(full, "rope_scaling" if scaling else "rope_parameters", theta=theta, **shared),
            SLIDING: rotation(sliding, "rope_parameters", theta=local, **shared),
        }
    if by_kind:
        raise InputError(
            f"config.json's rope_parameters differ by layer, which a {family!r} does not do: use another model"
        )
    for key, value in scaling.items():
        if key in nested and nested[key] != value:
            raise InputError(f"config.json's rope_scaling and rope_parameters disagree about {key}: remove one of them")
    given = {**nested, **scaling}
    share = config.get("partial_rotary_factor")
    if share is not None:
        given.setdefault("partial_rotary_factor", share)
    key = "rope_scaling" if scaling else "rope_parameters"
    if family == "phi3":
        kind = given.get("rope_type", given.get("type", "default"))
        if kind in ("su", "yarn"):  # what early configs called it
            given["rope_type"] = "longrope"
        elif kind not in ("default", "longrope"):
            raise InputError(f"config.json's {key} is of the type {kind!r}: Phi-3 knows longrope alone")
        shared |= {"partial": True, "original": settings["original_max_position_embeddings"]}
    elif "original_max_position_embeddings" in config and given.get("original_max_position_embeddings") is None:
        shared["original"] = config["original_max_position_embeddings"]
    return {FULL: rotation(given, key, theta=theta, **shared)}
