"""Where a run may be written, and writing one that was measured in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xarray as xr

from osp_diag.errors import UsageError
from osp_diag.runs.replacing import replacement
from osp_diag.runs.writer import RunWriter, check_destination
from osp_diag.wording import did_you_mean, nearest

__all__ = ["check_out", "write_run"]

SUFFIX = ".zarr"


def check_out(out: str | Path, *, overwrite: bool = False, resume: bool = False) -> None:
    """Refuse, before long work, a path that a run of checkpoints cannot go to.

    Raises
    ------
    UsageError : it does not end in .zarr, or its directory is not there
    StoreError : something is there already, or nothing can be written there
    """
    path = Path(out)
    if path.suffix != SUFFIX:
        raise UsageError(f"a run is a folder ending in {SUFFIX}; write {path}{SUFFIX} in place of {path}")
    parent = path.absolute().parent
    if not parent.exists():
        raise UsageError(
            f"cannot write a run to {path}: there is no directory {path.parent}{_did_you_mean(parent)}"
        )
    check_destination(path, overwrite=overwrite, resume=resume)


def _did_you_mean(folder: Path) -> str:
    names = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
    if nearest(folder.name, names):
        return f"; {did_you_mean(folder.name, names)}"
    return f"; make it first (mkdir -p {folder})"


def write_run(
    path: Path,
    steps: Sequence[tuple[int, Mapping[str, xr.Dataset]]],
    static: Mapping[str, xr.Dataset],
    attributes: Mapping[str, Any],
    series: Mapping[str, Mapping[int, float]],
    *,
    logged: Mapping[str, Mapping[int, xr.Dataset]] | None = None,
    overwrite: bool = False,
) -> None:
    """Write at once what was measured: beside its place, then in its place, whole.

    Whatever kills the process, a run that was to be replaced is there until the new one is.

    Raises
    ------
    StoreError : it cannot be written; what was there is as it was
    """
    with replacement(path, overwrite=overwrite) as beside, RunWriter(beside, attributes) as writer:
        for step, groups in steps:
            writer.append(step, groups, partial=True)
        arrays = logged or {}
        for step in sorted({step for values in (*series.values(), *arrays.values()) for step in values}):
            writer.append_series(step, {name: v[step] for name, v in series.items() if step in v})
            writer.append_logged(step, {name: v[step] for name, v in arrays.items() if step in v})
        for group, dataset in static.items():
            writer.write_static(group, dataset)
