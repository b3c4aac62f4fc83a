"""The backends that the parity suite holds to the same promises, and the same tiny models on each of them."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

import mlx_lqr
from mlx_lqr.backends import registry
from mlx_lqr.backends.capabilities import DIFFERENTIABLE
from mlx_lqr.backends.protocol import Model

BACKENDS = tuple(backend.name for backend in registry.backends() if DIFFERENTIABLE in backend.capabilities)
"""All that are registered and can do everything."""
OTHERS = BACKENDS[1:]
"""Those that have to agree with the first."""

_AS_IN_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "gemma": {"hidden_act": "gelu_python"},  # the exact one, which mlx-lm computes; the family means an approximation
    "phi3": {"pad_token_id": 0},  # the default is no token of this small vocabulary
    "smollm3": {"pad_token_id": 0},
}


def tiny_folder(family: str, **changes: Any) -> Path:
    """The folder of a tiny model (see tiny.py), with a tokenizer of one word a token."""
    import mlx.core as mx  # here, since conftest.py imports this file: mlx_lqr has to come first
    from mlx.utils import tree_flatten

    from helpers.tiny import COMMON, FAMILY, tiny

    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{family}-"))
    seed = changes.pop("seed", 0)
    config = {"model_type": family, **COMMON, **FAMILY[family], **changes, **_AS_IN_TRANSFORMERS.get(family, {})}
    module = tiny(family, seed=seed, **changes).module
    weights = dict(tree_flatten(module.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    words = {f"w{token}": token for token in range(config["vocab_size"])}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return folder


@functools.cache
def _shared_folder(family: str, changes: tuple[tuple[str, Any], ...]) -> Path:
    return tiny_folder(family, **dict(changes))


def tiny_on(backend: str, family: str, **changes: Any) -> Any:
    """The tiny model of a family on a backend, in float32; nothing ends its texts."""
    folder = _shared_folder(family, tuple(sorted(changes.items())))
    return mlx_lqr.load(folder, backend=backend, dtype="float32")  # type: ignore[arg-type]


@functools.cache
def smollm2_on(backend: str) -> Model:
    """SmolLM2-135M-Instruct, converted from its GGUF by this library, float32."""
    return mlx_lqr.load("demo", backend=backend, dtype="float32")  # type: ignore[arg-type]
