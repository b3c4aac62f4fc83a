"""Models and controllers of the Hugging Face hub -> their files, downloaded once, without a tensor framework."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mlx_lqr.errors import InputError, first_line

ON_THE_HUB = "hf:"
"""What the name of a controller on the hub begins with: hf:REPO/FILE"""
KINDS = (".safetensors", ".gguf")
"""How files that steer end."""
LARGEST = 1 << 28
"""Bytes of such a file; controllers have kilobytes, models more than this."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILE = re.compile(r"(?:[\w-][\w. -]*/)*[\w-][\w. -]*")
_DOWNLOADED = ["*.json", "*.jinja", "model*.safetensors", "tokenizer.model", "merges.txt", "vocab.txt"]

T = TypeVar("T")


def hub_folder(name: str) -> Path:
    """Download the model `name` (or find it in the hub's cache) and return its folder."""
    if not _HUB_ID.fullmatch(name):
        raise InputError(f"{name} does not exist: give a .gguf file, a model folder or a hub id such as org/model")
    from huggingface_hub import snapshot_download  # takes half a second, and is only needed here
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download() -> Path:
        try:
            return Path(snapshot_download(name, allow_patterns=_DOWNLOADED))
        except LocalEntryNotFoundError as error:  # neither reached nor in the cache
            raise ConnectionError(first_line(error)) from error

    return _downloaded(name, "model", "a folder", download)


def hub_file(name: str) -> Path:
    """Download a controller, named hf:REPO/FILE, or find it in the hub's cache.

    Raises:
        InputError: no such repository or file, one that is too large to be a controller, or a hub that cannot be
            reached where the file is not in its cache.
    """
    repo, file = hub_name(name)
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    def download() -> Path:
        try:
            size = get_hf_file_metadata(hf_hub_url(repo, file)).size
        except Exception as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            return Path(hf_hub_download(repo, file, local_files_only=True))  # the hub cannot be reached
        if size is not None and size > LARGEST:
            raise InputError(f"{file} of {repo} has {size >> 20} MB, which no controller has: name another file")
        return Path(hf_hub_download(repo, file))

    try:
        return _downloaded(repo, "repository", "a file", download)
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"cannot download {name}, and it was not downloaded before: check the network, or give a file"
        ) from error
    except EntryNotFoundError as error:
        raise InputError(f"the repository {repo} has no file {file}: look at {_page(repo)}") from error


def hub_name(name: str) -> tuple[str, str]:
    """The repository and the file in it of hf:REPO/FILE.

    Raises:
        InputError: it is not of this form, or the file is of a kind that no steering has.
    """
    owner, _, rest = name.removeprefix(ON_THE_HUB).partition("/")
    repo, slash, file = rest.partition("/")
    if not (slash and _HUB_ID.fullmatch(f"{owner}/{repo}") and _FILE.fullmatch(file)):
        raise InputError(f"{name} names no file on the hub: write hf:OWNER/REPO/FILE, as in hf:me/dog/dog.safetensors")
    if not file.endswith(KINDS):
        raise InputError(f"{name} is of another kind than files that steer, which end in {' or '.join(KINDS)}")
    return f"{owner}/{repo}", file


def check_repo(repo: str) -> None:
    """Raise `InputError` unless this can be a repository's name."""
    if not _HUB_ID.fullmatch(repo):
        raise InputError(f"{repo} cannot be a repository of the hub: write OWNER/NAME, as in me/dog-controllers")


def _page(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


def _downloaded(name: str, what: str, instead: str, download: Callable[[], T]) -> T:
    """What the download returns.

    Raises:
        InputError: there is no such repository, or it cannot be downloaded.
    """
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    try:
        return download()
    except (InputError, EntryNotFoundError):
        raise
    except RepositoryNotFoundError as error:
        raise InputError(
            f"the hub has no {what} {name} (or you may not see it): check the name, or log in with `hf auth login`"
        ) from error
    except Exception as error:  # errors of the hub, the network and the disk have no common class
        raise InputError(
            f"cannot download {name} ({first_line(error)}): check the network, or give {instead}"
        ) from error
