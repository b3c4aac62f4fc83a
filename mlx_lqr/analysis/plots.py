"""Plots of the analysis: each function takes a result and returns a matplotlib figure.

They share one style: the colours of Okabe and Ito, which colour-blind people can tell apart, for different kinds of
things, and viridis for layers; axes with units; text in SVG files stays text. Needs the extra `plots`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from mlx_lqr.analysis.certificate import TOLERANCE, Certificate
from mlx_lqr.analysis.linearity import TOLERANCE as LINEAR
from mlx_lqr.analysis.linearity import Linearity
from mlx_lqr.files.atomic import Kind, writing

BLACK = "#000000"
ORANGE = "#E69F00"
SKY = "#56B4E9"
GREEN = "#009E73"
BLUE = "#0072B2"
RED = "#D55E00"
PURPLE = "#CC79A7"
GREY = "#777777"
SERIES = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK)
LAYERS = "viridis"
_KINDS = {
    "concept": (BLUE, "along the concept, $\\pm v_k$"),
    "push": (RED, "along the push, $\\pm g_{k-1}$"),
    "random": (GREY, "random directions"),
}
_STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.labelsize": 9.0,
    "legend.fontsize": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "figure.dpi": 110.0,
    "savefig.dpi": 200.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "mlx-lqr",
    "image.cmap": LAYERS,
}


@contextmanager
def style() -> Iterator[None]:
    """Inside this context figures have this library's style; the caller's own settings stay as they are."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": matplotlib.get_backend(), **_STYLE}):
        yield


@dataclass(frozen=True)
class Tradeoff:
    """One method at one strength: its control and its damage, with their intervals."""

    method: str
    strength: float
    control: float
    """Higher is better"""
    damage: float
    """Lower is better"""
    control_interval: tuple[float, float]
    damage_interval: tuple[float, float]


def of_linearity(measured: Linearity) -> dict[str, Figure]:
    """file name -> plot, for all plots of a measurement of linearity."""
    drawings = {
        "spectra": spectra,
        "alignment": alignment,
        "linearisation-error": linearisation_error,
        "trust-region": trust_region,
    }
    return {name: draw(measured) for name, draw in drawings.items()}


def of_certificate(certificate: Certificate) -> dict[str, Figure]:
    """file name -> plot, for all plots of a certificate."""
    return {"tracking": tracking(certificate), "error-and-bound": error_and_bound(certificate)}


def save_all(
    figures: Mapping[str, Figure],
    folder: str | PathLike[str],
    kinds: Sequence[Literal["png", "svg"]] = ("png", "svg"),
    *,
    force: bool = False,
) -> None:
    """Write each figure as NAME.png and NAME.svg.

    Args:
        kinds: the formats to write.
        force: overwrite files of any kind, not only images.

    Raises:
        InputError: a file cannot be written, or is of another kind.
    """
    images: dict[str, Kind] = {"png": "PNG image", "svg": "SVG image"}
    for name, figure in figures.items():
        for kind in kinds:
            with writing(Path(folder) / f"{name}.{kind}", kind=images[kind], force=force) as temporary, style():
                metadata = {"Date": None} if kind == "svg" else None  # so that the same numbers give the same file
                figure.savefig(temporary, format=kind, metadata=metadata)


def spectra(measured: Linearity) -> Figure:
    """The singular values of every layer's Jacobian, the median over prompts."""
    with style():
        figure, (axes,) = _figure(1, width=5.2, height=3.6)
        values = measured.singular_values[1]
        T, d = values.shape
        floor = 10 ** np.floor(np.log10(np.quantile(values, 0.02)))
        for k in range(T):
            axes.plot(np.arange(1, d + 1), values[k], color=_of_layer(k, T), linewidth=1.0)
        axes.set(xscale="log", yscale="log", xlabel="index of the singular value", ylabel="singular value of $A_k$")
        axes.set_ylim(floor, values.max() * 1.5)
        axes.axhline(1.0, color=BLACK, linewidth=0.8, linestyle=":")
        _layer_bar(figure, axes, T)
        axes.set_title(f"{measured.model_name}, median over {measured.prompt_count} prompts", loc="left")
        return figure


def alignment(measured: Linearity, layers: Sequence[int] | None = None) -> Figure:
    """How similar the prompts' Jacobians are: the mean by layer, compared with chance, and the matrix of all pairs at
    `layers` (by default four, evenly spaced)."""
    with style():
        T, n = measured.similarity.shape[:2]
        chosen = list(layers) if layers is not None else sorted({round(x) for x in np.linspace(0, T - 1, 4)})
        figure = Figure(figsize=(7.2, 3.3), layout="constrained")
        grid = figure.add_gridspec(1, 2, width_ratios=(1.25, 1))
        axes = figure.add_subplot(grid[0])
        j = measured.mode_counts.index(measured.modes)
        axes.plot(measured.similarity_by_modes[:, j], color=BLUE, marker="o", markersize=2.5)
        axes.plot(measured.rotated_by_modes[:, j], color=GREY)
        axes.axhline(float(measured.gaussian_by_modes[j]), color=GREY, linestyle="--", linewidth=1)
        axes.set(xlabel="layer $k$", ylabel=f"spectral similarity, top {measured.modes} modes", ylim=(0, 1.02))
        axes.legend(["pairs of prompts", "these spectra, random directions", "Gaussian matrices"], loc="upper center")
        cells = grid[1].subgridspec(-(-len(chosen) // 2), 2)
        image: Any = None
        for column, k in enumerate(chosen):
            cell = figure.add_subplot(cells[column // 2, column % 2])
            image = cell.imshow(measured.similarity[k], vmin=0, vmax=1, cmap=LAYERS)
            cell.set(xticks=[], yticks=[], title=f"layer {k}")
            cell.grid(False)
            cell.spines[:].set_visible(False)
        figure.colorbar(image, ax=figure.axes[1:], shrink=0.8, label="similarity of two prompts")
        figure.suptitle(f"{measured.model_name}, {n} prompts", fontsize=9, x=0.01, ha="left")
        return figure


def linearisation_error(measured: Linearity) -> Figure:
    """The linearisation error against the size of the step: a line per layer, a panel per kind of direction."""
    with style():
        kinds = list(measured.error)
        T = measured.norm.shape[1]
        figure, panels = _figure(len(kinds), width=2.4 * len(kinds) + 1.2, height=2.9, share="all")
        for axes, kind in zip(panels, kinds, strict=True):
            curves = np.median(measured.error[kind], axis=0)
            for k in range(T):
                axes.plot(measured.sizes, curves[k], color=_of_layer(k, T), linewidth=1.0)
            axes.axhline(LINEAR, color=BLACK, linewidth=0.8, linestyle=":")
            axes.set(xscale="log", yscale="log", xlabel="size of the step, $|\\delta z|/|z_k|$")
            axes.set_title(_KINDS[kind][1], loc="left")
        place = {"textcoords": "offset points", "fontsize": 7.5, "va": "bottom"}
        panels[0].annotate(f"error {LINEAR:.0%}", (measured.sizes[0], LINEAR), (0, 2), **place)
        panels[0].set_ylabel("$|\\phi_k(z+\\delta z)-\\phi_k(z)-A_k\\delta z|\\,/\\,|A_k\\delta z|$")
        _layer_bar(figure, panels[-1], T, list(panels))
        return figure


def trust_region(measured: Linearity) -> Figure:
    """By layer: the size at which the error passes 10 %, and the sizes that the controller applies, over |z_k|."""
    with style():
        applied = measured.applied
        figure, panels = _figure(
            1 if applied is None else 2, width=4.2 if applied is None else 7.2, height=3.7, share="all"
        )
        T = measured.norm.shape[1]
        largest = measured.sizes[-1]
        for kind, radius in measured.trust.items():
            colour, name = _KINDS[kind]
            low, middle, high = _quantiles(np.minimum(radius, largest))
            panels[0].plot(middle, color=colour, label=name)
            panels[0].fill_between(range(T), low, high, color=colour, alpha=0.15, linewidth=0)
        panels[0].set(yscale="log", xlabel="layer $k$", ylabel="size over $|z_k|$")
        panels[0].set_title("error reaches 10 % (median, 80 % of prompts)", loc="left")
        panels[0].legend(loc="upper left", bbox_to_anchor=(0, -0.2))
        if applied is not None:
            controlled = np.nanmax(applied.push, axis=(0, 1)) > 0
            axes = panels[1]
            s = int(np.argmax(np.abs(applied.strengths)))
            after = np.roll(measured.norm, -1, axis=1)
            sizes = {
                "$|\\alpha_k|$": (BLUE, np.where(controlled, applied.feature_error[:, s] / measured.norm, np.nan)),
                "$|u_{k}|$ over $|z_{k+1}|$": (RED, np.where(np.arange(T) < T - 1, applied.push[:, s] / after, np.nan)),
                "$|z_k-z^0_k|$, all control so far": (ORANGE, applied.displacement[:, s] / measured.norm),
            }
            for name, (colour, size) in sizes.items():
                middle = np.median(size, axis=0)
                axes.plot(np.where(middle > 0, middle, np.nan), color=colour, label=name, marker="o", markersize=2.5)
            radius = np.minimum(np.median(measured.trust["random"], axis=0), largest)
            axes.plot(radius, color=GREY, linestyle="--", label="10 % error, random directions")
            axes.set(xlabel="layer $k$")
            axes.set_title(f"applied at strength {applied.strengths[s]:g}, {measured.concept} (median)", loc="left")
            axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2))
        return figure


def tracking(certificate: Certificate) -> Figure:
    """The feature by layer against its setpoint for every strength, in multiples of mu_k."""
    with style():
        first, T = certificate.first, len(certificate.magnitude) - 1
        layers = np.arange(first, T + 1)
        S = len(certificate.strengths)
        figure, panels = _figure(S, width=min(2.4 * S + 0.8, 9.6), height=2.9, share="all")
        scale = certificate.magnitude[first:]
        for s, axes in enumerate(panels):
            parts = {"unsteered": (GREY, certificate.unsteered), "measured": (BLUE, certificate.feature)}
            for name, (colour, part) in parts.items():
                low, middle, high = _quantiles(part[:, s, first:] / scale)
                axes.fill_between(layers, low, high, color=colour, alpha=0.18, linewidth=0)
                axes.plot(layers, middle, color=colour, label=name)
            middle = np.median(certificate.predicted[:, s, first:] / scale, axis=0)
            axes.plot(layers, middle, color=ORANGE, linestyle="--", label="predicted")
            axes.plot(
                layers[:-1], (certificate.setpoint[s, first:] / scale)[:-1], color=BLACK, linewidth=1, label="setpoint"
            )
            axes.set_xlabel("layer $k$")
            axes.set_title(f"strength {certificate.strengths[s]:g}", loc="left")
            _mark_output(axes, layers)
        panels[0].set_ylabel("feature, $v_k\\cdot z_k/\\mu_k$")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.suptitle(_title(certificate, "median and 80 % of"), fontsize=9, x=0.01, ha="left")
        return figure


def error_and_bound(certificate: Certificate) -> Figure:
    """The error of the feature's prediction, and its bounds, in multiples of mu_k."""
    with style():
        T = len(certificate.magnitude) - 1
        first = min(certificate.first + 2, T - 1)  # before it, nothing is displaced or all is as predicted
        layers = np.arange(first, T + 1)
        S = len(certificate.strengths)
        figure, panels = _figure(S, width=min(2.4 * S + 0.8, 9.6), height=3.1, share="all")
        scale = certificate.magnitude[first:]
        off = np.abs(certificate.feature - certificate.predicted)
        for s, axes in enumerate(panels):
            parts = {
                "measured": (BLUE, "-", off),
                "bound, knowing the errors before": (RED, "-", certificate.feature_posterior),
                "bound, before anything is steered": (PURPLE, "--", certificate.feature_prior),
            }
            for name, (colour, line, part) in parts.items():
                values = np.where(np.isfinite(part[:, s, first:]), part[:, s, first:], 1e30) / scale
                low, middle, high = _quantiles(values)
                axes.fill_between(layers, low, high, color=colour, alpha=0.18, linewidth=0)
                axes.plot(layers, middle, color=colour, linestyle=line, label=name)
            axes.axhline(
                TOLERANCE, color=BLACK, linewidth=0.8, linestyle=":", label=f"tolerance, {TOLERANCE:g} $\\mu_k$"
            )
            axes.set(xlabel="layer $k$", yscale="log", ylim=(1e-3, 1e3))
            axes.set_title(f"strength {certificate.strengths[s]:g}", loc="left")
            _mark_output(axes, layers)
        panels[0].set_ylabel("|feature $-$ predicted| $/\\mu_k$")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.suptitle(_title(certificate, "median and 80 % of"), fontsize=9, x=0.01, ha="left")
        return figure


def control_against_damage(
    results: Sequence[Tradeoff],
    control: str = "share of texts with the concept",
    damage: str = "perplexity under the unsteered model",
) -> Figure:
    """Control against damage: a line per method through its strengths, with intervals. Up and left is good.

    Args:
        results: of any methods, at any strengths.
        control, damage: labels of the axes, with units.
    """
    with style():
        figure, (axes,) = _figure(1, width=4.8, height=3.4)
        methods = list(dict.fromkeys(result.method for result in results))
        markers = "osD^vPX"
        for i, method in enumerate(methods):
            points = sorted((r for r in results if r.method == method), key=lambda r: r.strength)
            x, y = np.array([r.damage for r in points]), np.array([r.control for r in points])
            x_range, y_range = (
                np.abs(np.array(interval).T - centre)
                for interval, centre in (
                    ([r.damage_interval for r in points], x),
                    ([r.control_interval for r in points], y),
                )
            )
            colour = SERIES[i % len(SERIES)]
            axes.errorbar(x, y, y_range, x_range, color=colour, fmt="none", elinewidth=0.7, alpha=0.6)
            axes.plot(x, y, color=colour, marker=markers[i % len(markers)], markersize=4.5, label=method)
            for point in points:
                place = (point.damage, point.control)
                axes.annotate(
                    f"{point.strength:g}", place, (4, -9), textcoords="offset points", fontsize=7, color=colour
                )
        axes.set(xlabel=damage, ylabel=control)
        axes.legend(loc="lower right", title="numbers: strength", title_fontsize=7.5)
        return figure


def _figure(columns: int, *, width: float, height: float, share: str = "none") -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(1, columns, sharex=share == "all", sharey=share == "all", squeeze=False)
    return figure, list(panels[0])


def _quantiles(values: np.ndarray) -> np.ndarray:
    """The 10 %, 50 % and 90 % quantiles over the first axis; NaN where any value is NaN."""
    return np.asarray(np.quantile(values, (0.1, 0.5, 0.9), axis=0))


def _of_layer(k: int, T: int) -> Any:
    return matplotlib.colormaps[LAYERS](0.95 * k / max(1, T - 1))


def _layer_bar(figure: Figure, axes: Any, T: int, beside: list[Any] | None = None) -> None:
    colours = matplotlib.colors.ListedColormap([_of_layer(k, T) for k in range(T)])
    mappable = ScalarMappable(Normalize(-0.5, T - 0.5), colours)
    figure.colorbar(mappable, ax=beside or axes, label="layer $k$", pad=0.02)


def _mark_output(axes: Any, layers: np.ndarray) -> None:
    """Ticks at whole layers; the last of `layers` is the output."""
    inner = layers[:-1]
    step = max(1, -(-len(inner) // 4))
    ticks = [int(k) for k in inner[::step] if layers[-1] - k >= max(2, step - 1)]
    axes.set_xticks([*ticks, int(layers[-1])], [*map(str, ticks), "out"])


def _title(certificate: Certificate, what: str) -> str:
    return f"{certificate.model_name}, {certificate.concept}, {what} {certificate.held_out_prompts} held-out prompts"
