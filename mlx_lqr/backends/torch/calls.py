"""Where the tokens of one call of a transformers model stand.

transformers renames the arguments of its models from time to time. So a call is bound to the model's own signature, the
cache is known by what it is and not by its name, and position ids are held against what the cache says. What cannot be
placed is refused: taken for the beginning of a text, it would be steered at the wrong tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from mlx_lqr.backends.torch.library import paged_cache
from mlx_lqr.errors import InputError


def unknown_positions(what: str) -> InputError:
    """The refusal of a call whose tokens cannot be placed."""
    return InputError(
        f"transformers {metadata.version('transformers')} {what}, so that it is not known which tokens to steer: use "
        "mlx_lqr.generate, or another version of transformers"
    )


@dataclass(frozen=True)
class Call:
    """A call of a model's body, its arguments by the names of its own signature."""

    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Bind a call's arguments; whatever only the signature's `**kwargs` takes counts as an argument too."""
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
        return cls(arguments)

    @property
    def length(self) -> int:
        """How many positions the call has."""
        for name in ("input_ids", "inputs_embeds"):
            if isinstance(tokens := self.arguments.get(name), torch.Tensor):
                return tokens.shape[1]
        raise unknown_positions("calls its models with neither input_ids nor inputs_embeds")

    @property
    def cache(self) -> Any:
        """The object that holds keys and values, under whatever name, or None."""
        caches = {id(value): value for value in self.arguments.values() if _is_cache(value)}
        if len(caches) > 1:
            raise unknown_positions("calls its models with several caches")
        return next(iter(caches.values()), None)

    @property
    def is_paged(self) -> bool:
        """Whether many requests stand in one row, with a cache that does not tell where they do (generate_batch)."""
        cache = self.cache
        return cache is not None and (isinstance(cache, paged_cache()) or not hasattr(cache, "get_seq_length"))

    def before(self) -> int:
        """How many positions stand before those of the call, padding included.

        Raises:
            InputError: nothing tells, or the cache and the position ids contradict each other.
        """
        cache, positions = self.cache, self.arguments.get("position_ids")
        if self.is_paged:
            raise unknown_positions(f"calls its models with a {type(cache).__name__}")
        if cache is None and positions is None and self.arguments.get("use_cache") is not False:
            raise unknown_positions("calls its models with neither a cache nor position_ids")
        before = length_of(cache)
        if positions is not None:
            last, newest = before + self.length - 1, int(positions[..., -1].max())
            if newest > last or (newest < last and not self._may_be_padded()):
                held = f"a cache of {before}" if cache is not None else "no cache"
                raise unknown_positions(f"calls its models with {held} and position_ids up to {newest}")
        return before

    def _may_be_padded(self) -> bool:
        """Whether every sequence may begin with padding, which counts for the cache and not for position ids."""
        mask = self.arguments.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            return bool((mask == 0).any())
        return mask is not None

    def last_of_each_request(self) -> torch.Tensor:
        """Which positions (1, L, 1) of a paged call the next tokens of its requests follow.

        Those are each prompt's last token and all generated tokens, since no prompt's other tokens are asked for
        anything.
        """
        bounds, asked = self.arguments.get("cu_seq_lens_q"), self.arguments.get("logits_indices")
        if bounds is None or asked is None:
            missing = "cu_seq_lens_q" if bounds is None else "logits_indices"
            raise unknown_positions(f"calls its models with packed requests without {missing}")
        is_last = torch.zeros(self.length, dtype=torch.bool, device=bounds.device)
        is_last[bounds[1:][bounds.diff() > 0].long() - 1] = True
        is_asked = torch.zeros_like(is_last)
        is_asked[asked.long()] = True
        is_asked[0] &= is_last[0]  # where there are fewer requests than room for them, the rest of `asked` is zero
        if (is_asked & ~is_last).any():
            raise unknown_positions("asks for logits in the midst of packed requests")
        return is_asked[None, :, None]

    def last_of_each_text(self) -> torch.Tensor | None:
        """The last position of each text (B, L, 1) where several stand in one row without a cache, or None.

        transformers tells them apart in the same way: by position ids that start again, where there is no mask.
        """
        positions = self.arguments.get("position_ids")
        if positions is None or self.cache is not None or self.arguments.get("attention_mask") is not None:
            return None
        starts = positions.diff(dim=-1) != 1
        if not starts.any():
            return None
        return torch.nn.functional.pad(starts, (0, 1), value=True)[..., None]


def length_of(cache: Any) -> int:
    """How many positions a cache holds; 0 for none.

    Raises:
        InputError: it does not say.
    """
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError as error:  # of state-space models, whose caches keep no positions
        raise unknown_positions(f"calls this model with a {type(cache).__name__} that has no length") from error


def _is_cache(value: Any) -> bool:
    if isinstance(value, (torch.Tensor, Mapping)):
        return False
    return callable(getattr(value, "get_seq_length", None)) or callable(getattr(value, "update", None))
