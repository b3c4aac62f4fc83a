"""What models on no list have in common, whatever the framework: nothing is known of them by name.

Sizes that their arrays do not show are looked for in config.json under the names that families have for them; logits
are taken at the last block's output, since nobody knows the norm before the head.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from mlx_lqr.backends.batching import Stretches
from mlx_lqr.backends.hooked_model import HookedModel
from mlx_lqr.backends.hooks import BlockCall
from mlx_lqr.backends.protocol import Array, Float32, Kept, Law, Progress
from mlx_lqr.backends.state_place import NoChainError
from mlx_lqr.errors import InputError, first_line

WITHOUT_HEADS = "this model has blocks without self_attn.o_proj: use a method that acts on whole blocks"
_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length")
"""The names that families have for how long a context may be."""
_HEADS = ("num_attention_heads", "n_head", "num_heads")
L = TypeVar("L")


def sizes_of(config: Mapping[str, Any], width: int, vocabulary: int) -> dict[str, Any]:
    """A config under the names that `HookedModel` reads; None for heads and length of context where it says none."""
    sizes = {**_of_text(config), "hidden_size": width, "vocab_size": vocabulary}
    heads, length = stated_size(config, *_HEADS), stated_size(config, *_LENGTHS)
    return sizes | {"num_attention_heads": heads, "max_position_embeddings": length}


def stated_size(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these sizes that a config says as one number."""
    sizes = _of_text(config)
    for name in names:
        value = sizes.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _of_text(config: Mapping[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    return {**config, **(text if isinstance(text, dict) else {})}


def layout_or_refusal(look: Callable[[], L], family: str) -> L:
    """What `look` finds in a model.

    Raises:
        InputError: it has failed, or found no chain of blocks.
    """
    refused = f"models of the type {family!r} cannot be steered"
    try:
        return look()
    except NoChainError as error:
        raise InputError(f"{refused}: {error}; a controller needs blocks that hand on one state") from error
    except InputError:
        raise
    except Exception as error:  # of any of the library's modules
        raise InputError(f"{refused}: running a few tokens failed ({first_line(error)})") from error


class MeasuredRecorder(HookedModel):
    """A model of any architecture as a `Recorder` and, where its blocks have heads, a `HeadRecorder`."""

    family: str
    _knows_heads: bool

    @abstractmethod
    def _head_widths(self) -> set[int] | None:
        """How wide the inputs of the blocks' self_attn.o_proj are; None where some have none."""

    def _logits_at(self, asked: Stretches, law: Law | None, steer_all: bool, kept: Kept | None) -> tuple[Array, Array]:
        """Nothing is kept: blocks may hand on more than their state."""
        framework, last = self._framework, self.num_layers - 1
        tokens = self._padded(asked.sequences)
        at = framework.integers(asked.rows), framework.integers(asked.positions)
        first = 0 if steer_all else framework.integers(asked.first)[:, None]
        steering = self._from_positions(law, first, tokens)
        energies: list[Array] = []

        def hook(k: int, z: Array, call: BlockCall) -> Array:
            output = steering.block(k, z, call)
            if k == last:
                energies.append(framework.energy(output[at]))
            return output

        layers = sorted({*(law.layers if law is not None else ()), last})
        with framework.hooked(self.blocks, hook, layers, steering):
            logits = framework.float32(self._run(tokens)[at])
        return logits, (logits * 0).sum(-1) + energies[0] * 0

    def head_outputs(self, prompts: Sequence[Sequence[int]], *, progress: Progress | None = None) -> Float32:
        self._check_heads()
        return super().head_outputs(prompts, progress=progress)

    def projected(self, layer: int, heads: Float32) -> Float32:
        self._check_heads()
        return super().projected(layer, heads)

    def _check_heads(self) -> None:
        widths = self._head_widths()
        if widths is None:
            raise InputError(WITHOUT_HEADS)
        if not self._knows_heads or len(widths) > 1:
            raise InputError(
                f"the attention heads of models of the type {self.family!r} differ by layer, or config.json does not "
                "say how many there are: use a method that acts on whole blocks"
            )

    def _named(self, norms: Sequence[tuple[str, bytes]]) -> Sequence[tuple[str, bytes]]:
        """The norms, if there are any.

        Raises:
            InputError: there are none.
        """
        if not norms:
            raise InputError(
                f"models of the type {self.family!r} cannot be steered: their blocks have no norm weights, by which a "
                "controller knows its model; use another model"
            )
        return norms
