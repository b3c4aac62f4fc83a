"""Decoding with a transformers model: some sequences side by side, in caches of our own; on a GPU as CUDA graphs."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from mlx_lqr.backends.hooked_decoder import PREFILL_CHUNK, Head, HookedDecoder
from mlx_lqr.backends.hooks import BlockCall
from mlx_lqr.backends.protocol import GREEDY, Float32, Law, Sampling
from mlx_lqr.backends.torch.attention import attending
from mlx_lqr.backends.torch.blocks import FrozenBlock, hooked
from mlx_lqr.backends.torch.cache import KeyValueCache
from mlx_lqr.backends.torch.framework import TorchFramework
from mlx_lqr.backends.torch.library import cache_argument
from mlx_lqr.backends.torch.sampling import TorchSampler

RECORD_AFTER = 8
"""Steps without a graph after sequences have joined or left: where they come and go, recording would take longer"""


@dataclass(frozen=True)
class TorchTrace:
    """What the Jacobians at a prompt's last token depend on."""

    residual: Float32
    """z_0..z_T: (T + 1, d)"""
    blocks: list[FrozenBlock]
    """Each block as a function of its input there."""
    nbytes: int
    """Memory held: the prefix's keys and values, and the residual stream."""

    @property
    def state(self) -> Float32:
        """s_k = z_k: (T + 1, d)"""
        return self.residual


class TorchDecoder(HookedDecoder):
    """The `TracingDecoder` protocol.

    Args:
        module: a transformers model for causal language modelling.
        law, sampling, window: see `HookedDecoder`.
    """

    _cache: KeyValueCache
    _framework: TorchFramework

    def __init__(
        self,
        module: Any,
        framework: TorchFramework,
        law: Law | None,
        sampling: Sampling,
        window: int | None = None,
    ) -> None:
        self._module = module
        self._device = framework.device
        self._cache_argument = cache_argument(module.base_model)
        self._graph: _Graph | None = None
        self._plain_steps = 0
        """To come before a graph is recorded again"""
        self._graph_acts = False
        """Whether the law did when the graph was recorded."""
        self._records_graphs = self._device.type == "cuda" and _can_be_recorded(module)
        # Not None: a mask of this shape keeps transformers from making, and checking, masks of its own.
        self._no_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=self._device)
        super().__init__(framework, module.base_model.layers, int(module.config.vocab_size), law, sampling, window)

    @property
    def position(self) -> int:
        return self._cache.length if self._cache else 0

    def _place(self, law: Law | None) -> Law | None:
        self._graph = None
        placed: Law | None = self._framework.place(law)
        return placed

    def _sampler_of(self, sampling: Sampling) -> TorchSampler:
        return TorchSampler(self._framework, sampling)

    def _settle(self) -> None:
        """The cache has one form alone."""

    def _new_cache(self, padding: list[int]) -> KeyValueCache:
        return KeyValueCache(len(self._blocks), padding, self._device, window=self._window, ahead=PREFILL_CHUNK)

    def _step(self, tokens: torch.Tensor) -> torch.Tensor:
        if self._records_graphs and self._plain_steps == 0 and (self._law is None or self._law.replayable):
            return self._replay(tokens)
        self._plain_steps = max(0, self._plain_steps - 1)
        return self._append(tokens[:, None], steered=True)

    def _keep(self, rows: torch.Tensor) -> None:
        self._cache.keep(rows)
        self._graph, self._plain_steps = None, RECORD_AFTER

    def _join(self, other: TorchDecoder) -> None:
        self._cache.join(other._cache)
        self._graph, self._plain_steps = None, RECORD_AFTER

    def _copy_of(self, row: int) -> TorchDecoder:
        alone = TorchDecoder(self._module, self._framework, None, GREEDY)
        alone._cache = self._cache.of_row(row)
        return alone

    def _rewind(self, position: int) -> bool:
        return self._cache.rewind(position)

    def _trace(self, token: int) -> TorchTrace:
        if not self._cache:
            self._start([0])
        frozen = self._cache.frozen()
        precise = _PreciseRotation(self._module.base_model.rotary_emb)
        residual: list[torch.Tensor] = []
        blocks: list[FrozenBlock] = []

        def record(k: int, z: torch.Tensor, call: BlockCall) -> torch.Tensor:
            kwargs = {**call.kwargs, "position_embeddings": precise.of(call.kwargs["position_embeddings"])}
            blocks.append(FrozenBlock(self._blocks[k], self._module.config, frozen, call.args, kwargs))
            residual.append(z[0, -1])
            output = call(z)
            if k == len(self._blocks) - 1:
                residual.append(output[0, -1])
            return output

        with (
            hooked(self._blocks, record, range(len(self._blocks))),
            attending(self._module.config, frozen),
            precise,
        ):
            self._module.base_model(
                input_ids=self._framework.integers([[token]]),
                attention_mask=self._no_mask,
                position_ids=frozen.position,
                use_cache=True,
                **{self._cache_argument: frozen},
            )
        stacked = torch.stack(residual).float().cpu().numpy()
        return TorchTrace(stacked, blocks, frozen.nbytes + stacked.nbytes)

    def _append(self, tokens: torch.Tensor, *, steered: bool, head: Head = "last") -> torch.Tensor:
        cache, length = self._cache, tokens.shape[1]
        if cache.make_room(length):
            self._graph = None
        at = torch.arange(cache.length, cache.length + length, device=tokens.device)
        logits = self._forward(tokens, at, cache.slots_after(length), steered=steered, head=head)
        cache.length += length
        return logits

    def _forward(
        self, tokens: torch.Tensor, at: torch.Tensor, used: int, *, steered: bool, head: Head = "last"
    ) -> torch.Tensor:
        """The forward pass alone: tokens (B, L) at places (L,) of the cache, with `used` of its slots in sight."""
        self._energy = None
        options: dict[str, Any] = {
            "input_ids": tokens,
            "attention_mask": self._no_mask,
            "position_ids": self._cache.enter(at, used),
            self._cache_argument: self._cache,
            "use_cache": True,
        }
        hooks = self._hooks.placed() if steered and self._hooks is not None else nullcontext()
        with hooks, attending(self._module.config, self._cache):
            if head == "none":
                hidden: torch.Tensor = self._module.base_model(**options).last_hidden_state
                return hidden
            if head == "all":
                every: torch.Tensor = self._module(**options).logits
                return every
            logits: torch.Tensor = self._module(**options, logits_to_keep=1).logits[:, -1]
            return logits

    def _replay(self, tokens: torch.Tensor) -> torch.Tensor:
        """A steered step (B,) as a CUDA graph, which is recorded again when the buffers that it works on change."""
        cache = self._cache
        acts = self._law is not None and self._law.acts
        if self._law is not None:
            self._law.aim()  # before recording too: a graph holds the law's products and must not hold its aiming
        if cache.make_room(1) or self._graph is None or self._graph_acts != acts:
            self._graph = None  # its memory is let go before the new one takes any

            def run(tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
                return self._forward(tokens[:, None], at, cache.capacity, steered=True)

            self._graph = _Graph(run, tokens, cache.length)
            self._graph_energy, self._graph_acts = self._energy, acts
        logits = self._graph.replay(tokens, cache.length)
        self._energy = self._graph_energy
        cache.length += 1
        return logits


class _Graph:
    """A decoding step recorded once and replayed at the cost of a single launch.

    Args:
        run: (tokens (B,), place (1,)) -> logits (B, V), on the device alone.
        tokens, length: what it is recorded with; recording writes what the first replay writes again.
    """

    def __init__(
        self, run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], tokens: torch.Tensor, length: int
    ) -> None:
        self._tokens = tokens.clone()
        self._at = torch.full((1,), length, dtype=torch.long, device=tokens.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(tokens.device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # libraries set themselves up on the first calls, which cannot be recorded
                for _ in range(2):
                    run(self._tokens, self._at)
            torch.cuda.current_stream().wait_stream(aside)
            # Other threads may go on with what they compute, which has no part in it.
            with _nothing_collected(), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._logits = run(self._tokens, self._at)

    def replay(self, tokens: torch.Tensor, length: int) -> torch.Tensor:
        """The logits (B, V) of tokens (B,) at place `length`."""
        self._tokens.copy_(tokens)
        self._at.fill_(length)
        with torch.cuda.device(self._at.device):
            self._graph.replay()
        return self._logits.clone()  # the next replay writes over it


_recording = threading.Lock()


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Inside this context Python collects no garbage; one thread at a time.

    A decoder that nobody uses any more is collected together with its graph, and CUDA gives up a recording during which
    the thread lets a graph go.
    """
    with _recording:
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


class _PreciseRotation:
    """Inside this context the rotary embedding also computes its angles in float32, whatever it gives the model.

    A model of 16 bits rounds them, which would stand as an error in derivatives taken in float32.
    """

    def __init__(self, rotary: torch.nn.Module) -> None:
        self._rotary = rotary
        self._pairs: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        original = self._rotary.forward

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            precise = original(x.float(), *args, **kwargs)
            given = tuple(part.to(x.dtype) for part in precise)
            self._pairs.append((given, precise))
            return given

        self._rotary.__dict__["forward"] = forward

    def __exit__(self, *_: object) -> None:
        self._rotary.__dict__.pop("forward", None)

    def of(self, given: Any) -> Any:
        """The float32 form of what the embedding has given."""
        return next((precise for gave, precise in self._pairs if gave is given), given)


def _can_be_recorded(module: Any) -> bool:
    """Whether a step does the same whatever the numbers: experts are picked, and some rotations grow, by looking."""
    if any("expert" in name for name, _ in module.named_modules()):
        return False
    rotation = module.base_model.rotary_emb.rope_type  # where layers differ, by the kind of layer
    kinds = rotation.values() if isinstance(rotation, dict) else [rotation]
    return not any(kind in ("dynamic", "longrope") for kind in kinds)
