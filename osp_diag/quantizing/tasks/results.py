"""Accuracy on tasks, as a run holds it: a table in the group ``tasks``.

A row is one task under one setting. Rows are added to a run after it was written, by ``osp-diag tasks``; what
is measured again takes the place of the earlier row, and all rows of a run are of one set of weights.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.errors import StoreError
from osp_diag.quantizing.setting import UNQUANTIZED, Setting
from osp_diag.quantizing.tasks.groups import GROUPS, Group, Mean, group_mean
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run, open_run
from osp_diag.schema import TASKS

__all__ = [
    "NO_METHOD",
    "TASKS_ADVICE",
    "TaskResult",
    "TaskSetting",
    "mean_of",
    "settings_of",
    "store_task_results",
    "task_dataset",
    "task_results_of",
]

TASKS_ADVICE = "measure with `osp-diag tasks CHECKPOINT --run RUN`"
NO_METHOD = "none"
"""Method and convention of a model that is not rounded, by whatever method it was asked for."""


@dataclass(frozen=True, kw_only=True)
class TaskSetting:
    """What all tasks of one setting have in common; only results of one such are averaged."""

    weight_bits: int = UNQUANTIZED
    activation_bits: int = UNQUANTIZED
    key_value_bits: int = UNQUANTIZED
    method: str = NO_METHOD
    convention: str = NO_METHOD
    seed: int = 0
    bos: str = "no"
    limit: int = 0

    @property
    def bits(self) -> Setting:
        """Of weights, activations, keys and values."""
        return Setting(self.weight_bits, self.activation_bits, self.key_value_bits)

    def __str__(self) -> str:
        return str(self.bits) if self.bits.unquantized else f"{self.bits} {self.method}, {self.convention}"


@dataclass(frozen=True, kw_only=True)
class TaskResult(TaskSetting):
    """The accuracy on one task under one setting."""

    task: str
    accuracy: float
    standard_error: float
    documents: int
    metric: str
    shots: int
    task_version: str = ""
    harness: str = ""
    max_length: int = 0
    truncated: int = 0
    dtype: str = ""
    model_fingerprint: str = ""
    rounded_share: float = math.nan
    calibration: str = ""
    notes: str = ""


_DEFINITIONS = {
    "task": ("", "as lm-eval names it"),
    "accuracy": ("1", "share of the documents answered rightly, by the metric named beside it"),
    "standard_error": ("1", "of the accuracy, over documents, as lm-eval computes it"),
    "documents": ("document", "how many were asked"),
    "metric": (
        "",
        "of lm-eval, with the filter of generated answers: acc, acc_norm (log-likelihood by length)",
    ),
    "shots": ("1", "solved examples before each question"),
    "weight_bits": ("bit", "of the weights of the blocks' Linears; 16: as they are"),
    "activation_bits": ("bit", "of the inputs of the blocks' Linears; 16: as they are"),
    "key_value_bits": ("bit", "of the keys and values that attention reads; 16: as they are"),
    "method": ("", "how few-bit numbers are made; none: nothing is rounded"),
    "convention": ("", "what the grids are; none: nothing is rounded"),
    "seed": ("1", "of what the method draws at random"),
    "bos": ("", "whether sequences begin with the tokenizer's opening tokens"),
    "limit": ("document", "the most that were asked of a task; 0: all of them"),
    "task_version": ("", "of the definition of the task"),
    "harness": ("", "what asked and judged, with its version"),
    "max_length": ("token", "longest sequence; 0: no limit"),
    "truncated": ("request", "whose beginning was cut off, since they were longer"),
    "dtype": ("", "of the model's parameters"),
    "model_fingerprint": ("", "of the parameters before quantization"),
    "rounded_share": (
        "1",
        "of the numbers in the blocks' matrices, that are of Linears, which alone are rounded",
    ),
    "calibration": ("", "the text on which the method looked at activations"),
    "notes": ("", "what is to be said of the rounding, sentences with semicolons between"),
}
_KEY_FIELDS = (*(field.name for field in fields(TaskSetting)), "task", "shots", "metric")
"""What makes two rows the same measurement."""


def task_dataset(results: Sequence[TaskResult]) -> xr.Dataset:
    """A Dataset with the dimension ``result`` and, of each variable, units and definition."""
    variables = {
        name: (
            "result",
            np.asarray([getattr(row, name) for row in results]),
            {"units": unit, "definition": words},
        )
        for name, (unit, words) in _DEFINITIONS.items()
    }
    return xr.Dataset(variables, attrs={"title": "Accuracy on tasks"})


def task_results_of(run: Run) -> list[TaskResult]:
    """The results that a run holds.

    Raises
    ------
    StoreError : it holds none
    """
    if TASKS not in run.tree.children:
        raise StoreError(f"the run of {model_name(run.attrs)} holds no results on tasks; {TASKS_ADVICE}")
    return rows_of(run[TASKS].drop_vars("step", errors="ignore").load())


def rows_of(table: xr.Dataset) -> list[TaskResult]:
    """The inverse of :func:`task_dataset`."""
    # Runs of earlier versions lack what was recorded later.
    names = [field.name for field in fields(TaskResult) if field.name in table]
    columns = [table[name].values.tolist() for name in names]
    return [TaskResult(**dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]


def store_task_results(path: str | os.PathLike[str], results: Sequence[TaskResult]) -> None:
    """Add results to the run at ``path``; what it holds of the same measurement is replaced.

    Results of other weights go: a training that was exported earlier has moved on.

    Raises
    ------
    StoreError : no run is there, or another process writes it
    """
    from osp_diag.runs.writer import RunWriter

    run = open_run(path)
    models = {row.model_fingerprint for row in results}
    earlier = task_results_of(run) if TASKS in run.tree.children else []
    rows = {_key(row): row for row in earlier if row.model_fingerprint in models}
    rows |= {_key(row): row for row in results}
    # The writer refuses a run of another identity; what may differ is when and how it was written.
    now = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "command": " ".join(sys.argv)}
    attributes = {str(name): value for name, value in run.attrs.items()}
    with RunWriter(path, attributes | now, resume=True) as writer:
        writer.write_static(TASKS, task_dataset(list(rows.values())), replace=True)


def settings_of(results: Iterable[TaskResult]) -> list[TaskSetting]:
    """The settings of results, each once, in their order."""
    return list(dict.fromkeys(_setting(row) for row in results))


def mean_of(results: Iterable[TaskResult], setting: TaskSetting, group: Group | None = None) -> Mean:
    """The mean of a group of tasks under one setting, asked with the group's shots and metrics.

    Parameters
    ----------
    group : the lm-eval definitions of the ten tasks if None

    Returns
    -------
    NaN, with the names of what is missing, where a task was not asked so.
    """
    group = group or GROUPS["ten"]
    asked = {(task.name, task.shots, task.metric) for task in group.tasks}
    accuracies = {
        row.task: row.accuracy
        for row in results
        if _setting(row) == setting and (row.task, row.shots, row.metric.partition(",")[0]) in asked
    }
    return group_mean(accuracies, group)


def _setting(row: TaskResult) -> TaskSetting:
    return TaskSetting(**{field.name: getattr(row, field.name) for field in fields(TaskSetting)})


def _key(row: TaskResult) -> tuple[Any, ...]:
    values = asdict(row)
    return tuple(values[name] for name in _KEY_FIELDS)
