"""Open a GGUF model: one file, or all the parts of one.

The first part has the metadata. Every part states its number, how many there are and how many tensors all hold
together, so that a missing part, or one of another model, is noticed.
"""

from __future__ import annotations

from pathlib import Path

from mlx_lqr.errors import InputError

from .gguf_file import GGUFFile
from .parts import part_paths

_COUNT, _NUMBER, _TENSORS = "split.count", "split.no", "split.tensors.count"


def open_gguf(path: Path) -> GGUFFile:
    """The model in `path`, which may be any of its parts.

    Raises:
        InputError: a part is missing, cannot be read, or is not of this model.
    """
    file = GGUFFile(path)
    count = file.value(_COUNT, int, 1)
    if count in (0, 1):
        return file
    paths = part_paths(path)
    if len(paths) != count:
        raise InputError(
            f"{path} is one of {count} parts, and its name does not say which: give all their own names back "
            f"(NAME-00001-of-{count:05d}.gguf and so on)"
        )
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(
            f"{path} is one of {count} parts, and {', '.join(missing[:3])}{more} cannot be found: "
            "download all parts into one folder"
        )
    parts = [GGUFFile(part) for part in paths]
    _check(parts)
    model = parts[0]
    for part in parts[1:]:
        model.append(part)
    if len(model.tensors) != model.value(_TENSORS, int):
        raise InputError(
            f"{model.path} and its other parts hold {len(model.tensors)} tensors, not {model.metadata[_TENSORS]}: "
            "download all parts of one model"
        )
    return model


def _check(parts: list[GGUFFile]) -> None:
    """Raise `InputError` where a part is not the one that its name says, or contradicts the first."""
    first = parts[0]
    for number, part in enumerate(parts):
        expected = {_COUNT: len(parts), _NUMBER: number, _TENSORS: first.value(_TENSORS, int)}
        shared = {key: value for key, value in first.metadata.items() if key in part.metadata and key != _NUMBER}
        for key, value in (shared | expected).items():
            if part.metadata.get(key) != value:
                raise InputError(
                    f"{part.path} does not belong to {first.path.name} ({key} is {str(part.metadata.get(key))[:40]}, "
                    f"not {str(value)[:40]}): download all parts of one model"
                )
