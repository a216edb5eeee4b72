"""A held-out loss above the lowest that the run had reached."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from osp_diag.monitoring.finding import Finding
from osp_diag.monitoring.limits import LOSS_RISE
from osp_diag.monitoring.rule import RunningRule


@dataclass
class Rule(RunningRule):
    """How far the held-out loss lies above its lowest so far, in units of the farthest that it ever did
    before.

    Every probe has the same held-out tokens, so that its loss hardly wobbles.
    """

    times_usual: float = 4.0
    smallest_usual: float = LOSS_RISE / 4
    """nats, so that a rise is one of :data:`~osp_diag.monitoring.limits.LOSS_RISE` or more"""
    probes: int = 4
    """So many losses have to be known."""
    _lowest: float = float("inf")
    _lowest_step: int = -1
    _last_good: int | None = None
    _usual: float = 0.0
    _count: int = 0
    _is_high: bool = False

    def at_row(self, step: int, values: Mapping[str, float]) -> Iterable[Finding]:
        loss = values.get("held_out_loss", float("nan"))
        if not np.isfinite(loss):
            return ()
        rise = loss - self._lowest
        size = rise / max(self._usual, self.smallest_usual)
        was_high, self._is_high = self._is_high, self._count >= self.probes and size >= self.times_usual
        self._count += 1
        if not self._is_high:
            if self._count > 1:
                self._usual = max(self._usual, rise)
            self._last_good = step
        if loss < self._lowest:
            self._lowest, self._lowest_step = loss, step
        return (self._finding(step, loss, rise, size),) if self._is_high and not was_high else ()

    def _finding(self, step: int, loss: float, rise: float, size: float) -> Finding:
        return Finding(
            rule="loss_rise",
            severity="bad",
            step=step,
            last_good_step=self._last_good,
            first_bad_step=step,
            statistic="held_out_loss",
            value=loss,
            size=size,
            sentence=(
                f"the held-out loss rose to {loss:.4g} at step {step:,}, {rise:.2g} above its lowest, "
                f"{self._lowest:.4g} at step {self._lowest_step:,}"
            ),
        )
