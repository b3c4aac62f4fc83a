"""Type-check the package as it installs: runtime/ and convert/ sit inside mlx_lqr only there.

A copy with that layout is made of links, so that mypy's messages name the checkout's own files.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        package = Path(temporary) / "mlx_lqr"
        shutil.copytree(ROOT / "mlx_lqr", package, copy_function=os.symlink)
        for name in ("runtime", "convert"):
            (package / name).symlink_to(ROOT / name)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "mlx_lqr"]
        return subprocess.run(command, cwd=temporary, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
