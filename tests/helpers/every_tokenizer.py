"""Small tokenizers of every kind that models come with, and random sequences of their tokens."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXTS = [
    "Once upon a time, there was a dog that didn't bark. It's what we've said, isn't it?",
    "The sea is deep and blue; the church stands on a hill. Question: what is 2 + 2? Answer: 4.",
    "Ein Hund läuft über die Straße. Les garçons ont mangé. 犬は海が好きです。 한국어 🙂 🎉",
    "def f(x):\n    return x + 1\n\n\tprint('ok')  #  two  spaces",
    "Hello world, hello there. Yes or No? A: B: C: the the the",
]
LATIN = [text for text in TEXTS if text.isascii()]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _llama_decoder(prefix: bool) -> decoders.Decoder:
    plain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*plain, decoders.Strip(" ", 1, 0)] if prefix else plain)


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _sentencepiece(*, prefix: bool, metaspace: bool) -> Tokenizer:
    """BPE with byte fallback, as Llama 2 (with the prefix, as a normaliser or a Metaspace) and Gemma (without) have."""
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    spelled = [normalizers.Replace(" ", "▁")]
    learner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spelled] if prefix else spelled)
    trainer = trainers.BpeTrainer(
        vocab_size=520, special_tokens=["<unk>", *BYTES], max_token_length=8, show_progress=False
    )
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no merge reaches into the next word
    learner.train_from_iterator(LATIN, trainer)  # other scripts are left to the byte tokens
    tokenizer = Tokenizer.from_str(learner.to_str().replace('"byte_fallback":false', '"byte_fallback":true'))
    tokenizer = _without_added(tokenizer)
    if metaspace:
        scheme = "first" if prefix else "never"
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    tokenizer.decoder = _llama_decoder(prefix)
    return tokenizer


def _without_added(tokenizer: Tokenizer) -> Tokenizer:
    """The same with the special tokens of its training as ordinary ones, which byte tokens are."""
    bare = Tokenizer(tokenizer.model)
    bare.normalizer = tokenizer.normalizer
    return bare


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=220, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=260, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _word_level() -> Tokenizer:
    words = sorted({word for text in TEXTS for word in text.split()} | set(".?!,'"))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?unk", *words])}, unk_token="?unk"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _end_of_word() -> Tokenizer:
    """BPE whose words end in `</w>`, as in the first GPT."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _changing_its_end() -> Tokenizer:
    """One whose decoder changes what it has said once more follows."""
    tokenizer = _word_level()
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ea", "EA"), decoders.Replace("sd", "S")])
    return tokenizer


_KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": _byte_level,
    "llama": functools.partial(_sentencepiece, prefix=True, metaspace=False),
    "metaspace": functools.partial(_sentencepiece, prefix=True, metaspace=True),
    "gemma": functools.partial(_sentencepiece, prefix=False, metaspace=False),
    "unigram": _unigram,
    "word-piece": _word_piece,
    "word-level": _word_level,
    "end-of-word": _end_of_word,
    "changing": _changing_its_end,
}
KINDS = tuple(_KINDS)


@functools.cache
def _text_of(kind: str) -> str:
    tokenizer = _KINDS[kind]()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)]
    )
    return str(tokenizer.to_str())


def folder_of(kind: str, folder: Path, **settings: Any) -> Path:
    """A folder with this tokenizer, and with tokenizer_config.json as given."""
    tokenizer_of(kind).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def tokenizer_of(kind: str) -> Tokenizer:
    """A tokenizer of this kind, with a BOS token before every text, special tokens, and `<think>`, which is text."""
    return Tokenizer.from_str(_text_of(kind))


def beyond(prompt: str, whole: str) -> str:
    """What a text has beyond the beginning that it shares with another."""
    return whole[next((i for i in range(len(prompt)) if whole[i : i + 1] != prompt[i]), len(prompt)) :]
