"""Control vectors of llama.cpp and repeng: read from GGUF, they add direction.N to the output of block N."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from helpers.backends import BACKENDS, tiny_on
from helpers.command_line import refused, run

import mlx_lqr
from mlx_lqr import METHODS, InputError
from mlx_lqr.convert.architectures import ARCHITECTURES
from mlx_lqr.files.control_vectors import ControlVectors, read_control_vectors, write_control_vectors
from mlx_lqr.methods import combine, law_of

PROMPT = [3, 1, 4, 1, 5]


def written(file: Path, directions: Mapping[int, np.ndarray], hint: str = "llama", count: int | None = None) -> Path:
    """As repeng writes it: its calls of the gguf package, and no entry but its own."""
    writer = GGUFWriter(file, "controlvector")
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(directions) if count is None else count)
    for layer, direction in directions.items():
        writer.add_tensor(f"direction.{layer}", direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def some(width: int, *layers: int, seed: int = 0) -> dict[int, np.ndarray]:
    random = np.random.default_rng(seed)
    return {layer: random.standard_normal(width).astype(np.float32) for layer in layers}


@pytest.mark.parametrize("backend", BACKENDS)
def test_direction_n_goes_to_the_output_of_block_n_at_every_token(backend: str, tmp_path: Path) -> None:
    """A vector at block 1 alone leaves its input z_1 alone and moves its output z_2 by itself."""
    model = tiny_on(backend, "llama")
    (direction,) = some(model.hidden_size, 1).values()
    steering = mlx_lqr.load_steering(written(tmp_path / "calm.gguf", {1: direction}))
    assert (steering.method, steering.concepts, steering.positions) == ("control-vector", ("calm",), "all")
    assert (steering.active_layers, steering.strength) == ((1,), (1.0,))
    plain = model.residuals([PROMPT])[0]
    moved = model.residuals([PROMPT], law=law_of(steering, 0.5), steer_all=False)[0] - plain
    assert np.allclose(moved[:2], 0, atol=1e-6)
    assert np.allclose(moved[2], 0.5 * direction, atol=1e-5)
    text = mlx_lqr.generate(model, PROMPT, controller=steering, strength=0.0, max_tokens=4, temperature=0)
    assert text == mlx_lqr.generate(model, PROMPT, max_tokens=4, temperature=0)
    everywhere = model.logits(PROMPT, law=law_of(steering, 4.0), steer_all=True)
    last = model.logits(PROMPT, law=law_of(steering, 4.0))
    first = next(mlx_lqr.stream(model, PROMPT, controller=steering, strength=4.0, max_tokens=1, temperature=0))
    assert first.token == int(everywhere.argmax())
    assert not np.allclose(everywhere, last)


def test_they_are_checked_against_the_model(tmp_path: Path) -> None:
    model = tiny_on("mlx", "llama")
    width, layers = model.hidden_size, model.num_layers
    sound = some(width, 1)

    def checked(**how: Any) -> None:
        mlx_lqr.load_steering(written(tmp_path / "v.gguf", **{"directions": sound, **how})).check_model(model)

    for hint in ("llama", "Llama", "mistral", model.name, ""):
        checked(hint=hint)
    checked(count=layers)
    with pytest.raises(InputError, match=rf"for a model of the kind 'gemma2', and {model.name} is of the kind 'llama'"):
        checked(hint="gemma2")
    with pytest.raises(
        InputError, match=rf"{width + 1} wide and for 2 layers or more, and .* {layers} layers of width"
    ):
        checked(directions=some(width + 1, 1))
    with pytest.raises(InputError, match=rf"for {layers + 1} layers or more"):
        checked(count=layers + 1)
    with pytest.raises(InputError, match=rf"for {layers + 1} layers or more"):
        checked(directions=some(width, layers))


def test_ours_are_held_to_the_fingerprint(tmp_path: Path) -> None:
    model = tiny_on("mlx", "llama")
    vectors = ControlVectors(some(model.hidden_size, 1), "llama", model.num_layers, "calm", "x", model.fingerprint)
    for fingerprint, fits in ((model.fingerprint, True), ("0" * 16, False)):
        write_control_vectors(tmp_path / "v.gguf", replace(vectors, fingerprint=fingerprint))
        steering = mlx_lqr.load_steering(tmp_path / "v.gguf")
        assert steering.concepts == ("calm",)
        if fits:
            steering.check_model(model)
        else:
            with pytest.raises(InputError, match="this was fitted on llama"):
                steering.check_model(model)


@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: f"{row.name}-{row.model_type}")
def test_a_hint_may_be_the_name_that_gguf_or_config_json_has(row: Any) -> None:
    model: Any = type("Known", (), {"name": "x", "family": row.model_type, "num_layers": 2, "hidden_size": 4})
    for hint in (row.name, row.model_type):
        steering = mlx_lqr.Baseline(
            "control-vector",
            {"shift": np.ones((2, 4, 1), np.float32)},
            {},
            (1,),
            ("a",),
            "all",
            hint,
            "",
            2,
            4,
            ((0, 0),),
        )
        steering.check_model(model)


def test_what_is_written_is_read_again_here_and_by_the_gguf_package(tmp_path: Path) -> None:
    vectors = ControlVectors(some(8, 1, 3), "llama", 4, "calm", "a push", "ab12")
    file = tmp_path / "v.gguf"
    write_control_vectors(file, vectors)
    again = read_control_vectors(file)
    assert [
        getattr(again, name) for name in ("model_hint", "layer_count", "concept", "description", "fingerprint")
    ] == [
        "llama",
        4,
        "calm",
        "a push",
        "ab12",
    ]
    theirs = GGUFReader(file)
    hint = theirs.get_field("controlvector.model_hint")
    assert hint is not None
    assert hint.contents() == "llama"
    for tensor in theirs.tensors:
        layer = int(tensor.name.removeprefix("direction."))
        assert np.array_equal(tensor.data, vectors.directions[layer])
        assert np.array_equal(again.directions[layer], vectors.directions[layer])


def test_saved_as_safetensors_they_stay_what_they_are(tmp_path: Path) -> None:
    steering = mlx_lqr.load_steering(written(tmp_path / "calm.gguf", some(8, 1, 2)))
    steering.save(tmp_path / "calm.safetensors")
    again = mlx_lqr.load_steering(tmp_path / "calm.safetensors")
    assert np.array_equal(again.arrays["shift"], steering.arrays["shift"])
    assert (again.method, again.model_name, again.fingerprint) == ("control-vector", "llama", "")
    assert "calm" in run("show", tmp_path / "calm.gguf").output


def test_several_are_added(tmp_path: Path) -> None:
    """Also where one ends at an earlier layer, or says less of its model."""
    one, other = some(8, 1), some(8, 1, 3, seed=1)
    first = mlx_lqr.load_steering(written(tmp_path / "one.gguf", one))
    second = mlx_lqr.load_steering(written(tmp_path / "two.gguf", other, hint=""))
    law: Any = law_of(combine([first, second]), [2.0, 0.5])
    zero = np.zeros(8, np.float32)
    assert np.allclose(law(1, zero, zero), 2 * one[1] + 0.5 * other[1])
    assert np.allclose(law(3, zero, zero), 0.5 * other[3])
    for different in (written(tmp_path / "x.gguf", some(9, 1)), written(tmp_path / "x2.gguf", one, hint="gemma2")):
        with pytest.raises(InputError, match="different models"):
            combine([first, mlx_lqr.load_steering(different)])


def test_they_are_read_and_not_fitted() -> None:
    assert METHODS["control-vector"].title == "control vector"
    assert "control-vector" not in list(METHODS)
    with pytest.raises(InputError, match="control vectors are read and not fitted: the method pca"):
        mlx_lqr.fit_baseline(tiny_on("mlx", "llama"), "control-vector", [[1, 2]], [[3, 4]])
    assert "control-vector" in refused("fit", "x", "--method", "control-vector", "-o", "y")


def nan(directions: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    return {layer: np.full_like(direction, np.nan) for layer, direction in directions.items()}


@pytest.mark.parametrize(
    ("directions", "says"),
    [
        ({}, "holds no direction"),
        ({0: np.ones(8, np.float32)}, "'direction.0', where only direction.1"),
        ({10_000: np.ones(8, np.float32)}, "'direction.10000', where only direction.1"),
        ({1: np.ones(8, np.float16)}, "direction.1 is F16 of the shape (8,), not F32"),
        ({1: np.ones((2, 8), np.float32)}, "direction.1 is F32 of the shape (2, 8)"),
        ({1: np.ones(8, np.float32), 2: np.ones(9, np.float32)}, "its directions have several widths"),
        (nan({1: np.ones(8, np.float32)}), "direction.1 has values that are not finite"),
        ({9_999: np.ones(10_000, np.float32)}, "no model has 10000 layers of width 10000"),
        ({"one": np.ones(8, np.float32)}, "'direction.one', where only direction.1"),
    ],
)
def test_damaged_files_are_one_line(directions: Any, says: str, tmp_path: Path) -> None:
    file = written(tmp_path / "v.gguf", directions, count=1)
    assert says in refused("show", file)


def test_other_gguf_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    writer = GGUFWriter(file, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert refused("generate", "demo", "-p", "x", "-c", file) == (
        f"Error: {file} is a GGUF file of 'llama' and holds no control vector: a model is the argument MODEL"
    )


def cut(content: bytes) -> bytes:
    return content[:-4]


def counted(content: bytes) -> bytes:
    """It claims 2^60 tensors."""
    return content[:8] + struct.pack("<Q", 1 << 60) + content[16:]


def miscounted(content: bytes) -> bytes:
    """It states -1 layers, as a number with a sign."""
    at = content.index(b"controlvector.layer_count") + len(b"controlvector.layer_count")
    return content[:at] + struct.pack("<Ii", 5, -1) + content[at + 8 :]


@pytest.mark.parametrize(
    ("damage", "says"), [(cut, "cut short"), (counted, "cut short"), (miscounted, "it states -1 layers")]
)
def test_damaged_bytes_are_one_line(damage: Callable[[bytes], bytes], says: str, tmp_path: Path) -> None:
    file = written(tmp_path / "v.gguf", some(8, 1))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=re.escape(says)):
        mlx_lqr.load_steering(file)
