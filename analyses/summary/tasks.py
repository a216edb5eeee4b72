"""What a run says of its model's accuracy on tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from osp_diag.quantizing.tasks.groups import GROUPS
from osp_diag.quantizing.tasks.results import mean_of, settings_of, task_results_of
from osp_diag.runs.run import Run
from osp_diag.schema import TASKS

__all__ = ["task_accuracy", "task_sentences"]


def task_accuracy(run: Run) -> dict[str, Any]:
    """The field of the summary: setting → task, or mean of a whole group → accuracy; none without results."""
    if TASKS not in run.tree.children:
        return {}
    results = task_results_of(run)
    found: dict[str, dict[str, float]] = {}
    for setting in settings_of(results):
        documents = f", {setting.limit} documents a task" if setting.limit else ""
        means = {f"mean of {name}": mean_of(results, setting, group).value for name, group in GROUPS.items()}
        rows = {row.task: row.accuracy for row in results if settings_of([row]) == [setting]}
        found[f"{setting}, BOS {setting.bos}{documents}"] = {
            name: value for name, value in {**means, **rows}.items() if not math.isnan(value)
        }
    return {"task_accuracy": found}


def task_sentences(accuracy: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """One a setting; of a whole group the mean alone."""
    for setting, values in accuracy.items():
        whole = [name for name in GROUPS if f"mean of {name}" in values]
        told = {task.name for name in whole for task in GROUPS[name].tasks}
        listing = ", ".join(f"{name} {value:.1%}" for name, value in values.items() if name not in told)
        yield f"Accuracy on tasks at {setting}: {listing}"
