"""Reading runs for figures: opening, choosing the step, and saying what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.errors import OspDiagError, StoreError, UsageError
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run, open_run
from osp_diag.runs.steps import at_step, step_of

__all__ = [
    "check_label",
    "identifier",
    "nothing_finite",
    "open_runs",
    "per_run",
    "snapshot",
    "snapshot_sites",
    "snapshot_step",
    "statistics",
    "token_label",
    "token_texts",
]


def open_runs(runs: Any) -> list[Run]:
    """One run or several, open or as paths, as a list of open runs."""
    if isinstance(runs, str | Path) or hasattr(runs, "at"):
        runs = [runs]
    if not isinstance(runs, Iterable) or isinstance(runs, Mapping):
        raise UsageError(
            f"a figure is drawn from runs (open ones or their paths), not from {type(runs).__name__}"
        )
    run_list = [open_run(run) if isinstance(run, str | Path) else run for run in runs]
    if not run_list:
        raise UsageError("a figure needs at least one run: give the path that `osp-diag probe --out` wrote")
    return run_list


def _reason_of_absence(run: Run, site: str) -> str:
    """The reason that the run itself gives for a site's absence."""
    reason = run.absent_sites.get(site)
    return f" ({reason})" if reason else ""


def statistics(
    run: Run, site: str, variables: Iterable[str], figure: str, step: int | None = None
) -> xr.Dataset:
    """Variables of a site at one step, loaded; a StoreError says how to get what is missing.

    Parameters
    ----------
    variables : names of estimator outputs that the figure cannot do without
    figure : the name of the figure, for the message
    """
    names = list(variables)
    try:
        dataset = run.at(site)
    except (OspDiagError, KeyError):
        raise StoreError(
            f"{figure} needs the site {site!r}, which the run of {model_name(run.attrs)} does not hold"
            f"{_reason_of_absence(run, site)}; if the model has it, probe again with it among --sites"
        ) from None
    missing = [name for name in names if name not in dataset]
    if missing:
        raise StoreError(
            f"{figure} needs {', '.join(missing)} at {site!r}, which the run of {model_name(run.attrs)} does "
            "not hold; probe again with the estimator among --estimators"
        )
    values = at_step(dataset[names], step_of(run, step)).load()
    if not any(np.isfinite(values[name].values).any() for name in names):
        raise StoreError(nothing_finite(run, f"{', '.join(names)} at {site!r}", figure))
    return values


def nothing_finite(run: Run, subject: str, figure: str) -> str:
    """Why there is nothing to draw of a model that gives NaN, or of a part of it that did not run."""
    return (
        f"{figure}: {subject} holds no finite number in the run of {model_name(run.attrs)}: its activations "
        "there are NaN or Inf (its summary says where that begins), or that part of the model did not run"
    )


def check_label(
    figure: str, source: str, dim: str, label: int | None, labels: Sequence[int] | np.ndarray
) -> None:
    """Refuse a layer or head that is not there; None stands for the figure's own choice.

    Parameters
    ----------
    figure, source : the name of the figure, and what it reads ("the snapshot of NAME"), for the message
    """
    if label is not None and label not in labels:
        raise UsageError(f"{figure}: {source} has no {dim} {label}; it has {', '.join(map(str, labels))}")


def identifier(values: xr.DataArray) -> str:
    """What an axis or a caption calls a statistic: its estimator, and its own name where that is another."""
    estimator = str(values.attrs.get("estimator", values.name))
    return estimator if estimator.startswith(str(values.name)) else f"{values.name} ({estimator})"


def snapshot(run: Run, site: str, figure: str) -> xr.DataArray:
    """The raw activations of the first sequence at a site: (layer, token, channel) or with heads."""
    try:
        activation = run.snapshot(site)["activation"].load()
    except (OspDiagError, KeyError):
        raise StoreError(
            f"{figure} draws raw activations, and the run of {model_name(run.attrs)} holds no snapshot of "
            f"{site!r}{_reason_of_absence(run, site)}; probe again and let it keep snapshots of that site"
        ) from None
    if not np.isfinite(activation.values).any():
        raise StoreError(nothing_finite(run, f"the snapshot of {site!r}", figure))
    return activation


def snapshot_step(run: Run) -> int:
    """The step of the raw activations: a run keeps those of its first probe."""
    step_of(run)  # refuses a run without any
    return int(run.steps[0])


def snapshot_sites(run: Run) -> list[str]:
    """The sites of which a run keeps raw activations."""
    group = run.tree.children.get("snapshot")
    nodes = () if group is None else group.subtree
    paths = [node.path.removeprefix("/snapshot/") for node in nodes if "activation" in node.data_vars]
    return [path.replace("/", ":", 1) for path in paths]


def token_texts(run: Run, count: int) -> list[str]:
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


def token_label(text: str, longest: int = 12) -> str:
    """A token's text for an axis: blanks made visible where nothing else is there, long ones cut."""
    plain = text.replace("\u0120", " ").replace("\u2581", " ")
    label = plain.strip() or repr(plain)[1:-1].replace(" ", "\u2423") or "''"
    return label if len(label) <= longest else label[: longest - 1] + "\u2026"
