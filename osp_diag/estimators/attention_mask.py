"""Which keys a query may attend to, and what is added to its logits, one tile of queries at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import Array, index_range, namespace_of

__all__ = ["AttentionMask", "QueryRows", "is_fill", "is_filled_logit", "sampled_rows", "take_rows"]


def is_fill(values: Array) -> Bool[Any, "..."]:
    """True where an additive entry means "not allowed".

    That is at or below −1e6 (−32752 in float16), which no bias reaches, or −10000, with which BERT and
    Megatron fill (−9984 in bfloat16). At that single value a bias of ALiBi has no effect on a probability.

    NaN is not a fill: it is passed on, so that its row is found and counted.
    """
    named = (values == -10000.0) | (values == -9984.0)
    return is_filled_logit(values) | named


def is_filled_logit(logits: Array) -> Bool[Any, "..."]:
    """True where a logit was made by a fill: at or below −1e6 (−32752 in float16).

    So −1e9 is one, also if it was divided by √d afterwards (CodeGen). −10000 plus a logit is not told from
    the logits of a model that diverges: there causality and padding, which are known otherwise, have to do.
    """
    return logits <= (-32752.0 if logits.dtype == namespace_of(logits).float16 else -1e6)


class QueryRows(NamedTuple):
    """Some queries, and a range of keys outside of which none of them can see anything."""

    queries: Int[Any, " row"] | Int[Any, "batch row"]
    """the same of every sequence, or of each its own"""
    span: tuple[int, int] | None
    """(start, stop) where the rows are contiguous, else None"""
    keys: tuple[int, int]


def take_rows(array: Array, rows: QueryRows, axis: int) -> Array:
    """The rows of ``array`` along ``axis``; a view where they are contiguous."""
    if rows.span is None and rows.queries.ndim == 2:
        xp, (batch, count) = namespace_of(array), rows.queries.shape
        array = xp.broadcast_to(array, (batch, *array.shape[1:]))
        shape = [batch, *(1 for _ in array.shape[1:])]
        shape[axis] = count
        full = list(array.shape)
        full[axis] = count
        index = xp.broadcast_to(xp.reshape(rows.queries, tuple(shape)), tuple(full))
        return xp.take_along_axis(array, index, axis=axis)
    if rows.span is None:
        return namespace_of(array).take(array, rows.queries, axis=axis)
    index = [slice(None)] * array.ndim
    index[axis] = slice(*rows.span)
    return array[tuple(index)]


def sampled_rows(count: int, valid: Float[Any, "batch token"]) -> tuple[QueryRows, Float[Any, "batch row"]]:
    """(``count`` evenly spaced queries among the valid ones of each sequence, their weight 0 or 1).

    Each is in the middle of its share of the valid queries. A sequence with fewer than ``count`` gives all
    of them, and weight 0 to the rows that remain.
    """
    xp = namespace_of(valid)
    tokens = valid.shape[1]
    place, row = index_range(0, tokens, valid), index_range(0, count, valid)
    # Places of the valid queries first, in order; the others behind them.
    order = xp.sort(xp.where(valid > 0, place, place + tokens), axis=-1)
    total = xp.sum(xp.astype(valid > 0, place.dtype), axis=-1)[:, None]
    rank = xp.where(total >= count, (2 * row + 1) * total // (2 * count), row)
    queries = xp.take_along_axis(order, xp.clip(rank, 0, tokens - 1), axis=-1)
    return QueryRows(queries % tokens, None, (0, tokens)), xp.astype(rank < total, valid.dtype)


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """What a query may see. Every part that is given has to agree.

    Parameters
    ----------
    causal : query i sees keys j ≤ i. Say True for every causal model, also where ``tensor`` or
        ``function`` already encodes it: it also decides over which queries the mass received by a
        key is averaged (those at or after the key, or all of them).
    window : query i sees keys with i − j < window. It is one-sided: a bidirectional window is given
        by ``tensor`` or ``function``.
    tensor : broadcastable to (batch, head, query, key); bool (True = allowed), or floating and added
        to the logits. Additive entries at or below −1e6 (−32752 in float16), −Inf included, and −10000
        count as not allowed; any other entry (ALiBi) as part of the logit.
    keys : (batch, key), non-zero where a key is not padding
    function : (batch, head, query, key indices) → bool, as FlexAttention's ``mask_mod``. It is called
        with index arrays that broadcast against each other.
    """

    causal: bool = True
    window: int | None = None
    tensor: Array | None = None
    keys: Array | None = None
    function: Callable[[Array, Array, Array, Array], Array] | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise EstimatorError(
                f"the attention window is {self.window}: give the number of keys that a query sees, "
                "itself included (at least 1), or None for no window"
            )

    @property
    def additive(self) -> bool:
        """Whether ``tensor`` is added to the logits."""
        return self.tensor is not None and self.tensor.dtype != namespace_of(self.tensor).bool

    def check(self, batch: int, heads: int, tokens: int) -> None:
        """Refuse what does not broadcast to (batch, heads, tokens, tokens)."""
        if self.tensor is not None:
            xp = namespace_of(self.tensor)
            if self.additive and xp.isdtype(self.tensor.dtype, "integral"):
                raise EstimatorError(
                    f"the mask tensor has dtype {self.tensor.dtype}: pass bool (True = allowed) or a "
                    "floating dtype (added to the logits)"
                )
            shape = tuple(self.tensor.shape)
            padded = (1,) * (4 - len(shape)) + shape
            full = (batch, heads, tokens, tokens)
            if len(padded) != 4 or any(a not in (1, b) for a, b in zip(padded, full, strict=True)):
                raise EstimatorError(
                    f"the mask tensor has shape {shape}, which does not broadcast to (batch, head, query, "
                    f"key) = {full}; slice it to the keys that are present"
                )
        if self.keys is not None and tuple(self.keys.shape) != (batch, tokens):
            raise EstimatorError(
                f"the padding mask has shape {tuple(self.keys.shape)}, expected (batch, key) = "
                f"{(batch, tokens)}"
            )

    def span(self, start: int, stop: int, tokens: int, like: Array) -> QueryRows:
        """Queries start … stop − 1 with the keys that causality and the window leave in sight."""
        # The first query of the rows sees furthest back, the last one furthest on.
        first = 0 if self.window is None else max(0, start - self.window + 1)
        last = stop if self.causal else tokens
        return QueryRows(index_range(start, stop, like), (start, stop), (first, last))

    def rows(
        self, rows: QueryRows, *, batch: int, heads: int, like: Array
    ) -> tuple[Float[Any, "#batch #head #row #key"] | None, Bool[Any, "#batch #head row key"]]:
        """(additive bias in float32 or None, allowed) for some queries and ``rows.keys``.

        Both broadcast to (batch, head, row, key); nothing larger than that is made.
        """
        xp = namespace_of(like)
        queries = rows.queries if rows.queries.ndim == 2 else rows.queries[None, :]
        query = queries[:, None, :, None]
        key = index_range(*rows.keys, like)[None, None, None, :]
        allowed = xp.broadcast_to(key >= 0, (query.shape[0], 1, query.shape[2], key.shape[3]))
        if self.causal:
            allowed = allowed & (key <= query)
        if self.window is not None:
            allowed = allowed & (query - key < self.window)
        if self.keys is not None:
            allowed = allowed & (self.keys[:, None, None, rows.keys[0] : rows.keys[1]] != 0)
        if self.function is not None:
            b = index_range(0, batch, like)[:, None, None, None]
            h = index_range(0, heads, like)[None, :, None, None]
            allowed = allowed & self.function(b, h, query, key)
        if self.tensor is None:
            return None, allowed
        part = _tensor_rows(self.tensor, rows)
        if not self.additive:
            return None, allowed & part
        filled = is_fill(part)
        bias = xp.astype(part, xp.float32)
        return xp.where(filled, xp.zeros_like(bias), bias), allowed & ~filled


def _tensor_rows(tensor: Array, rows: QueryRows) -> Array:
    """``tensor`` in four dimensions, cut to the rows and keys."""
    while tensor.ndim < 4:
        tensor = tensor[None, ...]
    if tensor.shape[2] != 1:
        tensor = take_rows(tensor, rows, axis=2)
    return tensor if tensor.shape[3] == 1 else tensor[..., rows.keys[0] : rows.keys[1]]
