"""Where few bits hurt, as a run holds it: a group for each measurement, which a newer one replaces.

They are written after the run, by ``osp-diag advise``; each says in its attributes of which setting, tokens
and weights it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import xarray as xr

from osp_diag.errors import StoreError
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run, open_run
from osp_diag.schema import LAYER_ERRORS, SENSITIVITY, SPARED_CHANNELS, STEP

if TYPE_CHECKING:
    from osp_diag.runs.writer import RunWriter

__all__ = ["measurement_of", "measurement_words", "run_writer", "store_measurements"]

_WORDS = {
    LAYER_ERRORS: "errors of few bits by layer",
    SENSITIVITY: "sensitivity to few bits",
    SPARED_CHANNELS: "curve of channels that stay in 16 bits",
}


def run_writer(path: str | os.PathLike[str]) -> RunWriter:
    """What adds to the run at ``path`` after it was written; a context manager.

    Raises
    ------
    StoreError : no run is there, or another process writes it
    """
    from osp_diag.runs.writer import RunWriter

    # The writer refuses a run of another identity; what may differ is when and how it was written.
    now = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "command": " ".join(sys.argv)}
    attributes = {str(name): value for name, value in open_run(path).attrs.items()}
    return RunWriter(path, attributes | now, resume=True)


def store_measurements(path: str | os.PathLike[str], measurements: Mapping[str, xr.Dataset]) -> None:
    """Put measurements (group → Dataset) into the run at ``path``, in place of what it has of them.

    Raises
    ------
    StoreError : no run is there, or another process writes it
    """
    with run_writer(path) as writer:
        for group, dataset in measurements.items():
            writer.replace_group(group, dataset)


def measurement_of(run: Run, group: str) -> xr.Dataset:
    """What a run holds of one measurement: :data:`~osp_diag.schema.LAYER_ERRORS`,
    :data:`~osp_diag.schema.SENSITIVITY` or :data:`~osp_diag.schema.SPARED_CHANNELS`.

    Raises
    ------
    StoreError : the run does not hold it
    """
    if group not in run.tree.children:
        raise StoreError(
            f"the run of {model_name(run.attrs)} holds no {_WORDS[group]}; measure with `osp-diag advise "
            "CHECKPOINT --run RUN`"
        )
    dataset: xr.Dataset = run[group].drop_vars(STEP, errors="ignore").load()
    return dataset


def measurement_words(dataset: xr.Dataset) -> str:
    """Of which setting, method, convention and tokens a measurement is, for captions and terminals."""
    attributes = dataset.attrs
    tokens = f"{int(attributes['tokens']):,} tokens ({attributes['token_source']})"
    return f"{attributes['setting']}, {attributes['method']}, convention {attributes['convention']}; {tokens}"
