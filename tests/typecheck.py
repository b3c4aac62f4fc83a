"""Type-check the package as it installs, where runtime/ and convert/ sit inside mlx_lqr, then tests and benchmarks.

A copy with that layout is made of links, so that mypy's messages name the checkout's own files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BESIDE = ("tests", "benchmarks", "cli.py")
LENIENT = ("arg-type", "call-overload", "comparison-overlap", "func-returns-value", "index", "misc", "no-untyped-call")
"""Not asked of tests and benchmarks, which pass what is wrong on purpose, stand-ins, and options by the dozen."""


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(ROOT / "mlx_lqr", folder / "mlx_lqr", copy_function=os.symlink)
        for name in ("runtime", "convert"):
            (folder / "mlx_lqr" / name).symlink_to(ROOT / name)
        for name in BESIDE:
            (folder / name).symlink_to(ROOT / name)
        package = mypy(folder, "-p", "mlx_lqr")
        lenient = [f"--disable-error-code={code}" for code in LENIENT]
        return package or mypy(folder, "--explicit-package-bases", "--no-warn-unused-ignores", *lenient, *BESIDE)


def mypy(folder: Path, *arguments: str) -> int:
    """mypy's exit status; `helpers` is found where pytest finds it."""
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *arguments]
    paths = os.pathsep.join([str(folder), str(folder / "tests")])
    return subprocess.run(command, cwd=folder, env={**os.environ, "MYPYPATH": paths}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
