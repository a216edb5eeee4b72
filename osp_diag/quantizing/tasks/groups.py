"""Which tasks are asked together, and the one mean of them that papers quote.

Two groups of ten. ``ten`` has lm-eval's own definitions. ``osp-published`` asks what the release of
Outlier-Safe Pre-Training asks (``lighteval_tasks.py`` and ``tasks.txt`` of
github.com/dmis-lab/Outlier-Safe-Pre-Training): every multiple choice by the text of the answers, also MMLU
and CommonsenseQA, which lm-eval asks by their letters, at which small models guess. Its files are in
``published/``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from osp_diag.errors import UsageError
from osp_diag.wording import listed

__all__ = ["ACCURACIES", "GROUPS", "Group", "Mean", "Task", "group_mean", "group_named", "task_named"]

ACCURACIES = ("acc_norm", "acc", "exact_match")
"""Metrics that are shares of documents answered rightly; of a task that no group names, the first counts."""


@dataclass(frozen=True)
class Task:
    """One task, as lm-eval knows it.

    Attributes
    ----------
    name
        in lm-eval.
    part
        of the mean: tasks of one part are averaged first.
    metric
        whose value is the accuracy.
    shots
        solved examples before the question.
    folder
        of its definition within lm-eval's tasks; empty where it is ours.
    filter
        of an answer that is generated, before it is judged.
    """

    name: str
    part: str
    metric: str
    shots: int = 0
    folder: str = ""
    filter: str = "none"


@dataclass(frozen=True)
class Group:
    """Tasks that are asked together."""

    name: str
    tasks: tuple[Task, ...]
    meaning: str

    @property
    def parts(self) -> tuple[str, ...]:
        """What the mean is over."""
        return tuple(dict.fromkeys(task.part for task in self.tasks))


_TEN = (
    Task("arc_easy", "ARC", "acc_norm", folder="arc"),
    Task("arc_challenge", "ARC", "acc_norm", folder="arc"),
    Task("commonsense_qa", "CommonsenseQA", "acc", folder="commonsense_qa"),
    Task("gsm8k", "GSM8K", "exact_match", shots=8, folder="gsm8k", filter="flexible-extract"),
    Task("hellaswag", "HellaSwag", "acc_norm", folder="hellaswag"),
    Task("mmlu", "MMLU", "acc", folder="mmlu/default"),
    Task("openbookqa", "OpenBookQA", "acc_norm", folder="openbookqa"),
    Task("piqa", "PIQA", "acc_norm", folder="piqa"),
    Task("social_iqa", "SIQA", "acc", folder="siqa"),
    Task("triviaqa", "TriviaQA", "exact_match", shots=5, folder="triviaqa", filter="remove_whitespace"),
    Task("winogrande", "WinoGrande", "acc", folder="winogrande"),
)
_PUBLISHED = tuple(
    Task(
        f"osp_{task.name}",
        task.part,
        task.metric if task.metric == "exact_match" else "acc_norm",
        task.shots,
        filter={"gsm8k": "flexible-extract", "triviaqa": "remove_whitespace"}.get(task.name, "none"),
    )
    for task in _TEN
)
GROUPS = {
    group.name: group
    for group in (
        Group("ten", _TEN, "the OSP paper's ten tasks by lm-eval's own definitions"),
        Group("osp-published", _PUBLISHED, "the same as the release of OSP asks them: answers by their text"),
    )
}
"""The groups by name."""


@dataclass(frozen=True)
class Mean:
    """The mean over the parts of a group; NaN while a part is missing."""

    value: float
    missing: tuple[str, ...] = ()
    """tasks without an accuracy"""


def group_named(name: str) -> Group:
    """The group of a name.

    Raises
    ------
    UsageError : there is none
    """
    if name not in GROUPS:
        raise UsageError(f"there is no group of tasks {name!r}; there are {listed(list(GROUPS))}")
    return GROUPS[name]


def task_named(name: str) -> Task | None:
    """A task that a group names; None of any other."""
    return next((task for group in GROUPS.values() for task in group.tasks if task.name == name), None)


def group_mean(accuracies: Mapping[str, float], group: Group) -> Mean:
    """The mean over the parts of a group of the mean over the tasks of each: ARC counts once.

    Parameters
    ----------
    accuracies : task → share of documents answered rightly; what the group does not name is passed over
    """
    missing = tuple(task.name for task in group.tasks if math.isnan(accuracies.get(task.name, math.nan)))
    if missing:
        return Mean(math.nan, missing)
    parts = [[accuracies[task.name] for task in group.tasks if task.part == part] for part in group.parts]
    return Mean(_mean([_mean(values) for values in parts]))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
