"""A tokenizer.json that the tokenizers library panics at: one line, and nothing of what Rust prints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, processors

from mlx_lqr import InputError
from mlx_lqr.backends.text.tokenizer import Tokenizer

Settings = dict[str, Any]


def _no_special_tokens(settings: Settings) -> None:
    settings["post_processor"]["special_tokens"] = {}


def _long_prefix(settings: Settings) -> None:
    settings["model"]["continuing_subword_prefix"] = "##"


def _normalizer(**normalizer: Any) -> Callable[[Settings], None]:
    return lambda settings: settings.update(normalizer=normalizer)


PANICS: dict[str, Callable[[Settings], None]] = {
    "a template's token that is not there": _no_special_tokens,
    "a prefix longer than what is merged": _long_prefix,
    "nothing put before": _normalizer(type="Prepend", prepend=""),
    "a pattern that matches nothing": _normalizer(type="Replace", pattern={"Regex": "z*"}, content="x"),
    "a table that is none": _normalizer(type="Precompiled", precompiled_charsmap=""),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A byte-level tokenizer with a token before every text."""
    tokens = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    tokenizer = Library(models.BPE({token: i for i, token in enumerate(tokens)}, [("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def damaged(folder: Path, damage: Callable[[Settings], None]) -> Path:
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text("utf-8"))
    damage(settings)
    file.write_text(json.dumps(settings), "utf-8")
    return folder


@pytest.mark.parametrize("damage", PANICS.values(), ids=PANICS)
def test_a_panic_is_one_line(
    damage: Callable[[Settings], None], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read") as refusal:
        Tokenizer(damaged(folder, damage), {})
    assert "\n" not in str(refusal.value)
    assert capfd.readouterr() == ("", "")


def test_what_others_print_meanwhile_is_kept(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lqr.backends.text import library

    class Printing:
        @staticmethod
        def from_file(file: str) -> Library:
            os.write(2, b"of another thread\n")
            return Library.from_file(file)

    monkeypatch.setattr(library, "Tokenizer", Printing)
    assert Tokenizer(folder, {}).encode("he") == [0, 257]
    assert capfd.readouterr().err == "of another thread\n"


def test_a_panic_after_loading_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no trial has met."""
    monkeypatch.setattr("mlx_lqr.backends.text.library._TRIAL", ())
    tokenizer = Tokenizer(damaged(folder, _normalizer(type="Prepend", prepend="")), {})
    with pytest.raises(InputError, match="tokenizer fails"):
        tokenizer.encode("he")


def test_half_a_surrogate_pair_is_no_text(folder: Path) -> None:
    with pytest.raises(InputError, match="half a surrogate pair"):
        Tokenizer(folder, {}).encode("he \ud800")


def test_a_tokenizer_that_lacks_the_characters_of_the_trial_is_sound(tmp_path: Path) -> None:
    Library(models.WordLevel({"w0": 0}, unk_token="none")).save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path, {}).encode("w0") == [0]
