"""mlx-lqr linearity: how linear the blocks are, and whether a controller stays where they are."""

from __future__ import annotations

import numpy as np

from mlx_lqr.analysis.linearity import Linearity, monitored
from mlx_lqr.analysis.linearity import linearity as measure
from mlx_lqr.commands.analysis import Analysis, analysis_options
from mlx_lqr.commands.help import MEASURING, OUTPUT, command, option
from mlx_lqr.commands.output import say
from mlx_lqr.commands.tables import show_table
from mlx_lqr.errors import InputError

PROMPTS = 8
FEW_PROMPTS = 4


@command()
@analysis_options(
    name="linearity",
    done="looked at here",
    prompts="The prompts to compare.",
    count=PROMPTS,
    controller="Optional: what it does is measured too.",
)
@option("--modes", default=8, heading=MEASURING, help="How many dominant modes to compare between prompts.")
@option(
    "--write",
    is_flag=True,
    heading=OUTPUT,
    help="Store the linear region in the controller's file, so that chat can say when it is left.",
)
def linearity(analysis: Analysis, modes: int, write: bool) -> None:
    """Measure how linear a model's blocks are.

    Measured are the spectra of the Jacobians, how alike those of different prompts are, and the error of linearisation.
    """
    if write and analysis.controller is None:
        raise InputError("--write stores the region in a controller: add -c FILE")
    if modes < 1:
        raise InputError(f"--modes must be at least 1, not {modes}")
    measured = analysis.measure(
        lambda model, progress: measure(
            model,
            analysis.prompts,
            analysis.controller,
            strengths=analysis.strengths,
            modes=modes,
            seed=analysis.seed,
            progress=progress,
        )
    )
    if write and analysis.controller is not None and analysis.file is not None:
        monitored(analysis.controller, measured).save(analysis.file)
    if measured.prompt_count < FEW_PROMPTS:
        say(f"Note: medians over {measured.prompt_count} prompts say little: give {PROMPTS} or more", err=True)
    analysis.report(measured, lambda plots: plots.of_linearity(measured), lambda: _show(measured))
    if write and not analysis.as_json:
        say(f"Wrote {analysis.file}")


def _show(measured: Linearity) -> None:
    applied = measured.applied
    steered = ""
    if applied is not None:
        steered = f", {measured.concept} at strengths {', '.join(f'{s:g}' for s in applied.strengths)}"
    kinds = list(measured.trust)
    head = ["layer", "|z_k|", "largest sv", "median sv", "similarity (chance)", *kinds]
    rows = [_row(measured, k) for k in range(measured.norm.shape[1])]
    if applied is not None:
        head += ["alpha/trust", "push/trust"]
        for row, *shares in zip(rows, *shares_of_trust(measured), strict=True):
            row += [_size(share) for share in shares]
    show_table(
        head, rows, left=(), title=f"{measured.model_name}, medians over {measured.prompt_count} prompts{steered}"
    )
    say(
        "sv: singular values of A_k; similarity: of two prompts' A_k in the top "
        f"{measured.modes} modes (of random modes); {', '.join(kinds)}: |dz| / |z_k| at which the error passes 10 %"
    )
    if applied is not None:
        say("alpha/trust, push/trust: |alpha_k| and |u_k| over the trust region, at the largest strength")


def _row(measured: Linearity, k: int) -> list[str]:
    """Of layer k, without what a controller does there."""
    values = measured.singular_values[1, k]
    m = measured.mode_counts.index(measured.modes)
    return [
        str(k),
        f"{np.median(measured.norm[:, k]):.1f}",
        f"{values[0]:.2f}",
        f"{np.median(values):.2f}",
        f"{measured.similarity_by_modes[k, m]:.2f} ({measured.rotated_by_modes[k, m]:.2f})",
        *(_size(float(np.median(trust[:, k]))) for trust in measured.trust.values()),
    ]


def shares_of_trust(measured: Linearity) -> tuple[np.ndarray, np.ndarray]:
    """Median |alpha_k| and |u_k| (T,) at the largest strength over the trust region of where they act."""
    assert measured.applied is not None
    s = int(np.argmax(np.abs(measured.applied.strengths)))
    push_region = np.append(measured.trust_radius("push")[1:], np.nan)
    alpha, push = (np.median(part[:, s], axis=0) for part in (measured.applied.feature_error, measured.applied.push))
    controlled = np.where(push > 0, 1.0, np.nan)  # at the other layers no error is acted upon
    return controlled * alpha / measured.trust_radius("concept"), controlled * push / push_region


def _size(value: float) -> str:
    return "-" if np.isnan(value) else ">3" if np.isinf(value) else f"{value:.2f}"
