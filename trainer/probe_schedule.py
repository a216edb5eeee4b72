"""When a training run is probed."""

from __future__ import annotations

from osp_diag.probing.schedule import Schedule, dense_early
from osp_diag.trainer.config import ProbeConfig

__all__ = ["due_steps"]


def due_steps(config: ProbeConfig, last: int | None) -> Schedule:
    """Which steps are probed: dense early, sparser later, and the last one; none where ``every`` is 0.

    ``last`` is None where the loop does not know its end.
    """
    if config.every == 0:
        return lambda step: False
    regular = dense_early(every=config.every, dense_until=config.dense_until, dense_every=config.dense_every)
    return lambda step: step == last or regular(step)
