"""Reading the judged numbers of a run, some steps at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from osp_diag.monitoring.places import Block, block_of, is_judged_group, is_judged_statistic
from osp_diag.runs.run import Run

__all__ = ["probes_between"]

_PIECE = 32
"""Probed steps that are read at a time."""


def probes_between(run: Run, start: int, stop: int) -> Iterator[tuple[int, list[Block]]]:
    """(place, judged numbers) of each probed step from place ``start`` to before ``stop``."""
    for first in range(start, stop, _PIECE):
        last = min(first + _PIECE, stop)
        blocks = list(_blocks_between(run, first, last))
        for row in range(last - first):
            yield first + row, [Block(b.places, b.values[[row]], b.floor) for b in blocks]


def _blocks_between(run: Run, start: int, stop: int) -> Iterator[Block]:
    declared = tuple(run.attrs.get("sites") or ())
    for group in (*run.sites, *run.beside):
        if not is_judged_group(group, declared):
            continue
        for statistic, dims in run.statistics_at(group).items():
            if not is_judged_statistic(dims, None):
                continue
            array = run.rows(group, statistic, start, stop)
            if array.dtype.kind == "f" and is_judged_statistic(dims, array.attrs.get("units")):
                yield block_of(group, statistic, array, partial(run.labels, group))
