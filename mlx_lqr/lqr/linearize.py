"""A model -> its layer Jacobians A_k = d phi_k / d s_k at the last token, averaged over nominal prompts.

The token's own key and value are part of the map; all earlier tokens are fixed. s_k = (z_k, side_k) is the residual
stream with the m numbers that blocks hand on beside it; for most models m = 0 and s_k = z_k. Jacobians are streamed
from the last layer to the first, as the Riccati recursion uses them, so that only a few (d, d) matrices are in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import overload

import numpy as np

from mlx_lqr.backends.capabilities import DIFFERENTIABLE, require
from mlx_lqr.backends.protocol import Differentiable, Float32, Matrix, Progress, Trace
from mlx_lqr.errors import InputError
from mlx_lqr.files.atomic import reserved, writing
from mlx_lqr.files.jacobians import JacobianWriter, StoredJacobians
from mlx_lqr.files.json_text import Entries
from mlx_lqr.lqr.prompts import Prompt, tokenise

MAX_TOKENS = 32
"""Nominal prompts are cut to this many tokens: the Jacobian at a token depends little on a longer past."""


@dataclass(frozen=True, eq=False)
class Jacobians(Sequence[Float32]):
    """A_0..A_{T-1}, each (d + m, d + m) float32, of the model with this fingerprint."""

    matrices: Sequence[Float32]
    fingerprint: str = ""
    model_name: str = ""
    prompt_count: int = 0
    width: int | None = None
    """d, if m > 0"""

    def __len__(self) -> int:
        return len(self.matrices)

    @overload
    def __getitem__(self, layer: int) -> Float32: ...
    @overload
    def __getitem__(self, layer: slice) -> Sequence[Float32]: ...
    def __getitem__(self, layer: int | slice) -> Float32 | Sequence[Float32]:
        return self.matrices[layer]

    def save(self, path: str | PathLike[str], *, dtype: str = "float32", force: bool = False) -> None:
        """Write the tensors `jacobian.K` ("float32" or "float16") to a safetensors file.

        Args:
            force: overwrite a file of any kind.
        """
        metadata = _metadata(self.fingerprint, self.model_name, self.prompt_count, "", self.width)
        # A new file, so that an unfinished one of another save is not continued.
        with writing(path, kind="Jacobians", force=force) as temporary:
            writer = JacobianWriter(temporary, len(self), len(self[0]), dtype, metadata)
            for k in reversed(range(len(self))):
                writer.append(k, self[k])
            writer.close()

    @property
    def side(self) -> int:
        """m, how many numbers blocks hand on beside the residual stream."""
        return 0 if self.width is None else len(self[0]) - self.width

    def pull_back(self, layer: int, columns: Matrix) -> Matrix:
        """A_k' X for columns X (d + m, n)."""
        return self[layer].T @ columns

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Jacobians:
        """Open a file of Jacobians; each matrix is read when it is used (the file is memory-mapped)."""
        stored = StoredJacobians(path)
        entries = Entries(stored.metadata)
        try:
            width = entries.count("width", 1, len(stored[0]) - 1) if "width" in entries else None
            prompts = entries.count("prompts")
            return cls(stored, entries.text("fingerprint"), entries.text("model"), prompts, width)
        except ValueError as error:
            raise InputError(
                f"{path} is a damaged file of Jacobians ({error}): make it again with `linearize`"
            ) from error


def linearize(
    model: Differentiable,
    prompts: Sequence[Prompt],
    *,
    store: str | PathLike[str] | None = None,
    dtype: str = "float32",
    force: bool = False,
    progress: Progress | None = None,
) -> Jacobians:
    """The layer Jacobians of a model, averaged over `prompts` (at most 32 tokens of each).

    Args:
        model: what `load` returned.
        prompts: where to linearise; a single one gives the "nominal" Jacobians at its last token.
        store: a safetensors file to write them to, layer by layer; the result then reads from it. An interrupted run
            continues where it stopped if it is called again with the same arguments.
        dtype: "float32" or "float16", in the file.
        force: overwrite a file of any kind.
        progress: called as progress(stage, done, total).

    Raises:
        InputError: unusable prompts, or a place that cannot be written or that another mlx-lqr writes.
    """
    require(model, DIFFERENTIABLE, "compute Jacobians")
    width = model.hidden_size if model.state_size > model.hidden_size else None
    if store is None:
        jacobians = dict(stream_jacobians(model, traces(model, prompts), progress=progress))
        matrices = [jacobians[k] for k in range(len(jacobians))]
        return Jacobians(matrices, model.fingerprint, model.name, len(prompts), width)
    with reserved(store, "Jacobians", force=force):
        points = traces(model, prompts)
        digest = hashlib.sha256(b"".join(trace.residual.tobytes() for trace in points)).hexdigest()[:16]
        metadata = _metadata(model.fingerprint, model.name, len(prompts), digest, width)
        writer = JacobianWriter(store, model.num_layers, model.state_size, dtype, metadata, force=force)
        try:
            for k, A in _stream(model, points, model.num_layers - 1 - writer.finished, 0, progress):
                writer.append(k, A)
        finally:
            writer.close()
        return Jacobians.load(store)


def traces(model: Differentiable, prompts: Sequence[Prompt]) -> list[Trace]:
    """Run each prompt (at most 32 tokens of it) and keep what the Jacobians at its last token need.

    Raises:
        InputError: no prompts, or an unusable one.
    """
    if isinstance(prompts, str) or not prompts:
        raise InputError("linearize needs a list of at least one prompt")
    return list(model.traces(tokenise(model, prompt)[:MAX_TOKENS] for prompt in prompts))


def stream_jacobians(
    model: Differentiable, points: Sequence[Trace], *, lowest: int = 0, progress: Progress | None = None
) -> Iterator[tuple[int, Float32]]:
    """Yield (k, A_k), averaged over traces, from the last layer down to `lowest`.

    The gains of a layer depend on its own Jacobian and on those above it, so nothing below the lowest layer is needed.

    Raises:
        InputError: a Jacobian that is not finite (the layer is named).
    """
    yield from _stream(model, points, model.num_layers - 1, lowest, progress)


def _stream(
    model: Differentiable, points: Sequence[Trace], highest: int, lowest: int, progress: Progress | None
) -> Iterator[tuple[int, Float32]]:
    steps = (model.num_layers - lowest) * len(points)
    for k in reversed(range(lowest, highest + 1)):
        total = np.zeros((model.state_size, model.state_size), np.float32)
        for index, trace in enumerate(points):
            total += model.jacobian(trace, k)
            if progress:
                progress("Jacobians", (model.num_layers - 1 - k) * len(points) + index + 1, steps)
        total /= len(points)
        if not np.all(np.isfinite(total)):
            raise InputError(f"the Jacobian of layer {k} is not finite: load the model with dtype float32")
        yield k, total


def _metadata(fingerprint: str, model_name: str, prompts: int, digest: str, width: int | None) -> dict[str, str]:
    metadata = {
        "fingerprint": fingerprint,
        "model": model_name,
        "prompts": str(prompts),
        "prompts_digest": digest,
    }
    return metadata if width is None else metadata | {"width": str(width)}
