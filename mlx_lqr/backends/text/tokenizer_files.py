"""The files beside tokenizer.json, read as transformers reads them: settings, special tokens, and the chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from mlx_lqr.errors import InputError, quoted
from mlx_lqr.files.json_text import read_json_object

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TEMPLATES = "additional_chat_templates"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no such file.

    Raises:
        InputError: no JSON, or no object.
    """
    return read_json_object(file) if file.is_file() else {}


def special_tokens(folder: Path, settings: Mapping[str, Any], tokenizer: tokenizers.Tokenizer) -> dict[str, str]:
    """Texts of the special tokens by their names, bos_token and so on. Those that `tokenizer` lacks are added to it.

    tokenizer_config.json says what there is. Where it has no `added_tokens_decoder`, it is older, and
    special_tokens_map.json and added_tokens.json count too.

    Args:
        settings: the content of tokenizer_config.json.
    """
    settings, listed = dict(settings), _listed(settings, folder)
    for name in ("additional_special_tokens", "extra_special_tokens"):
        if not isinstance(settings.get(name) or [], (list, dict)):
            raise InputError(f"{folder} says {name} {quoted(settings[name])}, which are no tokens: download it again")
    if settings.get("additional_special_tokens") and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")  # its older name
    if "added_tokens_decoder" not in settings:
        settings |= _mapped_before(folder, settings)
        listed |= _listed_before(folder, settings) | tokenizer.get_added_tokens_decoder()
    named, others = _named(settings)
    names = {token.content for token in named.values()}
    wanted = [listed[index] for index in sorted(listed)]
    present = {token.content for token in [*wanted, *tokenizer.get_added_tokens_decoder().values()]}
    wanted += [token for token in [*named.values(), *others] if token.content not in present]
    known = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
    added = [_special(token) if token.content in names else token for token in wanted]
    added = [token for token in added if token.content not in known or (token.special and not known[token.content])]
    if added:
        tokenizer.add_tokens(added)
    return {name: token.content for name, token in named.items()}


def chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The model's template for a conversation without tools; None if it has none.

    Files of their own take the place of what tokenizer_config.json has.

    Raises:
        InputError: several templates, and none is the default.
    """
    files = {file.stem: file for file in sorted((folder / _TEMPLATES).glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files = {"default": folder / "chat_template.jinja", **files}
    given: Any = {name: _read(file) for name, file in files.items()} or settings.get("chat_template")
    if given is None:
        given = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(given, list):
        if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in given):
            raise InputError(f"{folder} lists chat templates that have no names: download the model again")
        given = {entry["name"]: entry.get("template") for entry in given}
    if isinstance(given, dict):
        if "default" not in given:
            raise InputError(
                f"{folder} has several chat templates ({', '.join(sorted(map(str, given)))}) and none is the default: "
                "save the one to use as chat_template.jinja"
            )
        given = given["default"]
    if given is not None and not isinstance(given, str):
        raise InputError(f"the chat template of {folder} is no text: download the model again")
    return given


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text: download the model again") from None


def _named(settings: Mapping[str, Any]) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """The special tokens that have a name, among them a model's own (image_token), and those that have none."""
    extra = settings.get("extra_special_tokens", settings.get("additional_special_tokens")) or []
    entries = {name: settings[name] for name in _NAMES if settings.get(name)}
    entries |= {name: value for name, value in settings.items() if name.endswith("_token") and _is_token(value)}
    if isinstance(extra, dict):
        entries |= extra
        extra = []
    return {name: _token(value) for name, value in entries.items()}, [_token(value) for value in extra]


def _is_token(value: Any) -> bool:
    return bool(value) and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))


def _token(value: Any) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise InputError(
            f"a special token must be a text or have a content, not {quoted(value)}: download the model again"
        )
    flags = {name: bool(value[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in value}
    return AddedToken(value["content"], special=True, **flags)


def _listed(settings: Mapping[str, Any], folder: Path) -> dict[int, AddedToken]:
    """What tokenizer_config.json lists as added tokens, by their ids."""
    try:
        return {
            int(index): AddedToken(**{key: value for key, value in entry.items() if key != "__type"})
            for index, entry in settings.get("added_tokens_decoder", {}).items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{folder} lists added tokens that cannot be read ({error}): download it again") from error


def _mapped_before(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What special_tokens_map.json says, as older models do."""
    mapped = read_json(folder / "special_tokens_map.json")
    extra, more = settings.get("extra_special_tokens"), mapped.get("extra_special_tokens")
    if isinstance(extra, list) and isinstance(more, list):
        mapped["extra_special_tokens"] = [*extra, *(token for token in more if token not in extra)]
    return mapped


def _listed_before(folder: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """What added_tokens.json lists, as older models do."""
    named = [settings[name] for name in _NAMES if settings.get(name)]
    special = {_token(value).content for value in [*named, *(settings.get("extra_special_tokens") or [])]}
    file = folder / "added_tokens.json"
    try:
        return {
            int(index): AddedToken(text, special=text in special, normalized=text not in special)
            for text, index in read_json(file).items()
        }
    except (TypeError, ValueError) as error:
        raise InputError(f"{file} lists tokens that cannot be read ({error}): download it again") from error


def _special(token: AddedToken) -> AddedToken:
    token.special = True
    return token
