"""The page of a controller on the hub, made from its file and what was measured of it: README.md, and a plot of what it
has in each layer.

A repository may hold several controllers. Each has a part of the page between two marks, which a later push of the same
file replaces; a page without marks is somebody else's and stays as it is.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence

import numpy as np

from mlx_lqr.errors import InputError
from mlx_lqr.lqr.strength import BUDGETS
from mlx_lqr.methods.method import Column, Shown
from mlx_lqr.methods.registry import METHODS
from mlx_lqr.methods.steering import Steering
from mlx_lqr.sharing.measured import Measured

_PART = re.compile(r"<!-- mlx-lqr: (\S+) -->\n.*?<!-- mlx-lqr: end -->\n", re.DOTALL)
TITLE = "# Controllers for mlx-lqr\n"
ABOUT = (
    "They steer a language model while it writes, on your own machine. "
    "Each was fitted on one model, and is refused by any other.\n"
)


def card(
    steering: Steering,
    repo: str,
    file: str,
    *,
    base_model: str | None = None,
    plot: str | None = None,
    measured: Sequence[Measured] = (),
    before: str = "",
) -> str:
    """The text of README.md.

    Args:
        steering: what `file` holds.
        repo, file: where it will be: OWNER/NAME, and the file's name in it.
        base_model: the model's id on the hub, if it is known.
        plot: the name of the plot in the repository, if there is one.
        measured: what was measured of it, a table each.
        before: the page that is there.

    Raises:
        InputError: the page that is there was written by somebody else.
    """
    parts = {found[1]: found[0] for found in _PART.finditer(before)}
    if before.strip() and not parts:
        raise InputError(
            f"{repo} has a README.md that mlx-lqr did not write: push to another repository, or replace it with --force"
        )
    part = _part(steering, repo, file, base_model, plot)
    tables = "".join(f"\n{one.markdown}" for one in measured)
    shown = f"\nMeasured by `mlx-lqr eval`, with 95 % intervals:\n{tables}" if measured else ""
    parts[file] = f"<!-- mlx-lqr: {file} -->\n{part}{shown}<!-- mlx-lqr: end -->\n"
    head = _front_matter(steering, base_model)
    return "\n".join([head + TITLE, ABOUT, *(parts[name] for name in sorted(parts))])


def picture(steering: Steering) -> bytes | None:
    """The file's numbers layer by layer as a PNG image; None without the extra `plots`."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    from mlx_lqr.analysis.plots import SERIES, style

    with style():
        columns = _columns(steering)
        figure = Figure(figsize=(6.4, 1.9 * len(columns)), layout="constrained")
        axes = np.atleast_1d(figure.subplots(len(columns), sharex=True))
        for i, (column, one) in enumerate(zip(columns, axes, strict=True)):
            one.bar(np.arange(steering.num_layers), column.values, color=SERIES[i % len(SERIES)])
            one.set_ylabel(column.header.strip())
        axes[-1].set_xlabel("layer")
        content = io.BytesIO()
        figure.savefig(content, format="png")
    return content.getvalue()


def _columns(steering: Steering) -> list[Column]:
    """What `show` prints of each layer, zero where there is no control."""
    active = np.isin(np.arange(steering.num_layers), steering.active_layers)
    shown = METHODS[steering.method].show(steering)
    return [Column(one.header, one.width, np.where(active, one.values, 0.0)) for one in shown.columns]


def _front_matter(steering: Steering, base_model: str | None) -> str:
    from huggingface_hub import ModelCardData

    tags = ["activation-steering", "mlx-lqr", steering.method]
    return f"---\n{ModelCardData(base_model=base_model, library_name='mlx-lqr', tags=tags).to_yaml()}\n---\n\n"


def _part(steering: Steering, repo: str, file: str, base_model: str | None, plot: str | None) -> str:
    shown = METHODS[steering.method].show(steering)
    rows = "".join(f"| {label} | {_cell(text)} |\n" for label, text in _rows(steering, shown))
    name = base_model or "MODEL"
    picture = f"\n![What the controller has in each layer]({plot})\n" if plot is not None else ""
    return (
        f"## {_cell(', '.join(steering.concepts))}: {file}\n\n|  |  |\n|---|---|\n{rows}\n"
        f"```sh\nmlx-lqr chat {name} -c hf:{repo}/{file}\n```\n\n"
        f"```python\nimport mlx_lqr\n\nmodel = mlx_lqr.load({name!r})\n"
        f"controller = mlx_lqr.load_steering({f'hf:{repo}/{file}'!r})\n"
        f'print(mlx_lqr.generate(model, "Once upon a time,", controller=controller))\n```\n{picture}'
    )


def _rows(steering: Steering, shown: Shown) -> Iterator[tuple[str, str]]:
    method = METHODS[steering.method]
    papers = "; ".join(paper.markdown for paper in method.papers)
    yield "method", method.title + (f" ({papers})" if papers else "")
    sizes = f"{steering.num_layers} layers of width {steering.hidden_size}"
    yield "model", f"{steering.model_name} ({sizes}, fingerprint {steering.fingerprint or 'not known'})"
    yield "layers", ", ".join(map(str, steering.active_layers))
    yield "positions", {"last": "from the prompt's last token on", "all": "every token"}[steering.positions]
    for concept, (positive, negative) in zip(steering.concepts, steering.prompt_counts, strict=True):
        if positive or negative:
            yield f"prompts for {_cell(concept)}", f"{positive} with the concept, {negative} without"
    yield from shown.numbers.items()
    yield from shown.notes.items()
    if steering.strength is not None:
        yield "recommended strength", ", ".join(f"{one:g}" for one in steering.strength)
    for concept, one in zip(steering.concepts, steering.calibration, strict=bool(steering.calibration)):
        if one is not None:
            costs = ", ".join(f"{name} {one.strength[name]:g} ({one.divergence[name]:.2g} nats)" for name in BUDGETS)
            yield f"cost of {_cell(concept)}", f"{costs}: strengths, and how far they move the next token on plain text"
    yield "made with", f"mlx-lqr {steering.library_version}"


def _cell(text: str) -> str:
    """Text from a file in a cell of a Markdown table, where nothing in it is markup."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    links = re.fullmatch(r".*\]\(https://arxiv\.org/abs/[\d.]+\).*", plain)  # those of the methods' papers
    return plain if links else re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", plain)
