"""What an activation tensor offers to estimators: each reduction taken once and shared."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import (
    Array,
    accumulator_dtype,
    is_jax_namespace,
    namespace_of,
    once,
    runs_on_host,
)
from osp_diag.estimators.base import Layout
from osp_diag.estimators.reductions import (
    GENERIC,
    ChannelSums,
    Exceedances,
    Reductions,
    RowMoments,
    SequenceMoments,
    is_constant,
    max_over_strata,
    over_strata,
    sequence_moments,
    token_extent,
)
from osp_diag.schema import STRATA

__all__ = [
    "GENERIC",
    "ActivationObservation",
    "ChannelSums",
    "Exceedances",
    "Reductions",
    "RowMoments",
    "SequenceMoments",
    "is_constant",
    "max_over_strata",
    "over_strata",
    "significant_bits_of",
]


def significant_bits_of(x: Array) -> int:
    """How many leading bits of a float32 magnitude can be set in what comes in ``x``'s dtype."""
    xp = namespace_of(x)
    for name, bits in (("bfloat16", 15), ("float16", 18)):
        if hasattr(xp, name) and x.dtype == getattr(xp, name):
            return bits
    return 31


class ActivationObservation:
    """Activations of one site in one forward pass, with the strata of their tokens.

    Parameters
    ----------
    x : (batch, token, channel), any floating dtype; computed on in float32
    strata : (stratum, batch, token) of 0 and 1, in the order of ``stratum_names``: row 0 (``all``) is the
        union of the others, which do not overlap; padding is 0 in all
    stratum_names : ``all``, then the others
    significant_bits : how many leading bits of a float32 magnitude can be set, which shortens exact
        medians: 15 if the values came as bfloat16, 18 if float16, else 31. Read off ``x`` by default.

    Tokens with a NaN or Inf channel are left out of every average (their weight is set to 0) and
    counted by the ``nonfinite`` estimator; nothing is averaged in silently. Tokens that are left out,
    and padding, are zeros in ``x``.
    """

    def __init__(
        self,
        x: Float[Any, "batch token channel"],
        strata: Float[Any, "stratum batch token"],
        *,
        stratum_names: tuple[str, ...] = STRATA,
        significant_bits: int | None = None,
        reductions: Reductions = GENERIC,
    ) -> None:
        fits = len(x.shape) == 3 and tuple(strata.shape) == (len(stratum_names), *x.shape[:2])
        if not fits or 0 in x.shape:
            raise EstimatorError(
                "activations must be (batch, token, channel), none of them 0, and strata "
                f"({len(stratum_names)}, batch, token); got {tuple(x.shape)} and {tuple(strata.shape)}"
            )
        xp = namespace_of(x)
        self.significant_bits = significant_bits or significant_bits_of(x)
        if x.dtype != xp.float32:
            x = xp.astype(x, xp.float32)
        self.raw = x
        self.raw_strata = xp.astype(strata, xp.float32, copy=False)
        if is_jax_namespace(xp):  # XLA's maximum over an axis can lose a NaN on a CPU
            self.finite_token = xp.all(xp.isfinite(x), axis=-1)
        else:
            self.finite_token = xp.isfinite(token_extent(x))
        # Why they are left out and not replaced: docs/decisions.md, Estimators.
        counted = self.finite_token & (self.raw_strata[0, ...] > 0)
        # Where nothing is left out a copy is saved; off the host the question would wait for the device.
        all_counted = runs_on_host(xp, x) and bool(xp.all(counted))
        self.x = x if all_counted else xp.where(counted[..., None], x, xp.zeros_like(x[:1, :1, :1]))
        self.strata = self.raw_strata * xp.astype(counted, xp.float32)[None, ...]
        self.reductions = reductions
        self.layout = Layout(channels=x.shape[-1], tokens=x.shape[-2], strata=stratum_names)
        self._cache: dict[str, Any] = {}

    @once
    def moments(self) -> RowMoments:
        return self.reductions.row_moments(self.x)

    @once
    def wide_moments(self) -> RowMoments:
        """The moments in the accumulator's type, for arithmetic on one number per token."""
        xp = namespace_of(self.strata)
        wide = accumulator_dtype(xp, self.strata)
        return RowMoments(*(xp.astype(value, wide) for value in self.moments))

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
    def sequences(self) -> SequenceMoments:
        return sequence_moments(self.moments, self.strata, self.layout.channels)

    @once
    def tokens_per_sequence(self) -> Array:
        """Number of counted tokens of each sequence, (batch,)."""
        return namespace_of(self.strata).sum(self.strata[0, ...], axis=-1)

    @once
    def sequence_median(self) -> Array:
        """Lower median of |x| over all elements of each sequence, (batch,); 0 for an empty one."""
        return self.reductions.sequence_median(self.x, self.tokens_per_sequence, self.significant_bits)

    @once
    def sequence_valid(self) -> Array:
        """1 where a sequence has a token of the stratum, (stratum, batch)."""
        xp = namespace_of(self.strata)
        return xp.astype(xp.any(self.strata > 0, axis=-1), self.strata.dtype)

    @once
    def start(self) -> Array:
        """Column of the first token of each sequence that is not padding, (batch,) int64; 0 if all is."""
        xp = namespace_of(self.raw_strata)
        return xp.argmax(self.raw_strata[0, ...], axis=-1)

    def beyond(self, threshold: Array, centre: Array | None = None) -> Exceedances:
        """Counts of |x − centre| ≥ threshold (one of each per sequence), by token and by channel."""
        return self.reductions.exceedances(self.x, self.strata, centre, threshold)
