"""Prompts of token ids for the tiny models, whose vocabulary has 64."""

from __future__ import annotations

PROMPT = [5, 17, 3, 42, 8, 29, 11, 60, 2, 33, 21, 40]
"""Longer than the tiny models' sliding windows of 6"""
BATCH = [PROMPT, PROMPT[:1], PROMPT[4:9], PROMPT[::-1], PROMPT[2:4]]
NOMINAL_PROMPT = PROMPT[:10]
"""Where blocks are linearised; longer than the sliding windows, too"""
NOMINAL_PROMPTS = [NOMINAL_PROMPT, NOMINAL_PROMPT[:4], [7, 1, 9], [3, 3, 50, 12, 6]]
