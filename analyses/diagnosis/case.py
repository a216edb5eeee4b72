"""What all questions share: the run, its laboratory, what was healthy, and what has been said so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import xarray as xr

from osp_diag.analyses.diagnosis.findings import Bracket, Finding
from osp_diag.laboratory import CheckpointState, Fork, Laboratory, Replay
from osp_diag.monitoring import Finding as Noticed
from osp_diag.monitoring import RunMonitor
from osp_diag.runs.headline import headline_by_step
from osp_diag.runs.run import Run

__all__ = ["Case"]

OF_ALL = ("learning_rate", "function", "data", "precision")
"""Families after whose onset every parameter may move otherwise than before."""


@dataclass
class Case:
    """A run under diagnosis.

    Attributes
    ----------
    run, laboratory : None where its checkpoints cannot be read
    against, its_laboratory : a good run to compare with
    findings : so far
    regression_bracket : where something got worse first; None where nothing did
    is_raised : whether kurtosis is above its noise at the last probe
    forks : of remedies that were tried, by start, end and changes
    replay : of the steps after the last good checkpoint; None where none was made
    ruled_out, not_recorded : sentences that the questions leave
    """

    run: Run
    laboratory: Laboratory | None
    against: Run | None = None
    its_laboratory: Laboratory | None = None
    findings: list[Finding] = field(default_factory=list)
    regression_bracket: Bracket | None = None
    is_raised: bool = False
    forks: dict[tuple[int, int, str], Fork] = field(default_factory=dict)
    replay: Replay | None = None
    ruled_out: list[str] = field(default_factory=list)
    not_recorded: list[str] = field(default_factory=list)
    _changes: dict[tuple[int, int], xr.Dataset] = field(default_factory=dict)

    @cached_property
    def monitor(self) -> RunMonitor:
        """The monitor of the run."""
        return RunMonitor(self.run)

    @cached_property
    def noticed(self) -> tuple[Noticed, ...]:
        """What the monitor finds."""
        return self.monitor.look()

    @cached_property
    def kurtosis(self) -> xr.DataArray | None:
        """Mean OSP kurtosis of the hidden states by step, all tokens; None where it was not measured."""
        return headline_by_step(self.run)

    @cached_property
    def checkpoints(self) -> tuple[CheckpointState, ...]:
        """Those that are left, ascending."""
        return () if self.laboratory is None else tuple(self.laboratory.checkpoints)

    @cached_property
    def pairs(self) -> list[tuple[CheckpointState, CheckpointState]]:
        """Each checkpoint with the next one."""
        return list(zip(self.checkpoints[:-1], self.checkpoints[1:], strict=True))

    @property
    def trains(self) -> bool:
        """Whether steps of the training can be made again."""
        return self.laboratory is not None and self.laboratory.trains

    def scalar(self, name: str) -> xr.DataArray | None:
        """A number by step, where it is known: of the run, or else left beside its checkpoints."""
        sources = [self.run.series] + ([] if self.laboratory is None else [self.laboratory.scalars])
        for source in sources:
            values = source[name].dropna("step") if name in source else None
            if values is not None and values.size:
                return values
        return None

    def changes(self, before: CheckpointState, after: CheckpointState) -> xr.Dataset:
        """How far parameters moved between two checkpoints."""
        assert self.laboratory is not None
        key = (before.step, after.step)
        if key not in self._changes:
            self._changes[key] = self.laboratory.weight_changes(*key)
        return self._changes[key]

    def logged(self, name: str) -> xr.Dataset | None:
        """A group of arrays by logged step; None where the run has none."""
        return self.run.logged(name) if name in self.run.logged_groups else None

    def checkpoint_up_to(self, step: int | None) -> CheckpointState | None:
        """The last checkpoint at or before a step."""
        early = [state for state in self.checkpoints if step is not None and state.step <= step]
        return early[-1] if early else None

    def checkpoint_after(self, step: int) -> CheckpointState | None:
        """The first checkpoint beyond a step."""
        return next((state for state in self.checkpoints if state.step > step), None)

    def config_at(self, step: int) -> Mapping[str, Any]:
        """The configuration under which a step was made."""
        configs = [s.attributes.get("config") for s in self.run.segments if s.after_step < step]
        return configs[-1] if configs and isinstance(configs[-1], Mapping) else {}

    def computes_exactly(self, step: int) -> bool:
        """Whether a step, made again, gives the same bits: in float32 on a CPU."""
        return self.config_at(step).get("dtype") == "float32" and self.run.attrs.get("device") == "cpu"

    def explains(self, parameter: str, bracket: Bracket) -> bool:
        """Whether a finding says already why this parameter moves otherwise within the bracket."""
        return any(_explains(finding, parameter, bracket) for finding in self.findings)


def _explains(finding: Finding, parameter: str, bracket: Bracket) -> bool:
    own = finding.bracket
    if own is None or (own.good or 0) >= bracket.bad:
        return False
    if finding.family in OF_ALL:
        return True
    in_time = own.bad > (bracket.good or 0)
    # Projections that went are multiplied into embedding and head.
    folded = finding.family == "projections" and parameter.endswith(("embed_tokens.weight", "lm_head.weight"))
    return in_time and (folded or parameter in finding.place.parameter)
