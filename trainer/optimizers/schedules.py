"""The learning rate over a run, as a factor of its peak."""

from __future__ import annotations

import math

from osp_diag.trainer.config import ScheduleConfig

__all__ = ["learning_rate_factor"]


def learning_rate_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """The factor of one step.

    With W steps of warm-up and D of decay (a value below 1 is that part of all steps, rounded):

    * warm-up, of every schedule: (step + 1) / W, so that the first step moves and step W − 1 is at the peak;
    * ``trapezoidal``: 1, then down in D equal parts to ``final`` at the last step. Where warm-up and decay
      overlap, the smaller of the two: a triangle;
    * ``cosine``: half a period from 1 at the end of the warm-up to ``final`` at the last step;
    * ``constant``: 1.

    Parameters
    ----------
    step : 0 is the first; what comes after the last has the last one's factor
    steps : of the whole run
    """
    step = min(step, steps - 1)
    warmup = _number_of_steps(config.warmup, steps)
    rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if config.name == "trapezoidal":
        decay = _number_of_steps(config.decay, steps)
        progress = max(0.0, 1 - (steps - 1 - step) / decay) if decay else 0.0
        return min(rising, 1 + (config.final - 1) * progress)
    if config.name == "cosine" and step >= warmup:
        # The peak is at step W − 1, or where there is no warm-up at the first step.
        peak = max(warmup - 1, 0)
        progress = (step - peak) / max(steps - 1 - peak, 1)
        # Half a period: 1 at the peak, ``final`` at the last step.
        return config.final + (1 - config.final) * (1 + math.cos(math.pi * progress)) / 2
    return rising


def _number_of_steps(value: float, steps: int) -> int:
    return round(value * steps) if value < 1 else int(value)
