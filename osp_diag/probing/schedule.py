"""When to probe: every so many steps, at given steps, or densely early and sparsely later."""

from __future__ import annotations

from collections.abc import Callable, Collection

from osp_diag.errors import UsageError

__all__ = ["Schedule", "dense_early", "schedule_of"]

Schedule = Callable[[int], bool]
"""step → whether it is probed"""


def dense_early(*, every: int, dense_until: int, dense_every: int = 1) -> Schedule:
    """Every ``dense_every`` steps up to ``dense_until``, then every ``every``: outliers are born early."""
    for name, value in (("every", every), ("dense_every", dense_every)):
        if value < 1:
            raise UsageError(f"{name}={value}: a schedule probes every 1 or more steps")

    def due(step: int) -> bool:
        return step % (dense_every if step <= dense_until else every) == 0

    return due


def schedule_of(every: int | Collection[int] | Schedule) -> Schedule:
    """A schedule from a period, from the steps themselves, or from a function of the step.

    Raises
    ------
    UsageError : a period below 1
    """
    if isinstance(every, int):
        if every < 1:
            raise UsageError(f"every={every}: probe every 1 or more steps, or do not attach a probe")
        return lambda step: step % every == 0
    if callable(every):
        return every
    steps = frozenset(every)
    return lambda step: step in steps
