"""What is done with a file of each kind: it is loaded, and then used as cheaply as it can be."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.command_line import run

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends.checkpoint.adapter_folder import read_adapter
from mlx_lqr.convert import convert
from mlx_lqr.files.prompts import read_prompts
from mlx_lqr.methods.running import law_on
from mlx_lqr.methods.steering import load_steering
from mlx_lqr.runtime.chat import Chat
from mlx_lqr.runtime.session import read_session, save_session
from mlx_lqr.tasks.read import read_rows
from mlx_lqr.tasks.records import Records

Use = Callable[[Path, Path], object]
HEADER = {"task": "x", "model": "tiny", "parts": {"a": {"rows": 5}, "b": {"rows": 20}}}


class ExitError(Exception):
    """A command that printed a traceback, or ended with another status than 0 and 2."""


def command(*arguments: object) -> None:
    """Run a command, whose refusal is an `InputError`."""
    result = run(*arguments)
    if result.exit_code == 0:
        result.stdout.encode()
        return
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    lines = [line for line in result.stderr.splitlines() if not line.startswith("Note: ")]
    if result.exit_code != 2 or len(lines) != 1 or not lines[0].startswith("Error: "):
        raise ExitError(f"{result.exit_code}: {result.stderr[-500:]}")
    raise InputError(lines[0])


def steering(folder: Path, file: Path) -> None:
    """Show it, steer a model with it, write and read it again."""
    command("show", file)
    command("show", file, "--json")
    loaded = load_steering(file)
    model = _sound(folder)
    loaded.check_model(model)
    copy = file.with_name("again.safetensors")
    loaded.save(copy, force=True)
    assert load_steering(copy).concepts == loaded.concepts
    copy.unlink()
    mlx_lqr.generate(model, [1, 2], controller=loaded, max_tokens=2, temperature=0)
    law_on(model, loaded, 1.0)


def jacobians(folder: Path, file: Path) -> None:
    """Solve with them."""
    loaded = mlx_lqr.Jacobians.load(file)
    gains = mlx_lqr.solve(loaded, 0.1, 1.0, 0.1)
    mlx_lqr.compile(gains, mlx_lqr.contrast(_sound(folder), [[1, 2], [3]], [[4], [5, 6]]))


def prompts(folder: Path, file: Path) -> None:
    """Make tokens of them."""
    tokenizer = _sound(folder).tokenizer
    for prompt in read_prompts(file)[:20]:
        tokenizer.encode(prompt[:1000])


def rows_of(row: dict[str, Any]) -> Use:
    """Read a task's rows, which are like this one."""
    kinds = {key: "texts" if isinstance(value, list) else "text" for key, value in row.items()}

    def use(folder: Path, file: Path) -> None:
        for one in read_rows(file, kinds, limit=3):  # type: ignore[arg-type]
            json.dumps(one, ensure_ascii=False)

    return use


def begin_records(file: Path) -> None:
    """An evaluation's file that was interrupted."""
    written = Records(HEADER, file)
    written.append(0.0, "a", [{"text": f"w{n}", "value": 0.5 * n} for n in range(5)])
    written.append(1.0, "b", [{"text": "x"}] * 16)
    written.append(1.0, "b", [{"text": "\ud800"}] * 4)


def records(folder: Path, file: Path) -> None:
    """Continue an evaluation."""
    known = Records(HEADER, file)
    known.append(2.0, "a", [{"text": "more"}])
    Records(HEADER, file)


def transcript(folder: Path, file: Path) -> None:
    """Continue a conversation, and write it."""
    chat = Chat(_sound(folder))
    chat.load(file)
    chat.save(file.with_name("again.json"), force=True)
    assert chat.messages == Chat(_sound(folder), list(chat.messages)).messages
    chat.model.tokenizer.chat([*chat.messages[:5], {"role": "user", "content": "w1"}])


def session(folder: Path, file: Path) -> None:
    """Read how a conversation is to go on, and set it."""
    read = read_session(file)
    chat = Chat(_sound(folder))
    chat.set_options(read.options)
    chat.load(file)
    save_session(file.with_name("again.json"), chat, {one.concept: one.file for one in read.steering})


def model_on(backend: str) -> Use:
    """Load a model, read and write text with it."""

    def use(folder: Path, file: Path) -> None:
        _spoken(mlx_lqr.load(folder, backend=backend))  # type: ignore[arg-type]

    return use


def adapter_on(backend: str) -> Use:
    """Read an adapter, and load a model with it."""

    def use(folder: Path, file: Path) -> None:
        read_adapter(folder)
        model = mlx_lqr.load(folder.parent / "llama", backend=backend, adapter=folder)  # type: ignore[arg-type]
        model.logits([1, 2])

    return use


def converted_folder(folder: Path, file: Path) -> None:
    """Convert a checkpoint, and load what came out."""
    _converted(folder, folder.parent / "converted")


def gguf(folder: Path, file: Path) -> None:
    """Convert a GGUF file, and load what came out."""
    _converted(file, folder.parent / "converted")


def _converted(source: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    try:
        convert(source, out)
        _spoken(mlx_lqr.load(out, backend="mlx"))
    except InputError:
        left = [file.name for file in out.parent.iterdir() if file.name.startswith(".")]
        assert not left, left
        raise
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _spoken(model: Any) -> None:
    tokenizer = model.tokenizer
    text = "hello world, a\u20ac"
    tokens = [token for token in tokenizer.encode(text) if token < model.vocab_size][:8] or [1]
    tokenizer.decode(tokens).encode()
    tokenizer.continuations("he", ["llo", " w"])
    if tokenizer.has_chat_template:
        tokenizer.chat([{"role": "user", "content": "hello"}])
    mlx_lqr.generate(model, tokens, max_tokens=2, temperature=0).encode()
    model.logits(tokens)
    assert model.context_length > 0
    assert isinstance(model.fingerprint, str)


@functools.cache
def _model(folder: Path) -> Any:
    return mlx_lqr.load(folder, backend="mlx", dtype="float32")


def _sound(folder: Path) -> Any:
    """The model that steering was fitted on, whose files are sound whenever those of another kind are not."""
    return _model(folder.parent / "llama")
