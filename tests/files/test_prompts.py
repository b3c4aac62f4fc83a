"""Files of prompts and rows that a user wrote: read as meant, or refused with file and line; never syntax for text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.tiny_tokenizers import chatting

from mlx_lqr import InputError, read_prompts
from mlx_lqr.concepts import bundled_concepts, bundled_prompts
from mlx_lqr.runtime import Chat
from mlx_lqr.tasks import Capability
from mlx_lqr.tasks.read import read_rows

BREAKS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
"""Where `str.splitlines` cuts a line, and no editor does."""


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_prompts_are_those_that_were_written(mark: str, newline: str, end: str, tmp_path: Path) -> None:
    prompts = ["The dog barks.", f"One{BREAKS}prompt.", "  spaces  ", "[INST] hi", '"Quoted," he said.', "{x} and {y}"]
    plain, lines = tmp_path / "plain.txt", tmp_path / "lines.jsonl"
    plain.write_bytes((mark + "\n".join(prompts) + end).replace("\n", newline).encode())
    assert read_prompts(plain) == prompts
    for escaped in (True, False):
        written = "\n".join(json.dumps({"prompt": prompt}, ensure_ascii=escaped) for prompt in prompts)
        lines.write_bytes((mark + written + end).replace("\n", newline).encode())
        assert read_prompts(lines) == prompts
        assert [row["prompt"] for row in read_rows(lines, {"prompt": "text"})] == prompts


GOOD = '{"prompt": "a"}'


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"{GOOD}\n{{oops\n{GOOD}\n", 2),
        (f'{GOOD}\n\n{{"prompt": "b"\n', 3),
        (f"a text\n{GOOD}\n", 1),
        (f'{GOOD}\n"b"\n', 2),
        (f'{GOOD}\n["b"]\n', 2),
        (f"{GOOD}\nnull\n", 2),
        (f'{GOOD}\n{{"text": "b"}}\n', 2),
        (f'{GOOD}\n{{"prompt": ""}}\n', 2),
        (f'{GOOD}\n{{"prompt": ["b"]}}\n', 2),
        (f'{GOOD}\n{{"prompt": "\\ud800"}}\n', 2),
        (f"{GOOD},\n{GOOD},\n", 1),
        (f"[{GOOD}, {GOOD}]", 1),
        (f"[\n{GOOD},\n{GOOD}\n]\n", 1),
        ('["a", "b"]\n', 1),
        ('[\n  "a",\n  "b"\n]\n', 1),
        ('["a", "b"', 1),
        ('{\n  "prompt": "a"\n}\n', 1),
        ('{"prompts": [\n"a"\n]}', 1),
        ('one\n{"prompt": "b"\nthree\n', 2),
    ],
)
def test_broken_or_other_json_is_refused_with_its_line(text: str, line: int, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    for mark in ("", "\ufeff"):
        file.write_text(mark + text, "utf-8")
        with pytest.raises(InputError, match=rf"prompts.jsonl, line {line}\b") as refusal:
            read_prompts(file)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "The dog barks.\n"),
        ("a.tsv", "x\ty\n"),
        ("a.txt", "prompt,label\nThe dog barks.,1\n"),
        ("a.txt", "\ufeffid;Prompt\r\n1;The dog barks.\r\n"),
        ("a.txt", '"text","label"\n"The dog barks.","1"\n'),
        ("a.txt", "label\ttext\n1\tThe dog barks.\n"),
        ("a.txt", "prompt\nThe dog barks.\n"),
    ],
)
def test_tables_are_refused(name: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(text, "utf-8", newline="")
    with pytest.raises(InputError, match=f"{name} is a table"):
        read_prompts(file)


@pytest.mark.parametrize("text", ["Well, text is text.\n", "Yes, prompt\nNo, never\n", "Question: why?\nBecause, text"])
def test_sentences_are_no_tables(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert read_prompts(tmp_path / "a.txt") == text.splitlines()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_other_encodings_are_refused_everywhere(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes('{"prompt": "Bär", "answer": "a", "others": ["b"]}\n'.encode(encoding))
    for read in (
        read_prompts,
        lambda path: read_rows(path, {"prompt": "text"}),
        Capability.read,
        Chat(chatting()).load,
    ):
        with pytest.raises(InputError, match="file is not UTF-8 text"):
            read(file)


def test_rows_and_transcripts_take_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text('{"prompt": "a\u2028b", "answer": "a", "others": ["b"]}\r\n', "utf-8-sig", newline="")
    assert [row["prompt"] for row in read_rows(file, {"prompt": "text"})] == ["a\u2028b"]
    assert len(Capability.read(file).questions) == 1
    chat = Chat(chatting(), options={"max_tokens": 2, "temperature": 0})
    list(chat.answer("hello"))
    chat.save(tmp_path / "chat.json")
    file.write_text((tmp_path / "chat.json").read_text("utf-8"), "utf-8-sig")
    messages = chat.messages
    chat.restart()
    chat.load(file)
    assert chat.messages == messages


def test_bundled_sets_are_read_by_newlines() -> None:
    assert all(all(text.strip() for texts in bundled_prompts(name) for text in texts) for name in bundled_concepts())
