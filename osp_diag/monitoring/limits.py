"""The limits that an activation or a logit should not pass, and why."""

from __future__ import annotations

from typing import NamedTuple

from osp_diag.monitoring.finding import Severity

__all__ = ["LIMITS", "LOSS_RISE", "QK_CLIP", "Limit"]

QK_CLIP = 100.0
"""Largest logit before the softmax that Kimi K2's QK-Clip lets pass."""

LOSS_RISE = 0.3
"""Nats above its lowest from which on a held-out loss has risen; healthy AdamW trainings of 512 tokens a step
reached 0.17 (docs/log.md)."""


class Limit(NamedTuple):
    """A largest value of a statistic."""

    statistic: str
    value: float
    meaning: str
    severity: Severity


LIMITS = (
    Limit("max_logit", QK_CLIP, "where QK-Clip would act", "watch"),
    Limit("absolute_maximum", 448.0, "the largest number of fp8 (E4M3)", "watch"),
    Limit("absolute_maximum", 65_504.0, "the largest number of fp16", "bad"),
)
"""Lowest first, of each statistic."""
