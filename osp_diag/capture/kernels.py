"""Triton kernels for the reductions of an activation tensor: each reads the tensor once, in its own dtype.

They give what :mod:`osp_diag.estimators.reductions` defines, and are tested against it. Compiled by
Inductor the generic reductions read a site many times over; these read it once for all row statistics, the
exact median included, and once for all channel sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from osp_diag.estimators._arrays import once
from osp_diag.estimators.activation import ActivationObservation
from osp_diag.estimators.base import Layout
from osp_diag.estimators.reductions import (
    GENERIC,
    ChannelSums,
    Exceedances,
    RowMoments,
    assembled_sums,
    power_of_two_below,
    with_union,
)

__all__ = ["FusedObservation"]


@triton.jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    x_pointer, out_pointer, row_stride, rows, d, rank, BLOCK: tl.constexpr, BITS: tl.constexpr
):
    """All statistics of one row, which stays in registers; the median bit by bit from the highest."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < d
    x = tl.load(x_pointer + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    magnitude = tl.abs(x)
    bad = (x != x) | (magnitude == float("inf"))
    number_bad = tl.sum(bad.to(tl.float32), axis=0)
    x = tl.where(bad, 0.0, x)
    magnitude = tl.where(bad, 0.0, magnitude)
    peak = tl.max(magnitude, axis=0)
    z = x / tl.where(peak > 0, peak, 1.0)
    mean = tl.sum(z, axis=0) / d
    absolute = tl.sum(tl.abs(z), axis=0) / d
    z2 = z * z
    second = tl.sum(z2, axis=0) / d
    fourth = tl.sum(z2 * z2, axis=0) / d
    centred = tl.where(inside, z - mean, 0.0)
    c2 = centred * centred
    central_second = tl.sum(c2, axis=0) / d
    central_third = tl.sum(c2 * centred, axis=0) / d
    central_fourth = tl.sum(c2 * c2, axis=0) / d

    bits = tl.where(inside, magnitude.to(tl.int32, bitcast=True), 0x7FFFFFFF)
    answer = 0
    for step in tl.static_range(BITS):
        candidate = answer | (1 << (30 - step))
        below = tl.sum((bits < candidate).to(tl.int32), axis=0)
        answer = tl.where(below <= rank, candidate, answer)
    median = answer.to(tl.int32).to(tl.float32, bitcast=True)

    out = out_pointer + row
    tl.store(out, peak)
    tl.store(out + rows, mean)
    tl.store(out + 2 * rows, absolute)
    tl.store(out + 3 * rows, second)
    tl.store(out + 4 * rows, central_second)
    tl.store(out + 5 * rows, central_third)
    tl.store(out + 6 * rows, central_fourth)
    tl.store(out + 7 * rows, fourth)
    tl.store(out + 8 * rows, median)
    tl.store(out + 9 * rows, number_bad)


@triton.jit
def _channels_kernel(  # type: ignore[no-untyped-def]
    x_pointer,
    part_pointer,
    unit_pointer,
    shift_pointer,
    out_pointer,
    row_stride,
    rows,
    d,
    rows_per_program,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums over a run of rows for each stratum; rows of part −1 count nowhere."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    first = tl.program_id(1) * rows_per_program
    for part in tl.static_range(PARTS):
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        square = tl.zeros((ROWS, COLUMNS), tl.float32)
        fourth = tl.zeros((ROWS, COLUMNS), tl.float32)
        spread = tl.zeros((ROWS, COLUMNS), tl.float32)
        top = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, rows_per_program, ROWS):
            row = first + start + tl.arange(0, ROWS)
            known = row < rows
            mine = tl.load(part_pointer + row, mask=known, other=-1) == part
            if tl.max(mine.to(tl.int32), axis=0) > 0:
                unit = tl.load(unit_pointer + row, mask=known, other=0.0)
                shift = tl.load(shift_pointer + row, mask=known, other=0.0)
                place = row[:, None].to(tl.int64) * row_stride + column[None, :]
                taken = mine[:, None] & inside[None, :]
                x = tl.load(x_pointer + place, mask=taken, other=0.0).to(tl.float32)
                z = x * unit[:, None]
                z2 = z * z
                centred = tl.where(taken, z - shift[:, None], 0.0)
                total += z
                square += z2
                fourth += z2 * z2
                spread += centred * centred
                top = tl.maximum(top, tl.abs(x))
        out = out_pointer + ((tl.program_id(1) * PARTS + part) * 5).to(tl.int64) * d + column
        tl.store(out, tl.sum(total, axis=0), mask=inside)
        tl.store(out + d, tl.sum(square, axis=0), mask=inside)
        tl.store(out + 2 * d, tl.sum(fourth, axis=0), mask=inside)
        tl.store(out + 3 * d, tl.sum(spread, axis=0), mask=inside)
        tl.store(out + 4 * d, tl.max(top, axis=0), mask=inside)


@triton.jit
def _beyond_kernel(  # type: ignore[no-untyped-def]
    x_pointer,
    part_pointer,
    centre_pointer,
    limit_pointer,
    token_pointer,
    channel_pointer,
    row_stride,
    d,
    BLOCK: tl.constexpr,
):
    """Elements of one row at or beyond its limit; hits are rare, so channels are counted one by one."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    part = tl.load(part_pointer + row)
    counted = column < tl.where(part >= 0, d, 0)
    x = tl.load(x_pointer + row * row_stride + column, mask=counted, other=0.0).to(tl.float32)
    limit = tl.load(limit_pointer + row)
    hit = (tl.abs(x - tl.load(centre_pointer + row)) >= limit) & counted
    tl.store(token_pointer + row, tl.sum(hit.to(tl.float32), axis=0))
    tl.atomic_add(channel_pointer + part * d + column, 1.0, mask=hit)


def _block(d: int) -> dict[str, int]:
    """A row in registers: at most 32 numbers a thread."""
    size = triton.next_power_of_2(d)
    return {"BLOCK": size, "num_warps": min(16, max(1, size // 512))}


def row_statistics(rows: Tensor, significant_bits: int) -> Tensor:
    """(rows, channels) → (10, rows) float32: the fields of RowMoments, median, number of NaN and Inf."""
    count, d = rows.shape
    out = torch.empty((10, count), dtype=torch.float32, device=rows.device)
    _rows_kernel[(count,)](
        rows, out, rows.stride(0), count, d, (d - 1) // 2, BITS=significant_bits, **_block(d)
    )
    return out


_ROWS_PER_PROGRAM = 256


def channel_statistics(rows: Tensor, part: Tensor, unit: Tensor, shift: Tensor) -> Tensor:
    """(program, part, 5, channels): total, square, fourth, row-centred square and maximum of runs of rows."""
    count, d = rows.shape
    programs = triton.cdiv(count, _ROWS_PER_PROGRAM)
    out = torch.empty((programs, 3, 5, d), dtype=torch.float32, device=rows.device)
    _channels_kernel[(triton.cdiv(d, 128), programs)](
        rows,
        part,
        unit,
        shift,
        out,
        rows.stride(0),
        count,
        d,
        _ROWS_PER_PROGRAM,
        PARTS=3,
        ROWS=16,
        COLUMNS=128,
        num_warps=4,
    )
    return out


class FusedObservation(ActivationObservation):
    """An activation observation whose reductions are Triton kernels; the rest is the generic definition."""

    def __init__(self, x: Tensor, strata: Tensor, *, significant_bits: int) -> None:
        self.raw, self.raw_strata = x, strata
        self.significant_bits, self.reductions = significant_bits, GENERIC
        self.layout = Layout(channels=x.shape[-1], tokens=x.shape[-2])
        self._kept: dict[str, Any] = {}
        self._rows = x.reshape(-1, x.shape[-1])
        found = row_statistics(self._rows, significant_bits).reshape(10, *x.shape[:2])
        self.finite_token = found[9] == 0
        self._counted = self.finite_token & (strata[0] > 0)
        self._found = torch.where(self._counted, found, 0.0)
        self.strata = strata * self._counted

    @once
    def x(self) -> Tensor:
        """(batch, token, channel) float32, 0 where not counted."""
        return torch.where(self._counted[..., None], self.raw.float(), 0.0)

    @once
    def moments(self) -> RowMoments:
        """Moments of each token over its channels."""
        return RowMoments(*self._found[:8])

    @once
    def median(self) -> Tensor:
        """Lower median of |x| of each token."""
        return self._found[8]

    @once
    def _part(self) -> Tensor:
        """The stratum, from 0, of each token, and −1 where it is not counted: (batch · token) int32."""
        parts = self.strata[1:].reshape(self.strata.shape[0] - 1, -1)
        order = torch.arange(1, parts.shape[0] + 1, device=parts.device, dtype=parts.dtype)
        return ((parts * order[:, None]).sum(0) - 1).int()

    @once
    def channels(self) -> ChannelSums:
        """Sums over the tokens of each stratum."""
        parts = self.strata[1:].reshape(self.strata.shape[0] - 1, -1)
        scale = power_of_two_below(torch, (parts * self.peak.reshape(1, -1)).amax(-1))
        token_scale = (parts * scale[:, None]).sum(0)
        unit = torch.where(token_scale > 0, 1.0 / token_scale, 0.0)
        shift = self.row_mean.reshape(-1) * unit
        found = channel_statistics(self._rows, self._part, unit, shift)
        sums = found[:, :, :4].double().sum(0).unbind(1)
        return assembled_sums(list(sums), found[:, :, 4].amax(0), scale)

    def beyond(self, threshold: Tensor, centre: Tensor | None = None) -> Exceedances:
        """Counts of |x − centre| ≥ threshold (one of each per sequence), by token and by channel."""
        batch, tokens, d = self.raw.shape
        limit = threshold[:, None].expand(batch, tokens).reshape(-1).contiguous()
        middle = torch.zeros_like(limit)
        if centre is not None:
            middle = centre[:, None].expand(batch, tokens).reshape(-1).contiguous()
        token = torch.empty_like(limit)
        channel = torch.zeros((3, d), dtype=torch.float32, device=limit.device)
        _beyond_kernel[(batch * tokens,)](
            self._rows, self._part, middle, limit, token, channel, self._rows.stride(0), d, **_block(d)
        )
        return Exceedances(
            token=token.reshape(batch, tokens), channel=with_union(torch, channel.double(), torch.sum)
        )
