"""What all laws share: arrays that a backend places once, and a strength that may be set again between two tokens.

A law is written once for every backend, as an expression in `@ * + - > **` and slices, which NumPy, MLX and torch
arrays share. A backend places the arrays (`place`) and calls the law with each block's input and output.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_lqr.backends.protocol import AddProduct, Affine, Array, Renew, Site
from mlx_lqr.errors import InputError
from mlx_lqr.methods.method import StrengthScale

if TYPE_CHECKING:
    from typing_extensions import Self

_CALLED = {"__call__", "_steered", "_error"}
"""What a call goes through"""


class AdjustableLaw:
    """A law (see `Law`) that acts at some layers with constant arrays and one array a layer that follows the strength.

    A subclass says what these arrays are and how a layer's output is changed with them. No other number may enter the
    call: a backend that records its operations replays them with the arrays of another law of the same class.

    Strength 0 means not steered, for every law: at strength 0 of all concepts a call returns the output unchanged, and
    a concept at strength 0 counts as absent. A law need not come near that as the strength goes to 0: feedback that
    aims at offset_k + s mu_k takes the feature to offset_k for any small s.

    Args:
        layers: where the law acts.
        concepts: how many concepts there are.
        strength: one number for all of them, or one for each. It may be set again at any time, also between two tokens.
        scale: the method's, which says from where on a strength is of no use.
    """

    site: Site = "block"

    def __init__(
        self, layers: Sequence[int], concepts: int, strength: float | Sequence[float], scale: StrengthScale
    ) -> None:
        self.layers: Sequence[int] = tuple(layers)
        self._scale = scale
        self.replayable = True
        self._array: Callable[[np.ndarray], Array] = np.asarray
        self._add_product: AddProduct = lambda c, a, b: c + a @ b
        self._renew: Renew = lambda _, values: values
        self._concepts = concepts
        self._affine_at: tuple[float, ...] | None = None
        self._affines: dict[int, Affine] = {}
        self._shared = [self._checked(strength)]
        """The strength, in a list that this law and those placed from it have in common."""
        self._arrange()

    def to(self, array: Callable[[np.ndarray], Array], add_product: AddProduct, *, renew: Renew | None = None) -> Self:
        placed = copy(self)
        placed._array, placed._add_product = array, add_product
        placed._renew = renew or (lambda _, values: array(values))
        placed._arrange()
        return placed

    @property
    def strength(self) -> tuple[float, ...]:
        return self._shared[0]

    @strength.setter
    def strength(self, value: float | Sequence[float]) -> None:
        self._shared[0] = self._checked(value)

    @property
    def acts(self) -> bool:
        """Whether anything is steered: False where every strength is 0."""
        return any(self._shared[0])

    def _checked(self, strength: float | Sequence[float]) -> tuple[float, ...]:
        numbers = check_strength(strength, self._concepts)
        largest = max(numbers, key=abs)
        if abs(largest) > self._scale.beyond:
            warnings.warn(f"strength {largest:g} is beyond any use: {self._scale.warning(largest)}", stacklevel=1)
        return numbers

    def aim(self) -> None:
        """Take over a strength that has been set since the last call."""
        if self._aimed_at is self._shared[0]:
            return
        targets = self._targets()
        for k in self.layers:
            self._target[k] = self._renew(self._target[k], targets[k])

    def __call__(self, layer: int, z: Array, output: Array) -> Array:
        if not self.acts:
            return output
        self.aim()
        return self._steered(layer, z, output)

    def affine(self) -> Mapping[int, Affine] | None:
        """See `AffineLaw`. None too of a subclass that changes what a call does, and not `_affine` with it."""
        if not self._is_affine():
            return None
        strength = self._shared[0]
        if self._affine_at is not strength:
            with np.errstate(over="ignore"):  # what overflows is reported by whoever decodes
                aimed = self._aimed(np.asarray(strength, np.float32)) if any(strength) else {}
                layers = self.layers if any(strength) else ()
                self._affines = {k: self._affine(k, np.asarray(aimed[k], np.float32)) for k in layers}
            self._affine_at = strength
        return self._affines

    def _affine(self, layer: int, aimed: np.ndarray) -> Affine:
        """What `_steered` does, of laws that are affine; `aimed` is this layer's array of `_aimed`."""
        raise NotImplementedError

    def _is_affine(self) -> bool:
        """Whether the class that says how a call steers also says it by `_affine`."""
        for kind in type(self).__mro__:
            if "_affine" in vars(kind):
                return kind is not AdjustableLaw
            if _CALLED & vars(kind).keys():
                return False
        return False

    def _steered(self, layer: int, z: Array, output: Array) -> Array:
        """output + u_k, with the arrays as `aim` has left them."""
        raise NotImplementedError

    def _fixed(self, layer: int) -> tuple[np.ndarray, ...]:
        """The constant arrays of a layer."""
        raise NotImplementedError

    def _aimed(self, strength: np.ndarray) -> Any:
        """The array of every layer, by its number, for a strength (m,) in float32."""
        raise NotImplementedError

    def _arrange(self) -> None:
        """Hand every layer's arrays to the constructor once, so that a call slices and converts nothing."""
        self._constant = {k: tuple(self._array(part) for part in self._fixed(k)) for k in self.layers}
        targets = self._targets()
        self._target: dict[int, Array] = {k: self._array(targets[k]) for k in self.layers}

    def _targets(self) -> Any:
        self._aimed_at = self._shared[0]
        with np.errstate(over="ignore"):  # what overflows is reported by whoever decodes
            return self._aimed(np.asarray(self._aimed_at, np.float32))


def check_strength(value: float | Sequence[float], concepts: int) -> tuple[float, ...]:
    """`value` as one finite number per concept.

    Raises:
        InputError: not a number, not finite, or another count than the controller's concepts.
    """
    try:
        numbers = np.atleast_1d(np.asarray(value, dtype=np.float64))
    except (TypeError, ValueError):
        raise InputError(f"strength must be a number, not {value!r}") from None
    if not np.all(np.isfinite(numbers)):
        raise InputError(f"strength must be a finite number, not {value!r}")
    if numbers.ndim != 1 or numbers.size not in (1, concepts):
        raise InputError(f"{numbers.size} strengths for {concepts} concepts: give one for all, or one for each")
    return tuple(float(x) + 0.0 for x in np.broadcast_to(numbers, (concepts,)))  # which takes the sign off zero
