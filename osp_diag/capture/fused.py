"""Folding on a GPU: kernels while the model runs, everything else once for many sites together.

A site costs the forward pass two readings and four launches. What remains, arithmetic on one number a token
or a channel, would be hundreds of tiny launches a site; it is put off, and done for up to 32 sites at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from osp_diag.capture.compiling import compile_once
from osp_diag.capture.kernels import SiteStatistics, count_beyond, site_statistics
from osp_diag.estimators._arrays import once
from osp_diag.estimators.activation import ActivationObservation, significant_bits_of
from osp_diag.estimators.base import Layout, Measurement, State, Suite, measure_each
from osp_diag.estimators.reductions import (
    GENERIC,
    ChannelSums,
    Exceedances,
    RowMoments,
    assembled_sums,
    with_union,
)

__all__ = ["FusedFolding", "FusedObservation"]

AT_ONCE = 32
"""Sites whose small arithmetic is done together: few launches, and little to hold in the meantime."""

Merge = Callable[[tuple[Any, ...], Suite, Layout, State], None]
"""(keys, a suite that knows the fields, layout, increments with a leading axis over the keys)"""


class FusedObservation(ActivationObservation):
    """An activation observation whose reductions came from the kernels; the rest is the generic definition.

    Without ``x`` it serves the measurements that do not read elements.
    """

    def __init__(
        self, x: Tensor | None, strata: Tensor, statistics: SiteStatistics, *, significant_bits: int
    ) -> None:
        self.elements, self.raw_strata, self.statistics = x, strata, statistics
        self.significant_bits, self.reductions = significant_bits, GENERIC
        self.layout = Layout(channels=statistics.sums.shape[-1], tokens=strata.shape[-1])
        self._cache: dict[str, Any] = {}
        self.finite_token = statistics.rows[9] == 0
        self._counted = self.finite_token & (strata[0] > 0)
        self._rows = torch.where(self._counted, statistics.rows, 0.0)
        self.strata = strata * self._counted

    @property
    def raw(self) -> Tensor:
        """The activations as they came."""
        assert self.elements is not None, "a measurement that reads elements must set `reads_elements`"
        return self.elements

    @once
    def x(self) -> Tensor:
        """(batch, token, channel) float32, 0 where not counted."""
        return torch.where(self._counted[..., None], self.raw.float(), 0.0)

    @once
    def moments(self) -> RowMoments:
        """Moments of each token over its channels."""
        return RowMoments(*self._rows[:8])

    @once
    def median(self) -> Tensor:
        """Lower median of |x| of each token."""
        return self._rows[8]

    @once
    def channels(self) -> ChannelSums:
        """Sums over the tokens of each stratum."""
        sums = self.statistics.sums
        scale = self.statistics.scale.reshape(1).expand(sums.shape[0])
        return assembled_sums(list(sums[:, :4].unbind(1)), sums[:, 4].float(), scale)

    def beyond(self, threshold: Tensor, centre: Tensor | None = None) -> Exceedances:
        """Counts of |x − centre| ≥ threshold (one of each per sequence), by token and by channel."""
        batch, tokens, _ = self.raw.shape
        limit = threshold[:, None].expand(batch, tokens).reshape(-1).contiguous()
        middle = torch.zeros_like(limit)
        if centre is not None:
            middle = centre[:, None].expand(batch, tokens).reshape(-1).contiguous()
        part = part_of_tokens(self.strata)
        token, channel = count_beyond(self.raw, part, middle, limit)
        return Exceedances(
            token=token.reshape(batch, tokens), channel=with_union(torch, channel.double(), torch.sum)
        )


def part_of_tokens(strata: Tensor) -> Tensor:
    """The stratum of each token, 0 first, 1 delimiter, 2 rest, and −1 for none: (batch · token) int32."""
    parts = strata[1:].reshape(strata.shape[0] - 1, -1)
    # A token is in one part at most, so that Σ part · number is its part's number, 0 for none.
    order = torch.arange(1, parts.shape[0] + 1, device=parts.device, dtype=parts.dtype)
    return ((parts * order[:, None]).sum(0) - 1).int()


# Why kernels first and arithmetic later, and what was rejected: docs/decisions.md, Capture.
class FusedFolding:
    """Collects the statistics of sites, and hands over increments for many of them together.

    Parameters
    ----------
    merge : what to do with the increments of several keys
    """

    def __init__(self, merge: Merge) -> None:
        self.merge = merge
        self._queues: dict[tuple[Any, ...], list[tuple[Any, SiteStatistics]]] = {}
        self._suites: dict[tuple[Any, ...], Suite] = {}
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}

    def fold(self, key: Any, suite: Suite, x: Tensor, strata: Tensor) -> State:
        """Run the kernels on one site; returns the increments of what has to read the elements again."""
        bits = significant_bits_of(x)
        statistics = site_statistics(x, self._part_of_tokens(strata), bits)
        row_measurements = tuple(m for m in suite.measurements if not m.reads_elements)
        element_measurements = tuple(m for m in suite.measurements if m.reads_elements)
        if row_measurements:
            group = (row_measurements, tuple(x.shape), x.device, id(strata))
            self._suites[group] = suite
            queue = self._queues.setdefault(group, [])
            queue.append((key, statistics))
            if len(queue) == AT_ONCE:
                self._finish(group, strata)
        if not element_measurements:
            return {}
        return self._measure_elements(element_measurements, x, strata, statistics, bits)

    def finish(self) -> None:
        """Do what was put off, at the end of a forward pass."""
        for group in list(self._queues):
            self._finish(group, self._parts[group[3]][0])
        self._parts.clear()

    def forget(self) -> None:
        """Drop what was put off, of a forward pass that raised."""
        self._queues.clear()
        self._parts.clear()

    def _part_of_tokens(self, strata: Tensor) -> Tensor:
        if id(strata) not in self._parts:
            self._parts[id(strata)] = (strata, part_of_tokens(strata))
        return self._parts[id(strata)][1]

    def _finish(self, group: tuple[Any, ...], strata: Tensor) -> None:
        queue = self._queues.pop(group)
        measurements, (_, tokens, channels) = group[0], group[1]

        def measure(rows: Tensor, sums: Tensor, scale: Tensor) -> State:
            site = SiteStatistics(rows, sums, scale)
            # No bits are looked at again, so that their number does not matter.
            return measure_each(measurements, FusedObservation(None, strata, site, significant_bits=31))

        stacked = [torch.stack(field) for field in zip(*(statistics for _, statistics in queue), strict=True)]
        # The very measurements of one site, over a leading axis of sites: few launches for all of them.
        increments = torch.vmap(measure)(*stacked)
        layout = Layout(channels=channels, tokens=tokens)
        self.merge(tuple(key for key, _ in queue), self._suites[group], layout, increments)

    def _measure_elements(
        self,
        measurements: tuple[Measurement, ...],
        x: Tensor,
        strata: Tensor,
        statistics: SiteStatistics,
        bits: int,
    ) -> State:

        def measure(x: Tensor, strata: Tensor, rows: Tensor, sums: Tensor, scale: Tensor) -> State:
            site = SiteStatistics(rows, sums, scale)
            return measure_each(measurements, FusedObservation(x, strata, site, significant_bits=bits))

        name = ("read again", measurements, x.shape, x.stride(), x.dtype, x.device)
        return compile_once(name, measure)(x, strata, *statistics)
