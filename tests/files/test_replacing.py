"""What stands at an output is replaced by its like alone, unless `--force` says otherwise."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.backends import tiny_folder
from helpers.command_line import refused, run
from helpers.controllers import controller_for
from helpers.tiny_tokenizers import chatting

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends.protocol import Model
from mlx_lqr.convert import convert
from mlx_lqr.files.atomic import check_writable, kind_of, writing
from mlx_lqr.files.results import write_json
from mlx_lqr.runtime import Chat

OTHERS: dict[str, bytes] = {
    "notes": b"my notes\n",
    "json": b'{"name": "mine"}',
    "list": b"[1, 2]",
    "broken json": b'{"strengths": ',
    "xml": b"<?xml version='1.0'?><feed/>",
    "binary": bytes(range(256)),
}


def baseline(model: Model) -> Any:
    return mlx_lqr.fit_baseline(model, "actadd", [[1, 2], [3]], [[4, 5], [6]])


def talked(model: Any) -> Chat:
    chat = Chat(model, options={"max_tokens": 2, "temperature": 0})
    list(chat.answer("hello"))
    return chat


def save_plot(path: Path, **options: Any) -> None:
    from matplotlib.figure import Figure

    from mlx_lqr.analysis import plots

    plots.save_all({path.stem: Figure()}, path.parent, kinds=(path.suffix[1:],), **options)  # type: ignore[arg-type]


@functools.cache
def writers() -> dict[str, Callable[..., object]]:
    """Everything that writes a file for a user, by what it writes."""
    model = chatting()
    jacobians = mlx_lqr.linearize(model, [[1, 2]])
    return {
        "controller": controller_for(model).save,
        "baseline": baseline(model).save,
        "Jacobians": jacobians.save,
        "linearize": lambda path, **options: mlx_lqr.linearize(model, [[1, 2]], store=path, **options),
        "transcript": talked(model).save,
        "results": lambda path, **options: write_json(path, {"strengths": []}, **options),
        "plot.png": save_plot,
        "plot.svg": save_plot,
    }


ALIKE = [{"controller", "baseline"}, {"Jacobians", "linearize"}]


@pytest.mark.parametrize("name", list(writers()))
def test_a_file_of_another_kind_is_not_replaced(name: str, tmp_path: Path) -> None:
    made = writers()
    file = tmp_path / name
    for other, content in OTHERS.items():
        file.write_bytes(content)
        with pytest.raises(InputError, match="--force") as refusal:
            made[name](file)
        assert "\n" not in str(refusal.value)
        assert file.read_bytes() == content, other
    for other, write in made.items():
        if "plot" in name or "plot" in other:
            continue
        file.unlink()
        write(file)
        if name == other or {name, other} in ALIKE:
            made[name](file)
        else:
            with pytest.raises(InputError, match="--force"):
                made[name](file)
    file.write_bytes(OTHERS["notes"])
    made[name](file, force=True)
    assert kind_of(file) is not None
    made[name](file)  # its like
    file.write_bytes(b"")  # as `mktemp` leaves it
    made[name](file)
    assert kind_of(file) is not None
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".partial")] == [name]


def test_no_device_and_no_link_is_replaced(tmp_path: Path) -> None:
    for target in ("/dev/null", "/dev/full", "/dev/stdout"):
        if not Path(target).is_file():
            with pytest.raises(InputError, match="device"):
                check_writable(target, "controller")
            with pytest.raises(InputError, match="device"), writing(target, force=True):
                raise AssertionError("the work was done")
    assert not Path("/dev/null").is_file()
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with writing(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_commands_refuse_before_any_work(tmp_path: Path, smollm2: Model, dog: Path, monkeypatch: Any) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    import importlib

    for name in ("fit", "analysis", "task_options", "running"):
        monkeypatch.setattr(importlib.import_module(f"mlx_lqr.commands.{name}"), "load", never)
    notes = tmp_path / "notes"
    notes.write_text("mine")
    for name in ("linearity", "certificate"):
        (tmp_path / f"{name}.json").write_text("{}")
    (tmp_path / "concept-unsteered.summary.json").write_text("{}")
    (tmp_path / "concept-comparison.json").write_text("{}")
    for command in (
        ("fit", "no-model", "--concept", "dog", "-o", notes),
        ("fit", "no-model", "--method", "actadd", "--concept", "dog", "-o", notes),
        ("linearize", "no-model", "-o", notes),
        ("tune", "concept", "no-model", "--concept", "dog", "-o", notes),
        ("linearity", "no-model", "-o", tmp_path),
        ("certify", "no-model", "-c", dog, "-o", tmp_path),
        ("eval", "concept", "no-model", "--words", "dog", "-o", tmp_path),
        ("compare", "concept", "no-model", "-c", dog, "-o", tmp_path),
    ):
        assert "--force" in refused(*command), command
        with pytest.raises(AssertionError, match="was loaded"):
            raise run(*command, "--force").exception or ValueError(command)
    assert notes.read_text() == "mine"


def test_save_in_a_chat(tmp_path: Path, monkeypatch: Any) -> None:
    from mlx_lqr.commands.chat_commands import carry_out
    from mlx_lqr.commands.chat_state import Conversation

    chat, notes = Conversation(talked(chatting())), tmp_path / "my notes"
    notes.write_text("mine")
    with pytest.raises(InputError, match="--force"):
        carry_out(chat, f"save {notes}")
    assert notes.read_text() == "mine"
    for rest in (f"--force {notes}", f"{notes} --force"):
        notes.write_text("mine")
        carry_out(chat, f"save {rest}")
        assert kind_of(notes) == "transcript"
    carry_out(chat, f"save {notes}")


def test_a_model_folder_is_replaced_by_force_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, out = tiny_folder("llama"), tmp_path / "out"
    monkeypatch.setattr("mlx_lqr.convert.folder.demo_model", lambda progress: small)
    assert run("convert", "demo", out).exit_code == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(out))
    (out / "old").write_text("")
    assert "exists already" in refused("convert", "demo", out)
    convert("demo", out, force=True)
    assert not (out / "old").exists()
    assert np.array_equal(*(mlx_lqr.load(folder).logits([5, 6]) for folder in (out, small)))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    assert "exists already" in refused("convert", "demo", mine, "--force")
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_a_transcript_keeps_the_strengths_of_each_answer(tmp_path: Path) -> None:
    model = chatting()
    chat, file = Chat(model, options={"max_tokens": 6, "temperature": 0}), tmp_path / "chat.json"
    list(chat.answer("one"))
    chat.add(controller_for(model), 2.0)
    list(chat.answer("two"))
    chat.set_strength(-1)
    pieces = chat.answer("three")
    for _ in range(2):
        next(pieces)
    chat.set_strength(0)
    rest = len(list(pieces))
    chat.set_strength(7)
    chat.save(file)
    saved = json.loads(file.read_text())
    assert saved["format"] == "mlx-lqr transcript 2"
    assert saved["strengths"] == {"a": 7.0}
    answers = [message for message in saved["messages"] if message["role"] == "assistant"]
    assert [answer["strengths"] for answer in answers] == [{}, {"a": 2.0}, {"a": -1.0}]
    assert ["changes" in answer for answer in answers] == [False, False, True]
    ((changed,),) = [answer["changes"] for answer in answers if "changes" in answer]
    assert changed == {"token": 6 - rest + 1, "strengths": {"a": 0.0}}  # the step under way was begun before
    again = Chat(model, options={"max_tokens": 2, "temperature": 0})
    again.load(file)
    list(again.answer("four"))
    again.save(tmp_path / "again.json")
    kept = json.loads((tmp_path / "again.json").read_text())["messages"]
    assert kept[: len(saved["messages"])] == saved["messages"]
    assert kept[-1]["strengths"] == {}
    assert again.messages[0] == {"role": "user", "content": "one"}  # what a chat template gets


def test_transcripts_of_other_versions(tmp_path: Path) -> None:
    file, chat = tmp_path / "chat.json", Chat(chatting())
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    old = {"model": "m", "strengths": {"dog": 2.0}, "messages": messages}
    file.write_text(json.dumps(old))
    chat.load(file)
    chat.save(file)  # over an old one
    assert "strengths" not in json.loads(file.read_text())["messages"][1]  # which it did not know
    for damage in (
        {"format": "mlx-lqr transcript 3"},
        {"messages": [messages[0], {**messages[1], "strengths": {"a": "x"}}]},
        {"messages": [messages[0], {**messages[1], "strengths": 3}]},
        {"messages": [messages[0], {**messages[1], "strengths": {"a": 1}, "changes": [{"token": 0, "strengths": {}}]}]},
        {"messages": [messages[0], {**messages[1], "strengths": {"a": 1}, "changes": [{"token": "4"}]}]},
        {"messages": [messages[0], {**messages[1], "strengths": {"a": 1}, "changes": 3}]},
    ):
        file.write_text(json.dumps({**old, **damage}))
        with pytest.raises(InputError, match="damaged transcript"):
            chat.load(file)
    file.write_text("[1]")
    with pytest.raises(InputError, match="damaged transcript"):
        chat.load(file)
