"""What attention to another sequence offers to estimators: queries and keys are of different tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxtyping import Float

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import Array, namespace_of, once
from osp_diag.estimators.attention import (
    GENERIC_ATTENTION,
    AttentionMask,
    AttentionObservation,
    AttentionReductions,
    TokenIds,
    as_float32,
    cleaned,
    finite_tokens,
)
from osp_diag.estimators.attention_tiles import LogitSource, ModelLogits, ProductLogits
from osp_diag.estimators.base import Layout
from osp_diag.schema import STRATA

__all__ = ["CrossAttentionObservation"]


class CrossAttentionObservation(AttentionObservation):
    """Cross-attention of one layer in one forward pass: a decoder's queries over an encoder's keys.

    Parameters
    ----------
    query : (batch, head, token, channel), as it enters the product; None where only logits are known
    key : (batch, key_value_head, key, channel), None likewise
    logits : (batch, head, token, key) where the model made and masked them itself, else None
    value : (batch, key_value_head, key, any width), or None where it is not known
    strata : (stratum, batch, token) of the queries' tokens
    key_strata : (stratum, batch, key) of the keys' tokens; padding is 0 in all
    scale, softcap, sink_logits, query_sample, tile : as of :class:`AttentionObservation`
    mask : what a query may see, rectangular
    token_ids : ids of the keys' tokens
    stratum_names : of both

    The *sink key* is the first token of the other sequence that is not padding, and key positions count from
    it. No key is later than a query: α_k is the mean of A[i, k] over all valid queries i, and what is told by
    stratum of the query speaks of the decoder's tokens, by stratum of the key of the encoder's. What is made
    of the products of queries and keys beside their logits comes out as NaN.

    Raises :class:`~osp_diag.errors.EstimatorError` for shapes that do not fit together.
    """

    def __init__(
        self,
        query: Float[Any, "batch head token channel"] | None,
        key: Float[Any, "batch key_value_head key channel"] | None,
        value: Float[Any, "batch key_value_head key value_channel"] | None,
        strata: Float[Any, "stratum batch token"],
        key_strata: Float[Any, "stratum batch key"],
        *,
        scale: float = 1.0,
        logits: Float[Any, "batch head token key"] | None = None,
        mask: AttentionMask | None = None,
        softcap: float | None = None,
        sink_logits: Float[Any, " head"] | None = None,
        token_ids: TokenIds | None = None,
        query_sample: int | None = 64,
        tile: int = 128,
        reductions: AttentionReductions = GENERIC_ATTENTION,
        stratum_names: tuple[str, ...] = STRATA,
    ) -> None:
        xp = namespace_of(strata)
        mask = _both_ways(AttentionMask(causal=False) if mask is None else mask)
        asking = query if query is not None else logits
        if asking is None or (query is None) != (key is None):
            raise EstimatorError(
                "cross-attention is told by query and key, or by the logits of their product"
            )
        batch, heads, tokens = asking.shape[:3]
        keys = asking.shape[3] if key is None else key.shape[2]
        shapes = (tuple(strata.shape[1:]), tuple(key_strata.shape[1:]))
        if shapes != ((batch, tokens), (batch, keys)):
            raise EstimatorError(
                f"the strata of queries and keys are of {shapes[0]} and {shapes[1]} tokens, expected "
                f"{(batch, tokens)} and {(batch, keys)}: (batch, token) each"
            )
        mask.check(batch, heads, tokens, keys)
        layout = Layout(heads=heads, key_value_heads=heads, tokens=keys, strata=stratum_names)
        layout = replace(layout, vocabulary=1 if token_ids is None else token_ids.vocabulary)
        if value is not None:
            layout = replace(layout, key_value_heads=value.shape[1])
        finite, finite_key = (xp.ones_like(part[0, ...]) > 0 for part in (strata, key_strata))
        source: LogitSource
        if query is None or key is None:
            assert logits is not None, "one of the two is there"
            source = ModelLogits(logits, 0, mask)
        else:
            if key.shape[0] != batch or key.shape[3] != query.shape[3] or heads % key.shape[1]:
                raise EstimatorError(
                    f"query {tuple(query.shape)} and key {tuple(key.shape)} do not fit: both are "
                    "(batch, head, token, channel), the key with a divisor of the query's heads"
                )
            layout = replace(layout, channels=heads * query.shape[3], head_channels=query.shape[3])
            query, key = as_float32(query), as_float32(key)
            finite, finite_key = finite_tokens(query), finite_tokens(key)
            query, key = cleaned(query, finite), cleaned(key, finite_key)
            source = ProductLogits(query, key, finite_key, scale, mask, softcap, sink_logits)
        self._open(source, None, strata, finite, layout, mask, None, query_sample, tile, reductions)
        self.finite_key = finite_key
        self._weigh(xp.astype(key_strata, xp.float32), finite_key)
        self.value, self.token_ids = value, token_ids
        self.query, self.key, self.scale = None, None, None

    @once
    def nonfinite(self) -> Array:
        """How many queries' and keys' tokens that are not padding had a NaN or Inf, or one in a logit."""
        xp = namespace_of(self.valid)
        in_logits = xp.any(self.softmax.nonfinite, axis=1) & (self.valid > 0)
        queries = xp.astype(in_logits | ~self.finite_token, xp.float32)
        keys = xp.astype(~self.finite_key, xp.float32)
        return xp.sum(self.raw_strata[0, ...] * queries) + xp.sum(self.raw_key_strata[0, ...] * keys)


def _both_ways(mask: AttentionMask) -> AttentionMask:
    """The mask with its causality as a function: as a flag it would choose the queries of a mean."""
    if not mask.causal:
        return mask
    other = mask.function

    def not_later(batch: Array, head: Array, query: Array, key: Array) -> Array:
        seen = key <= query
        return seen if other is None else seen & other(batch, head, query, key)

    return replace(mask, causal=False, function=not_later)
