"""A recorded number that changes from one probe to the next by far more than it ever did before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from osp_diag.monitoring.finding import Finding
from osp_diag.monitoring.grain import counting_error, grain
from osp_diag.monitoring.jump_record import JumpRecord
from osp_diag.monitoring.moment import TIMES_HIGH, Moment, Table
from osp_diag.monitoring.places import Place
from osp_diag.monitoring.rule import RunningRule
from osp_diag.schema import OPTIMIZER, WEIGHTS


@dataclass
class Rule(RunningRule):
    """|ln(now / before)| in units of the largest such change of that statistic and site between
    earlier probes.

    Of all layers, heads and matrices together: a few changes of one number are too few to say what is usual.
    What a floor of noise hides is no change: numbers count as not below it. Where noise hid nearly all of the
    past, it doesn't say how fast a number grows, which then jumps only if it is high at once. A share of few
    sequences, and a small count, change by chance as well: by at least four standard errors of the ratio of
    two such counts if it is a jump. Of what has been below 0 as well, such as a cosine, ratios near 0 say
    nothing: it counts as not below the largest distance that it had on the other side.

    The change from step 0, whose weights are random, is no usual one, nor is one that was itself a jump.
    Where this pause between probes is longer than any before, a change counts for as many times less.

    A fault before enough is known can't be told, and it must not hide a later one. So a pause whose largest
    change would be a jump beside the next largest counts as twice that: one pause of four, at most
    :attr:`odd_pauses`.

    A number that comes back after one odd probe does not jump: its change counts from the probe before last,
    where that is the smaller. A jump is told by its first place in network order, and a site and layer that
    jumped at the probe before is not told again.
    """

    times_usual: float = 4.0
    """Five healthy trainings reached 3.65 (docs/log.md)."""
    usual_changes: int = 4
    """So many earlier changes have to be known of a number: about five probes after the first."""
    changes_together: int = 6
    """And so many of all layers and parts together, for a site of one layer has fewer."""
    smallest_usual: float = 0.1
    """of ln: a change by less than 4 times that (a factor of 1.5) is no jump, however still a number was"""
    odd_pauses: int = 2
    """A spike makes two, up and down."""
    odd_as_usual: float = 2.0
    record: JumpRecord = field(default_factory=JumpRecord)
    """Every number's first jump, not only the first place's."""
    _groups: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Column → which statistic and site it is of."""
    _numbers: dict[tuple[str | None, str], int] = field(default_factory=dict)
    _largest: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    """(group, rank): the largest change of each earlier pause, largest first, as many as decide"""
    _pauses: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Of each group: how many there were."""
    _known: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    _above_noise: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Of each column: how many changes were known that noise did not hide."""
    _depths: np.ndarray = field(default_factory=lambda: np.empty(0))
    """Of each group: how far below 0 any of its numbers has been."""
    _last_but_one: np.ndarray = field(default_factory=lambda: np.empty(0))
    """ln of the numbers two probes ago; NaN of what jumped then."""
    _jumped: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    _longest: int = 0
    _jumping: frozenset[tuple[str | None, int | None]] = frozenset()
    """The sites and layers that jumped at the last probe."""

    def at_probe(self, moment: Moment) -> Iterable[Finding]:
        table, previous = moment.table, moment.previous
        if not previous:  # none, or step 0
            return ()
        self._widen(table.places)
        np.fmax.at(self._depths, self._groups, -moment.values)
        with np.errstate(divide="ignore"):
            logarithms = np.maximum(table.logarithms, np.log(self._depths)[self._groups])
        pause = moment.step - previous
        change = np.abs(logarithms[1] - logarithms[0]) / max(1.0, pause / (self._longest or pause))
        self._longest = max(self._longest, pause)
        since_last_but_one = np.nan_to_num(np.abs(logarithms[1] - self._last_but_one), nan=np.inf)
        size = np.minimum(change, since_last_but_one) / self._usual()[self._groups]
        known = (self._known >= self.usual_changes) & self._has_enough(self._known)
        high = ~(moment.values < TIMES_HIGH * table.floors)  # where noise has no floor, too
        jumps = (size >= self.times_usual) & known & (high | self._has_enough(self._above_noise))
        for column in np.flatnonzero(jumps).tolist():
            jumps[column] = change[column] >= self.times_usual * self._counting_error(table, column)
        self.record.add(table.places, moment.step, np.where(known, size, np.nan), jumps)
        usual = np.isfinite(change) & ~jumps
        self._learn(change, usual)
        self._above_noise += usual & ~table.are_noise
        self._last_but_one = np.where(self._jumped, np.nan, logarithms[0])
        self._jumped = jumps
        columns = np.flatnonzero(jumps).tolist()
        new = [column for column in columns if table.places[column][:2] not in self._jumping]
        self._jumping = frozenset(table.places[column][:2] for column in columns)
        return (self._finding(moment, size, new),) if new else ()

    def _usual(self) -> Float[np.ndarray, " group"]:
        largest = np.maximum(self._largest, self.smallest_usual)
        usual = largest[:, 0]
        for odd in range(1, self.odd_pauses + 1):
            stands_out = largest[:, odd - 1] >= self.times_usual * largest[:, odd]
            forgiven = stands_out & (odd * self.usual_changes <= self._pauses)
            usual = np.where(forgiven, self.odd_as_usual * largest[:, odd], usual)
        return usual

    def _has_enough(self, changes: np.ndarray) -> np.ndarray:
        """Of each column: whether there were enough of these changes of its statistic and site together."""
        together = np.bincount(self._groups, changes, len(self._pauses))
        return (together >= self.changes_together)[self._groups]

    def _counting_error(self, table: Table, column: int) -> float:
        """0 of weights, optimizers and scalars, which are no samples."""
        site = table.places[column].site
        if site is None or site.startswith((OPTIMIZER, WEIGHTS)):
            return 0.0
        before, now = np.exp(table.logarithms[:, column])
        same = np.flatnonzero(self._groups == self._groups[column])
        return counting_error(before, now, grain(table.recent()[:, same]))

    def _learn(self, change: np.ndarray, usual: np.ndarray) -> None:
        now = np.full(len(self._pauses), -1.0)
        np.maximum.at(now, self._groups[usual], change[usual])
        self._pauses += now >= 0
        ranked = np.column_stack([self._largest, np.maximum(now, 0)])
        self._largest = np.sort(ranked, axis=1)[:, :0:-1]
        self._known += usual

    def _widen(self, places: list[Place]) -> None:
        new = places[len(self._groups) :]
        numbers = [self._numbers.setdefault((p.site, p.statistic), len(self._numbers)) for p in new]
        self._groups = np.concatenate([self._groups, np.array(numbers, np.int64)])
        self._known = np.pad(self._known, (0, len(new)))
        self._above_noise = np.pad(self._above_noise, (0, len(new)))
        self._last_but_one = np.pad(self._last_but_one, (0, len(new)), constant_values=np.nan)
        self._jumped = np.pad(self._jumped, (0, len(new)))
        groups = len(self._numbers) - len(self._pauses)
        self._pauses = np.pad(self._pauses, (0, groups))
        self._depths = np.pad(self._depths, (0, groups))
        ranks = self.odd_pauses + 1 - self._largest.shape[1]
        self._largest = np.pad(self._largest, ((0, groups), (0, ranks)))

    def _finding(self, moment: Moment, size: np.ndarray, jumps: list[int]) -> Finding:
        column = moment.largest_at_first(jumps, size)
        place = moment.table.places[column]
        channel = moment.changed_channel(place)
        before, now = moment.table.recent(2)[:, column]
        others = len(jumps) - 1
        sentence = (
            f"{place.full_name} went from {before:.3g} to {now:.3g} between steps {moment.previous:,} "
            f"and {moment.step:,}, {size[column]:.1f} times the usual largest change there between probes"
            + (f", in channel {channel}" if channel is not None else "")
            + (
                f"; {others:,} other numbers jumped too"
                if others > 1
                else "; one other number jumped too" * others
            )
        )
        return moment.finding(
            column,
            rule="jump",
            severity="watch",
            sentence=sentence,
            last_good_step=moment.previous,
            channel=channel,
            size=float(size[column]),
        )
