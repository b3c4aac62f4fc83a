"""Why steering works on a model, and how well: measured, not assumed.

    from mlx_lqr.analysis import certify, linearity, plots
    measured = linearity(model, prompts, controller)
    plots.linearisation_error(measured).savefig("error.svg")

`linearity` asks whether the blocks are locally linear, `certify` how far the loop can be and is from what the linear
model predicts, `track` how closely the feature follows its setpoint. Results are dataclasses of NumPy arrays; plots.py
draws them (the extra `plots`) and results.py writes them as JSON.
"""

from mlx_lqr.analysis.certificate import Certificate, certify
from mlx_lqr.analysis.linearity import Linearity, linearity, monitored
from mlx_lqr.analysis.results import write_json
from mlx_lqr.analysis.rollout import default_prompts
from mlx_lqr.analysis.tracking import track

__all__ = ["Certificate", "Linearity", "certify", "default_prompts", "linearity", "monitored", "track", "write_json"]
