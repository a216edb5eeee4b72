"""Tasks by name, with their documents, from lm-eval: what is not there is said before a model is run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from osp_diag.errors import UsageError
from osp_diag.quantizing.tasks.groups import ACCURACIES, GROUPS, Task, task_named
from osp_diag.quiet import quietly
from osp_diag.wording import did_you_mean, listed

__all__ = ["LoadedTask", "harness_version", "load_tasks", "names_of", "quiet_harness"]

_PUBLISHED = Path(__file__).parent / "published"


@dataclass(frozen=True)
class LoadedTask:
    """A task and its documents.

    Attributes
    ----------
    task
        its name, the metric that is its accuracy, and how many shots.
    tree
        what lm-eval evaluates: its tasks, and the groups of them.
    """

    task: Task
    tree: dict[str, Any]


def harness_version() -> str:
    """The version of lm-eval.

    Raises
    ------
    UsageError : it is not installed
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"tasks need the package lm-eval (no module {error.name!r}): pip install 'osp-diag[tasks]'"
        ) from error
    return version("lm_eval")


def names_of(tasks: Sequence[str]) -> tuple[str, ...]:
    """Names of tasks, groups of ours replaced by what is in them, each once."""
    names = [
        part
        for name in tasks
        for part in ([t.name for t in GROUPS[name].tasks] if name in GROUPS else [name])
    ]
    return tuple(dict.fromkeys(names))


def load_tasks(
    tasks: Sequence[str], *, include_path: str | Path | None = None, shots: int | None = None
) -> list[LoadedTask]:
    """The tasks of these names and groups, with their documents.

    Documents come from the Hugging Face hub or its cache, or from where a task's file says.

    Parameters
    ----------
    tasks : names that lm-eval knows, or of :data:`~osp_diag.quantizing.tasks.groups.GROUPS`
    include_path : a folder with task files of your own, which come before those of lm-eval
    shots : solved examples before each question; None: as the group says, or the task's own file

    Raises
    ------
    UsageError : lm-eval is not installed; a task is unknown, has no metric that is an accuracy, or its
        documents are not here and cannot be fetched
    """
    harness_version()
    names = names_of(tasks)
    if not names:
        raise UsageError(f"name a task, or a group of them: {listed(list(GROUPS))}")
    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError(f"--include-path {include_path}: no such folder of task files")
    if shots is not None and shots < 0:
        raise UsageError(f"shots={shots}: give 0 or more solved examples")
    with quiet_harness():
        manager = _manager(names, include_path)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        known = [*GROUPS, *manager.all_tasks]
        raise UsageError(f"there is no task {unknown[0]!r}; {did_you_mean(unknown[0], known)}")
    return [_loaded(manager, name, shots) for name in names]


def _manager(names: Sequence[str], include_path: str | Path | None) -> Any:
    """An index of the folders that hold these tasks; of all of lm-eval's, which takes long, where need be."""
    from lm_eval import tasks as harness_tasks

    home = Path(harness_tasks.__file__).parent
    own = [] if include_path is None else [Path(include_path)]
    folders = [home / task.folder for name in names if (task := task_named(name)) and task.folder]
    paths = list(dict.fromkeys([*folders, _PUBLISHED, *own]))
    manager = harness_tasks.TaskManager(include_path=paths, include_defaults=False)
    if all(name in manager.all_tasks for name in names):
        return manager
    return harness_tasks.TaskManager(include_path=[_PUBLISHED, *own])


def _loaded(manager: Any, name: str, shots: int | None) -> LoadedTask:
    try:
        with quiet_harness():
            tree = manager.load([name])
    except (OSError, ValueError, LookupError) as error:
        raise UsageError(
            f"the documents of the task {name!r} are not here and could not be fetched "
            f"({_first_line(error)}). Run it once where the Hugging Face hub can be reached and copy that "
            "machine's cache (HF_HOME), or point --include-path to a folder with a task file whose documents "
            "are local files"
        ) from error
    leaves = list(tree["tasks"].values())
    known = task_named(name)
    for leaf in leaves:
        if shots is not None or known is not None:
            leaf.set_config(key="num_fewshot", value=known.shots if shots is None and known else shots)
        elif leaf.get_config("num_fewshot") is None:
            leaf.set_config(key="num_fewshot", value=0)
    numbers = {int(leaf.get_config("num_fewshot")) for leaf in leaves}
    if len(numbers) > 1:
        raise UsageError(
            f"the tasks of {name!r} are asked with {listed(sorted(map(str, numbers)))} shots; give one number"
        )
    metric, rule = (known.metric, known.filter) if known else _accuracy_of(name, leaves[0])
    return LoadedTask(Task(name, name, metric, numbers.pop(), filter=rule), tree)


def _accuracy_of(name: str, leaf: Any) -> tuple[str, str]:
    """(metric, filter) of a task that no group names."""
    metrics = [str(entry["metric"]) for entry in leaf.get_config("metric_list") or []]
    metric = next((metric for metric in ACCURACIES if metric in metrics), None)
    if metric is None:
        raise UsageError(
            f"the task {name!r} has no metric that is an accuracy ({', '.join(ACCURACIES)}); it has "
            f"{listed(metrics) or 'none'}"
        )
    filters = leaf.get_config("filter_list") or [{"name": "none"}]
    return metric, str(filters[0]["name"])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Without the log lines and bars of lm-eval and of datasets."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quietly():
            yield
    finally:
        logger.setLevel(level)
