"""What a rule sees when a step was probed: the judged numbers of now and of the last probes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from osp_diag.monitoring.finding import Finding, Severity
from osp_diag.monitoring.places import Place, places_in_order

__all__ = ["TIMES_FLOOR", "TIMES_HIGH", "WINDOW", "Moment", "Profiles", "Table", "stacked"]

WINDOW = 10
"""Probes that the rules look back over: of fewer one odd probe decides what is steady growth."""

TIMES_FLOOR = 2.0
"""Up to so many times what Gaussian noise scores a number is taken for noise, whose changes say nothing."""

TIMES_HIGH = 10.0
"""From so many times that, a decade, it is high."""

Profiles = Callable[[str], tuple[Mapping[int, np.ndarray], Mapping[int, np.ndarray]]]
"""Site → RMS by channel of each layer, at the probe before and now."""


def stacked(rows: Iterable[np.ndarray], width: int) -> Float[np.ndarray, "row place"]:
    """Rows below one another, each filled up with NaN to ``width``."""
    return np.stack([np.pad(row, (0, width - len(row)), constant_values=np.nan) for row in rows])


class Table:
    """The judged numbers of the last :data:`WINDOW` probes: a column a place, which may come at any time."""

    def __init__(self) -> None:
        self.places: list[Place] = []
        self.index: dict[Place, int] = {}
        self.floors = np.empty(0)
        """by column; NaN where noise has no floor"""
        self.steps: deque[int] = deque(maxlen=WINDOW)
        self.rows: deque[np.ndarray] = deque(maxlen=WINDOW)

    def add(self, step: int, numbers: Mapping[Place, float], floors: Mapping[Place, float]) -> None:
        """The numbers of one probe."""
        new = [place for place in numbers if place not in self.index]
        for place in new:
            self.index[place] = len(self.places)
            self.places.append(place)
        if new:
            added = np.array([floors.get(place, np.nan) for place in new])
            self.floors = np.concatenate([self.floors, added])
        row = np.full(len(self.places), np.nan)
        row[[self.index[place] for place in numbers]] = list(numbers.values())
        self.steps.append(step)
        self.rows.append(row)

    def columns_of(self, *statistics: str) -> list[int]:
        """The columns of these statistics."""
        return [column for column, place in enumerate(self.places) if place.statistic in statistics]

    def recent(self, count: int = WINDOW) -> Float[np.ndarray, "probe place"]:
        """The last ``count`` probes, NaN where a place was not there yet."""
        return stacked(list(self.rows)[-count:], len(self.places))

    @property
    def are_noise(self) -> Bool[np.ndarray, " place"]:
        """Where neither of the last two probes is above :data:`TIMES_FLOOR` × floor."""
        return np.all(self.recent(2) <= TIMES_FLOOR * self.floors, axis=0)

    @property
    def logarithms(self) -> Float[np.ndarray, "probe place"]:
        """ln of the last two probes, not below :data:`TIMES_FLOOR` × floor; NaN where not above 0."""
        recent = self.recent(2)
        values = np.fmax(recent, np.where(np.isnan(self.floors), -np.inf, TIMES_FLOOR * self.floors))
        values[np.isnan(recent)] = np.nan
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(np.where(np.isfinite(values) & (values > 0), values, np.nan))


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A probed step.

    Attributes
    ----------
    step, previous : this one and the one before; None where this is the first
    table : the judged numbers, this step's last
    profiles : where they are known
    """

    step: int
    previous: int | None
    table: Table
    profiles: Profiles

    @property
    def values(self) -> Float[np.ndarray, " place"]:
        """This step's numbers."""
        return self.table.recent(1)[0]

    def first(self, columns: Iterable[int]) -> int:
        """Of some columns the first in network order."""
        places = self.table.places
        return self.table.index[places_in_order(places[column] for column in columns)[0]]

    def largest_at_first(self, columns: Sequence[int], size: Float[np.ndarray, " place"]) -> int:
        """Of the columns of one site and layer, the first in network order, the one of the largest size."""
        places = self.table.places
        first = places[self.first(columns)]
        here = [column for column in columns if places[column][:2] == first[:2]]
        return max(here, key=lambda column: float(size[column]))

    def finding(
        self,
        column: int,
        *,
        rule: str,
        severity: Severity,
        sentence: str,
        last_good_step: int | None,
        channel: int | None = None,
        size: float | None = None,
    ) -> Finding:
        """What a rule finds in one of this step's numbers, which was first bad at this step."""
        place = self.table.places[column]
        return Finding(
            rule=rule,
            severity=severity,
            step=self.step,
            first_bad_step=self.step,
            sentence=sentence,
            value=float(self.values[column]),
            statistic=place.statistic,
            last_good_step=last_good_step,
            site=place.site,
            layer=place.layer,
            channel=channel,
            size=size,
        )

    def changed_channel(self, place: Place) -> int | None:
        """The channel whose size changed since the last probe, where one stands out."""
        if place.site is None or place.layer is None:
            return None
        before, now = (profile.get(place.layer) for profile in self.profiles(place.site))
        if before is None or now is None or before.shape != now.shape or not (before > 0).all():
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            change = np.abs(np.log(now / before))
        if not np.isfinite(change).all() or len(change) < 3:
            return None
        largest = int(np.argmax(change))
        second = float(np.partition(change, -2)[-2])
        return largest if change[largest] > 2 * max(second, 0.1) else None

    def loudest_channel(self, place: Place) -> int | None:
        """The channel of the largest RMS, where it is at least twice the median channel's."""
        now = (
            self.profiles(place.site)[1].get(place.layer) if place.site and place.layer is not None else None
        )
        if now is None or not np.isfinite(now).all() or now.max() < 2 * np.median(now):
            return None
        return int(np.argmax(now))
