"""Decoding in llama.cpp on tiny models of every architecture: tokens are MLX's own, alone, side by side and rolled."""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.controllers import controller_for
from helpers.decoding import decoded, decoded_together
from helpers.tiny_gguf import ARCHITECTURES, FURTHER, write

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends.protocol import OVERFLOWED, Sampling
from mlx_lqr.errors import OverflowingError
from mlx_lqr.methods.alqr import LinearFeedback
from mlx_lqr.methods.registry import METHODS
from mlx_lqr.methods.steering import law_of

pytest.importorskip("llama_cpp")

from helpers.llama_products import in_float32

from mlx_lqr.backends.llama.hook import PythonHook
from mlx_lqr.backends.llama.library import llama

pytestmark = in_float32()
PROMPT = [5, 17, 3, 42, 8]
PROMPTS = [PROMPT, [7, 9], [1, 2, 3, 4, 5, 6, 7, 8]]
FILE_TYPE = {"general.file_type": 0}  # all of it in float32, so that keys and values are too


@functools.cache
def tiny(arch: str = "llama", **changes: Any) -> tuple[Any, Any]:
    """The same tiny model in llama.cpp and in MLX."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-llama-"))
    file = write(folder / f"{arch}.gguf", arch, metadata=FILE_TYPE, **changes).path
    return mlx_lqr.load(file, backend="llama"), mlx_lqr.load(file, backend="mlx", dtype="float32")


@functools.cache
def controller(arch: str = "llama") -> mlx_lqr.Controller:
    return controller_for(tiny(arch)[1])


def law(strength: float = 2.0, arch: str = "llama") -> LinearFeedback:
    return LinearFeedback(controller(arch), strength)


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float((np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max())


@pytest.mark.parametrize("arch", [*ARCHITECTURES, *FURTHER])
def test_every_architecture_is_the_same_model(arch: str) -> None:
    ours, mlx = tiny(arch)
    assert ours.fingerprint == mlx.fingerprint
    assert ours.tokenizer.end_tokens == mlx.tokenizer.end_tokens
    steering = law(arch=arch)
    most = 1e-3 if arch.startswith("gemma") else 1e-4  # llama.cpp looks GELU up in a table of 16 bits
    for options in ({}, {"law": steering}, {"law": steering, "steer_all": True}):
        assert relative(ours.residuals(PROMPTS, **options), mlx.residuals(PROMPTS, **options)) < most
    for steer_all in (False, True):
        in_c, in_python, expected = (
            decoded(model, PROMPT, law=law(arch=arch), steer_all=steer_all, max_tokens=64)
            for model in (ours, with_laws_in_python(arch), mlx)
        )
        assert in_c == in_python == expected


def with_laws_in_python(arch: str = "llama") -> Any:
    """The tiny model in llama.cpp, steered as where there is no C compiler."""
    ours: Any = mlx_lqr.load(tiny(arch)[0].file, backend="llama")
    ours._context._make_hook = lambda: PythonHook(ours.num_layers, ours.hidden_size)
    return ours


@pytest.mark.parametrize("method", [*METHODS])
def test_every_method_runs_as_on_mlx(method: str) -> None:
    ours, mlx = tiny()
    fitted: Any = mlx_lqr.fit_baseline(mlx, method, [[1, 2, 3], [4, 5]], [[6, 7], [8]])
    carries = method == "spid"  # something from one token to the next, which prompts run whole do not show
    assert not carries or fitted.numbers["kd"] != 0
    models = ours, with_laws_in_python(), mlx
    pairs = [(prompt[:2], prompt[2:]) for prompt in PROMPTS]
    for steer_all in (False,) if carries else (False, True):
        options: Any = {"steer_all": steer_all}
        *scored, expected = (m.logits_along(pairs, law=law_of(fitted, 2.0), **options) for m in models)
        for one in scored:
            for logits, those in zip(one, expected, strict=True):
                np.testing.assert_allclose(logits, those, atol=1e-3)
        *together, those = (
            decoded_together(m, PROMPTS, law=law_of(fitted, 2.0), max_tokens=10, **options) for m in models
        )
        assert together == [those, those]
        assert those != decoded_together(ours, PROMPTS, max_tokens=10)


@pytest.mark.parametrize("arch", [*ARCHITECTURES, *FURTHER])
def test_attention_is_steered_before_what_the_block_makes_of_it(arch: str) -> None:
    """Biases, norms and the rows that the last block drops come after it."""
    ours, mlx = tiny(arch)
    iti = mlx_lqr.fit_baseline(mlx, "iti", [[1, 2, 3], [4, 5]], [[6, 7], [8]], heads=2 * mlx.num_layers)
    assert iti.active_layers[-1] == mlx.num_layers - 1
    most = 1e-3 if arch.startswith("gemma") else 1e-4
    for model in (ours, with_laws_in_python(arch)):
        for steer_all in (False, True):
            options: Any = {"law": law_of(iti, 5.0), "steer_all": steer_all}
            assert relative(model.residuals(PROMPTS, **options), mlx.residuals(PROMPTS, **options)) < most
            for one, expected in zip(
                *(m.logits_along([(PROMPT, [3, 9])], **options) for m in (model, mlx)), strict=True
            ):
                np.testing.assert_allclose(one, expected, atol=5e-3)


def test_laws_of_both_sites_steer_side_by_side() -> None:
    ours, mlx = tiny()
    iti = mlx_lqr.fit_baseline(mlx, "iti", [[1, 2, 3], [4, 5]], [[6, 7], [8]])
    for model in (ours, with_laws_in_python()):
        first, second = model.decoder(law()), model.decoder(law_of(iti, 5.0))
        for decoder in (first, second):
            decoder.fill([PROMPT[:-1]], steered=False)
        tokens = first.join(second, np.array(PROMPT[-1:]), np.array(PROMPT[-1:]))
        logits = first.step(tokens)
        np.testing.assert_allclose(logits[0], mlx.logits(PROMPT, law=law()), atol=1e-3)
        np.testing.assert_allclose(logits[1], mlx.logits(PROMPT, law=law_of(iti, 5.0)), atol=1e-3)


def test_a_law_that_reads_attention_is_refused() -> None:
    class Reading(LinearFeedback):
        site = "attention"

    ours, _ = tiny()
    for model in (ours, with_laws_in_python()):
        for _ in range(2):  # not only the first time
            with pytest.raises(InputError, match=r"llama\.cpp steers inside attention by fixed vectors alone"):
                model.logits(PROMPT, law=Reading(controller(), 1.0))


def test_many_sequences_and_long_ones_make_the_context_grow() -> None:
    ours, mlx = tiny("qwen3", max_position_embeddings=2048)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 250, size=length).tolist() for length in (3, 700, *range(5, 25))]
    for options in ({}, {"law": law(1.5, "qwen3")}):
        answers = [decoded_together(model, prompts, max_tokens=6, **options) for model in (ours, mlx)]
        assert answers[0] == answers[1]
    assert (
        relative(
            ours.residuals(prompts, law=law(1.5, "qwen3"), steer_all=True),
            mlx.residuals(prompts, law=law(1.5, "qwen3"), steer_all=True),
        )
        < 1e-3
    )


def test_sequences_that_join_are_steered_as_they_are_alone() -> None:
    ours, _ = tiny()
    laws = [law(2.0), None, law(-1.5)]
    alone = [decoded(ours, prompt, law=one, max_tokens=8) for prompt, one in zip(PROMPTS, laws, strict=True)]
    batch: Any = None
    tokens = np.empty(0, np.int64)
    answers: list[list[int]] = [[], [], []]
    for row, (prompt, one) in enumerate(zip(PROMPTS, laws, strict=True)):
        decoder = ours.decoder(one)
        decoder.fill([prompt[:-1]], steered=False)
        first = decoder.sample(decoder.step([prompt[-1]]))
        tokens = first if batch is None else batch.join(decoder, tokens, first)
        batch = decoder if batch is None else batch
        answers[row].append(int(first[0]))
        for _ in range(row):  # they are at different places
            tokens = batch.sample(batch.step(tokens))
            for i, token in enumerate(tokens.tolist()):
                answers[i].append(token)
    rows = [0, 2]
    tokens = batch.keep(rows, tokens)
    while len(answers[2]) < 8:
        tokens = batch.sample(batch.step(tokens))
        for row, token in zip(rows, tokens.tolist(), strict=True):
            answers[row].append(token)
    for answer, expected in zip(answers, alone, strict=True):
        assert answer[: len(expected)] == expected[: len(answer)]
        assert len(answer) > 2


def test_logits_along_a_prompt_are_those_of_steps() -> None:
    ours, _ = tiny()
    whole, step_by_step = ours.decoder(law()), ours.decoder(law())
    whole.fill([PROMPT[:2]], steered=False)
    step_by_step.fill([PROMPT[:2]], steered=False)
    expected = [step_by_step.step([token])[0] for token in PROMPT[2:]]
    assert relative(whole.logits_along(PROMPT[2:], steered=True), np.array(expected)) < 1e-4
    with pytest.warns(UserWarning, match="beyond any use"):
        huge = law(1e30)
    assert np.isnan(ours.decoder(huge).logits_along(PROMPT, steered=True)).all()


def test_a_law_that_fails_leaves_the_others() -> None:
    class Broken(LinearFeedback):
        def __call__(self, layer: int, z: Any, output: Any) -> Any:
            raise RuntimeError("broken")

    ours, _ = tiny()
    first, second = ours.decoder(law()), ours.decoder(Broken(controller(), 1.0))
    first.fill([PROMPT[:-1]], steered=False)
    second.fill([PROMPT[:-1]], steered=False)
    tokens = first.join(second, np.array(PROMPT[-1:]), np.array(PROMPT[-1:]))
    logits = first.step(tokens)
    assert [str(error) for error in first.failures.values()] == ["broken"]
    assert list(first.failures) == [1]
    np.testing.assert_allclose(logits[0], ours.logits(PROMPT, law=law()), atol=1e-4)
    np.testing.assert_allclose(logits[1], ours.logits(PROMPT), atol=1e-4)
    with pytest.raises(RuntimeError, match="broken"):
        ours.logits(PROMPT, law=Broken(controller(), 1.0))


def test_a_prompt_and_its_last_token_are_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes between them does not change what is steered."""
    ours, _ = tiny()
    expected = {steered: ours.logits(PROMPT, law=law(), steer_all=steered) for steered in (False, True)}
    calls: list[int] = []
    decode = llama().llama_decode
    monkeypatch.setattr(llama(), "llama_decode", lambda *given: (calls.append(1), decode(*given))[1])
    for steered, logits in expected.items():
        for between in (False, True):
            decoder = ours.decoder(law())
            calls.clear()
            decoder.fill([PROMPT[:2]], steered=steered)
            decoder.fill([PROMPT[2:-1]], steered=steered)
            assert decoder.position == 4
            if between:
                decoder.law = law()
            np.testing.assert_allclose(decoder.step(PROMPT[-1:])[0], logits, atol=1e-4)
            assert decoder.position == 5
            assert len(calls) == (3 if between else 2)


def test_a_decoder_goes_back_and_is_copied() -> None:
    ours, _ = tiny()
    decoder = ours.decoder()
    decoder.fill([PROMPT], steered=False)
    copied = decoder.apart(0)
    assert decoder.rewind(3)
    assert (decoder.position, copied.position) == (3, 5)
    decoder.law = law()
    np.testing.assert_allclose(decoder.step([9])[0], ours.logits([*PROMPT[:3], 9], law=law()), atol=1e-4)
    np.testing.assert_allclose(copied.step([9])[0], ours.logits([*PROMPT, 9]), atol=1e-4)


def test_penalties_are_mlx_own() -> None:
    settings = Sampling(temperature=0.0, repetition_penalty=1.4, frequency_penalty=0.5, presence_penalty=0.3)
    answers = [decoded_together(model, PROMPTS, sampling=settings, max_tokens=80) for model in tiny()]
    assert answers[0] == answers[1]
    assert answers[0] != decoded_together(tiny()[0], PROMPTS, max_tokens=80)


def test_filters_exclude_what_they_say_and_seeds_repeat() -> None:
    ours, _ = tiny()
    logits = ours.logits(PROMPT).astype(np.float64)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p)
    nucleus = set(order[: int(np.searchsorted(np.cumsum(p[order]), 0.5)) + 1].tolist())
    wanted = {
        "top_p": (nucleus, {"top_p": 0.5}),
        "top_k": (set(order[:3].tolist()), {"top_p": 1.0, "top_k": 3}),
        "min_p": (set(np.flatnonzero(p >= 0.5 * p.max()).tolist()), {"top_p": 1.0, "min_p": 0.5}),
    }
    for inside, options in wanted.values():
        drawn = []
        for seed in range(60):
            decoder = ours.decoder(sampling=Sampling(temperature=1.5, seed=seed, **options))
            decoder.fill([PROMPT[:-1]], steered=False)
            drawn += decoder.sample(decoder.step(PROMPT[-1:])).tolist()
        assert set(drawn) <= inside
        assert len(inside) == 1 or len(set(drawn)) > 1
    same = [decoded_together(ours, PROMPTS, sampling=Sampling(seed=4), max_tokens=9) for _ in range(2)]
    alone = [decoded(ours, prompt, sampling=Sampling(seed=4 + i), max_tokens=9) for i, prompt in enumerate(PROMPTS)]
    assert same[0] == same[1] == alone


def test_overflow_names_the_layer() -> None:
    ours, mlx = tiny()
    with pytest.warns(UserWarning, match="beyond any use"):
        steering = law(1e25)
    messages = []
    for model in (ours, mlx):
        with pytest.raises(OverflowingError, match="overflow at layer") as refusal:
            decoded(model, PROMPT, law=steering, max_tokens=3)
        messages.append(str(refusal.value))
        with pytest.raises(OverflowingError):
            model.logits(PROMPT, law=steering)
        with pytest.raises(OverflowingError):
            model.residuals(PROMPTS, law=steering)
        with pytest.raises(OverflowingError):
            model.log_probabilities([(PROMPT[:2], PROMPT[2:])], law=steering)
    assert messages[0] == messages[1]
    both = ours.decoder(law(1.0))
    both.fill([PROMPT[:-1]], steered=False)
    other = ours.decoder(steering)
    other.fill([PROMPT[:-1]], steered=False)
    tokens = both.join(other, np.array(PROMPT[-1:]), np.array(PROMPT[-1:]))
    drawn = both.sample(both.step(tokens)).tolist()
    assert drawn[0] != OVERFLOWED == drawn[1]


def test_a_context_rolls_as_mlx_own_does() -> None:
    ours, mlx = tiny("llama", max_position_embeddings=24)
    options: Any = {"law": LinearFeedback(controller_for(mlx), 1.0), "max_tokens": 40, "overflow": "roll"}
    answers = [decoded(model, PROMPT, **options) for model in (ours, mlx)]
    assert answers[0] == answers[1]
    with pytest.raises(InputError, match="do not fit the model's context"):
        decoded(ours, PROMPT, max_tokens=40)


def test_nothing_is_imported_that_is_not_needed() -> None:
    file = write(Path(tempfile.mkdtemp()) / "t.gguf", "llama").path
    code = (
        f"import sys, mlx_lqr\nmodel = mlx_lqr.load({str(file)!r}, backend='llama')\n"
        "model.fingerprint\nmlx_lqr.generate(model, 'hello', max_tokens=2)\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"mlx.core", "mlx_lm", "torch", "transformers", "scipy", "tokenizers", "gguf", "jinja2", "llama_cpp.llama"}
    assert not set(done.stdout.split()) & heavy
    assert "llama_cpp.llama_cpp" in done.stdout.split()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32"}, "runs a GGUF file in its own dtype"),
        ({"device": "cpu"}, "llama.cpp chooses its device itself"),
        ({"pipeline": True}, "llama.cpp runs a model in one process"),
    ],
)
def test_what_llama_cpp_does_not_do_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = write(tmp_path / "t.gguf", "llama").path
    with pytest.raises(InputError, match=message):
        mlx_lqr.load(file, backend="llama", **options)


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"runs \.gguf files, and .* is none: use --backend mlx or torch"):
        mlx_lqr.load(tmp_path, backend="llama")
    damaged = tmp_path / "t.gguf"
    damaged.write_bytes(write(tmp_path / "whole.gguf", "llama").path.read_bytes()[:900])
    with pytest.raises(InputError, match=r"llama\.cpp cannot load"):
        mlx_lqr.load(damaged, backend="llama")
    ours, _ = tiny()
    with pytest.raises(InputError, match="cannot be steered in place"), mlx_lqr.steer(ours, controller()):
        pass
    with pytest.raises(InputError, match=r"llama\.cpp runs models but cannot fit controllers"):
        mlx_lqr.fit(ours, [[1, 2]], [[3, 4]])
