"""Figures are found, not registered: every public module of this package is one.

What it says of itself (other names, its width, its place in the report and in the gallery) stands in it, too:
docs/decisions.md, Figures.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

import xarray as xr

from osp_diag import figures
from osp_diag.errors import UsageError
from osp_diag.figures._placement import InGallery, InReport
from osp_diag.figures.backend import Backend, Canvas
from osp_diag.figures.styles import Style
from osp_diag.wording import did_you_mean

__all__ = [
    "FigureModule",
    "Summary",
    "aliases",
    "canonical",
    "check_options",
    "check_prepared",
    "default_width",
    "figure_module",
    "in_gallery",
    "in_report",
    "names",
    "summaries",
]

_Placement = TypeVar("_Placement", InReport, InGallery)


class FigureModule(Protocol):
    """What a file of this package offers to be a figure; all but the two functions may be left out."""

    ALIASES: tuple[str, ...]
    WIDTH: str
    REPORT: InReport
    GALLERY: InGallery
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
    figure = canonical(name)
    if figure not in names():
        hint = did_you_mean(name, [*names(), *aliases()], "`osp-diag figure --help` lists them")
        raise UsageError(f"no figure is named {name!r}; {hint}")
    return importlib.import_module(f"{figures.__name__}.{figure}")


def default_width(name: str) -> str:
    """The width that a figure takes unless another is asked for."""
    return str(getattr(figure_module(name), "WIDTH", "two-column"))


def in_report(name: str) -> InReport:
    """How a figure stands in the report; the end of it for one that says nothing."""
    return _placement_of(name, "REPORT", InReport)


def in_gallery(name: str) -> InGallery:
    """How a figure stands in the gallery; the end of it, drawn of made-up runs, for one that says nothing."""
    return _placement_of(name, "GALLERY", InGallery)


def _placement_of(name: str, constant: str, kind: type[_Placement]) -> _Placement:
    placement = getattr(figure_module(name), constant, None)
    if placement is None:
        return kind()
    if not isinstance(placement, kind):
        raise UsageError(
            f"the figure {name}: {constant} is an {kind.__name__} of osp_diag.figures._placement, not "
            f"{placement!r}"
        )
    return placement


class Summary(NamedTuple):
    """What the help says of a figure: the first line of its file, and its other names."""

    line: str
    aliases: tuple[str, ...]


def summaries() -> dict[str, Summary]:
    """Figures by name, for the help.

    The files are parsed, not imported: a help text waits for no array library.
    """
    return {name: _summary(name) for name in names()}


def _summary(name: str) -> Summary:
    tree = ast.parse(_source(name))
    line = (ast.get_docstring(tree) or "").partition("\n")[0].rstrip(".")
    others: tuple[str, ...] = ()
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="ALIASES")], value=value):
                others = ast.literal_eval(value)
    return Summary(line, others)


def _source(name: str) -> str:
    """The text of a figure's file."""
    for folder in figures.__path__:
        path = Path(folder, f"{name}.py")
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise UsageError(f"no figure is named {name!r}")


def check_options(name: str, prepare: Callable[..., xr.Dataset], options: dict[str, Any]) -> None:
    """Refuse an option that the figure does not have, before any data is read."""
    parameters = [parameter for parameter in inspect.signature(prepare).parameters if parameter != "runs"]
    hints = get_type_hints(prepare)
    for option, value in options.items():
        if option not in parameters:
            raise UsageError(
                f"the figure {name} has no option {option!r}; {did_you_mean(option, parameters)}"
            )
        if not _fits(value, hints[option]):
            raise UsageError(
                f"the figure {name} takes for {option} {_in_words(hints[option])}, not {value!r}"
            )


def check_prepared(name: str, dataset: xr.Dataset, options: dict[str, Any]) -> xr.Dataset:
    """Refuse data of another figure, and options, which come too late for data that are prepared."""
    owner = dataset.attrs.get("figure")
    if owner != canonical(name):
        origin = f"was prepared for {owner}" if owner else "was not prepared by the backend `none`"
        raise UsageError(f"the figure {name} cannot be drawn from this Dataset, which {origin}")
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


def _in_words(hint: Any) -> str:
    words = {
        int: "a whole number",
        float: "a number",
        str: "a word",
        type(None): "none",
        Sequence: "several",
    }
    return " or ".join(words.get(get_origin(member) or member, str(member)) for member in _members(hint))
