"""A result as JSON: each field of its dataclass, arrays as nested lists of six digits, null for NaN and infinity."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from os import PathLike
from typing import Any

import numpy as np

from mlx_lqr.files.atomic import writing


def as_json(result: Any) -> Any:
    """A result, or a part of one, as JSON's own types."""
    if is_dataclass(result) and not isinstance(result, type):
        return {field.name: as_json(getattr(result, field.name)) for field in fields(result)}
    if isinstance(result, np.ndarray | np.generic):
        return as_json(result.tolist())
    if isinstance(result, dict):
        return {str(key): as_json(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [as_json(value) for value in result]
    if isinstance(result, float):
        return float(f"{result:.6g}") if math.isfinite(result) else None
    return result


def write_json(path: str | PathLike[str], result: Any, *, force: bool = False) -> None:
    """Write a result to a file, atomically.

    Args:
        force: overwrite a file of any kind, not only of results.

    Raises:
        InputError: the file cannot be written, or is of another kind.
    """
    with writing(path, kind="results", force=force) as temporary:
        temporary.write_text(json.dumps(as_json(result)) + "\n", "utf-8")
