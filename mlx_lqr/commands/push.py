"""mlx-lqr push: a controller onto the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_lqr.commands.help import OUTPUT, argument, command, option
from mlx_lqr.commands.options import force_option
from mlx_lqr.commands.output import say
from mlx_lqr.commands.progress import stopping
from mlx_lqr.launched import refuse_several
from mlx_lqr.sharing.upload import CARD, Upload


@command()
@argument("file", type=click.Path(path_type=Path), help="What `mlx-lqr fit` or `mlx-lqr export` wrote.")
@argument("repo", help="OWNER/NAME on the hub; it is made if it is not there, and may hold several controllers.")
@option(
    "--base-model",
    metavar="ID",
    heading=OUTPUT,
    help="The model's id on the hub, which the file does not know, for the page and its commands.",
)
@option(
    "--results",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="SUMMARY",
    heading=OUTPUT,
    help="What `mlx-lqr eval` measured of the controller (its FILE.summary.json), for the page; repeat it for several.",
)
@option("--private-repo", is_flag=True, heading=OUTPUT, help="If the repository is new, let nobody else see it.")
@option(
    "--dry-run", is_flag=True, heading=OUTPUT, help="Print the page and what would be uploaded, and upload nothing."
)
@force_option
def push(
    file: Path,
    repo: str,
    base_model: str | None,
    results: tuple[Path, ...],
    private_repo: bool,
    dry_run: bool,
    force: bool,
) -> None:
    """Put a controller on the Hugging Face hub.

    With a page made from the file: model, concept, method, strengths and what they cost, how to use it, and a plot if
    the extra `plots` is installed; with --results, what was measured of it too. You have to be logged in (`hf auth
    login`, or HF_TOKEN).
    """
    refuse_several("controllers are put on the hub")
    upload = Upload(file, repo, base_model, results)
    if dry_run:
        files = upload.files()
        say(files[CARD].decode(), nl=False)
        say("\nWould be uploaded: " + ", ".join(f"{name} ({len(files[name])} bytes)" for name in files), err=True)
        return
    with stopping("The repository may be there without the controller."):
        address = upload.push(private=private_repo, force=force)
    say(
        f"Pushed {file} to {address}. Others steer with it:\n  mlx-lqr chat {base_model or 'MODEL'} "
        f"-c hf:{repo}/{file.name}"
    )
