"""The steering methods, a file each; what a method of another package is made of is here by name.

    class MyMethod(BaselineMethod):
        name, title, formula = "my-method", "my own", "`y + s b`"
        strengths = StrengthScale("1 does all that was fitted", span=(0.0, 4.0))
        tensors = {"shift": "Tdm"}

        def fit(self, problem, options): ...
        def law(self, steering, strength): return Addition(steering, strength)

An entry point of the group `mlx_lqr.methods` makes it a method of every command (registry.py).
"""

from mlx_lqr.methods.addition import Addition
from mlx_lqr.methods.baseline import Baseline, BaselineLaw, BaselineMethod
from mlx_lqr.methods.contrasted import Contrasted, contrasted
from mlx_lqr.methods.documentation import table
from mlx_lqr.methods.fitting import fit_baseline
from mlx_lqr.methods.law import AdjustableLaw
from mlx_lqr.methods.method import Method, Option, Paper, Problem, Shown, StrengthScale
from mlx_lqr.methods.registry import METHODS
from mlx_lqr.methods.steering import Steering, combine, law_of, load_steering

__all__ = [
    "METHODS",
    "Addition",
    "AdjustableLaw",
    "Baseline",
    "BaselineLaw",
    "BaselineMethod",
    "Contrasted",
    "Method",
    "Option",
    "Paper",
    "Problem",
    "Shown",
    "Steering",
    "StrengthScale",
    "combine",
    "contrasted",
    "fit_baseline",
    "law_of",
    "load_steering",
    "table",
]
