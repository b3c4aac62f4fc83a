"""One at a time: who writes an output has it alone, and what a killed process left is no hindrance."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.platforms import posix
from helpers.tiny import tiny
from safetensors.numpy import load_file, save_file

import mlx_lqr
from mlx_lqr import InputError, tasks
from mlx_lqr.convert import sources
from mlx_lqr.files.atomic import reserved, writing
from mlx_lqr.files.jacobians import JacobianWriter
from mlx_lqr.files.locks import locked
from mlx_lqr.tasks.bootstrap import Metric, mean
from mlx_lqr.tasks.records import Row

PROMPT = [1, 2, 3]


def elsewhere(work: Callable[[], object]) -> BaseException | None:
    """What the work raises in another thread."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return raised[0] if raised else None


def take(target: Path, **options: Any) -> Callable[[], None]:
    def work() -> None:
        with locked(target, **options):
            pass

    return work


def test_another_thread_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out.jsonl"
    with locked(target):
        with locked(target):  # its own
            pass
        refusal = elsewhere(take(target))
        assert isinstance(refusal, InputError)
        assert str(refusal) == f"another mlx-lqr writes {target}: wait for it, or name another output (-o)"
        assert elsewhere(take(tmp_path / "deep" / "other")) is None
    assert elsewhere(take(target)) is None
    assert not list(target.parent.iterdir())


def test_whoever_waits_gets_it_afterwards(tmp_path: Path) -> None:
    waited, order = threading.Event(), []
    with locked(tmp_path / "out"):

        def work() -> None:
            with locked(tmp_path / "out", patience=60, waiting=waited.set):
                order.append("second")

        thread = threading.Thread(target=work)
        thread.start()
        assert waited.wait(60)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]
    assert not list(tmp_path.iterdir())


@posix
def test_locks_and_unfinished_files_follow_no_link(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("years of work")
    (tmp_path / ".out.lock").symlink_to(mine)
    refusal = elsewhere(take(tmp_path / "out"))
    assert isinstance(refusal, InputError)
    assert "is a link" in str(refusal)
    JacobianWriter(tmp_path / "j", 2, 3, "float32", {}).close()
    (partial,) = tmp_path.glob(".j.*.partial")
    for plant in (partial.symlink_to, partial.hardlink_to):
        partial.unlink()
        plant(mine)
        with pytest.raises(InputError, match="remove it"):
            JacobianWriter(tmp_path / "j", 2, 3, "float32", {})
        assert mine.read_text() == "years of work"


def test_one_model_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, waits, converted = threading.Event(), threading.Event(), []

    def convert(file: Path, folder: Path, **_: object) -> None:
        begun.set()
        assert waits.wait(60)
        with writing(folder, folder=True) as place:
            (place / "config.json").write_text("{}")
        converted.append(folder)

    def progress(stage: str, done: int, total: int) -> None:
        assert stage == "Waiting for another mlx-lqr"
        waits.set()

    monkeypatch.setattr("mlx_lqr.convert.folder.convert", convert)
    first = threading.Thread(target=lambda: sources._converted(tmp_path / "a.gguf", tmp_path / "out", None))
    first.start()
    assert begun.wait(60)
    assert sources._converted(tmp_path / "a.gguf", tmp_path / "out", progress) == tmp_path / "out"
    first.join(60)
    assert converted == [tmp_path / "out"]
    assert os.listdir(tmp_path) == ["out"]


KILLED = """
import sys, time
from pathlib import Path
from mlx_lqr.files.atomic import writing
with writing(sys.argv[1], folder=True) as folder:
    (folder / "model.safetensors").write_bytes(bytes(1000))
    print("writing", flush=True)
    time.sleep(600)
"""


@posix
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    ours = tmp_path / ".conv.settings"  # a user's own
    ours.mkdir()
    processes = [
        subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / name], stdout=subprocess.PIPE, text=True)
        for name in ("killed", "living")
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
        with pytest.raises(InputError, match="another mlx-lqr writes"), writing(tmp_path / "killed", folder=True):
            pass
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        with writing(tmp_path / "conv", folder=True) as folder:
            (folder / "config.json").write_text("{}")
            left = {path.name.rpartition("-")[0] for path in tmp_path.iterdir()}
            assert ".killed.mlx-lqr" not in left
            assert {".living.mlx-lqr", ".conv.mlx-lqr"} <= left
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    with writing(tmp_path / "living", folder=True):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".conv.settings", "conv", "living"]


class Slow:
    """A part that is measured for as long as it is told."""

    name = "slow"

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __len__(self) -> int:
        return 20

    def settings(self, model: object) -> Row:
        return {}

    def rows(self, steered: object, indices: range) -> list[Row]:
        self.begun.set()
        assert self.go_on.wait(60)
        return [{"value": 1.0} for _ in indices]

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        return {"value": mean([row["value"] for row in rows], [row["index"] for row in rows])}


def test_two_evaluations_do_not_write_one_file(tmp_path: Path) -> None:
    model, slow, file = tiny("llama"), Slow(), tmp_path / "rows.jsonl"
    task = tasks.Task("slow", (slow,), "value", "value")
    first = threading.Thread(target=lambda: tasks.evaluate(model, task, output=file))
    first.start()
    assert slow.begun.wait(60)
    with pytest.raises(InputError, match="another mlx-lqr writes"):
        tasks.evaluate(model, task, output=file)
    slow.go_on.set()
    first.join(60)
    rows = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert [row["index"] for row in rows] == list(range(20))
    assert tasks.evaluate(model, task, output=file).results()[0].metrics["value"].value == 1.0
    assert os.listdir(tmp_path) == [file.name]


def test_two_threads_do_not_linearize_into_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file, refused = tiny("llama"), tmp_path / "j.safetensors", []
    expected, jacobian = mlx_lqr.linearize(model, [PROMPT]), model.jacobian

    def watched(trace: Any, layer: int) -> np.ndarray:
        if threading.current_thread() is threading.main_thread():
            refused.append(elsewhere(lambda: mlx_lqr.linearize(model, [PROMPT[:2]], store=file)))
        return jacobian(trace, layer)

    monkeypatch.setattr(model, "jacobian", watched)
    stored = mlx_lqr.linearize(model, [PROMPT], store=file)
    assert all(np.array_equal(a, b) for a, b in zip(stored, expected, strict=True))
    assert ["another mlx-lqr writes" in str(error) for error in refused] == [True] * 3
    assert os.listdir(tmp_path) == [file.name]


def test_layers_that_are_not_where_they_should_be_are_refused(tmp_path: Path) -> None:
    """As two writers of one file would leave them."""
    file = tmp_path / "j.safetensors"
    matrices = [np.full((3, 3), k, np.float32) for k in range(3)]
    mlx_lqr.Jacobians(matrices).save(file)
    tensors, metadata = load_file(file), mlx_lqr.Jacobians.load(file).matrices.metadata  # type: ignore[attr-defined]
    mixed = {**tensors, "jacobian.1": tensors["jacobian.2"], "layer.1": tensors["layer.2"]}
    save_file(mixed, file, metadata)
    with pytest.raises(InputError, match="one square Jacobian for every layer"):
        mlx_lqr.Jacobians.load(file)
    save_file({**tensors, "jacobian.1": tensors["jacobian.2"]}, file, metadata)
    damaged = mlx_lqr.Jacobians.load(file)
    assert np.array_equal(damaged[2], matrices[2])
    with pytest.raises(InputError, match="damaged at layer 1"):
        damaged[1]
    old = {name: tensor for name, tensor in tensors.items() if name.startswith("jacobian.")}
    save_file(old, file, {**metadata, "format": "mlx-lqr jacobians 1"})
    assert all(np.array_equal(a, b) for a, b in zip(mlx_lqr.Jacobians.load(file), matrices, strict=True))
    with pytest.raises(ValueError, match="does not come after"):
        JacobianWriter(tmp_path / "other", 3, 3, "float32", {}).append(1, matrices[1])


def test_unfinished_files_of_other_settings_are_kept_until_one_is_finished(tmp_path: Path) -> None:
    file, identity = tmp_path / "j.safetensors", np.eye(3)
    for run in ("a", "b"):
        writer = JacobianWriter(file, 2, 3, "float32", {"prompts": run})
        writer.append(1, identity)
        writer.close()
    assert len(list(tmp_path.glob(".j.safetensors.*.partial"))) == 2
    half = next(tmp_path.glob(".j.safetensors.*.partial"))
    os.truncate(half, half.stat().st_size - 3)  # with half of the checksum
    finished = [JacobianWriter(file, 2, 3, "float32", {"prompts": run}) for run in ("a", "b")]
    assert sorted(writer.finished for writer in finished) == [0, 1]
    last = next(writer for writer in finished if writer.finished)
    last.append(0, identity)
    last.close()
    assert os.listdir(tmp_path) == [file.name]


def test_an_output_in_work_is_refused_before_the_work(tmp_path: Path) -> None:
    with reserved(tmp_path / "dog.safetensors", "controller"):
        error = elsewhere(lambda: reserved(tmp_path / "dog.safetensors", "controller").__enter__())
        assert "another mlx-lqr writes" in str(error)
