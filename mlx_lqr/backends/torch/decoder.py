"""Decoding with a transformers model: some sequences side by side, in caches of our own; on a GPU as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from mlx_lqr.backends.batching import padded_left
from mlx_lqr.backends.hooks import BlockCall, LawHooks
from mlx_lqr.backends.overflow import Examined, located
from mlx_lqr.backends.protocol import OVERFLOWED, CarryingLaw, Float32, Law, Sampling, restart
from mlx_lqr.backends.torch.attention import attending
from mlx_lqr.backends.torch.blocks import BlockHooks, FrozenBlock, hooked
from mlx_lqr.backends.torch.cache import KeyValueCache
from mlx_lqr.backends.torch.calls import cache_argument
from mlx_lqr.backends.torch.load import memory_for
from mlx_lqr.backends.torch.sampling import Sampler, penalised
from mlx_lqr.errors import InputError, OverflowingError

PREFILL_CHUNK = 512
"""Prompt tokens, of all sequences together, per forward pass while the cache is filled."""

_MEMORY = "decode fewer or shorter prompts at once, ask for fewer tokens, or load the model with dtype bfloat16"


@dataclass(frozen=True)
class TorchTrace:
    """What the Jacobians at a prompt's last token depend on."""

    residual: Float32
    """z_0..z_T: (T + 1, d)"""
    blocks: list[FrozenBlock]
    """Each block as a function of its input there."""
    nbytes: int
    """Memory held: the prefix's keys and values, and the residual stream."""


class TorchDecoder:
    """The `Decoder` protocol (see base.py).

    Args:
        module: a transformers model for causal language modelling.
        place: gives a law arrays of this module's kind.
        law, sampling: see the protocol.
        window: how many tokens a rolling context holds; None where it does not roll.
    """

    def __init__(
        self,
        module: Any,
        place: Callable[[Law | None], Law | None],
        law: Law | None,
        sampling: Sampling,
        window: int | None = None,
    ) -> None:
        self._module = module
        self._blocks: Sequence[torch.nn.Module] = module.base_model.layers
        self._device: torch.device = module.device
        self._cache_argument = cache_argument(module.base_model)
        self._place = place
        self._window = window
        self._cache: KeyValueCache | None = None
        self._energy: torch.Tensor | None = None
        """|z|^2 (B,) after the last steered block of the last step: not finite once activations overflow."""
        self._seen: torch.Tensor | None = None
        """(B, V): the tokens met so far, for the repetition penalty."""
        self._graph: _Graph | None = None
        self._graph_acts = False
        """Whether the law did when the graph was recorded."""
        self._records_graphs = self._device.type == "cuda" and _can_be_recorded(module)
        # Not None: a mask of this shape keeps transformers from making, and checking, masks of its own.
        self._no_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=self._device)
        self.law = law
        self.sampling = sampling

    @property
    def position(self) -> int:
        """How many tokens the cache holds, of the longest sequence."""
        return self._cache.length if self._cache is not None else 0

    @property
    def law(self) -> Law | None:
        return self._law

    @law.setter
    def law(self, law: Law | None) -> None:
        self._law = placed = self._place(law)
        self._graph = None
        self._hooks: BlockHooks | None = None
        if placed is None or not placed.layers:
            return
        steering, last = LawHooks(placed), max(placed.layers)

        def hook(k: int, z: torch.Tensor, call: BlockCall) -> torch.Tensor:
            output = steering.block(k, z, call)
            if k == last:
                self._energy = energy(output[:, -1])
            return output

        self._hooks = BlockHooks(self._blocks, hook, placed.layers, steering)

    @property
    def sampling(self) -> Sampling:
        return self._sampler.sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self._sampler = Sampler(sampling)

    @torch.no_grad()
    @memory_for("the prompts", _MEMORY)
    def fill(self, prompts: Sequence[Sequence[int]], *, steered: bool) -> None:
        restart(self._law)
        width = max(len(prompt) for prompt in prompts)
        if self._cache is None:
            self._start([width - len(prompt) for prompt in prompts])
        if self._seen is not None:
            for row, prompt in enumerate(prompts):
                self._seen[row, list(prompt)] = True
        tokens = self._tokens(padded_left(prompts))
        chunk = max(1, PREFILL_CHUNK // len(prompts))
        for start in range(0, width, chunk):
            self._run(tokens[:, start : start + chunk], steered=steered, head=False)

    @torch.no_grad()
    @memory_for("the next token", _MEMORY)
    def step(self, tokens: torch.Tensor | Sequence[int]) -> torch.Tensor:
        if self._cache is None:
            self._start([0] * len(tokens))
        tokens = tokens if isinstance(tokens, torch.Tensor) else self._tokens(tokens)
        # One that stands for an overflow is reported before anything that follows it is used.
        tokens = tokens.clamp_min(0)
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        if self._records_graphs and (self._law is None or self._law.replayable):
            return self._replay(tokens)
        return self._run(tokens[:, None], steered=True)

    @torch.no_grad()
    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        spoiled = (logits * 0).sum(dim=-1)  # 0, or NaN where one of them is not finite
        if self._energy is not None:
            spoiled = spoiled + self._energy * 0
        if self._seen is not None:
            logits = penalised(logits, self._seen, self.sampling.repetition_penalty)
        tokens = self._sampler.draw(logits)
        return torch.where(spoiled == 0, tokens, OVERFLOWED)

    @torch.no_grad()
    def keep(self, rows: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
        assert self._cache is not None
        chosen = torch.tensor(list(rows), device=self._device)
        self._cache.keep(chosen)
        if isinstance(self._law, CarryingLaw):
            self._law.keep(chosen)
        self._sampler.keep(rows)
        self._graph = None
        if self._seen is not None:
            self._seen = self._seen[chosen]
        return tokens[chosen]

    def rewind(self, position: int) -> bool:
        if self._cache is None or self._seen is not None:
            return False
        return self._cache.rewind(position)

    @torch.no_grad()
    @memory_for("the trace", "trace a shorter prompt")
    def trace(self, token: int) -> TorchTrace:
        if self._cache is None:
            self._start([0])
            assert self._cache is not None
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

        with hooked(self._blocks, record, range(len(self._blocks))), attending(self._module.config, frozen), precise:
            self._module.base_model(
                input_ids=self._tokens([[token]]),
                attention_mask=self._no_mask,
                position_ids=frozen.position,
                use_cache=True,
                **{self._cache_argument: frozen},
            )
        stacked = torch.stack(residual).float().cpu().numpy()
        return TorchTrace(stacked, blocks, frozen.nbytes + stacked.nbytes)

    @torch.no_grad()
    @memory_for("the prompts", _MEMORY)
    def overflow(self, tokens: Sequence[int], first: int) -> OverflowingError:
        self._start([0])
        restart(self._law)
        return located(
            self._examined,
            tokens,
            first,
            self._law,
            layers=len(self._blocks),
            chunk=PREFILL_CHUNK,
            dtype=self._dtype,
        )

    def _examined(self, tokens: Sequence[int], steering: LawHooks) -> Examined:
        energies: list[torch.Tensor] = []

        def record(k: int, z: torch.Tensor, call: BlockCall) -> torch.Tensor:
            if k == 0:
                energies.append(energy(z)[0])
            output = steering.block(k, z, call)
            energies.append(energy(output)[0])
            return output

        with hooked(self._blocks, record, range(len(self._blocks)), steering):
            logits = self._run(self._tokens([list(tokens)]), steered=False)
        return [row.tolist() for row in energies], bool(torch.isfinite(logits[0]).all())

    @property
    def _dtype(self) -> str:
        return str(self._module.dtype).rpartition(".")[2]

    def _tokens(self, tokens: Any) -> torch.Tensor:
        return torch.tensor(tokens, dtype=torch.long, device=self._device)

    def _start(self, padding: list[int]) -> None:
        """Make the cache for sequences with this much padding on their left."""
        if self._window is not None and len(padding) > 1:
            raise InputError("a batch cannot roll its context: decode one prompt at a time")
        self._cache = KeyValueCache(len(self._blocks), padding, self._device, window=self._window, ahead=PREFILL_CHUNK)
        if self.sampling.repetition_penalty != 1:
            vocabulary = int(self._module.config.vocab_size)
            self._seen = torch.zeros(len(padding), vocabulary, dtype=torch.bool, device=self._device)

    def _run(self, tokens: torch.Tensor, *, steered: bool, head: bool = True) -> torch.Tensor:
        """Append tokens (B, L), all of them steered or none, and return the last one's logits (B, V)."""
        cache, length = self._cache, tokens.shape[1]
        assert cache is not None
        if length == 0:
            return tokens.new_empty(0)
        if cache.make_room(length):
            self._graph = None
        at = torch.arange(cache.length, cache.length + length, device=self._device)
        logits = self._forward(tokens, at, cache.slots_after(length), steered=steered, head=head)
        cache.length += length
        return logits

    def _forward(
        self, tokens: torch.Tensor, at: torch.Tensor, used: int, *, steered: bool, head: bool = True
    ) -> torch.Tensor:
        """The forward pass alone: tokens (B, L) at places (L,) of the cache, with `used` of its slots in sight."""
        assert self._cache is not None
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
            if not head:
                hidden: torch.Tensor = self._module.base_model(**options).last_hidden_state
                return hidden
            logits: torch.Tensor = self._module(**options, logits_to_keep=1).logits[:, -1]
            return logits

    def _replay(self, tokens: torch.Tensor) -> torch.Tensor:
        """A steered step (B,) as a CUDA graph, which is recorded anew when the buffers it works on change."""
        cache = self._cache
        assert cache is not None
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
            with torch.cuda.graph(self._graph):
                self._logits = run(self._tokens, self._at)

    def replay(self, tokens: torch.Tensor, length: int) -> torch.Tensor:
        """The logits (B, V) of tokens (B,) at place `length`."""
        self._tokens.copy_(tokens)
        self._at.fill_(length)
        with torch.cuda.device(self._at.device):
            self._graph.replay()
        return self._logits.clone()  # the next replay writes over it


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


def energy(z: torch.Tensor) -> torch.Tensor:
    """|z|^2 (...) of activations (..., d), in float32."""
    return z.float().square().sum(dim=-1)
