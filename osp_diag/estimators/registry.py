"""Finding estimators by name. A new one needs one new file in this package, and nothing else.

Every module of the package is looked through, and every entry point of the group
``osp_diag.estimators`` that another installed package declares (an Estimator class, or a module that
defines some).
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import fields, is_dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib.metadata import entry_points
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np

from osp_diag.errors import EstimatorError
from osp_diag.estimators.base import Estimator, Layout, Observes, Output, Suite
from osp_diag.schema import GRADIENT
from osp_diag.wording import did_you_mean

__all__ = [
    "all_estimators",
    "applies_to",
    "default_estimators",
    "describe_outputs",
    "estimator_parameters",
    "estimators_named",
    "get_estimator",
]

ENTRY_POINT_GROUP = "osp_diag.estimators"


def _estimator_classes(module: ModuleType) -> list[type[Estimator]]:
    return [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Estimator)
        and not inspect.isabstract(value)
        and value.__module__ == module.__name__
    ]


def _entry_point_classes() -> list[type[Estimator]]:
    classes: list[type[Estimator]] = []
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            target = point.load()
        except Exception as error:
            raise EstimatorError(
                f"the entry point {point.name!r} of {ENTRY_POINT_GROUP} ({point.value}) cannot be loaded: "
                f"{error}; fix or uninstall the package that declares it"
            ) from error
        if inspect.ismodule(target):
            classes += _estimator_classes(target)
        elif inspect.isclass(target) and issubclass(target, Estimator):
            classes.append(target)
        else:
            raise EstimatorError(
                f"the entry point {point.name!r} of {ENTRY_POINT_GROUP} ({point.value}) is neither an "
                "Estimator class nor a module; fix or uninstall the package that declares it"
            )
    return classes


@lru_cache(maxsize=1)
def all_estimators() -> MappingProxyType[str, type[Estimator]]:
    """Every estimator class by its identifier, ``name/version``, in order of module and definition."""
    package = importlib.import_module("osp_diag.estimators")
    classes: list[type[Estimator]] = []
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name):
        classes += _estimator_classes(importlib.import_module(f"{package.__name__}.{info.name}"))
    by_identifier: dict[str, type[Estimator]] = {}
    for cls in classes + _entry_point_classes():
        identifier = f"{cls.name}/{cls.version}"
        other = by_identifier.setdefault(identifier, cls)
        if other is not cls:
            raise EstimatorError(
                f"{identifier} is defined twice, in {other.__module__} and {cls.__module__}: "
                "rename one, or raise its version"
            )
    return MappingProxyType(by_identifier)


def _find(name: str) -> type[Estimator]:
    by_identifier = all_estimators()
    if name in by_identifier:
        return by_identifier[name]
    versions = [cls for cls in by_identifier.values() if cls.name == name]
    if versions:
        return max(versions, key=lambda cls: cls.version)
    family = [cls.name for cls in by_identifier.values() if name and cls.family == name]
    if family:
        raise EstimatorError(f"{name!r} is a family of estimators; name one of {', '.join(family)}")
    names = sorted(by_identifier) if "/" in name else sorted({cls.name for cls in by_identifier.values()})
    hint = did_you_mean(name, names, "`osp-diag estimators` lists all")
    raise EstimatorError(f"no estimator is named {name!r}; {hint}")


def estimator_parameters(cls: type[Estimator]) -> dict[str, Any]:
    """The parameters of an estimator and their published defaults."""
    return {field.name: field.default for field in fields(cls)} if is_dataclass(cls) else {}


def get_estimator(name: str, **parameters: Any) -> Estimator:
    """An estimator by ``name`` (its highest version) or ``name/version``, with parameters.

    Raises :class:`~osp_diag.errors.EstimatorError` with the nearest names if there is none, or with
    the parameters that exist if one doesn't.
    """
    cls = _find(name)
    defaults = estimator_parameters(cls)
    unknown = sorted(set(parameters) - set(defaults))
    if unknown:
        takes = f"it takes {', '.join(defaults)}" if defaults else "it takes none"
        raise EstimatorError(f"estimator {cls.name!r} has no parameter {', '.join(unknown)}; {takes}")
    return cls(**parameters)


def estimators_named(name: str) -> tuple[Estimator, ...]:
    """The estimator of a name, or those of a family, whatever they observe: ``block_lens`` is several.

    Raises
    ------
    EstimatorError : as :func:`get_estimator`
    """
    family = tuple(e for e in default_estimators(optional=True) if name and e.family == name)
    return family or (get_estimator(name),)


def applies_to(estimator: Estimator | type[Estimator], site: str) -> bool:
    """Whether the definition is meant for the site (patterns as in a shell).

    Gradients of a site are meant by patterns that name them, never by ``*``: they are no activations.
    """
    patterns = [p for p in estimator.sites if p.startswith(GRADIENT) or not site.startswith(GRADIENT)]
    return any(fnmatchcase(site, pattern) for pattern in patterns)


def default_estimators(
    *, observes: Observes | None = None, site: str | None = None, optional: bool = False
) -> tuple[Estimator, ...]:
    """Estimators with default parameters: those that observe such things, at such a site.

    Optional ones (costly, or controls) only with ``optional=True``; of several versions, the highest.
    """
    classes = {cls.name: _find(cls.name) for cls in all_estimators().values()}
    return tuple(
        cls()
        for cls in classes.values()
        if (observes is None or cls.observes == observes)
        and (site is None or applies_to(cls, site))
        and (optional or not cls.optional)
    )


def describe_outputs(estimator: Estimator) -> dict[str, Output]:
    """Names, dimensions, units and definitions of what an estimator writes (values are of no data)."""
    layout = Layout(
        channels=64,
        heads=4,
        key_value_heads=2,
        head_channels=16,
        tokens=8,
        vocabulary=32,
        output_channels=16,
        experts=2,
    )
    state = Suite((estimator,)).init(layout, np.zeros(()))
    return estimator.finalise(state, layout)
