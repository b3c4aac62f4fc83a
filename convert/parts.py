"""The files of a GGUF model that is in parts: name-00001-of-00003.gguf and so on, as `llama-gguf-split` names them."""

from __future__ import annotations

import re
from pathlib import Path


def part_paths(file: Path) -> list[Path]:
    """All parts of the model that `file` is a part of, by its name, whether they exist or not; else `file` alone."""
    named = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", file.name)
    if named is None or not 1 <= int(named[2]) <= int(named[3]):
        return [file]
    return [file.with_name(f"{named[1]}-{number:05d}-of-{named[3]}.gguf") for number in range(1, int(named[3]) + 1)]
