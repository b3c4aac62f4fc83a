"""torch's names for what recording and decoding are made of (see `Framework`); what is said when memory runs out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mlx_lqr.backends.framework import Framework
from mlx_lqr.backends.protocol import Float32
from mlx_lqr.backends.torch.blocks import ForwardHooks
from mlx_lqr.backends.turn import Turn
from mlx_lqr.errors import InputError

_SHORTER = "give shorter prompts, load the model with dtype bfloat16, or use device cpu"
_FEWER = "decode fewer or shorter prompts at once, ask for fewer tokens, or load the model with dtype bfloat16"
ADVICE = {
    "the activations": _SHORTER,
    "the log-probabilities": _SHORTER,
    "the logits": _SHORTER,
    "the prompts": _FEWER,
    "the next token": _FEWER,
    "the trace": "trace a shorter prompt",
    "the derivatives": "load the model with dtype bfloat16, use the feature cost, or device cpu; what is stored so far "
    "stays",
    "the gains": "solve in NumPy (algebra=None), load the model with device cpu, or use the feature cost",
    "the model": "load it with dtype bfloat16, or on device cpu",
}
"""What to do where there is not enough memory for it."""


class TorchFramework(Framework):
    """torch on the device where the module is.

    Args:
        dtype: of the residual stream.
        hooks: how they are placed on the model's blocks.
    """

    turn = Turn()

    def __init__(self, module: Any, dtype: torch.dtype, hooks: type[ForwardHooks] = ForwardHooks) -> None:
        self._module = module
        self.dtype = dtype
        self.hooks = hooks

    @classmethod
    def of(cls, module: Any, block: torch.nn.Module) -> TorchFramework:
        """For a model with such blocks; norms are never packed, so that theirs is the dtype of the residual stream."""
        named = block.named_parameters()
        return cls(module, next(weight.dtype for name, weight in named if name.endswith("norm.weight")))

    @property
    def device(self) -> torch.device:
        device: torch.device = self._module.device
        return device

    @property
    def device_name(self) -> str:
        return "CPU" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).rpartition(".")[2]

    def floats(self, values: np.ndarray) -> torch.Tensor:
        return torch.tensor(values, device=self.device).to(self.dtype)

    def renewed(self, array: torch.Tensor, values: np.ndarray) -> torch.Tensor:
        return array.copy_(self.floats(values))

    def integers(self, numbers: Any) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.device)

    def tokens(self, tokens: torch.Tensor | Sequence[int]) -> torch.Tensor:
        tokens = tokens if isinstance(tokens, torch.Tensor) else self.integers(tokens)
        return tokens.clamp_min(0)

    def arange(self, count: int) -> torch.Tensor:
        return torch.arange(count, device=self.device)

    def none_seen(self, rows: int, vocabulary: int) -> torch.Tensor:
        return torch.zeros(rows, vocabulary, dtype=torch.bool, device=self.device)

    def added(self, array: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return array.scatter_add(1, columns, values.float())

    def float32(self, array: torch.Tensor) -> torch.Tensor:
        return array.float()

    def numpy(self, array: torch.Tensor) -> Float32:
        return array.float().cpu().numpy()

    def stack(self, arrays: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
        return torch.stack(list(arrays), dim=axis)

    def concatenate(self, arrays: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
        return torch.cat(list(arrays), dim=axis)

    def where(self, condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor | int) -> torch.Tensor:
        return torch.where(condition, a, b)

    def add_product(self, c: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """For any number of leading dimensions of a and as many, or none, of c."""
        product = torch.addmm(c.reshape(-1, c.shape[-1]), a.reshape(-1, a.shape[-1]), b)
        return product.view(*a.shape[:-1], b.shape[-1])

    def energy(self, z: torch.Tensor) -> torch.Tensor:
        return z.float().square().sum(dim=-1)

    def is_finite(self, array: torch.Tensor) -> bool:
        return bool(torch.isfinite(array).all())

    def log_probabilities(self, logits: torch.Tensor, tokens: Sequence[int]) -> Float32:
        chosen = torch.log_softmax(logits, dim=-1).gather(-1, self.integers(list(tokens))[:, None])
        return self.numpy(chosen[:, 0])

    def likeliest(self, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, largest = torch.log_softmax(logits, dim=-1).topk(count, dim=-1)
        return largest, values

    def compute(self, arrays: Iterable[torch.Tensor]) -> None:
        """Nothing: torch computes at once."""

    def start(self, arrays: Iterable[torch.Tensor]) -> None:
        """Nothing: torch has started."""

    @contextmanager
    def computing(self, what: str) -> Iterator[None]:
        with self.turn, torch.no_grad(), memory_for(what):
            yield


def out_of_memory(error: BaseException) -> bool:
    """Whether torch has failed to get memory, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Turn torch's failure to get memory inside this context into one line that says what to lower."""
    advice = ADVICE[what]
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise InputError(f"not enough memory for {what}: {advice}") from error
