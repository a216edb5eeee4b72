"""When a series leaves its noise: change points, exponential growth and plateau, with intervals.

The series is y = max(ln(κ / noise), 0) by probed step: what lies below the noise is noise.

* **Onset**: ``ruptures`` (KernelCPD, linear kernel: exact least squares of a piecewise constant mean, Killick
  et al. 2012, Celisse et al. 2018) cuts y into segments with the penalty 3 σ² ln n for each. σ is the noise
  of y, from the distance of each value to the line between its neighbours (median: few jumps don't count).
  The first segment whose mean reaches ln(departure), for two probes or more, has departed; the onset is the
  first step of the unbroken rise of segment means that leads to it: the first that can be told from noise.
* **Growth**: least squares of y = a + b min(t, t_plateau) on the probes from the onset on. The doubling time
  is ln 2 / b; the plateau is where the line ends, if the Bayesian information criterion asks for an end.
  The line meets the mean of y before the onset at the start of growth, which is before the onset: a
  growth is smaller than the noise at first.
* **Intervals**: residuals of both fits are drawn with replacement, everything is estimated again, and
  quantiles are taken. The lower end of an onset is moved to the probe before: nothing is known between two.
  On planted series of 50 probes, of 90% intervals 80 to 90% hold the doubling time and 55 to 85% the start of
  growth: they know the noise, and not how far a course is from an exponential.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import ruptures
from jaxtyping import Float, Int

__all__ = ["DEPARTURE", "FEWEST_PROBES", "SeriesEmergence", "State", "emergence_of_series", "first_rise"]

FEWEST_PROBES = 5
"""Fewer can't tell a change of mean from noise."""
DEPARTURE = 3.0
"""How many times the noise a kurtosis has to be: untrained and OSP models stay below 2.5."""
LEAST_NOISE = 0.05
"""Of ln κ. An estimate of the noise from few probes can be 0 by chance."""
MOST_BENDS = 64
"""Candidates for the step of the plateau; more are thinned evenly."""

State = Literal["noise", "onset", "from the start", "unknown"]
_NONE = (float("nan"), float("nan"), float("nan"))


@dataclass(frozen=True)
class SeriesEmergence:
    """What became of one series. Of three numbers: the estimate, and the ends of its interval."""

    state: State
    onset: tuple[float, float, float] = _NONE
    """step"""
    start: tuple[float, float, float] = _NONE
    """step at which the line of growth meets the noise"""
    doubling: tuple[float, float, float] = _NONE
    """steps"""
    plateau: tuple[float, float, float] = _NONE
    """y on the plateau; NaN while it still grows"""
    plateau_step: float = float("nan")
    agreement: float = float("nan")
    """share of the bootstrap draws that found an onset too"""
    raised_at_end: bool = False


@dataclass
class _Growth:
    """Fits of line and plateau to series of the same steps; what only the steps decide is computed once."""

    steps: Float[np.ndarray, " probe"]
    bends: Int[np.ndarray, " bend"] = field(init=False)
    bases: Float[np.ndarray, "bend probe two"] = field(init=False)
    solve: Float[np.ndarray, "bend two probe"] = field(init=False)

    def __post_init__(self) -> None:
        last = len(self.steps) - 1
        # A plateau takes two probes beyond its bend; the last candidate is growth without an end.
        inner = np.arange(2, last - 1)
        if len(inner) > MOST_BENDS:
            inner = inner[np.linspace(0, len(inner) - 1, MOST_BENDS).astype(int)]
        self.bends = np.append(inner, last)
        time = self.steps - self.steps[0]
        # Columns 1 and min(t, t_bend), one matrix a candidate; its pseudo-inverse gives the least squares.
        until_bend = np.minimum(time, time[self.bends][:, None])
        self.bases = np.stack([np.ones_like(until_bend), until_bend], axis=-1)
        self.solve = np.linalg.pinv(self.bases)

    def fit(self, y: Float[np.ndarray, " probe"]) -> tuple[float, int, Float[np.ndarray, " probe"]]:
        """Slope, place of the bend among the probes (the last one: none), and the fitted values."""
        # (a, b) of y = a + b · min(t, t_bend) by least squares, for every candidate of the bend at once.
        coefficients = self.solve @ y
        fitted = np.einsum("bpt,bt->bp", self.bases, coefficients)
        count = len(y)
        # Bayesian information criterion: n ln(mean squared error) + p ln n. A bend is one parameter more than
        # growth without an end (the last candidate); what all candidates share is left out.
        error = np.maximum(np.mean((y - fitted) ** 2, axis=1), LEAST_NOISE**2)
        criterion = count * np.log(error)
        criterion[:-1] += np.log(count)
        best = int(np.argmin(criterion))
        return float(coefficients[best, 1]), int(self.bends[best]), fitted[best]


def noise_of(steps: Float[np.ndarray, " probe"], y: Float[np.ndarray, " probe"]) -> float:
    """σ of the values around a smooth course: median distance to the line between both neighbours."""
    # d_i = y_i − (1 − w) y_(i−1) − w y_(i+1), w the place of step i between its neighbours: of independent
    # noise its standard deviation is σ √(1 + w² + (1 − w)²). A normal law's σ is 1.4826 times its median |x|.
    share = (steps[1:-1] - steps[:-2]) / (steps[2:] - steps[:-2])
    distance = y[1:-1] - (1 - share) * y[:-2] - share * y[2:]
    scaled = np.abs(distance) / np.sqrt(1 + share**2 + (1 - share) ** 2)
    return max(float(np.median(scaled)) * 1.4826, LEAST_NOISE)


def first_rise(y: Float[np.ndarray, " probe"], sigma: float, departure: float) -> tuple[int | None, bool]:
    """The probe at which the rise above ``departure`` begins (None: never), and whether y ends above."""
    # Why a change point, and not the first step above a threshold: docs/decisions.md, Analyses.
    penalty = 3 * sigma**2 * np.log(len(y))
    search = ruptures.KernelCPD(kernel="linear", min_size=1, jump=1).fit(y)
    ends = [int(end) for end in search.predict(pen=penalty)]
    starts = [0, *ends[:-1]]
    means = [float(np.mean(y[start:end])) for start, end in zip(starts, ends, strict=True)]
    level = float(np.log(departure))
    raised = np.repeat([mean >= level for mean in means], np.diff([0, *ends]))
    # The first two probes in a row whose segments' means reach ln(departure): one alone is a spike.
    stays = np.flatnonzero(raised[:-1] & raised[1:])
    if not stays.size:
        return None, False
    departed = int(np.searchsorted(ends, stays[0], side="right"))
    # Back along the unbroken rise of means. One step up from the noise counts; segment 0, the noise itself,
    # does not, whatever its mean.
    while departed > 1 and means[departed - 2] < means[departed - 1]:
        departed -= 1
    return starts[departed], means[-1] >= level


@dataclass(frozen=True)
class _Estimate:
    begin: int
    raised: bool
    start: float
    slope: float
    bend: int | None
    """probe at which the plateau begins; None: none yet"""
    fitted: Float[np.ndarray, " probe"]


def _estimate(
    steps: np.ndarray, y: np.ndarray, sigma: float, departure: float, fits: dict[int, _Growth]
) -> _Estimate | None:
    begin, raised = first_rise(y, sigma, departure)
    if begin is None:
        return None
    fitted = np.concatenate([np.full(begin, np.mean(y[:begin]) if begin else 0.0), np.zeros(len(y) - begin)])
    if len(y) - begin < 3:
        fitted[begin:] = np.mean(y[begin:])
        return _Estimate(begin, raised, float("nan"), float("nan"), None, fitted)
    if begin not in fits:
        fits[begin] = _Growth(steps[begin:])
    slope, bend, fitted[begin:] = fits[begin].fit(y[begin:])
    ended = bend < len(y) - begin - 1
    slope = slope if slope > 0 else float("nan")
    # The line of growth, carried back from the onset: t_0 = t_onset − (y_onset − mean of y before) / slope.
    start = steps[begin] - (fitted[begin] - fitted[0]) / slope if begin else float("nan")
    return _Estimate(begin, raised, float(start), slope, begin + bend if ended else None, fitted)


def emergence_of_series(
    steps: Float[np.ndarray, " probe"],
    y: Float[np.ndarray, " probe"],
    *,
    departure: float = DEPARTURE,
    level: float = 0.9,
    draws: int = 100,
    seed: int = 0,
) -> SeriesEmergence:
    """Onset, doubling time and plateau of one series, each with an interval (see the module).

    Parameters
    ----------
    steps, y : of the probes, ascending; y = max(ln(κ / noise), 0); probes with NaN are left out
    departure : the multiple of the noise that has to be reached
    level : share of the bootstrap draws inside an interval
    draws : of the bootstrap
    """
    finite = np.isfinite(y)
    steps, y = np.asarray(steps, dtype=np.float64)[finite], np.asarray(y, dtype=np.float64)[finite]
    if len(y) < FEWEST_PROBES:
        return SeriesEmergence("unknown")
    sigma = noise_of(steps, y)
    fits: dict[int, _Growth] = {}
    estimate = _estimate(steps, y, sigma, departure, fits)
    if estimate is None:
        return SeriesEmergence("noise")
    before, after = _residuals(y - estimate.fitted, estimate.begin)
    # The residual bootstrap: a resample is the fitted course plus residuals drawn with replacement, cut at 0.
    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(draws):
        residuals = np.concatenate([rng.choice(part, len(part)) for part in (before, after) if len(part)])
        resample = np.maximum(estimate.fitted + residuals, 0.0)
        resampled.append(_estimate(steps, resample, sigma, departure, fits))
    with_onset = [draw for draw in resampled if draw is not None]
    estimates = [estimate, *with_onset]
    begins = np.array([each.begin for each in estimates])
    low, high = np.quantile(begins, [(1 - level) / 2, (1 + level) / 2], method="nearest").astype(int)
    return SeriesEmergence(
        "onset" if estimate.begin else "from the start",
        (float(steps[estimate.begin]), float(steps[max(low - 1, 0)]), float(steps[high])),
        _interval([each.start for each in estimates], level),
        _interval([np.log(2) / each.slope for each in estimates], level),
        _interval([_top(each) for each in estimates], level),
        float(steps[estimate.bend]) if estimate.bend is not None else float("nan"),
        len(with_onset) / draws if draws else float("nan"),
        estimate.raised,
    )


def _residuals(residuals: np.ndarray, begin: int) -> tuple[np.ndarray, np.ndarray]:
    """Those before and after the onset, apart (noise is cut off at 0), widened by the parameters fitted.

    √(n / (n − p)) with p = 1 before the onset (the mean) and p = 3 after it (intercept, slope and bend).
    """
    before, after = residuals[:begin], residuals[begin:]
    return (
        before * np.sqrt(len(before) / max(len(before) - 1, 1)),
        after * np.sqrt(len(after) / max(len(after) - 3, 1)),
    )


def _top(estimate: _Estimate) -> float:
    return float(estimate.fitted[-1]) if estimate.bend is not None else float("nan")


def _interval(values: list[float], level: float) -> tuple[float, float, float]:
    """The first value, and quantiles of all that are finite."""
    finite = np.array(values)[np.isfinite(values)]
    if not np.isfinite(values[0]):
        return _NONE
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(values[0]), float(low), float(high)
