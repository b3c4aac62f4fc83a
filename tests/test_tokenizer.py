"""Chat templates and end tokens, as Hugging Face's files state them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from mlx_lqr import InputError
from mlx_lqr.backends.base import Model
from mlx_lqr.backends.tokenizer import Tokenizer

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi {{ there }}"}]


def folder_with(folder: Path, template: str | None, **settings: object) -> Path:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "</s>": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings |= {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_smollm2_chats_as_its_template_says(smollm2: Model) -> None:
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi {{ there }}<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = smollm2.tokenizer.chat(MESSAGES)
    assert smollm2.tokenizer.decode(tokens, skip_special_tokens=False) == expected
    assert tokens == smollm2.tokenizer.encode(expected, add_special_tokens=False)


def test_what_templates_may_use(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }} {% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}a {% endfor %}"
        "{{ strftime_now('%Y')|length }} {{ messages[0]|tojson|length }} {{ eos_token }}"
    )
    assert Tokenizer(folder_with(tmp_path, template), {}).chat(MESSAGES) == [1, 0, 3, 3, 2]


def test_named_templates_and_a_template_file(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "</s>"}, {"name": "default", "template": "a a"}]
    assert Tokenizer(folder_with(tmp_path, named), {}).chat(MESSAGES) == [0, 0]  # type: ignore[arg-type]
    (tmp_path / "chat_template.jinja").write_text("a <s>")
    assert Tokenizer(tmp_path, {}).chat(MESSAGES) == [0, 1]


@pytest.mark.parametrize("template", ["{{ raise_exception('only users speak') }}", "{{ messages", "{{ messages.x.y }}"])
def test_a_template_that_fails_is_one_line(template: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="chat template") as refusal:
        Tokenizer(folder_with(tmp_path, template), {}).chat(MESSAGES)
    assert "\n" not in str(refusal.value)


def test_a_template_cannot_reach_out(tmp_path: Path) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InputError, match="chat template"):
        Tokenizer(folder_with(tmp_path, escape), {}).chat(MESSAGES)


def test_end_tokens_come_from_every_file(tmp_path: Path) -> None:
    folder_with(tmp_path, None)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0]}')
    assert Tokenizer(tmp_path, {"eos_token_id": 3}).end_tokens == {0, 2, 3}
    with pytest.raises(InputError, match="no chat template"):
        Tokenizer(tmp_path, {}).chat(MESSAGES)
