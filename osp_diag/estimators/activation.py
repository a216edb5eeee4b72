"""What an activation tensor offers to estimators: row, channel and sequence reductions, each taken once.

The reductions are functions in a :class:`Reductions` table. The generic ones here are the
definition; a faster kernel (one pass over the rows, say) is another table with the same functions,
tested against this one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Float

from osp_diag.estimators._arrays import Array, kth_magnitude, namespace_of, once, weighted_row_sum
from osp_diag.estimators.base import Layout

__all__ = ["GENERIC", "ActivationObservation", "ChannelSums", "Reductions", "RowMoments", "over_strata"]


class RowMoments(NamedTuple):
    """Moments of each token over its channels, of x / scale, where scale is the token's max |x|.

    Dividing first keeps fourth powers within float32 for any finite input.
    """

    scale: Array
    mean: Array
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


def row_moments(x: Float[Any, "batch token channel"]) -> RowMoments:
    """Moments over the last axis in two passes: scale and mean, then centred powers."""
    xp = namespace_of(x)
    peak = xp.max(xp.abs(x), axis=-1)
    scale = xp.where(peak > 0, peak, xp.ones_like(peak))
    z = x / scale[..., None]
    mean = xp.mean(z, axis=-1)
    z2 = z * z
    centred = z - mean[..., None]
    c2 = centred * centred
    return RowMoments(
        scale=peak,
        mean=mean,
        second=xp.mean(z2, axis=-1),
        central_second=xp.mean(c2, axis=-1),
        central_third=xp.mean(c2 * centred, axis=-1),
        central_fourth=xp.mean(c2 * c2, axis=-1),
        fourth=xp.mean(z2 * z2, axis=-1),
    )


def row_median(x: Float[Any, "batch token channel"], significant_bits: int) -> Float[Any, "batch token"]:
    """Lower median of |x| over channels, exact (the lower of the two middle values when d is even)."""
    xp = namespace_of(x)
    return kth_magnitude(xp.abs(x), (x.shape[-1] - 1) // 2, significant_bits=significant_bits)


def _power_of_two_scale(xp: Any, peak: Array) -> Array:
    """A power of two near ``peak``: dividing by it is exact."""
    safe = xp.where(peak > 0, peak, xp.ones_like(peak))
    return 2.0 ** xp.round(xp.log2(safe))


def channel_sums(
    x: Float[Any, "batch token channel"],
    strata: Float[Any, "stratum batch token"],
    row_mean: Float[Any, "batch token"],
    peak: Float[Any, "batch token"],
) -> ChannelSums:
    """Sums over tokens for each stratum; ``strata[0]`` is the union of the others and is added up from them."""
    xp = namespace_of(x)
    rows = xp.reshape(x, (-1, x.shape[-1]))
    parts = xp.reshape(strata[1:, ...], (strata.shape[0] - 1, -1))
    scale = _power_of_two_scale(xp, xp.max(peak))
    z = rows / scale
    z2 = z * z
    centred = z - xp.reshape(row_mean, (-1, 1)) / scale
    wide = _wide(xp, x)

    def stratified(values: Array, power: int) -> Array:
        sums = xp.astype(weighted_row_sum(parts, values), wide) * xp.astype(scale, wide) ** power
        return xp.concat([xp.sum(sums, axis=0, keepdims=True), sums], axis=0)

    magnitude = xp.abs(rows)
    zero = xp.zeros_like(magnitude[:1, :1])
    tops = xp.stack(
        [
            xp.max(xp.where(parts[s, :, None] > 0, magnitude, zero), axis=0)
            for s in range(parts.shape[0])
        ]
    )
    return ChannelSums(
        total=stratified(z, 1),
        square=stratified(z2, 2),
        fourth=stratified(z2 * z2, 4),
        maximum=xp.concat([xp.max(tops, axis=0, keepdims=True), tops], axis=0),
        row_centred_square=stratified(centred * centred, 2),
    )


def _wide(xp: Any, like: Array) -> Any:
    from osp_diag.estimators._arrays import accumulator_dtype

    return accumulator_dtype(xp, like)


class Reductions(NamedTuple):
    """Where faster kernels plug in: replace any function by one that returns the same numbers."""

    row_moments: Callable[[Array], RowMoments] = row_moments
    row_median: Callable[[Array, int], Array] = row_median
    channel_sums: Callable[[Array, Array, Array, Array], ChannelSums] = channel_sums


GENERIC = Reductions()


def over_strata(
    values: Float[Any, "batch token"], strata: Float[Any, "stratum batch token"]
) -> Float[Any, " stratum"]:
    """Sum of a per-token number over the tokens of each stratum."""
    xp = namespace_of(values)
    return xp.sum(strata * values[None, ...], axis=(1, 2))


class ActivationObservation:
    """Activations of one site in one forward pass, with the strata of their tokens.

    Parameters
    ----------
    x : (batch, token, channel), any floating dtype; computed on in float32
    strata : (stratum, batch, token) of 0 and 1, in the order of ``STRATA``; padding is 0 in all
    significant_bits : 15 if ``x`` came as bfloat16, 18 if float16, else 31: shortens exact medians

    Tokens with a NaN or Inf channel are left out of every average (their weight is set to 0) and
    counted in ``nonfinite``; nothing is averaged in silently.
    """

    def __init__(
        self,
        x: Float[Any, "batch token channel"],
        strata: Float[Any, "stratum batch token"],
        *,
        significant_bits: int = 31,
        reductions: Reductions = GENERIC,
    ) -> None:
        xp = namespace_of(x)
        if x.dtype != xp.float32:
            x = xp.astype(x, xp.float32)
        self.raw = x
        self.raw_strata = strata
        self.finite_token = xp.isfinite(xp.max(xp.abs(x), axis=-1))
        self.x = xp.where(self.finite_token[..., None], x, xp.zeros_like(x[:1, :1, :1]))
        self.strata = strata * xp.astype(self.finite_token, strata.dtype)[None, ...]
        self.significant_bits = significant_bits
        self.reductions = reductions
        self.layout = Layout(channels=x.shape[-1], tokens=x.shape[-2])
        self._kept: dict[str, Any] = {}

    @once
    def moments(self) -> RowMoments:
        return self.reductions.row_moments(self.x)

    @once
    def magnitude(self) -> Array:
        return namespace_of(self.x).abs(self.x)

    @once
    def peak(self) -> Array:
        """max |x| of each token, (batch, token)."""
        return self.moments.scale

    @once
    def median(self) -> Array:
        """Lower median of |x| of each token, (batch, token)."""
        return self.reductions.row_median(self.x, self.significant_bits)

    @once
    def row_mean(self) -> Array:
        """Mean over channels of each token, (batch, token)."""
        return self.moments.mean * self.moments.scale

    @once
    def channels(self) -> ChannelSums:
        return self.reductions.channel_sums(self.x, self.strata, self.row_mean, self.peak)

    @once
    def sequence_valid(self) -> Array:
        """1 where a sequence has a token of the stratum, (stratum, batch)."""
        xp = namespace_of(self.x)
        return xp.astype(xp.any(self.strata > 0, axis=-1), self.strata.dtype)
