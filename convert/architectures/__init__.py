"""The architectures of GGUF files that can be converted."""

from __future__ import annotations

from mlx_lqr.convert.architectures.dense import DENSE
from mlx_lqr.convert.architectures.gemma import GEMMA
from mlx_lqr.convert.architectures.latent import LATENT
from mlx_lqr.convert.architectures.mixtures import MIXTURES
from mlx_lqr.convert.architectures.qwen import QWEN
from mlx_lqr.convert.architectures.recurrent import RECURRENT
from mlx_lqr.convert.architectures.row import Architecture, Stated
from mlx_lqr.convert.architectures.windows import WINDOWS
from mlx_lqr.convert.gguf_file import GGUFFile
from mlx_lqr.errors import InputError, quoted

ARCHITECTURES: tuple[Architecture, ...] = (*DENSE, *GEMMA, *QWEN, *MIXTURES, *LATENT, *RECURRENT, *WINDOWS)


def architecture(file: GGUFFile) -> Architecture:
    """The row for `file`.

    Raises:
        InputError: there is none.
    """
    name = file.value("general.architecture", str)
    rows = [row for row in ARCHITECTURES if row.name == name]
    if not rows:
        supported = ", ".join(sorted({row.name for row in ARCHITECTURES}))
        raise InputError(
            f"{file.path} has the architecture {quoted(name)}, which cannot be converted: give the original model "
            f"(a folder or hub id), or one of {supported}"
        )
    mixture = file.value(f"{name}.expert_count", int, 0) > 0
    fitting = [row for row in rows if row.mixture in (None, mixture)]
    for row in fitting:
        if row.only is None or row.only(Stated(file)):
            return row
    if mixture:
        raise InputError(f"{file.path} is a mixture of experts of the architecture {quoted(name)}: use another model")
    raise InputError(f"{file.path} does not state {name}.expert_count: convert the original model to GGUF again")


__all__ = ["ARCHITECTURES", "Architecture", "Stated", "architecture"]
