"""Marks for tests that need what only some systems have."""

from __future__ import annotations

import sys

import pytest

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs the signals, shell and devices of POSIX")
