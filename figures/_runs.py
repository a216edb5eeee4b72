"""Reading runs for figures: opening, choosing the step, and saying what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.errors import OspDiagError, StoreError, UsageError
from osp_diag.runs.naming import model_name
from osp_diag.runs.steps import at_step, step_of

__all__ = [
    "identifier",
    "nothing_finite",
    "opened",
    "per_run",
    "shown_token",
    "snapshot",
    "snapshot_sites",
    "snapshot_step",
    "statistics",
    "token_texts",
]


def opened(runs: Any) -> list[Any]:
    """One run or several, open or as paths, as a list of open runs."""
    if isinstance(runs, str | Path) or hasattr(runs, "at"):
        runs = [runs]
    if not isinstance(runs, Iterable) or isinstance(runs, Mapping):
        raise UsageError(
            f"a figure is drawn from runs (open ones or their paths), not from {type(runs).__name__}"
        )
    found = [_open(run) if isinstance(run, str | Path) else run for run in runs]
    if not found:
        raise UsageError("a figure needs at least one run: give the path that `osp-diag probe --out` wrote")
    return found


def _open(path: str | Path) -> Any:
    from osp_diag.runs.run import open_run

    return open_run(path)


def _why(run: Any, site: str) -> str:
    """The reason that the run itself gives for a site's absence."""
    reason = run.absent_sites.get(site)
    return f" ({reason})" if reason else ""


def statistics(
    run: Any, site: str, variables: Iterable[str], figure: str, step: int | None = None
) -> xr.Dataset:
    """Variables of a site at one step, loaded; a StoreError says how to get what is missing.

    Parameters
    ----------
    variables : names of estimator outputs that the figure cannot do without
    figure : the name of the figure, for the message
    """
    wanted = list(variables)
    try:
        dataset = run.at(site)
    except (OspDiagError, KeyError):
        raise StoreError(
            f"{figure} needs the site {site!r}, which the run of {model_name(run.attrs)} does not hold"
            f"{_why(run, site)}; if the model has it, probe again with it among --sites"
        ) from None
    missing = [name for name in wanted if name not in dataset]
    if missing:
        raise StoreError(
            f"{figure} needs {', '.join(missing)} at {site!r}, which the run of {model_name(run.attrs)} does "
            "not hold; probe again with the estimator among --estimators"
        )
    at_one = at_step(dataset[wanted], step_of(run, step)).load()
    if not any(np.isfinite(at_one[name].values).any() for name in wanted):
        raise StoreError(nothing_finite(run, f"{', '.join(wanted)} at {site!r}", figure))
    return at_one


def nothing_finite(run: Any, what: str, figure: str) -> str:
    """Why there is nothing to draw of a model that gives NaN, or of a part of it that did not run."""
    return (
        f"{figure}: {what} holds no finite number in the run of {model_name(run.attrs)}: its activations "
        "there are NaN or Inf (its summary says where that begins), or that part of the model did not run"
    )


def identifier(values: xr.DataArray) -> str:
    """What an axis or a caption calls a statistic: its estimator, and its own name where that is another."""
    estimator = str(values.attrs.get("estimator", values.name))
    return estimator if estimator.startswith(str(values.name)) else f"{values.name} ({estimator})"


def snapshot(run: Any, site: str, figure: str) -> xr.DataArray:
    """The raw activations of the first sequence at a site: (layer, token, channel) or with heads."""
    try:
        activation = run.snapshot(site)["activation"].load()
    except (OspDiagError, KeyError):
        raise StoreError(
            f"{figure} draws raw activations, and the run of {model_name(run.attrs)} holds no snapshot of "
            f"{site!r}{_why(run, site)}; probe again and let it keep snapshots of that site"
        ) from None
    if not np.isfinite(activation.values).any():
        raise StoreError(nothing_finite(run, f"the snapshot of {site!r}", figure))
    return activation


def snapshot_step(run: Any) -> int:
    """The step of the raw activations: a run keeps those of its first probe."""
    step_of(run)  # refuses a run without any
    return int(run.steps[0])


def snapshot_sites(run: Any) -> list[str]:
    """The sites of which a run keeps raw activations."""
    kept = run.tree.children.get("snapshot")
    nodes = () if kept is None else kept.subtree
    paths = [node.path.removeprefix("/snapshot/") for node in nodes if "activation" in node.data_vars]
    return [path.replace("/", ":", 1) for path in paths]


def token_texts(run: Any, count: int) -> list[str]:
    """The text of the first tokens of the snapshot, or their positions where no text was kept."""
    try:
        texts = [str(text) for text in run["snapshot"]["token_text"].values[:count]]
    except (OspDiagError, KeyError, TypeError):
        texts = []
    return texts + [str(position) for position in range(len(texts), count)]


def per_run(parts: list[xr.Dataset], labels: list[str]) -> xr.Dataset:
    """Datasets of several runs side by side on a new dimension ``run``, the smaller ones padded with NaN."""
    return xr.concat(
        [part.drop_vars("step", errors="ignore") for part in parts],
        dim=xr.DataArray(labels, dims="run", name="run"),
        join="outer",
        combine_attrs="override",
        data_vars="all",
        coords="minimal",
        compat="override",
    )


def shown_token(text: str, longest: int = 12) -> str:
    """A token's text for an axis: blanks made visible where nothing else is there, long ones cut."""
    plain = text.replace("\u0120", " ").replace("\u2581", " ")
    shown = plain.strip() or repr(plain)[1:-1].replace(" ", "\u2423") or "''"
    return shown if len(shown) <= longest else shown[: longest - 1] + "\u2026"
