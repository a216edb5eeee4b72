"""Figures are found, not registered: every public module of this package is one."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from functools import cache
from types import UnionType
from typing import Any, Protocol, Union, get_args, get_origin, get_type_hints

import xarray as xr

from osp_diag import figures
from osp_diag.errors import UsageError
from osp_diag.figures.backend import Backend, Canvas
from osp_diag.figures.styles import Style
from osp_diag.wording import did_you_mean

__all__ = [
    "FigureModule",
    "aliases",
    "canonical",
    "check_options",
    "check_prepared",
    "figure_module",
    "names",
]


class FigureModule(Protocol):
    """What a file of this package offers to be a figure; ``ALIASES`` may be left out."""

    ALIASES: tuple[str, ...]
    prepare: Callable[..., xr.Dataset]

    def draw(self, dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
        """Draw what ``prepare`` returned."""


def names() -> list[str]:
    """The figures there are: one file each."""
    return sorted(
        module.name
        for module in pkgutil.iter_modules(figures.__path__)
        if not module.ispkg and not module.name.startswith("_")
    )


@cache
def aliases() -> dict[str, str]:
    """Other names of figures, such as their number in the OSP paper."""
    return {
        alias: name
        for name in names()
        for alias in getattr(importlib.import_module(f"{figures.__name__}.{name}"), "ALIASES", ())
    }


def canonical(name: str) -> str:
    """The name of a figure from its name or alias."""
    return aliases().get(name, name)


def figure_module(name: str) -> Any:
    """The module of a figure by its name or alias; an unknown one is answered with the nearest names."""
    found = canonical(name)
    if found not in names():
        hint = did_you_mean(name, [*names(), *aliases()], "`osp-diag figure --help` lists them")
        raise UsageError(f"no figure is named {name!r}; {hint}")
    return importlib.import_module(f"{figures.__name__}.{found}")


def check_options(name: str, prepare: Callable[..., xr.Dataset], options: dict[str, Any]) -> None:
    """Refuse an option that the figure does not have, before any data is read."""
    known = [parameter for parameter in inspect.signature(prepare).parameters if parameter != "runs"]
    hints = get_type_hints(prepare)
    for option, value in options.items():
        if option not in known:
            raise UsageError(f"the figure {name} has no option {option!r}; {did_you_mean(option, known)}")
        if not _fits(value, hints[option]):
            raise UsageError(f"the figure {name} takes for {option} {_said(hints[option])}, not {value!r}")


def check_prepared(name: str, dataset: xr.Dataset, options: dict[str, Any]) -> xr.Dataset:
    """Refuse data of another figure, and options, which come too late for data that are prepared."""
    made_for = dataset.attrs.get("figure")
    if made_for != canonical(name):
        whose = f"for {made_for}" if made_for else "by the backend `none`"
        told = "was prepared" if made_for else "was not prepared"
        raise UsageError(f"the figure {name} cannot be drawn from this Dataset, which {told} {whose}")
    if options:
        raise UsageError(
            f"the figure {name} is drawn from data that are prepared already, so {', '.join(options)} cannot "
            "be chosen any more; give them with the runs"
        )
    return dataset


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the annotated type; a whole number will do where a real one is asked for."""
    for member in _members(hint):
        kind = get_origin(member) or member
        if isinstance(value, bool) and kind is not bool:
            continue
        if isinstance(value, (int, float) if kind is float else kind) and not (
            isinstance(value, str) and kind is Sequence
        ):
            return True
    return False


def _said(hint: Any) -> str:
    words = {
        int: "a whole number",
        float: "a number",
        str: "a word",
        type(None): "none",
        Sequence: "several",
    }
    return " or ".join(words.get(get_origin(member) or member, str(member)) for member in _members(hint))
