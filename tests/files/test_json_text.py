"""What a damaged or malicious file says is one line, whatever it is: JSON, and the metadata of our own files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.backends import tiny_on
from helpers.command_line import refused
from safetensors import safe_open
from safetensors.numpy import save_file

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.files.json_text import Entries, parse_json, read_json_object

DEEP = "[" * 5000
BAD = {
    "deep": DEEP + "]" * 5000,
    "deep and open": DEEP,
    "deeper than anybody writes": "[" * 300 + "]" * 300,
    "infinite": "[1e999]",
    "not a number": "[NaN]",
    "Infinity": "[-Infinity]",
    "a long number": "[" + "9" * 5000 + "]",
    "half a pair": '["\\ud800"]',
    "half a pair as a name": '{"\\udfff": 1}',
    "text": "nothing",
    "empty": "",
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_what_is_no_sound_json_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - whoever calls it says which file it was
        parse_json(text)
    assert len(str(refusal.value)) < 200
    file = tmp_path / "file.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"file\.json is not valid JSON") as line:
        read_json_object(file)
    assert "\n" not in str(line.value)


@pytest.mark.parametrize("value", [{"a": [1, -2.5, True, None, "\u20ac\U0001f600"]}, [[]] * 3, 2**63, 1e300])
def test_sound_json_is_what_python_reads(value: Any) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert parse_json(text) == json.loads(text)


def test_half_pairs_that_this_library_writes_come_back() -> None:
    assert parse_json('["\\ud800"]', half_pairs=True) == ["\ud800"]


def test_an_object_is_not_any_value(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match="no JSON object"):
        read_json_object(tmp_path / "list.json")


WRONG: dict[str, tuple[Callable[[Entries], Any], list[str]]] = {
    "count": (
        lambda e: e.count("x", 1, 100),
        ["0", "101", "4294967296", "-1", "1.5", "true", "", "9" * 400, "\u0663x"],
    ),
    "number": (lambda e: e.number("x"), ["1e999", "nan", "-inf", "", "[1]"]),
    "numbers": (lambda e: e.numbers("x"), ["{}", "[null]", "[[1]]", "[true]", '["a"]', "1", DEEP]),
    "layers": (lambda e: e.layers("x", 4), ["[4]", "[-1]", "[1, 1]", "[2, 1]", "[1e999]", "{}", "[0.5]"]),
    "texts": (lambda e: e.texts("x"), ["[]", '[""]', '["a", "a"]', "[1]", '["\\ud800"]', '{"a": 1}', DEEP]),
    "pairs": (lambda e: e.pairs("x", 1), ["[]", "{}", "[[1]]", "[[1, -1]]", "[[1e999, 1]]", "[[1, 2], [3, 4]]", "[1]"]),
    "named": (lambda e: e.named_numbers("x"), ["[]", '{"a": "b"}', '{"a": null}', '{"a": 1e999}']),
    "named pairs": (
        lambda e: e.named_pairs("x", 1),
        [
            "[]",
            "{}",
            "[null, null]",
            "[[1, 2]]",
            '[{"a": 1}]',
            '[{"a": [1]}]',
            '[{"a": [1, true]}]',
            '[{"a": [1e999, 1]}]',
        ],
    ),
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, (_, texts) in WRONG.items() for text in texts])
def test_metadata_of_the_wrong_kind_or_size_is_refused(kind: str, text: str) -> None:
    read, _ = WRONG[kind]
    for entries in (Entries({"x": text}), Entries({})):
        with pytest.raises(ValueError) as refusal:  # noqa: PT011
            read(entries)
        assert len(str(refusal.value)) < 200


def rewritten(file: Path, tensors: dict[str, np.ndarray] | None = None, **metadata: str) -> Path:
    """The file with other entries."""
    with safe_open(file, framework="numpy") as opened:
        kept = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        entries = {**opened.metadata(), **metadata}
    save_file({**kept, **(tensors or {})}, str(file), entries)
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A controller, the file of another method, and Jacobians, of a tiny model."""
    place = tmp_path_factory.mktemp("files")
    model = tiny_on("mlx", "llama")
    positive, negative = [[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10]]
    mlx_lqr.fit(model, positive, negative, concept="one", layers="all").save(place / "controller.safetensors")
    mlx_lqr.fit_baseline(model, "angular", positive, negative, concept="one").save(place / "baseline.safetensors")
    mlx_lqr.linearize(model, positive, store=place / "jacobians.safetensors")
    return place


COMMON = {
    "T": ["4294967296", "0", "-1", "x", "1e3", "9" * 500],
    "d": ["0", "4294967296", "[]"],
    "concepts": ["[]", "{}", '["a", "b"]', '["\\ud800"]', "[1]", DEEP],
    "prompt_counts": ["{}", "[]", "[[1e999, 1]]", "[[1]]", DEEP],
    "positions": ["middle", ""],
    "strength": ["[1e999]", "[]", "{}", DEEP],
}
ENTRIES = {
    "controller": {**COMMON, "q": ["nan", "1e999", ""], "cost": ["none"], "jacobian_prompts": ["-1", "x"]},
    "baseline": {**COMMON, "layers": ["[1e999]", "[99]", "[0, 0]", DEEP], "numbers": ["[]", '{"a": 1}', DEEP]},
}


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [(kind, name, text) for kind, names in ENTRIES.items() for name, texts in names.items() for text in texts],
)
def test_damaged_steering_is_one_line(kind: str, name: str, text: str, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    file.write_bytes((folder / f"{kind}.safetensors").read_bytes())
    assert "damaged" in refused("show", rewritten(file, **{name: text}))


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "I8", "F64"])
@pytest.mark.parametrize("kind", ["controller", "baseline", "jacobians"])
def test_tensors_of_a_dtype_that_is_never_written(kind: str, dtype: str, folder: Path, tmp_path: Path) -> None:
    """The header alone says it; the bytes are as many as it says."""
    content = (folder / f"{kind}.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = min(name for name in header if name != "__metadata__")
    size = {"BF16": 2, "F8_E4M3": 1, "I8": 1, "F64": 8}[dtype]
    entries, data, start = {"__metadata__": header["__metadata__"]}, b"", 0
    for tensor in sorted(name for name in header if name != "__metadata__"):
        count = int(np.prod(header[tensor]["shape"]))
        nbytes = count * (size if tensor == name else 4)
        kept = {**header[tensor], **({"dtype": dtype} if tensor == name else {})}
        entries[tensor] = {**kept, "data_offsets": [start, start + nbytes]}
        data, start = data + bytes(nbytes), start + nbytes
    text = json.dumps(entries).encode()
    file = tmp_path / "file.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(InputError, match=r"(make|fit) it again"):
        (mlx_lqr.Jacobians.load if kind == "jacobians" else mlx_lqr.load_steering)(file)  # type: ignore[operator]


@pytest.mark.parametrize(("name", "text"), [("prompts", ""), ("prompts", "-1"), ("prompts", "x"), ("width", "0")])
def test_damaged_jacobians_are_one_line(name: str, text: str, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    file.write_bytes((folder / "jacobians.safetensors").read_bytes())
    with pytest.raises(InputError, match="damaged file of Jacobians"):
        mlx_lqr.Jacobians.load(rewritten(file, **{name: text}))
