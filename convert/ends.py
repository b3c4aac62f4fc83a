"""Tokens that end a turn, known by their text as in llama.cpp.

Many GGUF files name only one of them in their metadata, and some have them as ordinary tokens.
"""

from __future__ import annotations

END_OF_TURN = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "_<EOT>",
    "<|return|>",
    "<|call|>",
    "[EOT]",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<turn|>",
    "[e~[",
)
