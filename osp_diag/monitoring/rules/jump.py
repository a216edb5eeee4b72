"""A recorded number that changes from one probe to the next by far more than it ever did before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from osp_diag.monitoring.finding import Finding
from osp_diag.monitoring.moment import Moment
from osp_diag.monitoring.places import Place
from osp_diag.monitoring.rule import RunningRule


@dataclass
class Rule(RunningRule):
    """|ln(now / before)| in units of the largest such change of that statistic and site between
    earlier probes.

    Of all layers, heads and matrices together: a few changes of one number are too few to say what is usual.
    What a floor of noise hides is no change: numbers count as not below it. The change from step 0, whose
    weights are random, is no usual one, nor is one that was itself a jump. Where this pause between probes is
    longer than any before, a change counts for as many times less.
    """

    times_usual: float = 4.0
    """Three healthy trainings reached 3.65 in 65,372 comparisons (docs/log.md)."""
    usual_changes: int = 4
    """So many earlier changes have to be known of a number: about five probes after the first."""
    changes_together: int = 6
    """And so many of all layers and parts together, for a site of one layer has fewer."""
    smallest_usual: float = 0.1
    """of ln: a change by less than 4 times that (a factor of 1.5) is no jump, however still a number was"""
    _groups: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Column → which statistic and site it is of."""
    _numbers: dict[tuple[str | None, str], int] = field(default_factory=dict)
    _usual: np.ndarray = field(default_factory=lambda: np.empty(0))
    _known: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    _longest: int = 0
    _is_jumping: bool = False

    def at_probe(self, moment: Moment) -> Iterable[Finding]:
        table, previous = moment.table, moment.previous
        if not previous:  # none, or step 0
            return ()
        self._widen(table.places)
        logarithms = table.logarithms[-2:]
        pause = moment.step - previous
        change = np.abs(logarithms[1] - logarithms[0]) / max(1.0, pause / (self._longest or pause))
        self._longest = max(self._longest, pause)
        size = change / np.maximum(self._usual, self.smallest_usual)[self._groups]
        together = np.bincount(self._groups, self._known, len(self._usual))[self._groups]
        known = (self._known >= self.usual_changes) & (together >= self.changes_together)
        jumps = (size >= self.times_usual) & known
        usual = np.isfinite(change) & ~jumps
        np.maximum.at(self._usual, self._groups[usual], change[usual])
        self._known += usual
        was_jumping, self._is_jumping = self._is_jumping, bool(jumps.any())
        return () if was_jumping or not jumps.any() else (self._finding(moment, size, np.flatnonzero(jumps)),)

    def _widen(self, places: list[Place]) -> None:
        new = places[len(self._groups) :]
        numbers = [self._numbers.setdefault((p.site, p.statistic), len(self._numbers)) for p in new]
        self._groups = np.concatenate([self._groups, np.array(numbers, np.int64)])
        self._known = np.pad(self._known, (0, len(new)))
        self._usual = np.pad(self._usual, (0, len(self._numbers) - len(self._usual)))

    def _finding(self, moment: Moment, size: np.ndarray, jumps: np.ndarray) -> Finding:
        places = moment.table.places
        first = places[moment.first(jumps)]
        here = [int(j) for j in jumps if places[int(j)][:2] == first[:2]]
        column = max(here, key=lambda index: float(size[index]))
        place, channel = places[column], moment.changed_channel(places[column])
        before, now = moment.table.recent(2)[:, column]
        others = len(jumps) - 1
        where = f" at {place.words}" if place.words else ""
        sentence = (
            f"{place.statistic}{where} went from {before:.3g} to {now:.3g} between steps {moment.previous:,} "
            f"and {moment.step:,}, {size[column]:.1f} times the largest change there from probe to probe "
            "until then"
            + (f", in channel {channel}" if channel is not None else "")
            + (
                f"; {others:,} other numbers jumped too"
                if others > 1
                else "; one other number jumped too" * others
            )
        )
        return Finding(
            rule="jump",
            severity="watch",
            step=moment.step,
            last_good_step=moment.previous,
            first_bad_step=moment.step,
            site=place.site,
            layer=place.layer,
            channel=channel,
            statistic=place.statistic,
            value=float(now),
            size=float(size[column]),
            sentence=sentence,
        )
