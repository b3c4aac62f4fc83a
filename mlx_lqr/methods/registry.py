"""The list of steering methods: one line each, and whatever other packages add.

A package adds a method by an entry point of the group `mlx_lqr.methods` in its pyproject.toml:

    [project.entry-points."mlx_lqr.methods"]
    my-method = "my_package.my_module:MyMethod"

A method's file is imported when the method is asked for, other packages are asked when methods are listed or a name is
not one of ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module, metadata
from inspect import get_annotations
from typing import Any

from mlx_lqr.errors import InputError, first_line
from mlx_lqr.methods.method import Method

GROUP = "mlx_lqr.methods"

OWN = {
    "alqr": "mlx_lqr.methods.alqr:ALQR",
    "actadd": "mlx_lqr.methods.actadd:ActAdd",
    "proportional": "mlx_lqr.methods.proportional:Proportional",
    "ablation": "mlx_lqr.methods.ablation:Ablation",
    "spid": "mlx_lqr.methods.spid:SPID",
    "mean-act": "mlx_lqr.methods.mean_act:MeanAcT",
    "linear-act": "mlx_lqr.methods.linear_act:LinearAcT",
    "pid-act": "mlx_lqr.methods.pid_act:PIDAcT",
    "iti": "mlx_lqr.methods.iti:ITI",
    "odesteer": "mlx_lqr.methods.odesteer:ODESteer",
    "angular": "mlx_lqr.methods.angular:Angular",
    "adaptive-angular": "mlx_lqr.methods.angular:AdaptiveAngular",
    "pca": "mlx_lqr.methods.pca:PCA",
}
READ = {"control-vector": "mlx_lqr.methods.control_vector:ControlVector"}
"""What files of other programs steer by. They are not fitted here, so that no list of methods to fit has them."""


class UnknownMethodError(InputError, KeyError):
    """There is no method of this name."""

    __str__ = Exception.__str__  # a KeyError would put the message in quotation marks


class Methods(Mapping[str, Method[Any]]):
    """Name -> method. A loop goes over those that can be fitted; those that are only read are there by their names."""

    def __init__(self, own: Mapping[str, str], read: Mapping[str, str]) -> None:
        self._own = own
        self._builtin = {**own, **read}
        self._loaded: dict[str, Method[Any]] = {}
        self._others: dict[str, metadata.EntryPoint] | None = None

    def __getitem__(self, name: str) -> Method[Any]:
        if name not in self._loaded:
            if name in self._builtin:
                module, _, attribute = self._builtin[name].partition(":")
                self._loaded[name] = _registered(name, getattr(import_module(module), attribute), "mlx-lqr")
            elif name in self._plugins():
                self._loaded[name] = _load(self._plugins()[name])
            else:
                raise UnknownMethodError(f"there is no method {name!r}: choose one of {', '.join(self)}")
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from self._plugins()

    def __len__(self) -> int:
        return len(self._own) + len(self._plugins())

    def _plugins(self) -> Mapping[str, metadata.EntryPoint]:
        """The methods of other packages, none of which is imported yet.

        Raises:
            InputError: two methods of one name.
        """
        if self._others is None:
            others: dict[str, metadata.EntryPoint] = {}
            for entry in metadata.entry_points(group=GROUP):
                if entry.name in self._builtin or entry.name in others:
                    owner = "mlx-lqr" if entry.name in self._builtin else _package(others[entry.name])
                    raise InputError(
                        f"{_package(entry)} adds a method {entry.name!r}, which {owner} has already: uninstall "
                        f"{_package(entry)}, or rename its method"
                    )
                others[entry.name] = entry
            self._others = others
        return self._others


METHODS = Methods(OWN, READ)
"""Every method by name, A-LQR first."""


def _package(entry: metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value.partition(".")[0]


def _load(entry: metadata.EntryPoint) -> Method[Any]:
    package = _package(entry)
    try:
        kind = entry.load()
    except Exception as error:
        raise InputError(
            f"the method {entry.name!r} of the package {package} cannot be loaded ({first_line(error)}): update "
            f"{package}, or uninstall it"
        ) from error
    return _registered(entry.name, kind, package)


def _registered(name: str, kind: Any, package: str) -> Method[Any]:
    """An instance of a method's class.

    Raises:
        InputError: no method, one without what a method must have, or one that calls itself something else.
    """
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise InputError(f"the method {name!r} of the package {package} is not a subclass of mlx_lqr.methods.Method")
    declared = [name for base in kind.__mro__ if issubclass(base, Method) for name in get_annotations(base)]
    lacking = sorted(kind.__abstractmethods__) + [name for name in declared if not hasattr(kind, name)]
    if lacking:
        raise InputError(f"the method {name!r} of the package {package} does not define {', '.join(lacking)}")
    if kind.name != name:
        raise InputError(f"the method {name!r} of the package {package} calls itself {kind.name!r}")
    method: Method[Any] = kind()
    return method
