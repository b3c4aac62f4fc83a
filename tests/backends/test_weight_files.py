"""The weights of a folder are those that its index or their names say, on every backend and for convert."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.backends import BACKENDS, tiny_folder

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends.checkpoint.weight_files import INDEX, SINGLE
from mlx_lqr.convert import convert

PROMPT = [5, 17, 3, 42, 8]


def converted(folder: Path) -> Path:
    return convert(folder, folder.parent / f"{folder.name}-converted")


READERS: dict[str, Callable[[Path], Any]] = {
    **{backend: lambda folder, backend=backend: logits(folder, backend) for backend in BACKENDS},
    "convert": lambda folder: logits(converted(folder), "mlx"),
}
every_reader = pytest.mark.parametrize("reader", READERS)


def logits(folder: Path, backend: str) -> np.ndarray:
    return mlx_lqr.load(folder, backend=backend, dtype="float32").logits(PROMPT)  # type: ignore[arg-type]


@pytest.fixture
def folder() -> Path:
    return tiny_folder("qwen2")


def weights_in(folder: Path) -> dict[str, mx.array]:
    weights = mx.load(str(folder / SINGLE))
    mx.eval(weights)
    return weights


def shards(folder: Path, count: int = 2) -> list[Path]:
    """Split model.safetensors into shards without an index."""
    weights = weights_in(folder)
    (folder / SINGLE).unlink()
    names = sorted(weights)
    files = [folder / f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    for number, file in enumerate(files):
        mx.save_safetensors(
            str(file), {name: weights[name] for name in names[number::count]}, metadata={"format": "mlx"}
        )
    return files


def index(folder: Path) -> dict[str, str]:
    """Write an index of the files that are there."""
    files = {name: file.name for file in sorted(folder.glob("*.safetensors")) for name in mx.load(str(file))}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return files


def stray(folder: Path, name: str) -> None:
    """The same tensors with other values, under another name."""
    first = next(folder.glob("model*.safetensors"))
    mx.save_safetensors(str(folder / name), {key: value + 1 for key, value in mx.load(str(first)).items()})


@every_reader
@pytest.mark.parametrize("name", ["model-old.safetensors", "model_fp32.safetensors", "adapters.safetensors", SINGLE])
@pytest.mark.parametrize("sharded", [False, True])
def test_files_beside_the_weights_are_not_read(reader: str, name: str, sharded: bool, folder: Path) -> None:
    expected = logits(folder, "mlx")
    if sharded:
        shards(folder)
        index(folder)
    if sharded or name != SINGLE:
        stray(folder, name)
    np.testing.assert_allclose(READERS[reader](folder), expected, atol=1e-4)


@every_reader
def test_a_whole_set_of_shards_needs_no_index(reader: str, folder: Path) -> None:
    expected = logits(folder, "mlx")
    shards(folder, 3)
    np.testing.assert_allclose(READERS[reader](folder), expected, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_that_the_index_does_not_name_are_not_read(backend: str, folder: Path) -> None:
    expected = logits(folder, "mlx")
    first, second = shards(folder)
    index(folder)
    stale, named = mx.load(str(first)), mx.load(str(second))
    more = {**named, **{name: value + 1 for name, value in stale.items()}}
    mx.eval(more)
    mx.save_safetensors(str(second), more, metadata={"format": "mlx"})
    np.testing.assert_allclose(logits(folder, backend), expected, atol=1e-4)
    with pytest.raises(InputError, match="does not name"):
        converted(folder)


def lose_a_file(folder: Path) -> str:
    shards(folder)
    index(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    return "lacks model-00002-of-00002.safetensors"


def lose_a_tensor(folder: Path) -> str:
    name, file = next(iter(index(folder).items()))
    weights = weights_in(folder)
    del weights[name]
    mx.save_safetensors(str(folder / file), weights)
    return f"{file} lacks {name}"


def leave_the_folder(folder: Path) -> str:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "../other/model.safetensors"}}))
    return "no file of the folder"


def name_what_no_file_can_be_called(folder: Path) -> str:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "x" * 300 + ".safetensors"}}))
    return "no file of the folder"


def break_the_index(folder: Path) -> str:
    (folder / INDEX).write_text("{")
    return "is no index of weights"


def lose_a_shard(folder: Path) -> str:
    shards(folder)[0].unlink()
    return "lacks shard 1 of 2"


def mix_sets(folder: Path) -> str:
    old, new = shards(folder), folder / "model-00001-of-00003.safetensors"
    new.write_bytes(old[0].read_bytes())
    return "shards of 2 and of 3"


def hold_twice(folder: Path) -> str:
    first, second = shards(folder)
    second.write_bytes(first.read_bytes())
    return "both model-00001-of-00002.safetensors and model-00002-of-00002.safetensors"


def rename(folder: Path) -> str:
    (folder / SINGLE).rename(folder / "model_fp32.safetensors")
    return "if model_fp32.safetensors is, rename it"


UNSOUND = [
    lose_a_file,
    lose_a_tensor,
    leave_the_folder,
    name_what_no_file_can_be_called,
    break_the_index,
    lose_a_shard,
    mix_sets,
    hold_twice,
    rename,
]


@every_reader
@pytest.mark.parametrize("damage", UNSOUND)
def test_what_is_missing_or_unclear_is_one_line(reader: str, damage: Callable[[Path], str], folder: Path) -> None:
    said = damage(folder)
    with pytest.raises(InputError) as refusal:
        READERS[reader](folder)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)
