"""What the attention of one layer offers to estimators, in memory O(tokens · tile).

Two ways in: queries and keys (:class:`AttentionObservation`), for models whose attention is fused,
and logits (:meth:`AttentionObservation.from_logits`), for models that make the T×T array anyway.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import (
    Array,
    accumulator_dtype,
    index_range,
    is_jax_namespace,
    namespace_of,
    once,
    running_sum,
)
from osp_diag.estimators.attention_mask import (
    AttentionMask,
    QueryRows,
    sampled_rows,
    take_rows,
)
from osp_diag.estimators.attention_tiles import (
    GENERIC_ATTENTION,
    AttentionReductions,
    LogitSource,
    ModelLogits,
    ProductLogits,
    SampledTile,
    SoftmaxStatistics,
    column_sums,
    pick_sink,
)
from osp_diag.estimators.base import Layout
from osp_diag.schema import STRATA

__all__ = [
    "GENERIC_ATTENTION",
    "AttentionMask",
    "AttentionObservation",
    "AttentionReductions",
    "SampledTile",
    "TokenIds",
    "as_float32",
    "channel_norm",
    "cleaned",
    "finite_tokens",
    "per_head",
    "wide",
]


def wide(values: Array) -> Array:
    """``values`` in the dtype that states accumulate in."""
    xp = namespace_of(values)
    return xp.astype(values, accumulator_dtype(xp, values))


def channel_norm(x: Float[Any, "... channel"]) -> Float[Any, "..."]:
    """‖x‖₂ over the last axis, scaled first so that squares neither overflow nor vanish."""
    xp = namespace_of(x)
    peak = xp.max(xp.abs(x), axis=-1)
    scale = xp.where(peak > 0, peak, xp.ones_like(peak))
    z = x / scale[..., None]
    return peak * xp.sqrt(xp.sum(z * z, axis=-1))


def per_head(values: Array, heads: int, axis: int) -> Array:
    """Numbers of each key-value head, repeated for the query heads that share it."""
    xp = namespace_of(values)
    axis %= values.ndim
    groups = values.shape[axis]
    shape = list(values.shape)
    repeated = xp.broadcast_to(
        xp.expand_dims(values, axis=axis + 1), (*shape[: axis + 1], heads // groups, *shape[axis + 1 :])
    )
    return xp.reshape(repeated, (*shape[:axis], heads, *shape[axis + 1 :]))


def finite_tokens(x: Float[Any, "batch head token channel"]) -> Bool[Any, "batch token"]:
    """True where a token has neither NaN nor Inf in any head and channel."""
    xp = namespace_of(x)
    if is_jax_namespace(xp):  # XLA's maximum over an axis can lose a NaN on a CPU
        return xp.all(xp.isfinite(x), axis=(1, 3))
    return xp.isfinite(xp.max(xp.abs(x), axis=(1, 3)))


def as_float32(x: Array) -> Array:
    """``x`` in float32, itself where it is."""
    xp = namespace_of(x)
    return x if x.dtype == xp.float32 else xp.astype(x, xp.float32)


def cleaned(x: Array, finite: Bool[Any, "batch token"]) -> Array:
    """``x`` (batch, head, token, channel) with tokens that are not finite set to 0."""
    xp = namespace_of(x)
    return xp.where(finite[:, None, :, None], x, xp.zeros_like(x[:1, :1, :1, :1]))


def _sink_positions(
    strata: Float[Any, "stratum batch token"], stratum_names: tuple[str, ...]
) -> Int[Any, " batch"]:
    """First token of stratum ``first`` of each sequence, else its first token that is not padding."""
    # Why not position 0: docs/decisions.md, Estimators.
    xp = namespace_of(strata)
    tokens = strata.shape[-1]
    place = index_range(0, tokens, strata)
    valid = xp.min(xp.where(strata[0, ...] > 0, place, tokens), axis=-1)
    if "first" not in stratum_names:
        return xp.clip(valid, 0, tokens - 1)
    first = xp.min(xp.where(strata[stratum_names.index("first"), ...] > 0, place, tokens), axis=-1)
    return xp.clip(xp.where(first < tokens, first, valid), 0, tokens - 1)


class TokenIds(NamedTuple):
    """Which token stands where, for what is told by token."""

    ids: Int[Any, "batch token"]
    """ids outside of the vocabulary, such as −1 where a model was called with embeddings, are no token's"""
    vocabulary: int


class AttentionObservation:
    """Attention of one layer in one forward pass, with the strata of its tokens.

    Parameters
    ----------
    query : (batch, head, token, channel), as it enters the product: after RoPE and QK norm
    key : (batch, key_value_head, token, channel); head h uses key-value head h // (heads / groups)
    value : (batch, key_value_head, token, any width), or None where it is not known
    strata : (stratum, batch, token) of 0 and 1, in the order of ``stratum_names``; padding is 0 in all
    stratum_names : ``all``, then the others
    scale : logits are scale · q·k
    mask : what a query may see (the mask alone says so: padding keys that it lets through get mass)
    softcap : c in c · tanh(logit / c), before the mask; None for none
    sink_logits : (head,) learned logits of an extra column; zeros are softmax-off-by-one
    token_ids : the tokens' ids; None where they are not known
    output_weight : what each head's output is multiplied with before it enters the stream, W_O by head; None
        where no measurement asks for it, or it is not known
    query_sample : number of evenly spaced queries of a sequence's tokens whose logits enter distributions;
        None for all
    tile : queries at a time

    The *sink key* of a sequence is its first token that is not padding. Everything is computed in
    float32. Tokens with a NaN or Inf in q or k are left out as queries and as keys, and counted in
    ``nonfinite``; if the sink key is one of them, its whole sequence is left out.

    Raises :class:`~osp_diag.errors.EstimatorError` for shapes that do not fit together.
    """

    query: Array | None
    """(batch, head, token, channel) float32, 0 where not finite; None if only logits are known"""
    key: Array | None
    scale: float | None
    output_weight: Array | None = None

    def __init__(
        self,
        query: Float[Any, "batch head token channel"],
        key: Float[Any, "batch key_value_head token channel"],
        value: Float[Any, "batch key_value_head token value_channel"] | None,
        strata: Float[Any, "stratum batch token"],
        *,
        scale: float,
        mask: AttentionMask | None = None,
        softcap: float | None = None,
        sink_logits: Float[Any, " head"] | None = None,
        token_ids: TokenIds | None = None,
        stratum_names: tuple[str, ...] = STRATA,
        output_weight: Float[Any, "head row value_channel"] | None = None,
        query_sample: int | None = 64,
        tile: int = 128,
        reductions: AttentionReductions = GENERIC_ATTENTION,
    ) -> None:
        batch, heads, tokens, channels = query.shape
        mask = AttentionMask() if mask is None else mask
        if key.shape[0] != batch or tuple(key.shape[2:]) != (tokens, channels) or heads % key.shape[1]:
            raise EstimatorError(
                f"query {tuple(query.shape)} and key {tuple(key.shape)} do not fit: both are (batch, head, "
                "token, channel), the key with a divisor of the query's heads and the same tokens (no cache)"
            )
        if sink_logits is not None and tuple(sink_logits.shape) != (heads,):
            raise EstimatorError(
                f"sink_logits has shape {tuple(sink_logits.shape)}, expected one logit a head: {(heads,)}"
            )
        mask.check(batch, heads, tokens)
        layout = Layout(
            channels=heads * channels,
            heads=heads,
            key_value_heads=key.shape[1],
            head_channels=channels,
            tokens=tokens,
            vocabulary=1 if token_ids is None else token_ids.vocabulary,
            strata=stratum_names,
        )
        query, key = as_float32(query), as_float32(key)
        finite = finite_tokens(query) & finite_tokens(key)
        query, key = cleaned(query, finite), cleaned(key, finite)
        source = ProductLogits(query, key, finite, scale, mask, softcap, sink_logits)
        self._open(source, value, strata, finite, layout, mask, token_ids, query_sample, tile, reductions)
        self.query, self.key, self.scale, self.output_weight = query, key, scale, output_weight

    @classmethod
    def from_logits(
        cls,
        logits: Float[Any, "batch head token key"],
        value: Float[Any, "batch key_value_head token value_channel"] | None,
        strata: Float[Any, "stratum batch token"],
        *,
        mask: AttentionMask | None = None,
        extra_columns: int = 0,
        token_ids: TokenIds | None = None,
        stratum_names: tuple[str, ...] = STRATA,
        output_weight: Float[Any, "head row value_channel"] | None = None,
        query_sample: int | None = 64,
        tile: int = 128,
        reductions: AttentionReductions = GENERIC_ATTENTION,
    ) -> AttentionObservation:
        """From logits that the model made itself, scaled and masked.

        Entries that :func:`~osp_diag.estimators.attention_mask.is_fill` tells are not allowed. The last
        ``extra_columns`` columns are learned sinks (gpt-oss). ``mask`` says whether the model is causal
        and may narrow what is allowed; it must not add to the logits again. Queries and keys are not
        known, so that what is computed from them comes out as NaN.
        """
        xp = namespace_of(logits)
        batch, heads, tokens, columns = logits.shape
        mask = AttentionMask() if mask is None else mask
        if extra_columns < 0 or columns != tokens + extra_columns:
            raise EstimatorError(
                f"logits {tuple(logits.shape)} do not have as many columns as tokens plus extra columns "
                f"({tokens} + {extra_columns}): say how many learned sink columns come last"
            )
        if mask.additive:
            raise EstimatorError(
                "the logits already hold the additive mask: pass `AttentionMask` without `tensor`, "
                "or with a bool one"
            )
        mask.check(batch, heads, tokens)
        groups = heads if value is None else value.shape[1]
        vocabulary = 1 if token_ids is None else token_ids.vocabulary
        layout = Layout(
            heads=heads,
            key_value_heads=groups,
            tokens=tokens,
            vocabulary=vocabulary,
            strata=stratum_names,
        )
        self = cls.__new__(cls)
        finite = xp.ones_like(strata[0, ...]) > 0
        source = ModelLogits(logits, extra_columns, mask)
        self._open(source, value, strata, finite, layout, mask, token_ids, query_sample, tile, reductions)
        self.query, self.key, self.scale, self.output_weight = None, None, None, output_weight
        return self

    def _open(
        self,
        source: LogitSource,
        value: Array | None,
        strata: Array,
        finite: Array,
        layout: Layout,
        mask: AttentionMask,
        token_ids: TokenIds | None,
        query_sample: int | None,
        tile: int,
        reductions: AttentionReductions,
    ) -> None:
        xp = namespace_of(strata)
        batch, tokens = finite.shape
        if tuple(strata.shape) != (len(layout.strata), batch, tokens):
            raise EstimatorError(
                f"strata has shape {tuple(strata.shape)}, expected (stratum, batch, token) = "
                f"{(len(layout.strata), batch, tokens)}"
            )
        if value is not None and (
            (value.shape[0], value.shape[2]) != (batch, tokens) or layout.heads % value.shape[1]
        ):
            raise EstimatorError(
                f"value has shape {tuple(value.shape)}, expected (batch, key_value_head, token, channel) "
                f"with batch {batch}, {tokens} tokens and a divisor of {layout.heads} heads"
            )
        if token_ids is not None and tuple(token_ids.ids.shape) != (batch, tokens):
            raise EstimatorError(
                f"token_ids have shape {tuple(token_ids.ids.shape)}, expected one id a token: "
                f"{(batch, tokens)}"
            )
        if tile < 1 or (query_sample is not None and query_sample < 1):
            raise EstimatorError(
                f"tile is {tile} and query_sample {query_sample}: both count queries and are at least 1 "
                "(query_sample=None takes every query)"
            )
        self.source, self.value, self.layout, self.mask = source, value, layout, mask
        self.token_ids, self.tile, self.reductions = token_ids, tile, reductions
        # Why distributions come from a sample of queries: docs/decisions.md, Estimators.
        self.sample = tokens if query_sample is None else min(query_sample, tokens)
        self.raw_strata = xp.astype(strata, xp.float32)
        self.finite_token = finite
        self._weigh(self.raw_strata, finite)
        self._cache: dict[str, Any] = {}

    def _weigh(self, raw_key_strata: Array, finite_key: Array) -> None:
        """Set the strata of queries and keys, of whose sink key and themselves all is finite."""
        xp = namespace_of(raw_key_strata)
        self.raw_key_strata = raw_key_strata
        self.sink = _sink_positions(raw_key_strata, self.layout.strata)
        sink_finite = xp.take_along_axis(finite_key, self.sink[:, None], axis=-1)
        self.strata = self.raw_strata * xp.astype(self.finite_token & sink_finite, xp.float32)[None, ...]
        self.key_strata = self.strata
        if raw_key_strata is not self.raw_strata:
            self.key_strata = raw_key_strata * xp.astype(finite_key & sink_finite, xp.float32)[None, ...]

    @property
    def valid(self) -> Float[Any, "batch token"]:
        """Weight of each token: 0 for padding and for what is not finite."""
        return self.strata[0, ...]

    @property
    def key_valid(self) -> Float[Any, "batch key"]:
        """As :attr:`valid`, of the tokens whose keys are attended to: the same, but in cross-attention."""
        return self.key_strata[0, ...]

    @once
    def is_sink(self) -> Bool[Any, "batch key"]:
        """Where a key is its sequence's sink key."""
        return index_range(0, self.source.key_count, self.valid)[None, :] == self.sink[:, None]

    @once
    def is_first(self) -> Bool[Any, "batch key"]:
        """Where a key's token is of the stratum ``first``; nowhere without that stratum."""
        names = self.layout.strata
        if "first" not in names:
            return self.raw_key_strata[0, ...] < 0
        return self.raw_key_strata[names.index("first"), ...] > 0

    @once
    def softmax(self) -> SoftmaxStatistics:
        """Softmax statistics of every query (batch, head, token), and the mass of every key."""
        return self.reductions.softmax_statistics(self.source, self.sink, self.valid, self.tile)

    @once
    def query_weight(self) -> Float[Any, "batch head token"]:
        """Weight of each query: 0 for padding, for what is not finite, and where it may see no key at all."""
        xp = namespace_of(self.valid)
        return self.valid[:, None, :] * xp.astype(self.softmax.usable, xp.float32)

    @once
    def sink_query_weight(self) -> Float[Any, "batch head token"]:
        """Weight of the queries after the sink key that can see it."""
        xp = namespace_of(self.valid)
        after = index_range(0, self.layout.tokens, self.valid)[None, :] > self.sink[:, None]
        sees = after[:, None, :] & (self.softmax.sink_logit > -xp.inf)
        return self.query_weight * xp.astype(sees, xp.float32)

    @once
    def nonfinite(self) -> Array:
        """How many tokens that are not padding had a NaN or Inf in q or k, or in a logit."""
        xp = namespace_of(self.valid)
        in_logits = xp.any(self.softmax.nonfinite, axis=1) & (self.valid > 0)
        bad = xp.astype(in_logits | ~self.finite_token, xp.float32)
        return xp.sum(self.raw_strata[0, ...] * bad)

    @once
    def received_attention_in_place(
        self,
    ) -> tuple[Float[Any, "batch head token"], Bool[Any, "batch head token"]]:
        """(α, whether it is defined) of the key at every position: α_k = mean over queries of A[i, k].

        The mean is over :attr:`queries_of_key`.
        """
        xp = namespace_of(self.valid)
        mass, count = self.softmax.key_mass, self.queries_of_key
        is_defined = (count > 0) & (self.key_valid[:, None, :] > 0)
        alpha = xp.where(
            is_defined, mass / xp.where(is_defined, count, xp.ones_like(count)), xp.zeros_like(mass)
        )
        return alpha, is_defined

    @once
    def queries_of_key(self) -> Float[Any, "batch head token"]:
        """How many queries α_k averages over.

        The valid queries i ≥ k if the mask is causal, all valid queries if not; where only some keys are seen
        by earlier queries, those i ≥ k and the earlier ones that see the key.
        """
        xp = namespace_of(self.valid)
        weight = self.query_weight
        total = xp.sum(weight, axis=-1, keepdims=True)
        # n − k of the formula, by weight: the queries at or after key k are all but those before it.
        at_or_after = total - running_sum(weight) + weight
        if self.mask.causal:
            return at_or_after
        count = xp.broadcast_to(total, self.softmax.key_mass.shape)
        if self.mask.partly_causal is None:
            return count
        partly = self.mask.partly_causal[:, None, None]
        return xp.where(partly, at_or_after + self._earlier_viewers, count)

    @once
    def _earlier_viewers(self) -> Float[Any, "batch head token"]:
        """Weight of the queries before each key that see it."""
        xp = namespace_of(self.valid)
        tokens, total = self.layout.tokens, xp.zeros_like(self.query_weight)
        for start in range(0, tokens, self.tile):
            rows = self.source.span(start, min(start + self.tile, tokens))
            tile = self.source.tile(rows)
            is_earlier = rows.queries[:, None] < index_range(0, tokens, self.valid)[None, :]
            sees = xp.astype(xp.broadcast_to(tile.allowed & is_earlier, tile.logits.shape), xp.float32)
            total = total + column_sums(take_rows(self.query_weight, rows, axis=2), sees)
        return total

    @once
    def received_attention(self) -> tuple[Float[Any, "batch head key"], Float[Any, "batch head key"]]:
        """(α, its weight 0 or 1) of the k-th token from the sink key on."""
        xp = namespace_of(self.valid)
        alpha, is_defined = self.received_attention_in_place
        tokens = self.source.key_count
        place = self.sink[:, None] + index_range(0, tokens, self.valid)[None, :]
        inside = xp.astype(place < tokens, xp.float32)[:, None, :]
        index = xp.broadcast_to(xp.clip(place, 0, tokens - 1)[:, None, :], alpha.shape)
        return (
            xp.take_along_axis(alpha, index, axis=-1) * inside,
            xp.take_along_axis(xp.astype(is_defined, xp.float32), index, axis=-1) * inside,
        )

    @property
    def sampled_tiles(self) -> int:
        """In how many tiles :meth:`sampled_tile` gives the sampled queries."""
        return -(-self.sample // self.tile)

    def sampled_tile(self, number: int) -> SampledTile:
        """Logits of sampled queries, for statistics of their distribution; kept if there is only one tile."""
        if "sampled_tile" in self._cache:
            return self._cache["sampled_tile"]
        tokens, weight = self.valid.shape[1], self.query_weight
        start = number * self.tile
        if self.sample == tokens:
            rows = self.source.span(start, min(start + self.tile, tokens))
            weight = take_rows(weight, rows, axis=2)
        else:
            # Of the tokens that are there: padding would thin the sample out.
            sample, live = sampled_rows(self.sample, self.raw_strata[0, ...])
            part = slice(start, start + self.tile)
            rows = QueryRows(sample.queries[:, part], None, (0, self.source.key_count))
            weight = take_rows(weight, rows, axis=2) * live[:, None, part]
        tile = self.source.tile(rows)
        sink_logit, is_sink = pick_sink(tile, self.sink, rows)
        sampled = SampledTile(tile, is_sink, sink_logit, weight)
        if self.sampled_tiles == 1:
            self._cache["sampled_tile"] = sampled
        return sampled

    @once
    def finite_value(
        self,
    ) -> tuple[Float[Any, "batch key_value_head token channel"], Float[Any, "batch token"]] | None:
        """(v, weight of each key whose v and whose sequence's sink v are finite); None without values.

        v is float32, and 0 where not finite.
        """
        if self.value is None:
            return None
        xp = namespace_of(self.key_valid)
        value = as_float32(self.value)
        finite = finite_tokens(value)
        sink_finite = xp.take_along_axis(finite, self.sink[:, None], axis=-1)
        return cleaned(value, finite), self.key_valid * xp.astype(finite & sink_finite, xp.float32)

    @once
    def finite_values(
        self,
    ) -> tuple[Float[Any, "batch key_value_head token"], Float[Any, "batch token"]] | None:
        """(‖v‖, weight of each key) of :attr:`finite_value`; None without values."""
        value = self.finite_value
        return None if value is None else (channel_norm(value[0]), value[1])

    @once
    def sink_key(self) -> Float[Any, "batch key_value_head channel"] | None:
        """The key of each sequence's sink token."""
        if self.key is None:
            return None
        xp = namespace_of(self.key)
        batch, groups, _, channels = self.key.shape
        index = xp.broadcast_to(self.sink[:, None, None, None], (batch, groups, 1, channels))
        return xp.take_along_axis(self.key, index, axis=2)[:, :, 0, :]
