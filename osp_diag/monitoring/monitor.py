"""The monitor: every number that a training records, judged by every rule as it comes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from osp_diag.monitoring.finding import Finding
from osp_diag.monitoring.moment import Moment, Profiles, Table
from osp_diag.monitoring.places import Block, Place, numbers_of
from osp_diag.monitoring.rule import RunningRule
from osp_diag.monitoring.rules import rule_classes

__all__ = ["Monitor"]

NOT_JUDGED = frozenset(
    {
        "learning_rate", "step_seconds", "probe_seconds", "probe_background_seconds", "tokens_per_second",
        "model_flops_utilisation", "batch_hash", "data_position", "skipped_step", "stopped_step",
        "loss", "held_out_loss",
    }
)  # fmt: skip
"""Scalars whose jumps say nothing (plans, clocks, names), or have rules of their own."""


class Monitor:
    """Judges a run step by step; each step costs what is new of it.

    Parameters
    ----------
    rules : instead of all in :mod:`osp_diag.monitoring.rules`
    """

    def __init__(self, rules: Sequence[RunningRule] | None = None) -> None:
        self.rules = [rule() for rule in rule_classes().values()] if rules is None else list(rules)
        self.findings: list[Finding] = []
        self._table = Table()
        self._since_probe: dict[str, list[float]] = {}

    @property
    def last_probe(self) -> int | None:
        """The last step that was judged; None before any was."""
        return self._table.steps[-1] if self._table.steps else None

    def add_scalars(self, step: int, values: Mapping[str, float]) -> list[Finding]:
        """Judge the scalars of a logged step: what was recorded, NaN included. Returns what is new."""
        for name, value in values.items():
            if name not in NOT_JUDGED:
                self._since_probe.setdefault(name, []).append(float(value))
        return self._judged(rule.at_row(step, values) for rule in self.rules)

    def add_probe(
        self, step: int, blocks: Iterable[Block], profiles: Profiles = lambda site: ({}, {})
    ) -> list[Finding]:
        """Judge a probed step, whose scalars came before. Returns what is new.

        Parameters
        ----------
        blocks : its judged numbers, each of one step
        profiles : site → RMS by channel of each layer, before and now
        """
        numbers, floors = numbers_of(blocks)
        # One number a pause between probes, so that a scalar is judged as what is probed.
        for name, values in self._since_probe.items():
            finite = [value for value in values if np.isfinite(value)]
            numbers[Place(None, None, name)] = float(np.median(finite)) if finite else float("nan")
        self._since_probe = {}
        previous = self.last_probe
        self._table.add(step, numbers, floors)
        moment = Moment(step=step, previous=previous, table=self._table, profiles=profiles)
        return self._judged(rule.at_probe(moment) for rule in self.rules)

    def _judged(self, parts: Iterable[Iterable[Finding]]) -> list[Finding]:
        new = [finding for part in parts for finding in part]
        new.sort(key=lambda finding: finding.rank)
        self.findings += new
        return new
