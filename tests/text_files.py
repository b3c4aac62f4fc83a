"""What holds for every text file: lines end in one newline and not in spaces, nothing is left of a merge.

    python tests/text_files.py [FILE ...]

Without files: all that git knows. pre-commit names those of a commit.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 3 * 2**20
TRAILING_SPACES = re.compile(rb"[ \t]+$", re.MULTILINE)
CONFLICT = re.compile(rb"^(<<<<<<<|>>>>>>>) ", re.MULTILINE)


def faults(file: Path) -> Iterator[str]:
    content = file.read_bytes()
    if len(content) > LARGEST:
        yield "larger than 3 MiB"
    if b"\0" in content:  # not a text
        return
    if b"\r\n" in content:
        yield "ends lines as Windows does"
    if content and (not content.endswith(b"\n") or content.endswith(b"\n\n")):
        yield "does not end in one newline"
    if file.suffix not in (".py", ".svg") and TRAILING_SPACES.search(content):  # ruff looks at Python, no one at SVG
        yield "has spaces at the end of a line"
    if CONFLICT.search(content):
        yield "has the marks of a merge conflict"


def main(names: list[str]) -> int:
    if not names:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        names = [str(ROOT / name) for name in listed.decode().split("\0") if name]
    files = [
        file for file in map(Path, names) if file.is_file() and not file.is_symlink() and "golden" not in file.parts
    ]
    lines = [f"{file}: {fault}" for file in files for fault in faults(file)]
    print(*lines, sep="\n", end="\n" if lines else "")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
