"""Accuracy on tasks that runs hold: which results compare, and what few bits leave of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from osp_diag.errors import StoreError
from osp_diag.quantizing.setting import Setting
from osp_diag.quantizing.tasks.groups import GROUPS
from osp_diag.quantizing.tasks.results import (
    TASKS_ADVICE,
    TaskResult,
    TaskSetting,
    mean_of,
    settings_of,
    task_results_of,
)
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run
from osp_diag.wording import listed

__all__ = ["TaskScores", "task_scores"]

FEW_BITS = ("4-4-4", "4-4-16")
"""What is looked for where no setting is named: the first that all runs hold."""


@dataclass(frozen=True)
class TaskScores:
    """Of each run the accuracy at full precision and at few bits, asked in the same way."""

    full: list[float]
    few: list[float]
    setting: TaskSetting
    """of ``few``"""
    harness: str
    """versions of lm-eval, several where the runs differ"""


def task_scores(
    runs: Sequence[Run],
    of: str = "ten",
    *,
    bits: str | None = None,
    method: str | None = None,
    convention: str | None = None,
) -> TaskScores:
    """The mean of a group, or one task's accuracy, of runs that were asked alike.

    Of several settings that all runs hold it is one with all documents, and of these the one measured last.

    Parameters
    ----------
    of : a group of :data:`~osp_diag.quantizing.tasks.groups.GROUPS`, or a task
    bits : such as ``4-4-4``; None: 4-4-4, or 4-4-16 where not all runs hold that
    method, convention : None: any that all runs hold

    Raises
    ------
    StoreError : a run holds no results, or there is no setting of which all hold the whole
    UsageError : bits that have no meaning
    """
    tables = [task_results_of(run) for run in runs]
    wanted = [Setting.read(entry) for entry in ([bits] if bits else FEW_BITS)]
    for few_bits in wanted:
        shared = [
            setting
            for setting in reversed(settings_of(tables[0]))
            if setting.bits == few_bits
            and method in (None, setting.method)
            and convention in (None, setting.convention)
            and all(
                not math.isnan(_score(table, which, of))
                for table in tables
                for which in (setting, _full(setting))
            )
        ]
        if shared:
            setting = min(shared, key=lambda candidate: candidate.limit > 0)
            versions = dict.fromkeys(row.harness for table in tables for row in table)
            return TaskScores(
                [_score(table, _full(setting), of) for table in tables],
                [_score(table, setting, of) for table in tables],
                setting,
                ", ".join(versions),
            )
    raise StoreError(_lacking(runs, tables, of, wanted))


def _full(setting: TaskSetting) -> TaskSetting:
    """The same questions of the model as it is."""
    return TaskSetting(bos=setting.bos, limit=setting.limit)


def _score(table: Sequence[TaskResult], setting: TaskSetting, of: str) -> float:
    if of in GROUPS:
        return mean_of(table, setting, GROUPS[of]).value
    return next(
        (row.accuracy for row in reversed(table) if row.task == of and settings_of([row]) == [setting]),
        math.nan,
    )


def _lacking(
    runs: Sequence[Run], tables: Sequence[Sequence[TaskResult]], of: str, wanted: Sequence[Setting]
) -> str:
    what = f"the mean of {of!r}" if of in GROUPS else f"the accuracy on {of!r}"
    held = [
        f"{model_name(run.attrs)} has {listed(sorted({row.task for row in table}), 6)} at "
        f"{listed([str(setting) for setting in settings_of(table)], 6)}"
        for run, table in zip(runs, tables, strict=True)
    ]
    return (
        f"not all runs hold {what} at 16-16-16 and {' or '.join(map(str, wanted))}, asked alike (all tasks, "
        f"shots, BOS, limit): {'; '.join(held)}; {TASKS_ADVICE}"
    )
