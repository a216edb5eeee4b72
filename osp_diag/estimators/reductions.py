"""Reductions of an activation tensor: over rows (tokens), channels and sequences.

The functions here are the definition. A faster kernel (one pass over the rows, say) is another
:class:`Reductions` table with the same functions, tested against this one.

Range: every reduction over channels is of x divided by a scale near its largest magnitude, in
float32, so any finite float32 input is safe. Sums over tokens are kept in the accumulator's type:
float64 with NumPy and torch; float32 in JAX without x64, where a sum of fourth powers is exact
only for |x| below about 4e9 (beyond, it becomes Inf, never NaN).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Float

from osp_diag.estimators._arrays import (
    Array,
    Namespace,
    accumulator_dtype,
    kth_magnitude,
    namespace_of,
    row_blocks,
    weighted_row_sum,
)

__all__ = [
    "GENERIC",
    "ChannelSums",
    "Exceedances",
    "Reductions",
    "RowMoments",
    "SequenceMoments",
    "assembled_sums",
    "is_constant",
    "max_over_strata",
    "over_strata",
    "power_of_two_below",
    "token_extent",
    "with_union",
]


class RowMoments(NamedTuple):
    """Moments of each token over its channels, of x / scale, where scale is the token's max |x|.

    Dividing first keeps fourth powers within float32 for any finite input. Each is (batch, token).
    """

    scale: Array
    """max |x|; 0 for a token of zeros, which is divided by 1"""
    mean: Array
    absolute: Array
    """mean of |x|"""
    second: Array
    """mean of squares, not centred"""
    central_second: Array
    central_third: Array
    central_fourth: Array
    fourth: Array
    """mean of fourth powers, not centred"""


class ChannelSums(NamedTuple):
    """Sums over the tokens of each stratum, each of shape (stratum, channel)."""

    total: Array
    square: Array
    fourth: Array
    maximum: Array
    row_centred_square: Array
    """sum of (x − mean over the token's channels)²"""


class Exceedances(NamedTuple):
    """How many elements lie at or beyond a threshold."""

    token: Array
    """(batch, token): number of channels; meaningless where the token is not counted"""
    channel: Array
    """(stratum, channel): number of tokens"""


class SequenceMoments(NamedTuple):
    """Moments of all elements (token and channel) of a sequence that are in a stratum, of x / scale."""

    elements: Array
    scale: Array
    mean: Array
    central_second: Array
    central_fourth: Array


def token_extent(x: Float[Any, "batch token channel"]) -> Float[Any, "batch token"]:
    """max |x| of each token over its channels; NaN or Inf if any is, since no extremum drops a NaN."""
    xp = namespace_of(x)
    rows = xp.reshape(x, (-1, x.shape[-1]))
    extents = [_extent(rows[block, :]) for block in row_blocks(rows)]
    return xp.reshape(xp.concat(extents), x.shape[:-1])


def _extent(rows: Array) -> Array:
    xp = namespace_of(rows)
    return xp.maximum(xp.max(rows, axis=-1), -xp.min(rows, axis=-1))


def _block_moments(x: Array) -> RowMoments:
    """Moments over the last axis in two passes: scale and mean, then centred powers.

    Elements are divided by a power of two, which rounds nothing, and the mean is taken off twice: where it is
    many deviations large, the rounding of quotients and of the mean would pass for spread.
    """
    xp = namespace_of(x)
    peak = _extent(x)
    scale = xp.where(peak > 0, peak, xp.ones_like(peak))
    unit = power_of_two_below(xp, scale)
    # The ratio from x / unit to x / scale is between 1/2 and 1.
    exact, ratio = x / unit[..., None], unit / scale
    rough = xp.mean(exact, axis=-1)
    centred = (exact - rough[..., None]) * ratio[..., None]
    remainder = xp.mean(centred, axis=-1)
    centred = centred - remainder[..., None]
    z = x / scale[..., None]
    z2, c2 = z * z, centred * centred
    return RowMoments(
        scale=peak,
        mean=rough * ratio + remainder,
        absolute=xp.mean(xp.abs(z), axis=-1),
        second=xp.mean(z2, axis=-1),
        central_second=xp.mean(c2, axis=-1),
        central_third=xp.mean(c2 * centred, axis=-1),
        central_fourth=xp.mean(c2 * c2, axis=-1),
        fourth=xp.mean(z2 * z2, axis=-1),
    )


def row_moments(x: Float[Any, "batch token channel"]) -> RowMoments:
    """Moments of each token over its channels, after division by its largest magnitude."""
    xp = namespace_of(x)
    rows = xp.reshape(x, (-1, x.shape[-1]))
    blocks = [_block_moments(rows[block, :]) for block in row_blocks(rows)]
    return RowMoments(*(xp.reshape(xp.concat(field), x.shape[:-1]) for field in zip(*blocks, strict=True)))


def row_median(x: Float[Any, "batch token channel"], significant_bits: int) -> Float[Any, "batch token"]:
    """Lower median of |x| over channels, exact (the lower of the two middle values when d is even)."""
    # Why the lower one: docs/decisions.md, Estimators.
    xp = namespace_of(x)
    rows, rank = xp.reshape(x, (-1, x.shape[-1])), (x.shape[-1] - 1) // 2
    medians = [
        kth_magnitude(xp.abs(rows[block, :]), rank, significant_bits=significant_bits)
        for block in row_blocks(rows)
    ]
    return xp.reshape(xp.concat(medians), x.shape[:-1])


def sequence_median(
    x: Float[Any, "batch token channel"], tokens: Float[Any, " batch"], significant_bits: int
) -> Float[Any, " batch"]:
    """Lower median of |x| over all elements of each sequence's ``tokens`` counted tokens, exact.

    The others are zeros and sort first: the rank is moved past them.
    """
    xp = namespace_of(x)
    length, d = x.shape[-2], x.shape[-1]
    count = xp.astype(tokens, xp.int32)
    rank = xp.where(count > 0, (length - count) * d + (count * d - 1) // 2, xp.zeros_like(count))
    magnitude = xp.reshape(xp.abs(x), (x.shape[0], length * d))
    return kth_magnitude(magnitude, rank, significant_bits=significant_bits)


def power_of_two_below(xp: Namespace, peak: Array) -> Array:
    """A power of two near ``peak``, within float32's normal range: dividing by it is exact."""
    safe = xp.where(peak > 0, peak, xp.ones_like(peak))
    return 2.0 ** xp.clip(xp.floor(xp.log2(safe)), -126.0, 126.0)


def _parts(strata: Array) -> Array:
    """The strata that do not overlap (all but ``all``): (stratum − 1, batch · token)."""
    return namespace_of(strata).reshape(strata[1:, ...], (strata.shape[0] - 1, -1))


def with_union(xp: Namespace, parts: Array, reduce: Callable[..., Array]) -> Array:
    """(stratum − 1, …) of the strata that do not overlap → (stratum, …), their union first."""
    return xp.concat([reduce(parts, axis=0, keepdims=True), parts], axis=0)


def channel_sums(
    x: Float[Any, "batch token channel"],
    strata: Float[Any, "stratum batch token"],
    row_mean: Float[Any, "batch token"],
    peak: Float[Any, "batch token"],
) -> ChannelSums:
    """Sums over tokens for each stratum; ``strata[0]`` is the union of the others and is added up from them.

    Each stratum has its own scale, so that a spike on the first token costs the others no precision.
    """
    xp = namespace_of(x)
    rows, parts = xp.reshape(x, (-1, x.shape[-1])), _parts(strata)
    wide = accumulator_dtype(xp, x)
    # One power of two for each stratum, so that the division is exact; each token takes its stratum's.
    # Why strata have scales of their own: docs/decisions.md, Estimators.
    scale = power_of_two_below(xp, xp.max(parts * xp.reshape(peak, (1, -1)), axis=-1))
    token_scale = xp.sum(parts * scale[:, None], axis=0)
    token_scale = xp.where(token_scale > 0, token_scale, xp.ones_like(token_scale))
    shift = xp.reshape(row_mean, (-1,)) / token_scale
    sums: list[Array] = [0.0] * 4
    tops: list[Array] = []
    for block in row_blocks(rows):
        weights, part = parts[:, block], rows[block, :]
        z = part / token_scale[block, None]
        z2, centred = z * z, z - shift[block, None]
        # Σ z, Σ z², Σ z⁴ and Σ (z − row mean)², in the order that assembled_sums takes.
        for power, values in enumerate((z, z2, z2 * z2, centred * centred)):
            sums[power] = sums[power] + xp.astype(weighted_row_sum(weights, values), wide)
        magnitude = xp.abs(part)
        top = [xp.max(magnitude * weights[s, :, None], axis=0) for s in range(parts.shape[0])]
        tops = [xp.stack(top)] if not tops else [xp.maximum(tops[0], xp.stack(top))]
    return assembled_sums(sums, tops[0], scale)


def assembled_sums(sums: list[Array], tops: Array, scale: Float[Any, " part"]) -> ChannelSums:
    """The sums in units of x, from those of x / scale: total, square, fourth, row-centred square; and maxima.

    Each is (part, channel), where the parts are the strata that do not overlap, with a scale for each.
    """
    xp = namespace_of(tops)
    wide = sums[0].dtype
    largest = xp.finfo(wide).max

    def stratified(values: Array, power: int) -> Array:
        # scale^p can leave the accumulator's range where it is float32: 0 · Inf would be NaN.
        unit = xp.clip(xp.astype(scale, wide) ** power, 0.0, largest)[:, None]
        return with_union(xp, values * unit, xp.sum)

    return ChannelSums(
        total=stratified(sums[0], 1),
        square=stratified(sums[1], 2),
        fourth=stratified(sums[2], 4),
        maximum=with_union(xp, tops, xp.max),
        row_centred_square=stratified(sums[3], 2),
    )


def exceedances(
    x: Float[Any, "batch token channel"],
    strata: Float[Any, "stratum batch token"],
    centre: Float[Any, " batch"] | None,
    threshold: Float[Any, " batch"],
) -> Exceedances:
    """Counts of |x − centre| ≥ threshold, with one centre and threshold for each sequence."""
    xp = namespace_of(x)
    rows, parts = xp.reshape(x, (-1, x.shape[-1])), _parts(strata)
    limit = _for_each_token(threshold, x)
    middle = None if centre is None else _for_each_token(centre, x)
    by_token, by_channel = [], 0.0
    for block in row_blocks(rows):
        part = rows[block, :] if middle is None else rows[block, :] - middle[block, None]
        beyond = xp.astype(xp.abs(part) >= limit[block, None], x.dtype)
        by_token.append(xp.sum(beyond, axis=-1))
        by_channel = by_channel + weighted_row_sum(parts[:, block], beyond)
    token = xp.reshape(xp.concat(by_token), x.shape[:-1])
    return Exceedances(token=token, channel=with_union(xp, by_channel, xp.sum))


def _for_each_token(values: Array, x: Array) -> Array:
    xp = namespace_of(x)
    return xp.reshape(xp.broadcast_to(values[:, None], x.shape[:-1]), (-1,))


def sequence_moments(
    rows: RowMoments, strata: Float[Any, "stratum batch token"], channels: int
) -> SequenceMoments:
    """Moments over whole sequences from the moments of their tokens, each (stratum, batch).

    Exact combination of central moments (Chan et al. 1979; Pébay 2008) with δ_t = mean_t − mean:
    m₂ = ⟨c₂ + δ²⟩ and m₄ = ⟨c₄ + 4 δ c₃ + 6 δ² c₂ + δ⁴⟩, averaged over the stratum's tokens.
    """
    xp = namespace_of(strata)
    wide = accumulator_dtype(xp, strata)
    weight = xp.astype(strata, wide)
    scale, row_mean, c2, c3, c4 = (
        xp.astype(value, wide)[None, ...]
        for value in (rows.scale, rows.mean, rows.central_second, rows.central_third, rows.central_fourth)
    )
    tokens = xp.sum(weight, axis=-1)
    count = xp.where(tokens > 0, tokens, xp.ones_like(tokens))
    # A token's moments are of x / its own scale; times ratio^p they are of x / the sequence's scale.
    peak = xp.max(weight * scale, axis=-1)
    unit = xp.where(peak > 0, peak, xp.ones_like(peak))
    ratio = weight * scale / unit[..., None]
    # The mean of the sequence, and δ_t of each token; tokens outside of the stratum weigh 0.
    means = row_mean * ratio
    mean = xp.sum(means, axis=-1) / count
    delta = weight * (means - mean[..., None])
    # c₂, and c₄ + 4 δ c₃ + 6 δ² c₂ + δ⁴; both are averaged below.
    second = c2 * ratio**2
    fourth = c4 * ratio**4 + 4 * delta * c3 * ratio**3 + 6 * delta**2 * second + delta**4
    return SequenceMoments(
        elements=tokens * channels,
        scale=unit,
        mean=mean,
        central_second=xp.sum(second + delta**2, axis=-1) / count,
        central_fourth=xp.sum(fourth, axis=-1) / count,
    )


def is_constant(central_second: Array, mean: Array) -> Array:
    """Whether a spread is nothing but float32 rounding of the mean: below 2⁻²² of it."""
    return central_second <= 2.0**-44 * mean**2


# Why kernels plug in here and not in estimators: docs/decisions.md, Estimators.
class Reductions(NamedTuple):
    """Where faster kernels plug in: replace any function by one that returns the same numbers."""

    row_moments: Callable[[Array], RowMoments] = row_moments
    row_median: Callable[[Array, int], Array] = row_median
    sequence_median: Callable[[Array, Array, int], Array] = sequence_median
    channel_sums: Callable[[Array, Array, Array, Array], ChannelSums] = channel_sums
    exceedances: Callable[[Array, Array, Array | None, Array], Exceedances] = exceedances


GENERIC = Reductions()


def over_strata(
    values: Float[Any, "batch token"], strata: Float[Any, "stratum batch token"]
) -> Float[Any, " stratum"]:
    """Sum of a per-token number over the tokens of each stratum, in the accumulator's type."""
    xp = namespace_of(values)
    # Selected, not multiplied: 0 · Inf would be NaN.
    values = xp.astype(values, accumulator_dtype(xp, values))[None, ...]
    return xp.sum(xp.where(strata > 0, values, xp.zeros_like(values)), axis=(1, 2))


def max_over_strata(
    values: Float[Any, "batch token"], strata: Float[Any, "stratum batch token"]
) -> Float[Any, " stratum"]:
    """Largest of a per-token number in each stratum; −Inf where the stratum has no token."""
    xp = namespace_of(values)
    wide = accumulator_dtype(xp, values)
    lowest = -xp.inf * xp.ones_like(xp.astype(strata, wide))
    return xp.max(xp.where(strata > 0, xp.astype(values, wide)[None, ...], lowest), axis=(1, 2))
