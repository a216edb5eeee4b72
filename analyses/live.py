"""Where a training run stands: what a view of a growing run shows, in the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import xarray as xr

from osp_diag.analyses.summary.numbers import hidden_state_kurtosis, sink_rates
from osp_diag.errors import StoreError
from osp_diag.monitoring import SEVERITIES, Finding, Forecast, RunMonitor, Severity, forecasts
from osp_diag.monitoring.scalars import scalar
from osp_diag.runs.following import FollowedRun, RunState
from osp_diag.runs.lock import WriterState, writer_state
from osp_diag.runs.run import Run
from osp_diag.schema import KURTOSIS
from osp_diag.wording import duration

__all__ = ["Standing", "standing"]

SCALARS = (
    "loss", "held_out_loss", "gradient_norm", "learning_rate", "tokens_per_second",
    "model_flops_utilisation",
)  # fmt: skip


@dataclass(frozen=True)
class Standing:
    """Where a run stands, as it was last looked at.

    Attributes
    ----------
    scalars : the last finite value of each; those never recorded are left out
    probing : share of the time so far that probing took
    kurtosis, sinks : see :mod:`osp_diag.analyses.summary.numbers`
    forecasts : None where nobody asked
    """

    path: str
    name: str
    description: str
    state: RunState
    problem: str
    writer: WriterState
    age: float | None
    last_step: int | None
    planned_steps: int | None
    probes: int
    scalars: dict[str, float]
    probing: float | None
    kurtosis: xr.DataArray | None
    sinks: xr.DataArray | None
    alerts: list[Finding]
    forecasts: tuple[Forecast, ...] | None = None

    def is_at_least(self, severity: Severity) -> bool:
        """Whether anything of this severity or a worse one is the matter, or the run cannot be read."""
        worst = SEVERITIES.index(severity)
        return self.state == "unreadable" or any(alert.rank <= worst for alert in self.alerts)

    @property
    def bad(self) -> bool:
        """Whether what the run goes on with can't be trusted, or it cannot be read."""
        return self.is_at_least("bad")

    @property
    def life(self) -> str:
        """Whether somebody writes it, in words."""
        if self.state == "absent":
            return "nothing is there yet; waiting for a writer"
        if self.state == "unreadable":
            return "cannot be read"
        ago = "" if self.age is None else f", last written {duration(self.age)} ago"
        complete = self.planned_steps is not None and (self.last_step or 0) >= self.planned_steps
        words = {
            "writing": "being written",
            "closed": "finished" if complete else "nobody writes it",
            "died": "its writer died without closing it",
            "unknown": "whether somebody writes it can't be told here",
        }
        return words[self.writer] + ago

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the numbers at the last step, and the alerts."""
        record: dict[str, Any] = {
            "run": self.path,
            "model": self.name,
            "state": self.state,
            "problem": self.problem,
            "writer": self.writer,
            "seconds_since_written": self.age,
            "last_step": self.last_step,
            "planned_steps": self.planned_steps,
            "probes": self.probes,
            "share_of_time_probing": self.probing,
            **{name: self.scalars.get(name) for name in SCALARS},
        }
        if self.kurtosis is not None and self.kurtosis.sizes["step"]:
            last = self.kurtosis.isel(step=-1)
            record[KURTOSIS] = [
                {"site": str(site), "layer": int(layer), "value": _plain(value), "floor": float(floor)}
                for site, layer, value, floor in zip(
                    last["site"].values, last["layer"].values, last.values, last["floor"].values, strict=True
                )
            ]
        if self.sinks is not None and self.sinks.sizes["step"]:
            last = self.sinks.isel(step=-1)
            layers = zip(last["layer"].values, last.values, strict=True)
            record["sink_rate"] = [{"layer": int(layer), "value": _plain(value)} for layer, value in layers]
        record["alerts"] = [alert.as_dict() for alert in self.alerts]
        if self.forecasts is not None:
            record["forecasts"] = [forecast.as_dict() for forecast in self.forecasts]
        return record


_MONITORS: WeakKeyDictionary[Run, RunMonitor] = WeakKeyDictionary()
"""So that a look at a growing run judges only what is new."""


def standing(run: Run, against: Run | None = None, *, forecast: bool = False) -> Standing:
    """Where the run stands, as it was last looked at; call ``run.refresh()`` before.

    Parameters
    ----------
    against : a run that is known to be good, which decides at the first call with ``run``
    forecast : also extrapolate steady growth; see :func:`osp_diag.monitoring.forecasts`
    """
    if run not in _MONITORS:
        _MONITORS[run] = RunMonitor(run, against)
    followed = run if isinstance(run, FollowedRun) else None
    with followed.lock if followed else nullcontext():
        numbers: dict[str, Any] = {
            "scalars": {},
            "probing": None,
            "kurtosis": None,
            "sinks": None,
            "alerts": [],
        }
        last, probes = None, 0
        with suppress(StoreError):  # of a damaged file; the run's own ``problem`` says so
            ends = [int(steps[-1]) for steps in (run.steps, run.series["step"].values) if len(steps)]
            last, probes = max(ends, default=None), len(run.steps)
            numbers["scalars"], numbers["probing"] = _scalars(run), _share_of_time_probing(run)
            numbers["kurtosis"], numbers["sinks"] = hidden_state_kurtosis(run), sink_rates(run)
            numbers["alerts"] = sorted(_MONITORS[run].look(), key=lambda alert: alert.rank)
            if forecast:
                numbers["forecasts"] = forecasts(run)
        attrs = run.attrs
        config = attrs.get("config")
        planned = config.get("steps") if isinstance(config, dict) else None
        return Standing(
            path="" if run.path is None else str(run.path),
            name=str(attrs.get("model_name") or (run.path.name if run.path else "unnamed model")),
            description=_description(attrs),
            state=followed.state if followed else "recording",
            problem=followed.problem if followed else "",
            writer=followed.writer if followed else _writer(run),
            age=run.age,
            last_step=last,
            planned_steps=planned if isinstance(planned, int) else None,
            probes=probes,
            **numbers,
        )


def _writer(run: Run) -> WriterState:
    return "closed" if run.path is None else writer_state(run.path)


def _description(attrs: Mapping[Hashable, Any]) -> str:
    parts = [str(attrs[key]) for key in ("architecture",) if key in attrs]
    sizes = (("number_of_layers", "layers"), ("hidden_size", "channels"))
    return ", ".join(parts + [f"{attrs[key]} {unit}" for key, unit in sizes if key in attrs])


def _scalars(run: Run) -> dict[str, float]:
    last = {}
    for name in SCALARS:
        values = scalar(run, name)
        finite = np.flatnonzero(np.isfinite(values))
        if finite.size:
            last[name] = float(values[finite[-1]])
    return last


def _share_of_time_probing(run: Run) -> float | None:
    probe, step = scalar(run, "probe_seconds"), scalar(run, "step_seconds")
    if not (np.isfinite(probe).any() and np.isfinite(step).any()):
        return None
    probing = float(np.nansum(probe))
    # Steps between two that were recorded took as long as these.
    training = float(np.nanmean(step)) * int(run.series["step"][-1])
    return probing / (probing + training) if probing + training else None


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
