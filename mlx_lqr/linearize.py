"""A model -> its layer Jacobians A_k = d phi_k / d z_k at the last token, averaged over nominal prompts.

The token's own key and value are part of the map, all earlier tokens are fixed. Jacobians are streamed from the last
layer to the first, the order in which the Riccati sweep consumes them, so that a few (d, d) matrices are all that is
held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np

from mlx_lqr.atomic import writing
from mlx_lqr.backends.base import Float32, Model, Progress, Trace
from mlx_lqr.contrast import Prompt, tokenise
from mlx_lqr.errors import InputError
from mlx_lqr.tensors import read_tensors, write_tensors

FORMAT = "mlx-lqr jacobians 1"
MAX_TOKENS = 32
"""Nominal prompts are cut to this many tokens: the Jacobian at a token depends little on a longer past."""


@dataclass(frozen=True)
class Jacobians(Sequence[Float32]):
    """A_0..A_{T-1}, each (d, d) float32, of the model with this fingerprint."""

    matrices: Sequence[Float32]
    fingerprint: str = ""
    model_name: str = ""
    prompt_count: int = 0

    def __len__(self) -> int:
        return len(self.matrices)

    def __getitem__(self, layer):  # type: ignore[no-untyped-def]
        return self.matrices[layer]

    def save(self, path: str | PathLike[str]) -> None:
        """Write the tensors `jacobian.K` to a safetensors file, atomically."""
        metadata = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "model": self.model_name,
            "prompts": str(self.prompt_count),
        }
        with writing(path) as temporary:
            write_tensors(temporary, {f"jacobian.{k}": A for k, A in enumerate(self.matrices)}, metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Jacobians:
        """Read a file that `save` wrote, memory-mapped where the platform allows it."""
        tensors, metadata = read_tensors(path, FORMAT, "a file of Jacobians")
        matrices = [tensors.get(f"jacobian.{k}") for k in range(len(tensors))]
        width = matrices[0].shape[0] if matrices and matrices[0] is not None else 0
        checked = [A for A in matrices if A is not None and A.shape == (width, width)]
        if not matrices or len(checked) != len(matrices):
            raise InputError(
                f"{path} does not hold one square Jacobian for every layer: make it again with `linearize`"
            )
        return cls(
            [A.astype(np.float32, copy=False) for A in checked],
            metadata.get("fingerprint", ""),
            metadata.get("model", ""),
            int(metadata.get("prompts", "0")),
        )


def linearize(model: Model, prompts: Sequence[Prompt], *, progress: Progress | None = None) -> Jacobians:
    """The layer Jacobians of a model, averaged over `prompts` (at most 32 tokens of each)."""
    found = dict(stream_jacobians(model, prompts, progress=progress))
    return Jacobians([found[k] for k in range(len(found))], model.fingerprint, model.name, len(prompts))


def stream_jacobians(
    model: Model, prompts: Sequence[Prompt], *, lowest: int = 0, progress: Progress | None = None
) -> Iterator[tuple[int, Float32]]:
    """Yield (k, A_k), averaged over prompts, from the last layer down to `lowest` (higher gains need no more).

    Raises:
        InputError: no prompts, an unusable prompt, or a Jacobian that is not finite (the layer is named).
    """
    if isinstance(prompts, str) or not prompts:
        raise InputError("linearize needs a list of at least one prompt")
    traces: list[Trace] = [model.trace(tokenise(model, prompt)[:MAX_TOKENS]) for prompt in prompts]
    steps = (model.num_layers - lowest) * len(traces)
    for k in reversed(range(lowest, model.num_layers)):
        total = np.zeros((model.hidden_size, model.hidden_size), np.float32)
        for index, trace in enumerate(traces):
            total += model.jacobian(trace, k)
            if progress:
                progress("Jacobians", (model.num_layers - 1 - k) * len(traces) + index + 1, steps)
        total /= len(traces)
        if not np.all(np.isfinite(total)):
            raise InputError(f"the Jacobian of layer {k} is not finite: load the model with dtype float32")
        yield k, total
