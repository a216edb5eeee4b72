"""A loss that leaps above the losses before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from osp_diag.monitoring.finding import Finding
from osp_diag.monitoring.rule import RunningRule


@dataclass
class Rule(RunningRule):
    """The training loss above the median of the last ``window`` of its rows, in units of its usual noise.

    The noise is 1.4826 × the median |difference of neighbouring rows| / √2, so neither a falling loss nor one
    odd row sets it. Rows of a spike are not among those before.
    """

    times_noise: float = 16.0
    """Five healthy trainings reached 11.5 (docs/log.md)."""
    smallest: float = 0.1
    """nats: less is no spike, however quiet the loss was"""
    window: int = 20
    _before: deque[tuple[int, float]] = field(default_factory=deque)
    _is_high: bool = False

    def at_row(self, step: int, values: Mapping[str, float]) -> Iterable[Finding]:
        loss = values.get("loss", float("nan"))
        if not np.isfinite(loss) or values.get("stopped_step"):  # of which another rule tells
            return ()
        before = self._before
        size, leap, usual = 0.0, 0.0, float("nan")
        if len(before) == self.window:
            losses = np.array([value for _, value in before])
            noise = 1.4826 * float(np.median(np.abs(np.diff(losses)))) / np.sqrt(2)
            usual = float(np.median(losses))
            leap = loss - usual
            size = leap / max(noise, 1e-12)
        was_high, self._is_high = self._is_high, size >= self.times_noise and leap >= self.smallest
        last = before[-1][0] if before else None
        if self._is_high and len(before) == self.window:
            if was_high:
                before.popleft()  # a loss that stays is no spike for ever
                before.append((step, loss))
                return ()
            return (self._finding(step, last, loss, usual, size),)
        before.append((step, loss))
        if len(before) > self.window:
            before.popleft()
        return ()

    def _finding(self, step: int, last: int | None, loss: float, usual: float, size: float) -> Finding:
        return Finding(
            rule="loss_spike",
            severity="watch",
            step=step,
            last_good_step=last,
            first_bad_step=step,
            statistic="loss",
            value=loss,
            size=size,
            sentence=(
                f"the training loss leapt to {loss:.4g} at step {step:,}, from {usual:.4g} (the median of "
                f"the {self.window} rows before): {size:.0f} times its usual noise"
            ),
        )
