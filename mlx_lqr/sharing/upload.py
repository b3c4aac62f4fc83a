"""A controller file onto the Hugging Face hub, with its page: one commit, by the hub's own client and its login."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlx_lqr.convert.hub import KINDS, check_repo, hub_name
from mlx_lqr.errors import InputError, first_line
from mlx_lqr.loading import is_on_hub
from mlx_lqr.methods.steering import Steering, load_steering
from mlx_lqr.sharing.card import card, picture
from mlx_lqr.sharing.measured import read_measured

CARD = "README.md"


@dataclass(frozen=True, eq=False)
class Upload:
    """A controller that can be put on the hub.

    Raises:
        InputError: the file is none that steers, or its name or the repository's cannot be used on the hub.
    """

    path: Path
    repo: str
    base_model: str | None = None
    """The model's id on the hub, if it is known"""
    results: Sequence[Path] = ()
    """Summaries that `mlx-lqr eval` wrote of it, for the page"""

    def __post_init__(self) -> None:
        check_repo(self.repo)
        if is_on_hub(str(self.path)):
            raise InputError(f"{self.path} is on the hub already: give a file of this machine")
        if not self.path.name.endswith(KINDS):
            raise InputError(f"{self.path} has to end in {' or '.join(KINDS)} on the hub: rename it")
        hub_name(f"hf:{self.repo}/{self.path.name}")  # refuses a name that nobody could ask for
        if self.base_model is not None:
            check_repo(self.base_model)

    def files(self, before: str = "") -> Mapping[str, bytes]:
        """What is uploaded, by its name in the repository.

        Args:
            before: the page that is there.
        """
        steering: Steering = load_steering(self.path)
        drawn = picture(steering)
        plot = f"{self.path.stem}.png"
        page = card(
            steering,
            self.repo,
            self.path.name,
            base_model=self.base_model,
            plot=None if drawn is None else plot,
            measured=[read_measured(file, steering) for file in self.results],
            before=before,
        )
        files = {self.path.name: self.path.read_bytes(), CARD: page.encode()}
        return files if drawn is None else {**files, plot: drawn}

    def push(self, *, private: bool = False, force: bool = False) -> str:
        """Upload it, into a new repository if there is none; returns the repository's address.

        Args:
            private: make a new repository that only its owner sees.
            force: replace a page that this library did not write.

        Raises:
            InputError: nobody is logged in, may not write there, or the hub cannot be reached; or a page of somebody
                else.
        """
        from huggingface_hub import CommitOperationAdd, HfApi, get_token

        self.files()  # a file that cannot be used is refused before anything is changed on the hub
        if get_token() is None:
            raise InputError("you are not logged in to the hub: `hf auth login`, or set HF_TOKEN")
        api = HfApi(library_name="mlx-lqr")
        with _clear_errors(self.repo):
            address = str(api.create_repo(self.repo, private=private or None, exist_ok=True))
            before = "" if force else self._page()
            operations = [CommitOperationAdd(name, content) for name, content in self.files(before).items()]
            api.create_commit(self.repo, operations, commit_message=f"Add {self.path.name} with mlx-lqr")
        return address

    def _page(self) -> str:
        """The page that is there, as it is now; empty where there is none."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.repo, CARD)).read_text("utf-8")
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return ""


@contextmanager
def _clear_errors(repo: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except InputError:
        raise
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise InputError(f"cannot reach the hub ({first_line(error)}): check the network") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403, 404):
            raise InputError(
                f"the hub does not let you write to {repo}: log in with `hf auth login` as somebody who may, with a "
                "token that may write"
            ) from error
        raise InputError(f"the hub refuses {repo} ({first_line(error)}): try again later") from error
    except Exception as error:  # errors of the network have no common class
        raise InputError(f"cannot reach the hub ({first_line(error)}): check the network") from error
