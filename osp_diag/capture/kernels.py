"""Triton kernels for the reductions of an activation tensor: each reads the tensor once, in its own dtype.

They give what :mod:`osp_diag.estimators.reductions` defines, and are tested against it. Compiled by
Inductor the generic reductions read a site many times over; these read it once for all row statistics, the
exact median included, and once for all channel sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["SiteStatistics", "count_beyond", "site_statistics"]


class SiteStatistics(NamedTuple):
    """What the kernels keep of one site: a few numbers a token and a few a channel."""

    rows: Tensor
    """(10, batch, token) float32: the fields of ``RowMoments``, lower median, number of NaN and Inf"""
    sums: Tensor
    """(3, 5, channel) float64 for each stratum but ``all``: Σ z, Σ z², Σ z⁴, Σ (z − row mean)², max |x|"""
    scale: Tensor
    """() float32, z = x / scale: 1, or a power of two where fourth powers would leave float32"""


@triton.jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    x_pointer,
    out_pointer,
    row_stride,
    rows,
    d,
    rank,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):
    """All statistics of a few rows, which stay in registers; the median bit by bit from the highest."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    column = tl.arange(0, BLOCK)
    inside = (column < d)[None, :] & is_row[:, None]
    offset = row[:, None].to(tl.int64) * row_stride + column[None, :]
    x = tl.load(x_pointer + offset, mask=inside, other=0.0).to(tl.float32)
    # NaN and Inf are counted and become 0; the row is left out of every average later.
    bad = (x != x) | (tl.abs(x) == float("inf"))
    number_bad = tl.sum(bad.to(tl.float32), axis=1)
    x = tl.where(bad, 0.0, x)
    magnitude = tl.abs(x)
    # Moments of z = x / max |x|, so that fourth powers stay within float32; columns beyond d are 0.
    peak = tl.max(magnitude, axis=1)
    largest = tl.where(peak > 0, peak, 1.0)
    z = x / largest[:, None]
    absolute = tl.sum(tl.abs(z), axis=1) / d
    z2 = z * z
    second = tl.sum(z2, axis=1) / d
    fourth = tl.sum(z2 * z2, axis=1) / d
    # As the generic moments do: 2⁻ᵉ is exact as a factor, and the mean is taken off twice. Where it is many
    # deviations large, the rounding of quotients and of the mean would pass for spread.
    exponent = tl.clamp((largest.to(tl.int32, bitcast=True) >> 23).to(tl.float32), 1.0, 253.0).to(tl.int32)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    ratio = 1.0 / (largest * inverse)
    exact = x * inverse[:, None]
    rough = tl.sum(exact, axis=1) / d
    centred = tl.where(inside, (exact - rough[:, None]) * ratio[:, None], 0.0)
    remainder = tl.sum(centred, axis=1) / d
    mean = rough * ratio + remainder
    centred = tl.where(inside, centred - remainder[:, None], 0.0)
    c2 = centred * centred
    central_second = tl.sum(c2, axis=1) / d
    central_third = tl.sum(c2 * centred, axis=1) / d
    central_fourth = tl.sum(c2 * c2, axis=1) / d

    # Magnitudes sort like their bits. The answer takes a bit if at most ``rank`` elements are smaller with
    # it; columns beyond d are larger than any.
    bits = tl.where(inside, magnitude.to(tl.int32, bitcast=True), 0x7FFFFFFF)
    answer = tl.zeros((ROWS,), tl.int32)
    for step in tl.static_range(BITS):
        candidate = answer | (1 << (30 - step))
        below = tl.sum((bits < candidate[:, None]).to(tl.int32), axis=1)
        answer = tl.where(below <= rank, candidate, answer)

    out = out_pointer + row
    tl.store(out, peak, mask=is_row)
    tl.store(out + rows, mean, mask=is_row)
    tl.store(out + 2 * rows, absolute, mask=is_row)
    tl.store(out + 3 * rows, second, mask=is_row)
    tl.store(out + 4 * rows, central_second, mask=is_row)
    tl.store(out + 5 * rows, central_third, mask=is_row)
    tl.store(out + 6 * rows, central_fourth, mask=is_row)
    tl.store(out + 7 * rows, fourth, mask=is_row)
    tl.store(out + 8 * rows, answer.to(tl.float32, bitcast=True), mask=is_row)
    tl.store(out + 9 * rows, number_bad, mask=is_row)


@triton.jit
def _channels_kernel(  # type: ignore[no-untyped-def]
    x_pointer,
    part_pointer,
    statistics_pointer,
    top_pointer,
    out_pointer,
    scale_pointer,
    row_stride,
    rows,
    d,
    rows_per_program,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums over a run of rows for each of three strata; rows of part −1 and rows with NaN count nowhere."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    first = tl.program_id(1) * rows_per_program
    # Fourth powers of what lies between 1e-6 and 1e6 stay within float32; else a power of two is taken out.
    peak_of_all = tl.load(top_pointer)
    in_range = ((peak_of_all > 1e-6) & (peak_of_all < 1e6)) | (peak_of_all == 0.0)
    scale = tl.where(in_range, 1.0, tl.exp2(tl.floor(tl.log2(tl.where(in_range, 1.0, peak_of_all)))))
    tl.store(scale_pointer, scale)
    for part in tl.static_range(3):
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        square = tl.zeros((ROWS, COLUMNS), tl.float32)
        fourth = tl.zeros((ROWS, COLUMNS), tl.float32)
        spread = tl.zeros((ROWS, COLUMNS), tl.float32)
        top = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, rows_per_program, ROWS):
            row = first + start + tl.arange(0, ROWS)
            is_row = row < rows
            in_part = tl.load(part_pointer + row, mask=is_row, other=-1) == part
            in_part = in_part & (tl.load(statistics_pointer + 9 * rows + row, mask=is_row, other=1.0) == 0.0)
            if tl.max(in_part.to(tl.int32), axis=0) > 0:
                peak = tl.load(statistics_pointer + row, mask=is_row, other=0.0)
                # Row means come as means of x / peak.
                shift = tl.load(statistics_pointer + rows + row, mask=is_row, other=0.0) * (peak / scale)
                offset = row[:, None].to(tl.int64) * row_stride + column[None, :]
                is_counted = in_part[:, None] & inside[None, :]
                x = tl.load(x_pointer + offset, mask=is_counted, other=0.0).to(tl.float32)
                z = x / scale
                z2 = z * z
                centred = tl.where(is_counted, z - shift[:, None], 0.0)
                total += z
                square += z2
                fourth += z2 * z2
                spread += centred * centred
                top = tl.maximum(top, tl.abs(x))
        out = out_pointer + ((tl.program_id(1) * 3 + part) * 5).to(tl.int64) * d + column
        tl.store(out, tl.sum(total, axis=0), mask=inside)
        tl.store(out + d, tl.sum(square, axis=0), mask=inside)
        tl.store(out + 2 * d, tl.sum(fourth, axis=0), mask=inside)
        tl.store(out + 3 * d, tl.sum(spread, axis=0), mask=inside)
        tl.store(out + 4 * d, tl.max(top, axis=0), mask=inside)


@triton.jit
def _join_kernel(in_pointer, out_pointer, programs, d, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add up what the programs of the channels kernel found; every fifth field is a maximum."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    field = tl.program_id(1)
    total = tl.zeros((COLUMNS,), tl.float64)
    for program in range(programs):
        offset = (program * 15 + field).to(tl.int64) * d + column
        value = tl.load(in_pointer + offset, mask=inside, other=0.0).to(tl.float64)
        total = tl.where(field % 5 == 4, tl.maximum(total, value), total + value)
    tl.store(out_pointer + field * d + column, total, mask=inside)


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


ROWS_OF_A_PROGRAM = 128


def site_statistics(x: Tensor, part: Tensor, significant_bits: int) -> SiteStatistics:
    """All that most measurements need of one site, in two readings.

    Parameters
    ----------
    x : (batch, token, channel)
    part : (batch · token) int32: 0 first, 1 delimiter, 2 rest, −1 padding
    significant_bits : see :class:`~osp_diag.estimators.activation.ActivationObservation`
    """
    batch, tokens, d = x.shape
    flat = x.reshape(-1, d)
    count = flat.shape[0]
    block = triton.next_power_of_2(d)
    rows = torch.empty((10, count), dtype=torch.float32, device=x.device)
    _rows_kernel[(count,)](
        flat,
        rows,
        flat.stride(0),
        count,
        d,
        (d - 1) // 2,
        ROWS=1,
        BLOCK=block,
        BITS=significant_bits,
        num_warps=min(16, max(1, block // 512)),
    )
    # Each program sums a run of rows in float32; the runs are added up in float64.
    programs = triton.cdiv(count, ROWS_OF_A_PROGRAM)
    partial = torch.empty((programs, 15, d), dtype=torch.float32, device=x.device)
    scale = torch.empty((), dtype=torch.float32, device=x.device)
    _channels_kernel[(triton.cdiv(d, 256), programs)](
        flat,
        part,
        rows,
        rows[0].amax(),
        partial,
        scale,
        flat.stride(0),
        count,
        d,
        ROWS_OF_A_PROGRAM,
        ROWS=4,
        COLUMNS=256,
        num_warps=2,
    )
    sums = torch.empty((3, 5, d), dtype=torch.float64, device=x.device)
    _join_kernel[(triton.cdiv(d, 128), 15)](partial, sums, programs, d, COLUMNS=128, num_warps=4)
    return SiteStatistics(rows.reshape(10, batch, tokens), sums, scale)


def count_beyond(x: Tensor, part: Tensor, centre: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """How many elements lie at or beyond their token's limit: ((batch · token), (3, channel)).

    ``part`` as in :func:`site_statistics`, also −1 where a token is not finite; ``centre`` and ``limit``
    are (batch · token).
    """
    flat = x.reshape(-1, x.shape[-1])
    d, block = flat.shape[1], triton.next_power_of_2(flat.shape[1])
    token = torch.empty_like(limit)
    channel = torch.zeros((3, d), dtype=torch.float32, device=x.device)
    _beyond_kernel[(flat.shape[0],)](
        flat,
        part,
        centre,
        limit,
        token,
        channel,
        flat.stride(0),
        d,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )
    return token, channel
