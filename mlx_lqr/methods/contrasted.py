"""What most methods start from: the last-token activations of both sets, their contrast, and the layers to act at.

e_k = mean+_k - mean-_k are differences of mean last-token activations, as in lqr/contrast.py. What a block adds or
takes is measured at its output z_{k+1}: there the direction of block k is e_{k+1}.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_lqr.backends.protocol import Float32
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.contrast import Contrast, activations, contrast_of
from mlx_lqr.lqr.layers import SEPARATING, best_of, check_layers
from mlx_lqr.methods.method import DefaultLayers, Problem


@dataclass(frozen=True, eq=False)
class Contrasted:
    """Two sets of prompts, as a model of T blocks of width d sees them."""

    positive: Float32
    """(n, T + 1, d): z_0..z_T at the last token of each positive prompt"""
    negative: Float32
    """(m, T + 1, d)"""
    contrast: Contrast
    layers: tuple[int, ...]
    """Where to act"""

    @property
    def inputs(self) -> Float32:
        """e_k at every block's input: (T, d)"""
        return self.contrast.direction

    @property
    def outputs(self) -> Float32:
        """e_{k+1} at every block's output: (T, d)"""
        return np.vstack([self.contrast.direction[1:], self.contrast.output_direction[None]])

    @property
    def active(self) -> Float32:
        """1 at the layers to act at, 0 elsewhere: (T, 1)"""
        active = np.zeros((len(self.contrast.direction), 1), np.float32)
        active[list(self.layers)] = 1
        return active


def contrasted(problem: Problem, default: DefaultLayers, *, at_input: bool = False) -> Contrasted:
    """Run both sets through the model.

    Args:
        default: where the method acts if nothing is said.
        at_input: whether it measures at the blocks' inputs, so that layers="auto" is decided by what separates there.

    Raises:
        InputError: the activations do not tell the sets apart.
    """
    positive, negative = activations(problem.model, problem.positive, problem.negative, problem.progress)
    contrast = contrast_of(problem.model, positive, negative)
    if problem.on_contrast is not None:
        problem.on_contrast(contrast)
    return Contrasted(positive, negative, contrast, _layers(problem, default, contrast, at_input))


def _layers(problem: Problem, default: DefaultLayers, contrast: Contrast, at_input: bool) -> tuple[int, ...]:
    """Where to act. "auto" for a method of one layer is the one that separates the sets best."""
    T = problem.model.num_layers
    if isinstance(problem.layers, tuple):
        return problem.layers
    if problem.layers is None and default != "auto":
        return (T // 2,) if default == "middle" else check_layers("all", T)
    if contrast.held_out is None:
        raise InputError('layers "auto" compares the prompts of a set with one another: give more than one of each')
    separation = contrast.held_out[:-1] if at_input else contrast.held_out[1:]
    return (int(np.argmax(separation)),) if default == "middle" else best_of(separation, SEPARATING)
