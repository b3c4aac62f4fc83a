"""A file is written whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from mlx_lqr import InputError
from mlx_lqr.files.atomic import writing
from mlx_lqr.files.jacobians import JacobianWriter


def _write_half(path: Path, error: type[BaseException]) -> None:
    path.write_text("half of the n")
    raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(error), writing(target) as temporary:
        _write_half(temporary, error)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(InputError, match=r"cannot write .*No space left on device"), writing(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert target.read_text() == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_jacobians_on_a_full_disk_keep_the_finished_layers(tmp_path: Path) -> None:
    writer = JacobianWriter(tmp_path / "jacobians.safetensors", 2, 1000, "float32", {})
    writer.append(1, np.eye(1000))
    with open("/dev/full", "wb", buffering=0) as full:
        kept, writer._file = writer._file, full  # type: ignore[assignment]
        with pytest.raises(InputError, match=r"No space left on device; the 1 layers finished so far are kept"):
            writer.append(0, np.eye(1000))
    writer._file = kept
    writer.close()
    assert JacobianWriter(tmp_path / "jacobians.safetensors", 2, 1000, "float32", {}).finished == 1


def test_folders_are_all_or_nothing_too(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "model", folder=True) as temporary:
        _write_half(temporary / "config.json", KeyboardInterrupt)
    assert not list(tmp_path.iterdir())
    with writing(tmp_path / "model", folder=True) as temporary:
        (temporary / "config.json").write_text("{}")
    assert (tmp_path / "model" / "config.json").read_text() == "{}"
    with pytest.raises(InputError, match="exists already"), writing(tmp_path / "model", folder=True):
        pass


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"), writing(tmp_path / "file" / "below"):
        raise AssertionError("the work was done")
    with pytest.raises(InputError, match="is a folder"), writing(tmp_path):
        raise AssertionError("the work was done")
