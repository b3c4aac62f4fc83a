"""What depends on how long a text is: scaled rotary embeddings, sliding windows, contexts that end or roll."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.backends import BACKENDS
from helpers.tiny_configs import (
    BASE,
    DYNAMIC,
    FAMILIES,
    LINEAR,
    LLAMA3,
    LONG,
    PROMPT,
    SCALINGS,
    YARN,
    load,
    relative,
    weights_folder,
    with_config,
)
from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mlx_lqr import InputError
from mlx_lqr.backends.checkpoint.config import model_config
from mlx_lqr.backends.checkpoint.families import SETTINGS
from mlx_lqr.runtime.decode import decode

CPU = torch.device("cpu")


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: "-".join([scaling["rope_type"], *list(scaling)[3:]]))
def test_scaled_rotations_are_those_of_transformers(scaling: dict[str, Any]) -> None:
    for family, context, theta in (("llama", 64, 5e5), ("phi3", 128, 1e4), ("qwen3", 4096, 1e6)):
        if family == "phi3" and scaling["rope_type"] != "longrope":
            continue
        config = BASE[family] | {"max_position_embeddings": context, "rope_theta": theta, "rope_scaling": scaling}
        ours = model_config(config).rotations["full_attention"]
        theirs, scale = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](CONFIG_MAPPING[family](**copy.deepcopy(config)), CPU)
        np.testing.assert_allclose(ours.frequencies, theirs.numpy(), rtol=1e-5)
        assert ours.scale == pytest.approx(scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_refuses_a_scaled_rotation_that_it_can_have(family: str, tmp_path: Path) -> None:
    for scaling in (LINEAR, LLAMA3, YARN, LONG) if family != "phi3" else (LONG,):
        config = BASE[family] | {"rope_scaling": scaling, "original_max_position_embeddings": 32}
        folder = with_config(weights_folder(family), config, tmp_path)
        for backend in BACKENDS:
            assert load(folder, backend).context_length == (32 if scaling is LONG else 64)


@pytest.mark.parametrize("family", [family for family in FAMILIES if "sliding_window" in SETTINGS[family]])
def test_texts_grow_past_the_window_alike(family: str, tmp_path: Path) -> None:
    """Token by token in every cache: of one sequence, of a batch, frozen for derivatives, and of a compiled step."""
    long = BASE[family] | {"max_position_embeddings": 400, "original_max_position_embeddings": 400}
    folder = with_config(weights_folder(family), long, tmp_path)
    ours, theirs = load(folder, "mlx"), load(folder, "torch")
    count = 40 if family == "qwen2" else 12  # a step is compiled after 32 tokens, which takes seconds
    assert tokens(ours, [PROMPT], count) == tokens(theirs, [PROMPT], count)
    batch = [PROMPT, PROMPT[:3], PROMPT[5:14]]
    assert tokens(ours, batch, 12) == [tokens(ours, [prompt], 12)[0] for prompt in batch] == tokens(theirs, batch, 12)
    traces = ours.trace(PROMPT), theirs.trace(PROMPT)
    for k in range(3):
        assert relative(ours.jacobian(traces[0], k), theirs.jacobian(traces[1], k)) < 1e-3


@pytest.mark.parametrize("family", ["phi3", "gemma2", "qwen2"])
@pytest.mark.parametrize("window", [5, 24, 100])
def test_a_context_rolls_with_windows_shorter_and_longer_than_it(family: str, window: int, tmp_path: Path) -> None:
    short = BASE[family] | {"max_position_embeddings": 24, "original_max_position_embeddings": 24}
    folder = with_config(weights_folder(family), short | {"sliding_window": window}, tmp_path)
    answers = [tokens(load(folder, backend), [PROMPT], 30, overflow="roll") for backend in BACKENDS]
    assert answers[0] == answers[1]


def tokens(model: Any, prompts: list[list[int]], count: int, **options: Any) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]
    for i, token in decode(model, prompts, max_tokens=count, **options):
        answers[i].append(token)
    return answers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("scaling", "context"), [(LONG, 32), (DYNAMIC, 44)])
def test_a_rotation_that_changes_with_the_length_is_used_up_to_there(
    backend: str, scaling: dict[str, Any], context: int, tmp_path: Path
) -> None:
    config = BASE["llama"] | {"rope_scaling": scaling, "max_position_embeddings": 44}
    model = load(with_config(weights_folder("llama"), config, tmp_path), backend)
    assert model.context_length == context
    assert len(tokens(model, [PROMPT], context + 1 - len(PROMPT))[0]) == context + 1 - len(PROMPT)
    with pytest.raises(InputError, match="do not fit the model's context"):
        tokens(model, [PROMPT], context + 2 - len(PROMPT))
    with pytest.raises(InputError, match="cannot roll"):
        tokens(model, [PROMPT], 5, overflow="roll")
