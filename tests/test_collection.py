"""Tests can be collected where other systems differ from ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_all_files_can_be_collected_on_windows() -> None:
    script = Path(__file__).parent / "helpers" / "windows.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
