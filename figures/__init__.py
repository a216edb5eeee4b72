"""Pictures of runs. Each figure is one file: ``prepare`` makes the data, ``draw`` draws it on any backend.

>>> from osp_diag import figures
>>> figures.draw("depth_profile", "run.zarr", out="depth.pdf")      # doctest: +SKIP
>>> data = figures.draw("sink_map", run, backend="none")             # doctest: +SKIP

To add a figure, add a file with ``prepare(runs, **options) -> xarray.Dataset`` and
``draw(dataset, backend, *, style, width) -> Canvas`` to this package: it is found by its name. How it stands
in the report and in the gallery, it may say by what ``_placement.py`` offers.
Figures read runs only; they never touch a model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray as xr

    from osp_diag.figures.styles import Style
    from osp_diag.runs.run import Run

if __name__ != "osp_diag.figures":
    raise ImportError(
        f"{__file__} is osp_diag's own folder, seen because Python was started beside it; write "
        "osp_diag.figures for ours, or start Python elsewhere for the package that is called figures"
    )

__all__ = ["aliases", "draw", "names"]


def __dir__() -> list[str]:
    return sorted(__all__)


def names() -> list[str]:
    """The names of the figures."""
    from osp_diag.figures._registry import names

    return names()


def aliases() -> dict[str, str]:
    """Other names that figures go by: ``fig1`` to ``fig11`` and ``table2`` are the OSP paper's."""
    from osp_diag.figures._registry import aliases

    return dict(aliases())


def draw(
    name: str,
    runs: Run | str | Path | xr.Dataset | Sequence[Run | str | Path],
    *,
    out: str | os.PathLike[str] | None = None,
    backend: str | None = None,
    style: Style | str = "paper",
    width: str | None = None,
    **options: Any,
) -> Any:
    """Draw a figure from one run or several, or once more from its data.

    Parameters
    ----------
    name : a name of :func:`names`, or an alias
    runs : an open run, the path of one, or a sequence of either; or what the backend ``none`` gave for this
        figure (without options, which are in it already)
    out : file to write; .png, .pdf and .svg are drawn by matplotlib, .html (self-contained) by plotly
    backend : ``matplotlib`` (default without ``out``), ``plotly`` or ``none``
    style : a ``osp_diag.figures.styles.Style``, or the name of one
    width : ``one-column`` or ``two-column`` (the names in ``style.widths``); each figure has its default
    options : as the figure's ``prepare`` takes them; ``step`` is the run's last one by default

    Returns
    -------
    The matplotlib or plotly figure; from ``none`` the prepared ``xarray.Dataset``, whose attrs hold the
    caption.

    Raises
    ------
    UsageError : unknown figure, option, backend, style, width, suffix, or a folder that is not there
    StoreError : a run that does not hold what the figure draws
    """
    import xarray as xr

    from osp_diag.errors import UsageError
    from osp_diag.figures._registry import (
        canonical,
        check_options,
        check_prepared,
        default_width,
        figure_module,
    )
    from osp_diag.figures._runs import open_runs
    from osp_diag.figures.backend import backend_for, load_backend
    from osp_diag.figures.styles import load_style

    figure = figure_module(name)
    path = None if out is None else Path(out)
    library = load_backend(backend_for(path, backend))
    if path is not None and not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: the folder {path.parent} does not exist; make it first")
    look = load_style(style)
    column_width = width or default_width(name)
    if column_width not in look.widths:
        raise UsageError(
            f"the style {look.name} has no width {column_width!r}; it has {', '.join(look.widths)}"
        )
    if isinstance(runs, xr.Dataset):
        dataset = check_prepared(name, runs, options)
    else:
        check_options(name, figure.prepare, options)
        dataset = figure.prepare(open_runs(runs), **options)
        dataset.attrs["figure"] = canonical(name)
    canvas = figure.draw(dataset, library, style=look, width=column_width)
    canvas.caption(dataset.attrs["caption"])
    if path is not None:
        try:
            canvas.save(path, {"title": dataset.attrs["title"], "caption": dataset.attrs["caption"]})
        except OSError as problem:
            raise UsageError(
                f"cannot write {path}: {problem.strerror or problem}; write elsewhere or make room"
            ) from problem
    return canvas.finish(dataset)
