"""Local tasks of lm-eval, one of each kind that it has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROWS: list[dict[str, Any]] = [
    {"question": "The animal that barks at night is a", "choices": ["cat on a roof", "big dog", "fish"], "answer": 1},
    {"question": "Fish swim in the", "choices": ["deep blue water", "sky", "oven, where it is hot"], "answer": 0},
    {"question": "The sun rises in the", "choices": ["evening", "morning and in the east"], "answer": 1},
]
KINDS: dict[str, dict[str, Any]] = {
    "choice": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"},
    "scored": {
        "output_type": "loglikelihood",
        "doc_to_target": " {{choices[answer]}}",
        "metric_list": [{"metric": "perplexity"}],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "written": {
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path, rows: Sequence[dict[str, Any]] = ROWS) -> Path:
    """A folder of local tasks, one of each kind that lm-eval has."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind in KINDS.items():
        config = {
            "task": f"our_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[answer]}}",
            **kind,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML
    return folder
