"""Which safetensors files of a model folder are its weights, and which tensor lies in which of them.

Folders collect files: an older copy, the same weights in another dtype, shards of an earlier download. So the index
says what belongs to the model, where there is one; without it, the names do, and what they leave open is refused.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mlx_lqr.errors import InputError, first_line, quoted
from mlx_lqr.files.json_text import read_json_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LONGEST = 255
"""Bytes of a file's name that the usual file systems take."""
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")


@dataclass(frozen=True)
class Weights:
    """What a folder's weight files hold.

    `files` maps the name of every tensor to its file, `shapes` to its shape; `formats` is who the files say wrote them.
    """

    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    formats: frozenset[str | None]
    unnamed: tuple[Path, str] | None = None
    """A file of these, and a tensor in it that the index does not name, and that is therefore not read."""

    @property
    def paths(self) -> list[Path]:
        return sorted(set(self.files.values()))

    def of(self, path: Path) -> list[str]:
        """The names of the tensors to be read from this file."""
        return [name for name, file in self.files.items() if file == path]


def weights_of(folder: Path) -> Weights:
    """The weights of the model in `folder`, by the files' headers alone.

    Raises:
        InputError: there are none, a file or a tensor that is named is missing, or it is unclear what belongs together.
    """
    index = folder / INDEX
    named = _indexed(index) if index.is_file() else dict.fromkeys(_unindexed(folder))
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    formats: set[str | None] = set()
    unnamed: tuple[Path, str] | None = None
    for file, wanted in named.items():
        try:
            with safe_open(folder / file, framework="np") as opened:
                present = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
                formats.add((opened.metadata() or {}).get("format"))
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{folder / file} is damaged, cut short or corrupt ({first_line(error)}): download or convert the "
                "model again"
            ) from error
        for name in present if wanted is None else wanted:
            if name not in present:
                raise InputError(f"{folder / file} lacks {name}, which {INDEX} says is in it: download the model again")
            if name in files:
                raise InputError(f"both {files[name].name} and {file} in {folder} hold {name}: remove the stray file")
            files[name], shapes[name] = folder / file, present[name]
        if wanted is not None and (others := present.keys() - set(wanted)):
            unnamed = (folder / file, min(others))
    return Weights(files, shapes, frozenset(formats), unnamed)


def _indexed(index: Path) -> dict[str, list[str] | None]:
    """The file names that the index gives, each with its tensors."""
    folder = index.parent
    try:
        weight_map = read_json_object(index)["weight_map"]
        named: dict[str, list[str] | None] = {}
        for tensor, file in weight_map.items():
            if Path(file).name != file or len(os.fsencode(file)) > LONGEST:
                raise ValueError(f"it names {quoted(file)}, which is no file of the folder")
            tensors = named.setdefault(file, [])
            assert tensors is not None
            tensors.append(tensor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is no index of weights ({first_line(error)}): download the model again") from error
    missing = sorted(file for file in named if not (folder / file).is_file())
    if missing:
        whole = f", or remove {INDEX} if {SINGLE} is the whole model" if (folder / SINGLE).is_file() else ""
        raise InputError(
            f"{folder} lacks {missing[0]}, which {INDEX} names ({len(missing)} of its files are missing): "
            f"download it again{whole}"
        )
    if not named:
        raise InputError(f"{index} names no weights: download the model again")
    return named


def _unindexed(folder: Path) -> list[str]:
    """The file names of a folder without an index: the single one, else a whole set of shards."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    shards = {file.name: match for file in folder.iterdir() if (match := _SHARD.fullmatch(file.name))}
    if not shards:
        others = sorted(file.name for file in folder.glob("*.safetensors"))
        if others:
            raise InputError(
                f"{folder} has no model*.safetensors that is the whole model: if {others[0]} is, rename it {SINGLE}"
            )
        raise InputError(
            f"{folder} has no model*.safetensors: give the folder of a whole model (pickled weights are never read)"
        )
    totals = sorted({int(match[2]) for match in shards.values()})
    if len(totals) > 1:
        sets = " and ".join(f"of {total}" for total in totals)
        raise InputError(f"{folder} has shards {sets} and no {INDEX}: remove those that do not belong to the model")
    present = {int(match[1]) for match in shards.values()}
    absent = [number for number in range(1, totals[0] + 1) if number not in present]
    if absent or len(shards) != totals[0]:
        which = f"shard {absent[0]} of {totals[0]}" if absent else "a clear set of shards"
        raise InputError(f"{folder} lacks {which}: download it again")
    return sorted(shards)
