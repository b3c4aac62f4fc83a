"""What cannot be converted is refused in one line, quickly, and nothing is left behind."""

from __future__ import annotations

import errno
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from gguf.constants import GGMLQuantizationType as Kind
from helpers.tiny_gguf import write

from mlx_lqr.convert import convert
from mlx_lqr.convert.gguf_file import GGUFFile
from mlx_lqr.errors import InputError


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a good file."""
    return write(tmp_path_factory.mktemp("intact") / "t.gguf", "llama", Kind.Q8_0).path.read_bytes()


def refused(source: Path | str, place: Path, **options: Any) -> str:
    """The message with which `source` is refused; checks that it is one line and that nothing is left."""
    with pytest.raises(InputError) as caught:
        convert(source, place / "out", **options)
    message = str(caught.value)
    assert "\n" not in message
    assert ":" in message  # what is wrong: what to do
    assert not place.exists() or list(place.iterdir()) == []
    return message


def header(tensors: int, keys: int, rest: bytes = b"", version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + rest


def key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


HUGE = 1 << 60
CORRUPT = {
    "empty": (b"", "empty"),
    "text": (b"hello, I am no model", "not a GGUF file"),
    "bad magic": (header(0, 0, magic=b"GGML"), "not a GGUF file"),
    "only magic": (b"GGUF", "cut short"),
    "version 1": (header(0, 0, version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "absurd key count": (header(0, HUGE), "cut short"),
    "absurd tensor count": (header(HUGE, 0), "cut short"),
    "absurd string": (header(0, 1, key("a", 8, struct.pack("<Q", HUGE)) + b"x" * 99), "cut short"),
    "absurd strings": (header(0, 1, key("a", 9, struct.pack("<IQ", 8, HUGE)) + b"x" * 99), "cut short"),
    "absurd array": (header(0, 1, key("a", 9, struct.pack("<IQ", 0, HUGE)) + b"x" * 99), "cut short"),
    "nested array": (header(0, 1, key("a", 9, struct.pack("<IQ", 9, 1)) + b"x" * 99), "array of type 9"),
    "unknown value": (header(0, 1, key("a", 77, b"x" * 99)), "value of type 77"),
    "same key twice": (header(0, 2, key("a", 7, b"\1") * 2), "states a twice"),
    "not UTF-8": (header(0, 1, struct.pack("<Q", 2) + b"\xff\xfe" + b"\0" * 20), "UTF-8"),
    "alignment": (header(0, 1, key("general.alignment", 4, struct.pack("<I", 3))), "alignment is 3"),
    "nothing in it": (header(0, 0), "does not state general.architecture"),
    "split": (header(0, 1, key("split.count", 2, struct.pack("<H", 3))), "one of 3 parts"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_gguf_is_refused(case: str, tmp_path: Path) -> None:
    content, message = CORRUPT[case]
    (tmp_path / "t.gguf").write_bytes(content)
    assert message in refused(tmp_path / "t.gguf", tmp_path / "place")


def tensor_entry(shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    packed = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", 1) + b"t" + packed + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (tensor_entry([HUGE, HUGE]), "cut short"),
        (tensor_entry([4], offset=HUGE), "cut short"),
        (tensor_entry([]), "0 dimensions"),
        (tensor_entry([1] * 5), "5 dimensions"),
        (tensor_entry([0, 4]), "shape (4, 0)"),
        (tensor_entry([33], kind=8), "shape (33,)"),  # Q8_0 has blocks of 32
        (tensor_entry([4], kind=999), "GGML type 999"),
        (tensor_entry([4]) * 2, "twice"),
    ],
)
def test_corrupt_tensor_table_is_refused(entry: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.gguf").write_bytes(header(len(entry) // len(tensor_entry([4])) or 1, 0, entry + b"\0" * 200))
    assert message in refused(tmp_path / "t.gguf", tmp_path / "place")


def test_gguf_cut_anywhere_is_refused(intact: bytes, tmp_path: Path) -> None:
    rng = random.Random(0)
    start = min(tensor.offset for tensor in GGUFFile(_file(tmp_path, intact)).tensors.values())
    end = max(tensor.offset + tensor.nbytes for tensor in GGUFFile(_file(tmp_path, intact)).tensors.values())
    cuts = [*rng.sample(range(start), 150), *rng.sample(range(start, end), 50), end - 1]
    for cut in cuts:
        message = refused(_file(tmp_path, intact[:cut]), tmp_path / "place")
        assert "cut short" in message or "empty" in message or "not a GGUF" in message


def test_gguf_with_a_flipped_byte_is_converted_or_refused(intact: bytes, tmp_path: Path) -> None:
    """Never a traceback, a hang or a wild allocation, whatever the header says."""
    rng = random.Random(1)
    start = min(tensor.offset for tensor in GGUFFile(_file(tmp_path, intact)).tensors.values())
    refusals: list[str] = []
    for number in range(250):
        content = bytearray(intact)
        for _ in range(rng.choice([1, 1, 4])):
            content[rng.randrange(start)] = rng.choice([0, 1, 0x7F, 0xFF, rng.randrange(256)])
        try:
            convert(_file(tmp_path, bytes(content)), tmp_path / "outs" / str(number))
        except InputError as error:
            refusals.append(str(error))
    assert len(refusals) > 50
    assert not any("\n" in message for message in refusals)


def _file(folder: Path, content: bytes) -> Path:
    path = folder / "changed.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "does not state llama.expert_used_count"),
        ({"llama.expert_count": 8, "llama.expert_used_count": 9}, "uses 9 of 8 experts"),
        (
            {"llama.expert_count": 8, "llama.expert_used_count": 2},
            "the tensor 'blk.0.ffn_down.weight', which this kind",
        ),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count"),
        ({"llama.attention.value_length": 8}, "value_length"),
        ({"llama.attention.head_count": [4, 2]}, "a different llama.attention.head_count for each layer"),
        ({"llama.attention.head_count": 0}, "0 heads"),
        ({"llama.block_count": 1 << 30}, "1073741824 blocks"),
        ({"llama.block_count": 3}, "lacks the tensor for model.layers.2"),
        ({"llama.block_count": 1}, "holds the tensor 'blk.1."),
        ({"llama.feed_forward_length": 64}, "in the shape"),
        ({"llama.embedding_length": "64"}, "states llama.embedding_length as '64'"),
        ({"llama.context_length": None}, "does not state llama.context_length"),
        ({"llama.rope.freq_base": 0.0}, "states llama.rope.freq_base as 0.0"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope'"),
    ],
)
def test_model_beyond_what_mlx_does_is_refused(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny = write(tmp_path / "t.gguf", "llama", metadata=metadata)
    assert message in refused(tiny.path, tmp_path / "place")


def test_unsupported_architecture_is_named_with_the_supported_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "t.gguf", "llama").path
    path.write_bytes(path.read_bytes().replace(b"llama", b"bloom"))
    message = refused(path, tmp_path / "place")
    assert "'bloom'" in message
    assert "give the original model (a folder or hub id), or one of afmoe," in message
    assert "gemma2, gemma3, gemma3n" in message


def test_weights_that_are_no_numbers_are_refused(intact: bytes, tmp_path: Path) -> None:
    tensor = GGUFFile(_file(tmp_path, intact)).tensors["output_norm.weight"]
    content = intact[: tensor.offset] + struct.pack("<f", float("nan")) + intact[tensor.offset + 4 :]
    assert "model.norm.weight holds values that are not numbers" in refused(
        _file(tmp_path, content), tmp_path / "place"
    )


@pytest.mark.parametrize("source", ["nowhere", "/nowhere/at/all", "no/such/file.gguf", "model.gguf"])
def test_source_that_does_not_exist_is_refused(source: str, tmp_path: Path) -> None:
    assert "does not exist: give" in refused(source, tmp_path / "place")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "unknown dtype 'float64': use float32, float16, bfloat16"),
        ({"quantize": 3}, "3 bits: use 4 or 8"),
        ({"group_size": 48}, "groups of 48: use 32, 64, 128"),
    ],
)
def test_unknown_option_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path, tmp_path / "place", **options)


def test_place_that_is_taken_is_refused_and_untouched(tmp_path: Path) -> None:
    path = write(tmp_path / "t.gguf", "llama").path
    place = tmp_path / "out"
    place.mkdir()
    (place / "mine").write_text("keep")
    with pytest.raises(InputError, match="exists already: name another place"):
        convert(path, place)
    assert [file.name for file in place.iterdir()] == ["mine"]
    (place / "mine").unlink()
    assert convert(path, place) == place  # an empty folder is no obstacle


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "t.gguf", "llama").path
    written = 0

    def add(*_: Any) -> None:
        nonlocal written
        written += 1
        if written > 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mlx_lqr.convert.write._Shard.add", add)
    assert "No space left on device" in refused(path, tmp_path / "place")


def test_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "t.gguf", "llama").path

    def interrupt(stage: str, done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(path, tmp_path / "place" / "out", progress=interrupt)
    assert list((tmp_path / "place").iterdir()) == []
