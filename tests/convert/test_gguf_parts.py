"""A GGUF model in parts is read from any of them; parts that are missing or of another model are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGMLQuantizationType as Kind
from gguf.constants import GGUFValueType
from helpers.tiny_gguf import write

from mlx_lqr.convert import convert
from mlx_lqr.convert.sources import cached_conversion
from mlx_lqr.errors import InputError

COUNT = 3


def split(file: Path, folder: Path, count: int = COUNT, last: dict[str, int] | None = None) -> list[Path]:
    """Write `file` in parts as `llama-gguf-split` does: the first has the metadata, all have their place and tensors.

    `last` is what the last part states otherwise.
    """
    reader = GGUFReader(file)
    per_part = -(-len(reader.tensors) // count)
    parts = []
    for number in range(count):
        path = folder / f"{file.stem}-{number + 1:05d}-of-{count:05d}.gguf"
        writer = GGUFWriter(path, "llama")
        writer.kv_data[0].clear()
        for field in reader.fields.values() if number == 0 else ():
            if not field.name.startswith("GGUF."):
                kind = field.types[0]
                inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kind, inner)
        place = {"no": number, "count": count, "tensors": len(reader.tensors)}
        if number == count - 1:
            place |= last or {}
        writer.add_uint16("split.no", place["no"])
        writer.add_uint16("split.count", place["count"])
        writer.add_int32("split.tensors.count", place["tensors"])
        for tensor in reader.tensors[number * per_part : (number + 1) * per_part]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parts.append(path)
    return parts


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(("arch", "kind"), [("llama", Kind.Q8_0), ("mixtral", Kind.F16)])
@pytest.mark.parametrize("given", range(COUNT))
def test_any_part_is_the_whole_model(arch: str, kind: Kind, given: int, tmp_path: Path) -> None:
    whole = write(tmp_path / "model.gguf", arch, kind).path
    parts = split(whole, tmp_path)
    folder = convert(parts[given], tmp_path / "parts")
    assert content(folder) == content(convert(whole, tmp_path / "whole"))


def test_a_model_in_one_numbered_part_is_a_whole_one(tmp_path: Path) -> None:
    whole = write(tmp_path / "model.gguf", "llama").path
    (part,) = split(whole, tmp_path, 1)
    assert content(convert(part, tmp_path / "part")) == content(convert(whole, tmp_path / "whole"))


def test_the_cache_knows_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_LQR_CACHE", str(tmp_path / "cache"))
    parts = split(write(tmp_path / "model.gguf", "llama").path, tmp_path)
    folder = cached_conversion(parts[1])
    assert cached_conversion(parts[0]) == folder
    split(write(tmp_path / "model.gguf", "llama", seed=1).path, tmp_path)
    assert cached_conversion(parts[0]) != folder


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return split(write(tmp_path / "model.gguf", "llama").path, tmp_path)


def refused(file: Path, place: Path) -> str:
    with pytest.raises(InputError) as caught:
        convert(file, place / "out")
    message = str(caught.value)
    assert "\n" not in message
    assert ": " in message  # what is wrong: what to do
    assert not (place / "out").exists()
    return message


@pytest.mark.parametrize("given", [0, 2])
def test_a_missing_part_is_named(given: int, parts: list[Path], tmp_path: Path) -> None:
    parts[1].unlink()
    message = refused(parts[given], tmp_path)
    assert f"is one of 3 parts, and {parts[1].name} cannot be found: download all parts" in message


def test_a_part_without_its_name_is_refused(parts: list[Path], tmp_path: Path) -> None:
    renamed = parts[0].rename(tmp_path / "renamed.gguf")
    assert "one of 3 parts, and its name does not say which" in refused(renamed, tmp_path)


def test_parts_of_another_count_are_refused(parts: list[Path], tmp_path: Path) -> None:
    renamed = parts[0].rename(tmp_path / "model-00001-of-00002.gguf")
    assert "one of 3 parts" in refused(renamed, tmp_path)


def test_a_part_cut_short_is_named(parts: list[Path], tmp_path: Path) -> None:
    parts[2].write_bytes(parts[2].read_bytes()[:-2000])
    assert f"{parts[2]} is cut short or corrupt" in refused(parts[0], tmp_path)


def test_a_part_twice_is_refused(parts: list[Path], tmp_path: Path) -> None:
    shutil.copy(parts[1], parts[2])
    assert f"{parts[2]} does not belong to {parts[0].name} (split.no is 1, not 2)" in refused(parts[0], tmp_path)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"tensors": 1000}, "split.tensors.count is 1000, not 21"),
        ({"count": 4}, "split.count is 4, not 3"),
        ({"no": 7}, "split.no is 7, not 2"),
    ],
)
def test_a_part_of_another_model_is_refused(last: dict[str, int], message: str, tmp_path: Path) -> None:
    parts = split(write(tmp_path / "model.gguf", "llama").path, tmp_path, last=last)
    assert message in refused(parts[0], tmp_path)


def test_a_part_with_other_tensors_is_refused(parts: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    larger = write(other / "model.gguf", "llama", hidden_size=128).path
    shutil.copy(split(larger, other)[2], parts[2])
    assert "in the shape" in refused(parts[0], tmp_path)


def test_parts_that_hold_a_tensor_twice_are_refused(parts: list[Path], tmp_path: Path) -> None:
    copied = bytearray(parts[1].read_bytes())
    copied[copied.index(b"split.no") + len(b"split.no") + 4] = 2  # its number, after the key and its type
    parts[2].write_bytes(copied)
    assert "both hold" in refused(parts[0], tmp_path)
