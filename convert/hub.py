"""A model of the Hugging Face hub -> its folder, downloaded once, without a tensor framework."""

from __future__ import annotations

import re
from pathlib import Path

from mlx_lqr.errors import InputError, first_line

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DOWNLOADED = ["*.json", "*.jinja", "model*.safetensors", "tokenizer.model", "merges.txt", "vocab.txt"]


def hub_folder(name: str) -> Path:
    """Download the model `name` (or find it in the hub's cache) and return its folder."""
    if not _HUB_ID.fullmatch(name):
        raise InputError(f"{name} does not exist: give a .gguf file, a model folder or a hub id such as org/model")
    from huggingface_hub import snapshot_download  # takes half a second, and is only needed here
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_DOWNLOADED))
    except RepositoryNotFoundError as error:
        raise InputError(
            f"the hub has no model {name} (or you may not see it): check the name, or log in with `hf auth login`"
        ) from error
    except Exception as error:  # errors of the hub, the network and the disk have no common class
        raise InputError(
            f"cannot download {name} ({first_line(error)}): check the network, or give a folder"
        ) from error
