"""A training loss far below the loss on held-out tokens: the model learns its data by heart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from osp_diag.monitoring.finding import Finding
from osp_diag.monitoring.rule import RunningRule


@dataclass
class Rule(RunningRule):
    """Held-out loss − the median of the training losses since the last held-out loss.

    Told once, when it comes, and again when it comes back after it was gone.
    """

    nats: float = 0.7
    """A factor of 2 in perplexity. Healthy trainings on batches of 512 tokens reached 0.35 (docs/log.md)."""
    _losses: list[float] = field(default_factory=list)
    _last_good: int | None = None
    _is_wide: bool = False

    def at_row(self, step: int, values: Mapping[str, float]) -> Iterable[Finding]:
        loss, held_out = (values.get(name, float("nan")) for name in ("loss", "held_out_loss"))
        if np.isfinite(loss):
            self._losses.append(loss)
        if not np.isfinite(held_out) or not self._losses:
            return ()
        usual, self._losses = float(np.median(self._losses)), []
        gap = held_out - usual
        was_wide, self._is_wide = self._is_wide, gap >= self.nats
        if not self._is_wide:
            self._last_good = step
        return (self._finding(step, gap, held_out, usual),) if self._is_wide and not was_wide else ()

    def _finding(self, step: int, gap: float, held_out: float, usual: float) -> Finding:
        return Finding(
            rule="held_out_gap",
            severity="watch",
            step=step,
            last_good_step=self._last_good,
            first_bad_step=step,
            statistic="held_out_loss",
            value=gap,
            sentence=(
                f"the held-out loss is {held_out:.4g} at step {step:,}, {gap:.2g} above the training loss "
                f"({usual:.4g}, the median since the probe before): the data repeat, or differ from what is "
                "held out"
            ),
        )
