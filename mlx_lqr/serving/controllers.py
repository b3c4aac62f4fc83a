"""The controllers that a server has loaded, one a concept, and what a client's words about steering mean."""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lqr.backends.protocol import Runner
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.strength import BUDGETS, default_strength
from mlx_lqr.methods.steering import Steering, combine, in_conversation, load_steering
from mlx_lqr.runtime.arguments import Asked, asked_strength, parse_strength
from mlx_lqr.serving.failures import RequestError, unusable

MOST = 100
"""Controllers at once"""
KEPT = 64
"""Combinations that are kept, for the next request of the same"""
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ENDING = ".safetensors"
_ADVICE = 'such as {"dog": 2.0}, {"dog": "gentle"} or {"dog": "1.5x"}'

Wanted = Mapping[str, float | str | None]
"""By concept: a number, a budget or a multiple of the recommended strength, or None for the recommended one"""


@dataclass(frozen=True)
class Loaded:
    """A controller of one concept."""

    id: str
    steering: Steering
    default: float = 0.0
    """The strength at which the server steers by itself"""

    @property
    def concept(self) -> str:
        return self.steering.concepts[0]

    def entry(self) -> dict[str, Any]:
        """As clients see it."""
        calibration = self.steering.calibration[0] if self.steering.calibration else None
        return {
            "id": self.id,
            "object": "controller",
            "concepts": list(self.steering.concepts),
            "method": self.steering.method,
            "layers": list(self.steering.active_layers),
            "strength": self.steering.strength[0] if self.steering.strength is not None else None,
            "budgets": {name: calibration.strength[name] for name in BUDGETS} if calibration is not None else None,
            "default": self.default,
        }


class Controllers:
    """Controllers by id, for any number of threads. Those that clients make are kept in a folder.

    Args:
        model: which they have to be of.
        folder: where they are kept; it is made when the first one is.
    """

    def __init__(self, model: Runner, folder: Path) -> None:
        self._model, self._folder = model, folder
        self._lock = threading.RLock()
        self._loaded: dict[str, Loaded] = {}
        self._combined: dict[tuple[bool, tuple[str, ...]], Steering] = {}
        self._kept: set[str] = set()
        """Whose files in the folder are these controllers'; others may be another server's"""

    def all(self) -> list[Loaded]:
        with self._lock:
            return list(self._loaded.values())

    def get(self, id: str) -> Loaded:
        """Raises `RequestError` 404 where there is none."""
        with self._lock:
            if id not in self._loaded:
                raise RequestError(
                    404, f"there is no controller {id!r}: GET /v1/controllers lists them", code="not_found"
                )
            return self._loaded[id]

    def load_folder(self) -> list[str]:
        """Load what the folder holds; returns a line for each file that cannot be used."""
        notes = []
        for file in sorted(self._folder.glob(f"*{_ENDING}")):
            try:
                id = check_id(file.name.removesuffix(_ENDING))
                self._add_new(id, load_steering(file))
                self._kept.add(id)
            except InputError as error:
                notes.append(f"{file} is left out: {error}")
        return notes

    def add_several(self, steering: Steering, strengths: Sequence[float]) -> None:
        """Add a file's concepts, each as a controller of its own that steers by itself at its strength.

        Raises:
            InputError: as `add` does, or there is one of this name already.
        """
        for one, strength in zip(steering.split(), strengths, strict=True):
            self._add_new(re.sub(r"[^A-Za-z0-9_-]+", "-", one.concepts[0])[:64], one, strength)

    def add(self, id: str, steering: Steering, *, default: float = 0.0, keep: bool = False) -> Loaded:
        """Add a controller, in place of the one with its id.

        Args:
            default: the strength at which the server steers by itself.
            keep: save it into the folder.

        Raises:
            InputError: it is of another model or of several concepts, or cannot be saved.
            RequestError: there are too many, another one is of the same concept, or the folder has a file of this id
                that is not this one's.
        """
        steering.check_model(self._model)
        if len(steering.concepts) != 1:
            raise InputError("a controller of several concepts: give the file of each concept alone")
        with self._lock:
            self.check_room(id, steering.concepts[0], keep=keep)
            if keep:
                self._save(id, steering)
            self._loaded[id] = Loaded(id, steering, default)
            self._combined.clear()
            return self._loaded[id]

    def check_room(self, id: str, concept: str, *, keep: bool) -> None:
        """Raise `RequestError` 409 where a controller of this concept cannot be added, and kept, under this id."""
        if keep and id not in self._kept and self._file(id).exists():
            raise _taken(id)
        others = [one for one in self.all() if one.id != id]
        if len(others) >= MOST:
            raise RequestError(409, f"there are {MOST} controllers already: delete one first")
        for one in others:
            if one.concept == concept:
                raise RequestError(409, f"the controller {one.id!r} is for {concept!r} already: delete it first")

    def _add_new(self, id: str, steering: Steering, default: float = 0.0) -> None:
        """Add a controller, in place of no other."""
        if any(one.id == id for one in self.all()):
            raise InputError(f"there is a controller {id!r} already: leave one of the two out")
        self.add(id, steering, default=default)

    def upload(self, id: str, content: bytes) -> Loaded:
        """Add the controller in a file's bytes, checked, and keep it.

        Raises:
            InputError: it is damaged, of another kind or of another model.
            RequestError: it cannot have this id, or see `add`.
        """
        check_id(id)
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / "controller.safetensors"
            file.write_bytes(content)
            try:
                steering = load_steering(file)
            except InputError as error:
                raise InputError(str(error).replace(str(file), "the file")) from None
        return self.add(id, steering, keep=True)

    def content(self, id: str) -> bytes:
        """A controller as the bytes of a file."""
        steering = self.get(id).steering
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / "controller.safetensors"
            steering.save(file)
            return file.read_bytes()

    def remove(self, id: str) -> None:
        """Forget a controller, and remove its file if it is in the folder."""
        with self._lock:
            self.get(id)
            del self._loaded[id]
            self._combined.clear()
            if id in self._kept:
                self._kept.remove(id)
                self._file(id).unlink(missing_ok=True)

    def named(self, concepts: str) -> Wanted:
        """What follows the @ in a model's name: concepts, each with a strength or without one: dog:2,ocean:gentle."""
        wanted: dict[str, float | str | None] = {}
        for part in concepts.split(","):
            concept, colon, strength = part.strip().rpartition(":")
            wanted[concept if colon else strength] = strength if colon else None
        return wanted

    def default(self) -> Wanted:
        """How the server steers by itself."""
        return {one.concept: one.default for one in self.all() if one.default}

    def strengths(self, wanted: Wanted) -> dict[str, float]:
        """The strength of each concept that is wanted.

        Raises:
            RequestError: an unknown concept, or a strength that means nothing for it.
        """
        by_concept = {one.concept: one.steering for one in self.all()}
        strengths = {}
        for concept, strength in wanted.items():
            if concept not in by_concept:
                known = ", ".join(by_concept) or "none at all"
                raise RequestError(400, f"no controller is for {concept!r}: there are {known}", param="steering")
            try:
                asked = parse_strength(strength, _ADVICE) if isinstance(strength, str) else strength
                strengths[concept] = _strength(by_concept[concept], asked)
            except InputError as error:
                raise unusable(error, "steering") from None
        return strengths

    def steering(self, wanted: Wanted, *, answered: bool = False) -> tuple[Steering | None, dict[str, float]]:
        """All that is wanted as one steering, and the strength of each of its concepts, in its order.

        Args:
            answered: whether the model has given an answer before, in the same conversation.

        Raises:
            RequestError: as `strengths` does, or controllers that cannot be combined.
        """
        strengths = self.strengths(wanted)
        if not strengths:
            return None, {}
        with self._lock:
            parts = [one for one in self._loaded.values() if one.concept in strengths]
            key = answered, tuple(one.id for one in parts)
            try:
                if key not in self._combined:
                    if len(self._combined) >= KEPT:
                        self._combined.clear()
                    together = combine([one.steering for one in parts])
                    self._combined[key] = in_conversation(together) if answered else together
                combined = self._combined[key]
            except InputError as error:
                raise unusable(error, "steering") from None
        return combined, {concept: strengths[concept] for concept in combined.concepts}

    def _save(self, id: str, steering: Steering) -> None:
        """Save it into the folder, in place of no file that another server has made there meanwhile."""
        file = self._file(id)
        file.parent.mkdir(parents=True, exist_ok=True)
        if id in self._kept:
            steering.save(file, force=True)
            return
        try:
            open(file, "xb").close()
        except FileExistsError:
            raise _taken(id) from None
        try:
            steering.save(file, force=True)
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        self._kept.add(id)

    def _file(self, id: str) -> Path:
        return self._folder / f"{check_id(id)}{_ENDING}"


def _taken(id: str) -> RequestError:
    return RequestError(409, f"the server's folder has a file for {id!r} that is not this one's: take another name")


def check_id(id: str) -> str:
    """The id, if it can be one.

    Raises:
        RequestError: it is not 1 to 64 letters, digits, - and _.
    """
    if not _ID.fullmatch(id):
        raise RequestError(
            400, f"a controller's name is 1 to 64 letters, digits, - and _, not {id[:80]!r}", param="name"
        )
    return id


def _strength(steering: Steering, asked: Asked | None) -> float:
    return default_strength(steering)[0] if asked is None else asked_strength(steering, asked)[0]
