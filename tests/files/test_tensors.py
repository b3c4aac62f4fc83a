"""Files of tensors: equal byte for byte where what they hold is, and never half read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.controllers import controller_for
from helpers.tiny import tiny
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.files.tensors import read_format, read_tensors, write_tensors


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


CONTENT = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.float32([[-0.5]]), "none": np.empty((0, 4))}


def test_files_are_read_as_the_library_of_the_format_reads_them(tmp_path: Path) -> None:
    write_tensors(tmp_path / "ours", CONTENT, {"format": "f"})
    metadata = {"format": "f", "text": "é 𝄞 \n"}
    halves = {name: tensor.astype(np.float16) for name, tensor in CONTENT.items()}
    save_file({"one": np.array(3.5, np.float32), **halves}, tmp_path / "theirs", metadata)
    for name in ("ours", "theirs"):
        read, expected = read_tensors(tmp_path / name, "f", "a file")[0], load_file(tmp_path / name)
        assert read.keys() == expected.keys()
        for key, tensor in expected.items():
            assert read[key].dtype == tensor.dtype
            assert read[key].shape == tensor.shape
            assert np.array_equal(read[key], tensor)
    assert read_tensors(tmp_path / "theirs", "f", "a file")[1] == metadata
    assert read_format(tmp_path / "theirs") == "f"


def header(content: bytes) -> dict[str, Any]:
    entries: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return entries


def with_header(entries: Any, content: bytes) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + int.from_bytes(content[:8], "little") :]


def changed(name: str, **entry: Any) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        entries = header(content)
        entries[name] = {**entries[name], **entry}
        return with_header(entries, content)

    return change


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut in the data": lambda content: content[:-1],
    "cut in the header": lambda content: content[:40],
    "cut in its length": lambda content: content[:5],
    "empty": lambda _: b"",
    "longer": lambda content: content + b"\0",
    "a header of any length": lambda content: b"\xff" * 8 + content[8:],
    "no JSON": lambda content: with_header(b'{"a": }', content),
    "no object": lambda content: with_header([], content),
    "no text": lambda content: with_header(b'{"\xff": 1}', content),
    "nested": lambda content: with_header(b'{"a":' * 9999 + b"1" + b"}" * 9999, content),
    "an overlap": changed("b", data_offsets=[0, 24]),
    "a gap": changed("b", data_offsets=[8, 32]),
    "backwards": changed("b", data_offsets=[28, 4]),
    "negative": changed("a", shape=[-1, -1]),
    "another shape": changed("b", shape=[3, 3]),
    "fractions": changed("b", shape=[2.0, 3.0]),
    "no shape": changed("b", shape=6),
    "truth for a number": changed("a", shape=[True, True]),
    "another size": changed("b", dtype="F64"),
    "an unknown dtype": changed("b", dtype="F33"),
    "more than there is": changed("b", shape=[1 << 40, 1 << 40]),
    "one that we never write": changed("b", dtype="I32"),
    "metadata that is none": lambda content: with_header({**header(content), "__metadata__": {"format": 1}}, content),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_files_are_refused_in_one_line(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_tensors(file, CONTENT, {"format": "f"})
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match="damaged or not a safetensors file: make it again") as refused:
        read_tensors(file, "f", "a file")
    assert "\n" not in str(refused.value)
