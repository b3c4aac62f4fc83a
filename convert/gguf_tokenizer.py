"""GGUF metadata -> the tokenizer files of a Hugging Face folder.

GGUF files of the supported models have three kinds of tokenizer. "gpt2" is byte-level BPE with its merges. "llama" is
SentencePiece BPE, whose merges have to be recovered: SentencePiece joins the two neighbours whose union is the piece
with the highest score, so every way to cut a piece into two pieces is a merge, ranked by the score of the whole piece.
"gemma4" spells spaces as SentencePiece does, and has its merges.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from mlx_lqr.errors import InputError, quoted

from .ends import END_OF_TURN
from .gguf_file import GGUFFile
from .pre_tokenizers import PreTokenizer, pre_tokenizer
from .write import write_json

_KINDS = ("gpt2", "llama", "gemma4")
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # token types
_SPACE = "\u2581"  # how SentencePiece spells a space
_KEY = "tokenizer.ggml."
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_SENTENCEPIECE_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}  # llama.cpp's defaults, if the file does not say
# DeepSeek's have a wide bar.
_CONTROL_LOOKING = re.compile("<([|\uff5c])[^\\s<>|\uff5c]+\\1>|<(?:start|end)_of_turn>")


class GGUFTokenizer:
    """The tokenizer of a GGUF file: `tokenizer` (of the tokenizers library), and its settings for the folder's files.

    Raises:
        InputError: the kind or the pre-tokenizer is not supported, or the metadata contradicts itself.
    """

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self.kind = file.value(_KEY + "model", str)
        if self.kind not in _KINDS:
            raise InputError(
                f"{file.path} has a tokenizer of kind {quoted(self.kind)}: supported are {', '.join(_KINDS)}; "
                "convert the original model"
            )
        self.tokens: list[str] = file.strings(_KEY + "tokens")
        stated = self._list_like_tokens("token_type", [_NORMAL] * len(self.tokens))
        self._types = [_type(token, kind) for token, kind in zip(self.tokens, stated, strict=True)]
        if self.kind != "gpt2":  # SentencePiece matches these in text whose spaces are already replaced
            self.tokens = [
                token.replace(_SPACE, " ") if kind == _USER_DEFINED else token
                for token, kind in zip(self.tokens, self._types, strict=True)
            ]
        self._vocabulary = {token: index for index, token in enumerate(self.tokens)}
        if len(self._vocabulary) != len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if self._vocabulary[token] != index)
            raise InputError(f"{file.path} lists the token {twice[:40]!r} twice: convert the original model again")
        self._special = self._special_ids()
        self._cutting = pre_tokenizer(file.value(_KEY + "pre", str)) if self.kind == "gpt2" else None
        self.adds_bos = file.value(_KEY + "add_bos_token", bool, self._cutting is None or self._cutting.adds_bos)
        self.adds_eos = file.value(_KEY + "add_eos_token", bool, False)
        if self._cutting is not None:
            self.tokenizer = self._byte_level(self._cutting)
        elif self.kind == "llama":
            self.tokenizer = self._sentencepiece(
                self._recovered_merges(), file.value(_KEY + "add_space_prefix", bool, True)
            )
        else:
            self.tokenizer = self._sentencepiece(self._stated_merges(), prefixed=False)
        self._add_special_tokens()

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, if there is one."""
        return self._special.get("bos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The token that pads a batch, if there is one."""
        return self._special.get("pad_token")

    @property
    def eos_token_ids(self) -> list[int]:
        """All tokens that end generation: the end of the text first, then ends of a turn."""
        stated = [self._file.metadata.get(f"{_KEY}{name}_token_id") for name in ("eot", "eom")]
        named = [token for token in END_OF_TURN if token in self._vocabulary]
        if {"<|return|>", "<|call|>"} <= set(named):  # gpt-oss ends a message with <|end|>, after which it goes on
            named = [token for token in named if token != "<|end|>"]
        known = [self._vocabulary[token] for token in named]
        ends = [self._special.get("eos_token"), *stated, *known]
        return list(dict.fromkeys(token for token in ends if isinstance(token, int) and 0 <= token < len(self.tokens)))

    def save(self, folder: Path, max_length: int) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json into `folder`."""
        self.tokenizer.save(str(folder / "tokenizer.json"))
        names = {role: self.tokens[index] for role, index in self._special.items()}
        write_json(folder / "special_tokens_map.json", names)
        config: dict[str, Any] = names | {
            "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
            "add_bos_token": self.adds_bos,
            "add_eos_token": self.adds_eos,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
        }
        if "tokenizer.chat_template" in self._file.metadata:
            config["chat_template"] = self._file.value("tokenizer.chat_template", str)
        write_json(folder / "tokenizer_config.json", config)

    def _byte_level(self, cutting: PreTokenizer) -> Tokenizer:
        tokenizer = Tokenizer(models.BPE(self._vocabulary, self._stated_merges(), ignore_merges=cutting.whole_words))
        if cutting.nfc:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = cutting.build()
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _stated_merges(self) -> list[tuple[str, str]]:
        merges = [_pair(merge) for merge in self._file.strings(_KEY + "merges")]
        # llama.cpp skips merges of unknown pieces; the tokenizers library refuses them
        return [(left, right) for left, right in merges if {left, right, left + right} <= self._vocabulary.keys()]

    def _sentencepiece(self, merges: list[tuple[str, str]], prefixed: bool) -> Tokenizer:
        unknown = self._special.get("unk_token")
        tokenizer = Tokenizer(
            models.BPE(
                self._vocabulary,
                merges,
                unk_token=None if unknown is None else self.tokens[unknown],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        spelled: normalizers.Normalizer = normalizers.Replace(" ", _SPACE)
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spelled]) if prefixed else spelled
        plain = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*plain, decoders.Strip(" ", 1, 0)] if prefixed else plain)
        return tokenizer

    def _recovered_merges(self) -> list[tuple[str, str]]:
        """Every cut of a piece into two pieces, best score first. Other tokens are matched before merging."""
        scores: list[float] = self._list_like_tokens("scores", None)
        ids = {token: index for token, index in self._vocabulary.items() if self._types[index] == _NORMAL}
        merges: list[tuple[float, int, int, int, str, str]] = []
        for token, index in ids.items():
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in ids and right in ids:
                    merges.append((-scores[index], index, ids[left], ids[right], left, right))
        merges.sort()
        return [(left, right) for *_, left, right in merges]

    def _add_special_tokens(self) -> None:
        added = [
            AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, kind in zip(self.tokens, self._types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED) and token
        ]
        self.tokenizer.add_tokens(added)
        before = [self._special_token("bos_token")] if self.adds_bos else []
        after = [self._special_token("eos_token")] if self.adds_eos else []
        if before or after:
            self.tokenizer.post_processor = processors.TemplateProcessing(
                single=[*(token for token, _ in before), "$A", *(token for token, _ in after)],
                pair=[
                    *(token for token, _ in before),
                    "$A",
                    *(token for token, _ in after + before),
                    "$B",
                    *(token for token, _ in after),
                ],
                special_tokens=list(dict.fromkeys(before + after)),
            )

    def _special_token(self, role: str) -> tuple[str, int]:
        if role not in self._special:
            raise InputError(f"{self._file.path} adds a {role} to texts but has none: convert the original model again")
        return self.tokens[self._special[role]], self._special[role]

    def _special_ids(self) -> dict[str, int]:
        """Role -> id of the special tokens that the file has."""
        ids: dict[str, int] = {}
        for role, key in _SPECIAL.items():
            fallback = _SENTENCEPIECE_IDS.get(role) if self.kind == "llama" else None
            index = self._file.metadata.get(_KEY + key, fallback)
            if isinstance(index, int) and 0 <= index < len(self.tokens):  # llama.cpp ignores ids out of range as well
                ids[role] = index
        return ids

    def _list_like_tokens(self, name: str, default: list[Any] | None) -> list[Any]:
        values: list[Any] = self._file.value(_KEY + name, list, default)
        if len(values) != len(self.tokens):
            raise InputError(f"{self._file.path} has {len(values)} {name} for {len(self.tokens)} tokens: it is corrupt")
        return values


def _type(token: str, stated: int) -> int:
    """A token's type. One that looks like a control token is one, whatever the file says, as in llama.cpp.

    Otherwise the marks of a chat template would be split into pieces, and no answer would end.
    """
    return _CONTROL if token in END_OF_TURN or _CONTROL_LOOKING.fullmatch(token) else stated


def _pair(merge: str) -> tuple[str, str]:
    """The two sides of a merge. The space is searched from the second character on, as in llama.cpp."""
    cut = merge.find(" ", 1)
    return (merge[:cut], merge[cut + 1 :]) if cut > 0 else (merge, "")
