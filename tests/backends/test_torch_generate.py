"""Steering in place of transformers models: which positions of whose calls, and calls that cannot be placed."""

from __future__ import annotations

import gc
import inspect
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.controllers import controller_for
from helpers.prompts import BATCH, PROMPT
from helpers.tiny_torch import STEERED, ours, small, theirs
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import RequestState

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends.torch.calls import Call
from mlx_lqr.backends.torch.generate import Positions, Prompt
from mlx_lqr.backends.torch.library import cache_argument
from mlx_lqr.backends.torch.model import TorchModel
from mlx_lqr.methods.running import law_on


def lively(family: str = "llama") -> TorchModel:
    """A model whose answers change from token to token, so that each of them tells."""
    return small(family, seed=2)


def in_cache(model: TorchModel, cache: Any) -> dict[str, Any]:
    return {cache_argument(model.module): cache}


@pytest.mark.parametrize("implementation", ["dynamic", "unbounded", "static"])
@pytest.mark.parametrize("held", [0, 7])
@pytest.mark.parametrize("family", STEERED)
def test_every_kind_of_cache_is_placed(family: str, held: int, implementation: str) -> None:
    model = lively(family)
    controller = controller_for(model)
    config = model.module.config
    kinds: dict[str, Callable[[], Any]] = {
        "dynamic": lambda: transformers.DynamicCache(config=config),
        "unbounded": transformers.DynamicCache,
        "static": lambda: transformers.StaticCache(config=config, max_cache_len=40),
    }
    cache = kinds[implementation]()
    if held:
        with torch.no_grad():
            model.module(torch.tensor([PROMPT[:held]]), **in_cache(model, cache))
    expected = ours(model, PROMPT, controller)
    with mlx_lqr.steer(model, controller, 2.0):
        assert theirs(model, PROMPT, **in_cache(model, cache)) == expected


@pytest.mark.parametrize("held", [5, 11])
def test_a_prompt_without_what_its_cache_holds(held: int) -> None:
    model = lively()
    controller = controller_for(model)
    cache = transformers.DynamicCache(config=model.module.config)
    with torch.no_grad():
        model.module(torch.tensor([PROMPT[:held]]), **in_cache(model, cache))
    rest = torch.tensor([PROMPT[held:]])
    with mlx_lqr.steer(model, controller, 2.0):
        answers = model.module.generate(
            rest, attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long), max_new_tokens=8, do_sample=False,
            eos_token_id=None, pad_token_id=0, **in_cache(model, cache),
        )  # fmt: skip
    assert answers[0, rest.shape[1] :].tolist() == ours(model, PROMPT, controller)


def test_a_conversation_goes_on_from_the_cache_of_its_first_answer() -> None:
    model = lively()
    controller = controller_for(model)
    cache = transformers.DynamicCache(config=model.module.config)
    with mlx_lqr.steer(model, controller, 2.0):
        first = theirs(model, PROMPT, 4, **in_cache(model, cache))
        second = [*PROMPT, *first, 3, 9, 4]
        answer = theirs(model, second, 6, **in_cache(model, cache))
    decoder = model.decoder(law_on(model, controller, 2.0))
    decoder.fill([PROMPT[:-1]], steered=False)
    for token in [PROMPT[-1], *first[:-1]]:
        decoder.step([token])
    decoder.fill([[first[-1], 3, 9]], steered=False)
    expected, token = [], 4
    for _ in range(6):
        token = int(decoder.sample(decoder.step([token]))[0])
        expected.append(token)
    assert answer == expected


def test_chunks_after_a_cache_are_placed_or_refused() -> None:
    """transformers 5.20 reads once more what the cache holds, in the wrong places: no answer is better than that."""
    model = lively()
    controller = controller_for(model)
    cache = transformers.DynamicCache(config=model.module.config)
    with torch.no_grad():
        model.module(torch.tensor([PROMPT[:7]]), **in_cache(model, cache))
    with mlx_lqr.steer(model, controller, 2.0):
        if transformers.__version__.startswith("5.20."):
            with pytest.raises(InputError, match="with a cache of 7 and position_ids up to 1"):
                theirs(model, PROMPT, prefill_chunk_size=2, **in_cache(model, cache))
            return
        answer = theirs(model, PROMPT, prefill_chunk_size=2, **in_cache(model, cache))
    assert answer == ours(model, PROMPT, controller)


@pytest.mark.parametrize("family", STEERED)
@pytest.mark.parametrize(
    "options",
    [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}, {"assistant_early_exit": 2},
     {"prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 1}],
    ids=str,
)  # fmt: skip
def test_drafts_without_another_model_change_no_token(family: str, options: dict[str, Any]) -> None:
    model = lively(family)
    controller = controller_for(model)
    prompt = [*PROMPT, *PROMPT[:4]]  # so that a lookup finds something
    expected = ours(model, prompt, controller, 12)
    with mlx_lqr.steer(model, controller, 2.0):
        assert theirs(model, prompt, 12, **options) == expected


def test_beams_and_samples_are_those_of_the_steered_distribution() -> None:
    """Scores of the sequences that transformers returns, against our own log-probabilities of the same tokens."""
    model = lively()
    controller = controller_for(model)
    law = law_on(model, controller, 2.0)
    tokens = torch.tensor([PROMPT])
    for options in ({"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0},
                    {"do_sample": True, "num_return_sequences": 3, "top_k": 0}):  # fmt: skip
        torch.manual_seed(0)
        with mlx_lqr.steer(model, controller, 2.0):
            generated = model.module.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5, eos_token_id=None, pad_token_id=0,
                output_scores=True, return_dict_in_generate=True, **options,
            )  # fmt: skip
            scores = model.module.compute_transition_scores(
                generated.sequences,
                generated.scores,
                getattr(generated, "beam_indices", None),
                normalize_logits="do_sample" in options,
            )
        answers = generated.sequences[:, len(PROMPT) :].tolist()
        expected = model.log_probabilities([(PROMPT, answer) for answer in answers], law=law)
        assert np.abs(scores.numpy() - np.stack(expected)).max() < 1e-4, options
        plain = model.log_probabilities([(PROMPT, answer) for answer in answers])
        assert np.abs(scores.numpy() - np.stack(plain)).max() > 0.1


def test_embeddings_are_a_prompt_too() -> None:
    model = lively()
    controller = controller_for(model)
    embedded = model.module.get_input_embeddings()(torch.tensor([PROMPT]))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with mlx_lqr.steer(model, controller, 2.0):
        answers = model.module.generate(inputs_embeds=embedded, **options)
        chunked = model.module.generate(
            inputs_embeds=embedded, input_ids=torch.zeros(1, 0, dtype=torch.long), **options
        )
    assert answers[0].tolist() == chunked[0].tolist() == ours(model, PROMPT, controller)


def test_no_prompt_is_the_one_token_that_begins_a_text() -> None:
    model = lively()
    controller = controller_for(model)
    model.module.generation_config.bos_token_id = 5
    with mlx_lqr.steer(model, controller, 2.0):
        answers = model.module.generate(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert answers[0].tolist() == [5, *ours(model, [5], controller)]


def test_a_streamer_is_fed_from_another_thread() -> None:
    model = lively()
    controller = controller_for(model)
    streamed: list[int] = []

    class Streamer(transformers.generation.streamers.BaseStreamer):  # type: ignore[misc]
        def put(self, value: torch.Tensor) -> None:
            streamed.extend(value.flatten().tolist())

        def end(self) -> None:
            streamed.append(-1)

    with mlx_lqr.steer(model, controller, 2.0), ThreadPoolExecutor() as pool:
        pool.submit(theirs, model, PROMPT, streamer=Streamer(), prefill_chunk_size=4).result()
    assert streamed == [*PROMPT, *ours(model, PROMPT, controller), -1]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the two collections of garbage with which transformers ends each batch: they take a second."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


BATCHING: list[dict[str, Any]] = [{}, {"max_batch_tokens": 8, "num_blocks": 32}, {"scheduler_type": "prefill_first"}]


def answering(max_tokens: int, **options: Any) -> transformers.GenerationConfig:
    """Greedy answers that nothing ends; sampled from the likeliest token alone, which allows several to a prompt."""
    kind = {"do_sample": True, "top_k": 1, "eos_token_id": -1, "pad_token_id": 0}
    return transformers.GenerationConfig(max_new_tokens=max_tokens, **kind, **options)


def batched(
    model: TorchModel, prompts: list[list[int]], max_tokens: int = 6, answers: int = 1, **options: Any
) -> list[list[int]]:
    batching = ContinuousBatchingConfig(**{"num_blocks": 64, "max_batch_tokens": 64, "page_size": 16, **options})
    generated = model.module.generate_batch(
        prompts,
        generation_config=answering(max_tokens, num_return_sequences=answers),
        continuous_batching_config=batching,
    )
    return [answer.generated_tokens for answer in generated.values()]


@pytest.mark.parametrize("options", BATCHING, ids=str)
@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("family", STEERED)
@pytest.mark.usefixtures("quick")
def test_each_request_of_a_packed_batch_is_steered_as_if_alone(
    family: str, positions: Any, options: dict[str, Any]
) -> None:
    model = lively(family)
    controller = controller_for(model, positions=positions)
    prompts = [PROMPT, *BATCH, PROMPT[:1], PROMPT]
    with mlx_lqr.steer(model, controller, 2.0):
        answers = batched(model, prompts, **options)
    assert answers == [ours(model, prompt, controller, 6) for prompt in prompts]
    assert answers != batched(model, prompts, **options)


@pytest.mark.usefixtures("quick")
def test_generate_that_leads_to_a_packed_batch() -> None:
    model = lively()
    controller = controller_for(model)
    tokens = torch.tensor([PROMPT, PROMPT[::-1]])
    batching = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=32, page_size=16)
    with mlx_lqr.steer(model, controller, 2.0):
        answers = model.module.generate(
            tokens, cache_implementation="paged", continuous_batching_config=batching, max_new_tokens=6,
            do_sample=False, eos_token_id=-1, pad_token_id=0,
        )  # fmt: skip
    expected = [ours(model, prompt, controller, 6) for prompt in tokens.tolist()]
    assert answers[0, :, tokens.shape[1] :].tolist() == expected


@pytest.mark.usefixtures("quick")
def test_several_answers_to_a_request_are_steered_alike() -> None:
    model = lively()
    controller = controller_for(model)
    with mlx_lqr.steer(model, controller, 2.0):
        own = batched(model, [PROMPT, PROMPT[:3]], answers=3)
    assert own == [ours(model, prompt, controller, 6) for prompt in (PROMPT, PROMPT[:3]) for _ in range(3)]


@pytest.mark.usefixtures("quick")
def test_requests_do_not_share_what_was_steered() -> None:
    """The second prompt goes on where the first one's answer did: its tokens are not generated, so not steered."""
    model = lively()
    controller = controller_for(model)
    prompts = [PROMPT, [*PROMPT, *ours(model, PROMPT, controller, 12)]]
    batching = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64, page_size=4)
    batches = []
    with (
        mlx_lqr.steer(model, controller, 2.0),
        model.module.continuous_batching_context_manager(
            generation_config=answering(12), continuous_batching_config=batching
        ) as manager,
    ):
        for prompt in prompts:
            manager.add_request(prompt, max_new_tokens=12)
            batches.append(manager.get_result(timeout=30).generated_tokens)
    assert batches == [ours(model, prompt, controller, 12) for prompt in prompts]


@pytest.mark.usefixtures("quick")
def test_answers_that_are_read_again_as_prompts_are_refused() -> None:
    model = lively()
    controller = controller_for(model)
    before = RequestState.create_equivalent_initial_request
    with mlx_lqr.steer(model, controller, 2.0), pytest.raises(InputError, match="no room left") as refusal:
        batched(model, [PROMPT, PROMPT[::-1]], 30, num_blocks=4, page_size=16, max_batch_tokens=16)
    assert "\n" not in str(refusal.value)
    assert RequestState.create_equivalent_initial_request is before
    assert len(batched(model, [PROMPT, PROMPT[::-1]], 30, num_blocks=4, page_size=16, max_batch_tokens=16)) == 2


def test_texts_packed_in_one_row_are_steered_each_at_its_last_position() -> None:
    model = lively()
    controller = controller_for(model)
    law = law_on(model, controller, 2.0)
    row = torch.tensor([[token for prompt in BATCH for token in prompt]])
    positions = torch.tensor([[place for prompt in BATCH for place in range(len(prompt))]])
    with torch.no_grad(), mlx_lqr.steer(model, controller, 2.0):
        logits = model.module(row, position_ids=positions, use_cache=False).logits[0].numpy()
    ends = np.cumsum([len(prompt) for prompt in BATCH]) - 1
    for end, prompt in zip(ends, BATCH, strict=True):
        assert np.abs(logits[end] - model.logits(prompt, law=law)).max() < 1e-4


def renamed(model: TorchModel, hidden: str) -> Call:
    """A step at place 12 as a transformers would make it that had renamed one of its arguments."""
    cache = transformers.DynamicCache(config=model.module.config)
    with torch.no_grad():
        model.module(torch.tensor([PROMPT]), **in_cache(model, cache))
    arguments: dict[str, Any] = {
        "input_ids": torch.tensor([[7]]),
        "position_ids": torch.tensor([[len(PROMPT)]]),
        "use_cache": True,
        **in_cache(model, cache),
    }
    wanted = cache_argument(model.module) if hidden == "cache" else hidden
    arguments[f"other_{hidden}"] = arguments.pop(wanted)
    return Call.of(inspect.signature(model.module.base_model.forward), (), arguments)


def test_a_renamed_cache_is_still_found() -> None:
    model = lively()
    assert renamed(model, "cache").before() == len(PROMPT)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"cache": None}, "with no cache and position_ids up to 12"),
        ({"position_ids": torch.tensor([[3]])}, "with a cache of 12 and position_ids up to 3"),
        ({"position_ids": torch.tensor([[13]])}, "with a cache of 12 and position_ids up to 13"),
        ({"cache": None, "position_ids": None}, "with neither a cache nor position_ids"),
        ({"input_ids": None}, "with neither input_ids nor inputs_embeds"),
        ({"another": transformers.DynamicCache()}, "with several caches"),
        ({"cache": SimpleNamespace(update=print)}, "with a SimpleNamespace"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_calls_that_cannot_be_placed_are_refused_in_one_line(change: dict[str, Any], match: str) -> None:
    cache = transformers.DynamicCache()
    cache.update(torch.zeros(1, 1, 12, 2), torch.zeros(1, 1, 12, 2), 0)
    given = {"input_ids": torch.tensor([[7]]), "position_ids": torch.tensor([[12]]), "cache": cache, "use_cache": True}
    positions = Positions(False, [])
    with positions.answering(Prompt(12)):
        positions.begin(Call(given))
        assert positions.first == 0
        with pytest.raises(InputError, match=match) as refusal:
            positions.begin(Call({**given, **change}))
    assert str(refusal.value).startswith(f"transformers {transformers.__version__} ")
    assert "use mlx_lqr.generate" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("missing", ["cu_seq_lens_q", "logits_indices", "neither"])
def test_packed_requests_whose_ends_are_not_known_are_refused(missing: str) -> None:
    class Paged:
        def update(self) -> None: ...

    given: dict[str, Any] = {
        "input_ids": torch.zeros(1, 6, dtype=torch.long),
        "cu_seq_lens_q": torch.tensor([0, 4, 5, 6]),
        "logits_indices": torch.tensor([4, 5, 0]),
        "cache": Paged(),
    }
    refusals: list[InputError] = []
    positions = Positions(False, refusals)
    if missing == "neither":
        positions.begin(Call(given))
        assert isinstance(positions.first, torch.Tensor)
        assert positions.first.flatten().tolist() == [False, False, False, False, True, True]
        given["logits_indices"] = torch.tensor([2, 5])
    else:
        del given[missing]
    with pytest.raises(InputError, match="midst of packed" if missing == "neither" else f"without {missing}"):
        positions.begin(Call(given))
    assert len(refusals) == 1


def test_generate_refuses_positions_that_it_is_told_otherwise() -> None:
    model = lively()
    tokens = torch.tensor([PROMPT])
    moved = torch.arange(3, 3 + len(PROMPT))[None]
    with mlx_lqr.steer(model, controller_for(model), 2.0), pytest.raises(InputError, match="position_ids up to 14"):
        model.module.generate(tokens, position_ids=moved, max_new_tokens=2)
    with mlx_lqr.steer(model, controller_for(model), 2.0), pytest.raises(InputError, match="prompts as a tensor"):
        model.module.generate([PROMPT], max_new_tokens=2)


@pytest.mark.usefixtures("quick")
def test_a_manager_from_before_is_refused() -> None:
    model = lively()
    config = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=16, page_size=16)
    model.module.generate_batch(
        [PROMPT], generation_config=config, continuous_batching_config=batching, persistent_manager=True
    )
    try:
        with mlx_lqr.steer(model, controller_for(model), 2.0), pytest.raises(InputError, match="destroy_cached"):
            model.module.generate_batch([PROMPT], generation_config=config)
    finally:
        model.module.destroy_cached_continuous_batching_manager()


def test_nothing_of_ours_warns(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    """A user's terminal shows nothing that only whoever calls transformers could mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = lively()
        controller = controller_for(model)
        model.residuals([PROMPT])
        model.head_outputs([PROMPT])
        model.log_probabilities([(PROMPT, [1, 2])], law=law_on(model, controller, 2.0))
        expected = ours(model, PROMPT, controller)
        with mlx_lqr.steer(model, controller, 2.0):
            answer = theirs(model, PROMPT)
    assert answer == expected
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert capfd.readouterr().err == ""
