"""Contrast prompts that `fit` makes itself, from a word or a manner, and the two files that it leaves of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from mlx_lqr.backends.protocol import Runner
from mlx_lqr.commands.help import CONCEPT, OUTPUT, option, together
from mlx_lqr.errors import InputError
from mlx_lqr.files.prompts import check_new, write_prompts
from mlx_lqr.launched import rank
from mlx_lqr.lqr.concept_prompts import concept_prompts, style_prompts

Sets = Sequence[Sequence[str]]
"""Positive and negative prompts."""

made_prompts_options = together(
    option(
        "--concept-word",
        metavar="WORD",
        heading=CONCEPT,
        help="A topic as it stands in a sentence, such as chess or volcanoes: the prompts are made from it.",
    ),
    option(
        "--concept-style",
        metavar="MANNER",
        heading=CONCEPT,
        help='What follows "Answer", such as "like a pirate": the prompts are made in the chat template.',
    ),
    option(
        "--save-prompts",
        metavar="PREFIX",
        heading=OUTPUT,
        help="Made prompts go to PREFIX.positive.txt and PREFIX.negative.txt; by default beside the output.",
    ),
)


@dataclass(frozen=True)
class MadePrompts:
    """Prompts that are to be made once the model is loaded, and where they are kept."""

    concept: str
    make: Callable[[Runner], Sets]
    way: str
    """How they are made, in words."""
    files: tuple[str, str]
    """Of the positive and of the negative prompts."""
    force: bool

    def save(self, sets: Sets) -> None:
        """Write both files and say where they are."""
        for file, prompts in zip(self.files, sets, strict=True):
            write_prompts(file, prompts, force=self.force)
        if rank() > 0:
            return
        positive, negative = self.files
        click.echo(
            f"{len(sets[0])} + {len(sets[1])} prompts were made {self.way}. Edit them and fit again with\n"
            f"  --positive {positive} --negative {negative}",
            err=True,
        )


def made_prompts(
    word: str | None,
    style: str | None,
    prefix: str | None,
    output: str,
    *,
    others: bool,
    chat: bool | None,
    force: bool,
) -> MadePrompts | None:
    """What the options of these names ask for; None where the prompts are given.

    Args:
        output: the controller's file, beside which the prompts go if no prefix is given.
        others: whether --concept, --positive or --negative were given.
        chat: whether --chat-prompts or --plain-prompts was.

    Raises:
        InputError: options that do not go together, or files that exist already.
    """
    if word is None and style is None:
        if prefix is not None:
            raise InputError("--save-prompts is for prompts that are made: give --concept-word or --concept-style too")
        return None
    if others or (word is not None and style is not None):
        raise InputError("give one of --concept, --concept-word, --concept-style, or --positive and --negative")
    prefix = prefix or str(Path(output).with_suffix(""))
    files = f"{prefix}.positive.txt", f"{prefix}.negative.txt"
    for file in files:
        check_new(file, force=force)
    if word is not None:
        sets = concept_prompts(word)  # a mistake is refused before the model is loaded
        return MadePrompts(word.strip(), lambda model: sets, "from sentence frames", files, force)
    assert style is not None
    if chat is not None:
        raise InputError(
            "--concept-style is in the chat template already: leave --chat-prompts and --plain-prompts out"
        )
    manner = style.strip()
    way = "in the chat template, where the model is asked for this manner and for a plain one"
    return MadePrompts(manner, lambda model: style_prompts(model, manner), way, files, force)
