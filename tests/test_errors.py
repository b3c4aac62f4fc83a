"""A refusal is one line that can be printed, whatever a damaged file has put into it."""

from __future__ import annotations

import pytest

from mlx_lqr.errors import LENGTH, InputError, quoted


@pytest.mark.parametrize("value", ["two\nlines\r\nand\u2028more", "half a pair \ud800", "x" * 100_000])
def test_a_refusal_is_one_line_that_can_be_printed(value: str) -> None:
    line = str(InputError(f"the file says {value}: make it again"))
    assert len(line.splitlines()) == 1
    assert line.encode()
    assert len(line) < LENGTH
    assert line.startswith("the file says ")
    assert line.endswith(": make it again")


def test_an_ordinary_message_stays_as_it_is() -> None:
    assert str(InputError("the file caf\u00e9 is\tdamaged")) == "the file caf\u00e9 is\tdamaged"


def test_a_quoted_value_is_short() -> None:
    assert quoted("a") == "'a'"
    assert len(quoted([0] * 10_000)) < 50
    assert quoted("\ud800").encode() == b"'\\ud800'"
