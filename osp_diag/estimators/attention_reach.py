"""How far the queries of one attention call see: only back, both ways, or both ways to some keys alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxtyping import Bool, Float

from osp_diag.estimators._arrays import Array, namespace_of, runs_on_host
from osp_diag.estimators.attention_mask import AttentionMask, QueryRows, index_range, take_rows

__all__ = ["with_reach"]

_HIDDEN = -1e3
"""Some models fill masks with −1e4 or −1e9 only. A bias may go as low, but never for all later keys."""


# Why each call is asked: docs/decisions.md, Capture.
def with_reach(
    mask: AttentionMask,
    valid: Float[Any, "batch token"],
    *,
    heads: int,
    logits: Float[Any, "batch head token key"] | None = None,
    tile: int = 128,
) -> AttentionMask:
    """``mask`` with ``causal`` or ``partly_causal`` set as its tensor, its function or the logits show.

    Of each sequence the pairs of valid tokens are looked at: if no query sees a later key it is causal; if
    every key sees the queries that see it, it is bidirectional; otherwise it is partly causal.

    Where looking at values would make the host wait for a device, ``causal`` stays False and
    ``partly_causal`` says the same for each sequence: the same numbers, of twice as many products.

    Parameters
    ----------
    mask : of a call that does not say itself that it is causal
    valid : 0 for padding
    heads : of the queries
    logits : that the model made and masked itself, where those are all that is known
    tile : queries at a time
    """
    if mask.causal or (logits is None and mask.tensor is None and mask.function is None):
        return mask
    xp = namespace_of(valid)
    batch, tokens = valid.shape
    everything = index_range(0, tokens, valid)
    sees_later = xp.zeros_like(valid[:, 0]) > 0
    is_one_sided = sees_later
    for start in range(0, tokens, tile):
        span = (start, min(start + tile, tokens))
        queries = index_range(*span, valid)
        rows = QueryRows(queries, span, (0, tokens))
        columns = QueryRows(everything, (0, tokens), span)
        sees, is_seen = (_seen(mask, logits, part, batch, heads, valid) for part in (rows, columns))
        later = everything[None, :] > queries[:, None]
        counted = (take_rows(valid, rows, axis=1)[:, :, None] > 0) & (valid[:, None, :] > 0) & later
        counted = counted[:, None, :, :]
        sees_later = sees_later | xp.any(sees & counted, axis=(1, 2, 3))
        one_sided = sees != xp.matrix_transpose(is_seen)
        is_one_sided = is_one_sided | xp.any(one_sided & counted, axis=(1, 2, 3))
    partly = is_one_sided | ~sees_later
    if not runs_on_host(xp, valid):
        return replace(mask, partly_causal=partly)
    if not bool(xp.any(sees_later)):
        return replace(mask, causal=True)
    return replace(mask, partly_causal=partly) if bool(xp.any(partly)) else mask


def _seen(
    mask: AttentionMask, logits: Array | None, rows: QueryRows, batch: int, heads: int, like: Array
) -> Bool[Any, "#batch #head row #key"]:
    """Which of the keys ``rows.keys`` the queries see."""
    bias, allowed = mask.rows(rows, batch=batch, heads=heads, like=like)
    if logits is not None:
        return allowed & (take_rows(logits, rows, axis=2)[..., slice(*rows.keys)] > _HIDDEN)
    return allowed if bias is None else allowed & (bias > _HIDDEN)
