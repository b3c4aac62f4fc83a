"""Constraints for pip: every package of pyproject.toml at the oldest version that it allows.

    python tests/oldest.py > constraints.txt
    pip install --editable '.[torch]' --constraint constraints.txt

Packages that only tests need may be of any version.
"""

from __future__ import annotations

import re
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
_GROUPS = ("dependencies", "torch")


def oldest(pyproject: str) -> dict[str, str]:
    """Package -> the oldest version that the dependencies and the torch backend allow.

    Raises:
        ValueError: a package without a lower bound.
    """
    found: dict[str, str] = {}
    for group in _GROUPS:  # Python 3.10 has no parser of TOML, and pip cannot have installed one yet
        listed = re.search(rf"^{group} = \[(.*?)\]$", pyproject, re.MULTILINE | re.DOTALL)
        assert listed is not None, group
        for requirement in re.findall(r'"([^"]+)"', listed[1]):
            bound = re.match(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\d.]+)", requirement)
            if bound is None:
                raise ValueError(f"{requirement!r} has no lower bound")
            found[bound[1]] = bound[2]
    return found


if __name__ == "__main__":
    for name, version in oldest(PYPROJECT.read_text("utf-8")).items():
        print(f"{name}=={version}")
