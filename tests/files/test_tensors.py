"""Files of tensors are equal byte for byte where what they hold is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from helpers.controllers import controller_for
from helpers.tiny import tiny
from safetensors import safe_open
from safetensors.numpy import load_file

import mlx_lqr
from mlx_lqr.files.tensors import write_tensors


def test_the_same_tensors_and_metadata_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = {name: np.arange(size, dtype=np.float32) for size, name in enumerate("cab", 1)}
    metadata = {name: f'"{name}" é \\' for name in "zyxwvutsrq"}  # ten in any order: 3,628,800 of them
    contents = set()
    for order in (1, -1):
        write_tensors(tmp_path / "file", dict([*tensors.items()][::order]), dict([*metadata.items()][::order]))
        contents.add((tmp_path / "file").read_bytes())
    assert len(contents) == 1
    loaded = load_file(tmp_path / "file")
    assert all(np.array_equal(loaded[name], tensors[name]) for name in tensors | loaded)
    with safe_open(tmp_path / "file", framework="numpy") as opened:
        assert opened.metadata() == metadata


def test_one_fit_gives_one_file(tmp_path: Path) -> None:
    for name in ("first", "second"):
        controller_for(tiny("llama")).save(tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    mlx_lqr.Controller.load(tmp_path / "second").save(tmp_path / "first")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
