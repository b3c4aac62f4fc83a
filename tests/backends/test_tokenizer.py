"""Token ids, chat templates and end tokens, as Hugging Face's files state them and as transformers reads these."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from helpers.chat_templates import CONVERSATIONS, TEMPLATES
from helpers.every_tokenizer import KINDS, TEXTS, folder_of, tokenizer_of
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer

from mlx_lqr import InputError
from mlx_lqr.backends.protocol import Model
from mlx_lqr.backends.text.tokenizer import Tokenizer

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi {{ there }}"}]


def folder_with(folder: Path, template: str | None, **settings: object) -> Path:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "</s>": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings |= {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@functools.cache
def both(kind: str) -> tuple[Path, Any]:
    """A folder with a tokenizer of this kind, and transformers' own reading of it."""
    folder = folder_of(kind, Path(tempfile.mkdtemp()), pad_token="</s>", image_token="<think>")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder, AutoTokenizer.from_pretrained(folder)


def written(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_smollm2_chats_as_its_template_says(smollm2: Model) -> None:
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi {{ there }}<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = smollm2.tokenizer.chat(MESSAGES)
    assert smollm2.tokenizer.decode(tokens, skip_special_tokens=False) == expected
    assert tokens == smollm2.tokenizer.encode(expected, add_special_tokens=False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_as_transformers_renders_them(name: str, tmp_path: Path) -> None:
    refused = 0
    for kind in KINDS:
        folder, theirs = both(kind)
        ours = Tokenizer(written(folder, {"chat_template.jinja": TEMPLATES[name]}), {})
        theirs.chat_template = TEMPLATES[name]
        for messages in CONVERSATIONS:
            try:
                expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            except Exception:  # a template's own, and what it brings about
                refused += 1
                with pytest.raises(InputError, match="chat template") as refusal:
                    ours.chat(messages)
                assert "\n" not in str(refusal.value)
            else:
                assert ours.chat(messages) == expected, (kind, messages)
    assert refused < len(KINDS) * len(CONVERSATIONS) / 2


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"content": content, **plain, **flags}


FILES: dict[str, dict[str, Any]] = {
    "nothing": {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}},
    "bos-settings": {"tokenizer_config.json": {"bos_token": "<s>", "add_bos_token": False, "add_eos_token": True}},
    "in-words": {"tokenizer_config.json": {"eos_token": "Hello", "pad_token": "Question"}},
    "not-there": {"tokenizer_config.json": {"eos_token": "<new>", "sep_token": "<sep>", "mask_token": None}},
    "listed": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                "9001": token("<one>"),
                "9000": token("<two>", special=False, lstrip=True, rstrip=True),
                "9002": token("<think>", special=True),
            },
            "eos_token": "<two>",
            "additional_special_tokens": ["<three>", "<one>"],
        },
        "special_tokens_map.json": {"eos_token": "<not this>"},
        "added_tokens.json": {"<nor this>": 9003},
    },
    "mapped": {
        "tokenizer_config.json": {"bos_token": "</s>", "pad_token": "<pad>"},
        "special_tokens_map.json": {
            "bos_token": {**token("<s>"), "normalized": True},
            "eos_token": "<|im_end|>",
            "additional_special_tokens": ["<a>", "<b>"],
        },
        "added_tokens.json": {"<c>": 5001, "<b>": 5000},
    },
    "merged": {
        "tokenizer_config.json": {"pad_token": "<pad>", "additional_special_tokens": ["<a>", "<b>"]},
        "special_tokens_map.json": {"extra_special_tokens": ["<b>", "<d>"], "cls_token": "<c>"},
        "added_tokens.json": {"<c>": 5001, "<b>": 5000},
    },
    "own-names": {
        "tokenizer_config.json": {
            "eos_token": {"__type": "AddedToken", **token("<e>", rstrip=True)},
            "image_token": "<image>",
            "extra_special_tokens": {"boi_token": "<boi>"},
        }
    },
    "extra-list": {"tokenizer_config.json": {"eos_token": "</s>", "extra_special_tokens": ["<x>", "<think>"]}},
    "split": {"tokenizer_config.json": {"bos_token": "<s>", "split_special_tokens": True}},
    "map-only": {"special_tokens_map.json": {"eos_token": "<think>", "unk_token": "</s>"}},
}


@pytest.mark.parametrize("kind", ["byte-level", "llama", "metaspace", "unigram", "word-level"])
@pytest.mark.parametrize("case", FILES)
def test_every_file_counts_as_it_does_for_transformers(case: str, kind: str, tmp_path: Path) -> None:
    files = {"tokenizer_config.json": {}, "config.json": {"model_type": "llama"}, **FILES[case]}
    files["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast"} | files["tokenizer_config.json"]
    tokenizer_of(kind).save(str(tmp_path / "tokenizer.json"))
    ours, theirs = Tokenizer(written(tmp_path, files), {}), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.special_tokens == theirs.special_tokens_map
    marks = sorted({*theirs.added_tokens_encoder, "<new>", "<not this>", "<nor this>", "<c>"})
    texts = [*TEXTS, "", " ", " Hello", "Hello ", *("a " + mark + " b" + mark for mark in marks)]
    for text in texts:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False), text
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == expected
        assert "".join(map(ours.stream().add, ids)) in ours.decode(ids)
    ends = [theirs.eos_token_id] if theirs.eos_token_id is not None else []
    assert ours.end_tokens == set(ends)


@pytest.mark.parametrize("kind", ["byte-level", "llama", "word-piece"])
@pytest.mark.parametrize("direction", ["left", "right"])
def test_texts_are_neither_cut_nor_filled_up(kind: str, direction: str, tmp_path: Path) -> None:
    saved = tokenizer_of(kind)
    saved.enable_truncation(5, stride=2, direction=direction)
    saved.enable_padding(direction=direction, pad_id=1, pad_token="</s>", length=40)
    folder_of(kind, tmp_path)
    saved.save(str(tmp_path / "tokenizer.json"))
    written(tmp_path, {"config.json": {"model_type": "llama"}})
    ours, theirs, plain = Tokenizer(tmp_path, {}), AutoTokenizer.from_pretrained(tmp_path), tokenizer_of(kind)
    assert plain.padding is None
    for text in [*TEXTS, "", "Hello"]:
        assert ours.encode(text) == theirs.encode(text) == plain.encode(text).ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_brings_its_first_token_does_not_get_it_twice(kind: str) -> None:
    folder, theirs = both(kind)
    ours, bos = Tokenizer(folder, {}), theirs.bos_token_id
    for text in TEXTS:
        plain = theirs.encode(text)
        assert ours.encode(text) == plain
        assert plain[0] == bos
        brought = theirs.encode("<s>" + text, add_special_tokens=False)
        assert ours.encode("<s>" + text) == brought
        assert brought.count(bos) == 1
        assert ours.encode("<s><s>" + text)[:3].count(bos) == 2, "what is written twice is meant so"


def test_what_templates_may_use(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }} {% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}a {% endfor %}"
        "{{ strftime_now('%Y')|length }} {{ messages[0]|tojson|length }} {{ eos_token }}"
    )
    assert Tokenizer(folder_with(tmp_path, template), {}).chat(MESSAGES) == [1, 0, 3, 3, 2]


def test_named_templates_and_a_template_file(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "</s>"}, {"name": "default", "template": "a a"}]
    assert Tokenizer(folder_with(tmp_path, named), {}).chat(MESSAGES) == [0, 0]  # type: ignore[arg-type]
    written(tmp_path, {"chat_template.json": {"chat_template": "</s>"}})  # a processor's, which the others go before
    assert Tokenizer(tmp_path, {}).chat(MESSAGES) == [0, 0]
    written(tmp_path, {"chat_template.jinja": "a <s>"})
    assert Tokenizer(tmp_path, {}).chat(MESSAGES) == [0, 1]
    written(tmp_path, {"additional_chat_templates/rag.jinja": "</s>"})
    assert Tokenizer(tmp_path, {}).chat(MESSAGES) == [0, 1]
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer = Tokenizer(tmp_path, {})
    with pytest.raises(InputError, match=r"several chat templates \(rag\) and none is the default"):
        tokenizer.chat(MESSAGES)
    other = folder_with(tmp_path / "additional_chat_templates", None)
    written(other, {"chat_template.json": {"chat_template": "a </s>"}})
    assert Tokenizer(other, {}).chat(MESSAGES) == [0, 2]


BROKEN = [
    "{{ raise_exception('only\\nusers speak') }}",
    "{{ messages",
    "{{ messages.x.y }}",
    "{{ 1 / 0 }}",
    "{{ messages + 1 }}",
    "{{ 'a' * 3 + 2 }}",
    "{% for i in range(1000000) %}x{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ messages[0].content.encode('ascii').decode('no-codec') }}",
    "{{ strftime_now(3) }}",
    "{{ [1] | tojson(indent={}) }}",
]


@pytest.mark.parametrize("template", BROKEN)
def test_a_template_that_fails_is_one_line(template: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="chat template") as refusal:
        Tokenizer(folder_with(tmp_path, template), {}).chat(MESSAGES)
    assert "\n" not in str(refusal.value)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ dict.__class__.__mro__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% set ns = namespace(__class__=1) %}{{ ns }}",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
    "{{ messages.append(1) }}",
    "{{ raise_exception.__globals__['os'] }}",
    "{{ (''|attr('format'))('{0.__class__.__mro__}') }}{{ cycler.__init__.__globals__.os }}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_cannot_reach_out(escape: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="chat template"):
        Tokenizer(folder_with(tmp_path, escape), {}).chat(MESSAGES)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer_config.json", "[1]", "no JSON object"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", '{"bos_token": 3}', "special token must be a text"),
        ("tokenizer_config.json", '{"extra_special_tokens": [null]}', "special token must be a text"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "<y>"}}}', "cannot be read"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": 2}}', "cannot be read"),
        ("tokenizer_config.json", '{"chat_template": 3}', "is no text"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "rag"}]}', "none is the default"),
        ("special_tokens_map.json", b"\xff\xfe", "not valid JSON"),
        ("added_tokens.json", '{"<y>": null}', "cannot be read"),
        ("generation_config.json", "3", "no JSON object"),
        ("chat_template.jinja", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_damaged_files_are_one_line(name: str, content: str | bytes, says: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, None)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=says) as refusal:
        Tokenizer(folder, {}).chat(MESSAGES)
    assert "\n" not in str(refusal.value)


def test_end_tokens_come_from_every_file(tmp_path: Path) -> None:
    folder_with(tmp_path, None)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0]}')
    assert Tokenizer(tmp_path, {"eos_token_id": 3}).end_tokens == {0, 2, 3}
    assert Tokenizer(tmp_path, {"text_config": {"eos_token_id": [1]}}).end_tokens == {0, 1, 2}
    with pytest.raises(InputError, match="no chat template"):
        Tokenizer(tmp_path, {}).chat(MESSAGES)
