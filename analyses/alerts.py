"""What somebody who watches a training run should be told: five rules, each with its number."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from osp_diag.analyses.summary.numbers import hidden_state_kurtosis
from osp_diag.errors import UsageError
from osp_diag.runs.run import Run

__all__ = ["Alert", "AlertRules", "alerts", "growth", "scalar", "share_rising"]

Severity = Literal["bad", "watch"]
WRITTEN_WITH = {
    "loss": ("learning_rate", "step_seconds"),
    "gradient_norm": ("learning_rate", "step_seconds"),
    "held_out_loss": ("probe_seconds",),
}
"""Scalar → those that come with it: NaN beside NaN only means that nothing was recorded at that step."""


@dataclass(frozen=True, kw_only=True)
class AlertRules:
    """The numbers of the rules."""

    times_floor: float = 10.0
    """Kurtosis counts as high from this multiple of what Gaussian noise of that width scores: a decade.
    The probe's own noise is a few percent of the floor (:mod:`osp_diag.analyses.emergence.history` departs at
    3)."""
    window: int = 10
    """Probes over which it has to grow: with fewer one odd probe decides."""
    growth: float = 1.25
    """Factor by which it has to grow over them; the wobble of a plateau is a tenth."""
    rising: float = 0.9
    """Share of the pairs of these probes of which the later has to be the higher. Of ten
    probes in random order one in 5,600 does so."""

    def __post_init__(self) -> None:
        if self.times_floor <= 1 or self.growth <= 1 or self.window < 2 or not 0 < self.rising <= 1:
            raise UsageError(
                "AlertRules: times_floor and growth are above 1, window at least 2, rising a share; got "
                f"{self.times_floor:g}, {self.growth:g}, {self.window} and {self.rising:g}"
            )


@dataclass(frozen=True)
class Alert:
    """One thing to know. "bad": what follows can't be trusted; "watch": it may go wrong."""

    rule: str
    severity: Severity
    text: str
    step: int
    value: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        return asdict(self) | {"value": self.value if np.isfinite(self.value) else str(self.value)}


def alerts(run: Run, rules: AlertRules = AlertRules()) -> list[Alert]:
    """What the rules find in a run as it was last looked at, worst first.

    * ``nonfinite_activations``: NaN or Inf in a measured activation of any probed step (bad)
    * ``nonfinite_scalars``: a loss or gradient norm of NaN or Inf (bad)
    * ``diverged_steps``: steps that the trainer passed over because loss or gradient went wrong (bad)
    * ``loss_spike``: the trainer stopped at a step whose loss and gradient norm are finite, so at a spike of
      the loss by its own rule, ``divergence.spike`` (bad)
    * ``growing_kurtosis``: the OSP kurtosis of a hidden state is at least ``times_floor`` × its floor and
      grows by ``growth`` over the last ``window`` probes, and steadily (watch)
    """
    found = [
        _nonfinite_activations(run),
        *_nonfinite_scalars(run),
        _diverged(run),
        _stopped_by_spike(run),
        _growing(run, rules),
    ]
    return [alert for alert in found if alert is not None]


def scalar(run: Run, name: str) -> Float[np.ndarray, " row"]:
    """A scalar at the steps of ``run.series``: NaN where it was not recorded, everywhere if it never was."""
    series = run.series
    return series[name].values if name in series else np.full(series.sizes["step"], np.nan)


def growth(values: Float[np.ndarray, " probe"]) -> float:
    """exp of the median slope of ln y between any two probes, times the probes between first and last.

    The Theil–Sen line: one odd probe does not turn it. NaN with fewer than two values above 0.
    """
    places = np.flatnonzero(np.isfinite(values) & (values > 0))
    if len(places) < 2:
        return float("nan")
    y = np.log(values[places])
    first, second = np.triu_indices(len(places), 1)
    slope = np.median((y[second] - y[first]) / (places[second] - places[first]))
    return float(np.exp(slope * (len(values) - 1)))


def share_rising(values: Float[np.ndarray, " probe"]) -> float:
    """Share of the pairs of probes of which the later is the higher; pairs with NaN are none."""
    first, second = np.triu_indices(len(values), 1)
    return float((values[second] > values[first]).mean()) if len(first) else 0.0


def _nonfinite_activations(run: Run) -> Alert | None:
    name = "nonfinite_token_count"
    found: dict[str, np.ndarray] = {}
    for site in run.sites_with(name):
        if run.statistics_at(site)[name] == ("layer", "stratum"):
            bad = np.flatnonzero(run.values(site, name, {"stratum": "all"}, ("layer",)).values > 0)
            found |= {site: bad} if bad.size else {}
    if not found:
        return None
    probes = np.unique(np.concatenate(list(found.values())))
    site = min(found, key=lambda name: found[name][0])
    row = run.values(site, name, {"stratum": "all"}).isel(step=int(probes[0]))
    where = f"{site}, layer {row['layer'].values[row.values > 0][0]}"
    step = int(run.steps[probes[0]])
    return Alert(
        "nonfinite_activations",
        "bad",
        f"NaN or Inf in activations of {_count(len(probes), 'probed step')}, first at step {step:,} "
        f"({where})",
        step,
        float(len(probes)),
    )


def _nonfinite_scalars(run: Run) -> list[Alert]:
    steps, found = run.series["step"].values, []
    for name in WRITTEN_WITH:
        if name not in run.series:
            continue
        values = scalar(run, name)
        bad = np.flatnonzero(np.isinf(values) | _recorded_as_nan(run, name))
        if bad.size:
            step = int(steps[bad[0]])
            text = f"{name} is {values[bad[0]]} at step {step:,}" + (
                f" and {_count(bad.size - 1, 'later step')}" if bad.size > 1 else ""
            )
            found.append(Alert("nonfinite_scalars", "bad", text, step, float(values[bad[0]])))
    return found


def _recorded_as_nan(run: Run, name: str) -> Bool[np.ndarray, " row"]:
    """Where a scalar was recorded and is NaN, which it is as well where it was not recorded.

    Our trainer records it together with others, which tell. A loop of somebody else's may record each when it
    likes. There, NaN are taken as recorded at the end alone, where nothing but NaN has come in its rows for
    longer than ever before between two numbers.
    """
    values = scalar(run, name)
    rows = np.zeros(len(values), bool)
    for other in WRITTEN_WITH[name]:
        rows |= np.isfinite(scalar(run, other))
    if isinstance(run.attrs.get("config"), dict):
        missing = np.isnan(values) & rows
        missing[-1:] &= name != "held_out_loss"  # which comes a moment later than what it comes with
        return missing
    # Of a row in which there is no number at all something was recorded, and as NaN.
    rows |= ~np.any([np.isfinite(scalar(run, str(other))) for other in run.series], axis=0)
    rows |= np.isfinite(values)
    numbers = np.flatnonzero(np.isfinite(values[rows]))
    longest = (np.diff(numbers) - 1).max(initial=0)
    missing = np.zeros(len(values), bool)
    if len(numbers) > 1 and rows.sum() - 1 - numbers[-1] > longest:
        missing[np.flatnonzero(rows)[numbers[-1] + 1 :]] = True
    return missing & np.isnan(values)


def _diverged(run: Run) -> Alert | None:
    bad = np.flatnonzero(scalar(run, "skipped_step") > 0)
    if not bad.size:
        return None
    steps = run.series["step"].values[bad]
    text = f"the trainer passed over {_count(bad.size, 'diverged step')}, the last is {int(steps[-1]):,}"
    return Alert("diverged_steps", "bad", text, int(steps[-1]), float(bad.size))


def _stopped_by_spike(run: Run) -> Alert | None:
    """Where the trainer stopped; nothing moved in that step or since."""
    stopped = np.flatnonzero(scalar(run, "stopped_step") > 0)
    if not stopped.size:
        return None
    last = stopped[-1]
    loss, norm, step = scalar(run, "loss"), scalar(run, "gradient_norm"), int(run.series["step"][last])
    if not np.isfinite(loss[last] + norm[last]):
        return None
    before = loss[:last][np.isfinite(loss[:last])][-10:]
    usual = ""
    if before.size:
        usual = f", the median of the {before.size} recorded before it is {np.median(before):.4g}"
    text = (
        f"training stopped at step {step:,}: its loss of {loss[last]:.4g} is a spike{usual}. "
        f"The state after step {step - 1:,} is saved: go on with --resume --set divergence.policy=skip, "
        "which passes over such steps, or begin again with a lower optimizer.lr"
    )
    return Alert("loss_spike", "bad", text, step, float(loss[last]))


def _growing(run: Run, rules: AlertRules) -> Alert | None:
    kurtosis = hidden_state_kurtosis(run)
    if kurtosis is None or kurtosis.sizes["step"] < rules.window:
        return None
    recent = kurtosis.values[:, -rules.window :]
    over = recent[:, -1] / kurtosis["floor"].values
    grown = np.array([growth(row) for row in recent])
    steady = np.array([share_rising(row) for row in recent])
    rising = np.flatnonzero((over >= rules.times_floor) & (grown >= rules.growth) & (steady >= rules.rising))
    if not rising.size:
        return None
    worst = rising[np.argmax(over[rising])]
    others = f"; {_count(rising.size - 1, 'other hidden state')} likewise" if rising.size > 1 else ""
    return Alert(
        "growing_kurtosis",
        "watch",
        f"OSP kurtosis of {kurtosis['hidden_state'].values[worst]} is {over[worst]:,.0f} times its floor, "
        f"having grown {grown[worst]:.2f}-fold over the last {rules.window} probes{others}",
        int(kurtosis["step"].values[-1]),
        float(over[worst]),
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
