"""Every picture shows its numbers, in files whose text is text, without touching the caller's own style."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from helpers.controllers import controller_for
from helpers.prompts import NOMINAL_PROMPTS as PROMPTS
from helpers.tiny import tiny

from mlx_lqr.analysis import Certificate, Linearity, certify, linearity, plots


@pytest.fixture(scope="module")
def measured() -> Linearity:
    model = tiny("llama", num_hidden_layers=4)
    return linearity(model, PROMPTS, controller_for(model, layers=[1, 2, 3]), modes=4)


@pytest.fixture(scope="module")
def certificate() -> Certificate:
    model = tiny("llama", num_hidden_layers=6)
    controller = controller_for(model, layers=[1, 2, 3, 4, 5], setpoint="paper")
    return certify(model, controller, PROMPTS[:2], PROMPTS[2:], strengths=(1.0, 2.0))


def test_pictures_of_linearity_show_its_numbers(measured: Linearity) -> None:
    spectra = plots.spectra(measured).axes[0]
    assert np.allclose(spectra.lines[2].get_ydata(), measured.singular_values[1, 2])
    error = plots.linearisation_error(measured)
    titles = [axes.get_title(loc="left") for axes in error.axes[:3]]
    assert titles == ["along the concept, $\\pm v_k$", "along the push, $\\pm g_{k-1}$", "random directions"]
    assert np.allclose(error.axes[2].lines[3].get_ydata(), np.median(measured.error["random"][:, 3], axis=0))
    assert "|\\delta z|" in error.axes[0].get_xlabel()
    alignment = plots.alignment(measured, layers=[0, 3])
    assert np.allclose(alignment.axes[2].images[0].get_array(), measured.similarity[3])
    assert [axes.get_title() for axes in alignment.axes[1:3]] == ["layer 0", "layer 3"]
    regions = plots.trust_region(measured)
    middle = np.median(np.minimum(measured.trust["random"], measured.sizes[-1]), axis=0)
    assert np.allclose(regions.axes[0].lines[2].get_ydata(), middle)
    alone = linearity(tiny("llama"), PROMPTS[:2])
    assert len(plots.of_linearity(alone)) == 4
    assert len(plots.trust_region(alone).axes) == 1


def test_pictures_of_a_certificate_show_its_numbers(certificate: Certificate) -> None:
    first, mu = certificate.first, certificate.magnitude
    tracking = plots.tracking(certificate).axes[1]
    lines = {line.get_label(): np.asarray(line.get_ydata()) for line in tracking.lines}
    assert np.allclose(lines["measured"], np.median(certificate.feature[:, 1, first:], axis=0) / mu[first:])
    assert np.allclose(lines["setpoint"], 2.0)
    assert tracking.get_title(loc="left") == "strength 2"
    drawn = plots.error_and_bound(certificate).axes[0]
    lines = {line.get_label(): np.asarray(line.get_ydata()) for line in drawn.lines}
    bound = np.median(certificate.feature_posterior[:, 0, first + 2 :], axis=0) / mu[first + 2 :]
    assert np.allclose(lines["bound, knowing the errors before"], bound)
    assert drawn.get_yscale() == "log"


def tradeoffs() -> list[plots.Tradeoff]:
    """Made up: two methods at three strengths."""
    results = []
    for method, price in (("A-LQR", 1.0), ("additive", 2.0)):
        for strength in (3.0, 1.0, 2.0):
            control, damage = min(0.95, 0.3 * strength), 8 + price * strength
            intervals = (control - 0.08, control + 0.05), (damage - 0.4, damage + 0.6)
            results.append(plots.Tradeoff(method, strength, control, damage, *intervals))
    return results


def test_control_against_damage_joins_a_methods_strengths() -> None:
    axes = plots.control_against_damage(tradeoffs(), damage="perplexity").axes[0]
    lines = {line.get_label(): line for line in axes.lines if not str(line.get_label()).startswith("_")}
    assert list(lines) == ["A-LQR", "additive"]
    assert np.allclose(lines["A-LQR"].get_xdata(), [9, 10, 11])  # in the order of the strengths
    assert np.allclose(lines["additive"].get_ydata(), [0.3, 0.6, 0.9])
    assert axes.get_xlabel() == "perplexity"
    assert {text.get_text() for text in axes.texts} == {"1", "2", "3"}


def test_files_are_made_in_one_style(measured: Linearity, certificate: Certificate, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    figures = plots.of_linearity(measured) | plots.of_certificate(certificate)
    figures["control-against-damage"] = plots.control_against_damage(tradeoffs())
    plots.save_all(figures, tmp_path)
    assert dict(matplotlib.rcParams) == before
    assert len(figures) == 7
    for name in figures:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        vector = (tmp_path / f"{name}.svg").read_text("utf-8")
        assert "<text" in vector
        assert "DejaVu" not in vector.split("</style>")[0]  # no glyphs drawn as paths
    (tmp_path / "again").mkdir()
    plots.save_all({"spectra": plots.spectra(measured)}, tmp_path / "again")
    assert (tmp_path / "again" / "spectra.svg").read_bytes() == (tmp_path / "spectra.svg").read_bytes()
