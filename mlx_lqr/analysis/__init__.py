"""Why steering works on a model, and how well: measured, not assumed.

    from mlx_lqr.analysis import certify, linearity, plots
    measured = linearity(model, prompts, controller)
    plots.linearisation_error(measured).savefig("error.svg")

`check` says what a model is, and how right its derivatives are; `linearity` measures whether the blocks are locally
linear; `certify` bounds how far the steered model can be from the linear prediction, and measures how far it is;
`track` shows how closely the feature follows its setpoint. Results are dataclasses of NumPy arrays; plots.py draws them
(the extra `plots`), `write_json` writes them to a file.
"""

from mlx_lqr.analysis.certificate import Certificate, certify
from mlx_lqr.analysis.check import Check, check
from mlx_lqr.analysis.inputs import default_prompts
from mlx_lqr.analysis.linearity import Linearity, linearity, monitored
from mlx_lqr.analysis.tracking import track
from mlx_lqr.files.results import write_json

__all__ = [
    "Certificate",
    "Check",
    "Linearity",
    "certify",
    "check",
    "default_prompts",
    "linearity",
    "monitored",
    "track",
    "write_json",
]
