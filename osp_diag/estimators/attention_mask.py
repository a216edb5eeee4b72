"""Which keys a query may attend to, and what is added to its logits, one tile of queries at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int, Shaped

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import Array, index_range, namespace_of

__all__ = ["AttentionMask", "QueryRows", "in_four_axes", "is_fill", "sampled_rows", "take_rows"]


_OUT_OF_SIGHT = 9000.0
"""How far below its row's largest entry one has no weight: models fill with −1e4 or −1e9 too."""


def is_fill(values: Array, allowed: Array | None = None) -> Bool[Any, "..."]:
    """True where an additive entry or a logit means "not allowed".

    That is at or below −1e30, in float16 at or below half of its finite minimum; and where ``allowed`` is
    given, 9,000 or more below the largest entry of those allowed in its row (the last axis). exp(−9000) is
    0 in every floating type, so a real bias (ALiBi at 10,000 tokens) loses nothing but its count.

    NaN is not a fill: it is passed on, so that its row is found and counted. Models fill with the finite
    minimum of a dtype that may be narrower, and some (CodeGen) scale logits only afterwards.
    """
    xp = namespace_of(values)
    filled = values <= (-32752.0 if values.dtype == xp.float16 else -1e30)
    if allowed is None:
        return filled
    wide = xp.astype(values, xp.float32)
    top = xp.max(xp.where(allowed & ~filled, wide, -xp.inf), axis=-1, keepdims=True)
    # A row with +Inf has no largest entry to measure from.
    return filled | ((wide <= top - _OUT_OF_SIGHT) & xp.isfinite(top))


def in_four_axes(mask: Array) -> Shaped[Any, "#batch #head #query #key"]:
    """A mask's tensor as it is broadcast, its missing axes of length 1 in front."""
    return mask[(None,) * (4 - mask.ndim) + (...,)]


class QueryRows(NamedTuple):
    """Some queries, and a range of keys outside of which none of them can see anything."""

    queries: Int[Any, " row"] | Int[Any, "batch row"]
    """the same ones of every sequence, or those of each"""
    span: tuple[int, int] | None
    """(start, stop) where the rows are contiguous, else None"""
    keys: tuple[int, int]


def take_rows(array: Array, rows: QueryRows, axis: int) -> Array:
    """The rows of ``array`` (batch, …) along ``axis``; a view where they are contiguous."""
    if rows.span is None:
        xp = namespace_of(array)
        if rows.queries.ndim == 1:
            return xp.take(array, rows.queries, axis=axis)
        batch, count = rows.queries.shape
        shape, place = [batch, *array.shape[1:]], [1] * array.ndim
        whole = xp.broadcast_to(array, tuple(shape))
        shape[axis], place[0], place[axis] = count, batch, count
        index = xp.broadcast_to(xp.reshape(rows.queries, tuple(place)), tuple(shape))
        return xp.take_along_axis(whole, index, axis=axis)
    cut = [slice(None)] * array.ndim
    cut[axis] = slice(*rows.span)
    return array[tuple(cut)]


def sampled_rows(count: int, valid: Float[Any, "batch token"]) -> tuple[QueryRows, Float[Any, "batch row"]]:
    """``count`` evenly spaced queries of each sequence, and the weight 0 or 1 of each.

    Each stands in the middle of its share of the tokens that are valid. A sequence of fewer than ``count``
    gives every one of them once; the rows beyond have the weight 0.
    """
    xp = namespace_of(valid)
    tokens = valid.shape[1]
    # The columns of the valid tokens in order, then the others.
    columns = xp.argsort(xp.astype(valid <= 0, xp.int32), axis=1, stable=True)
    present = xp.sum(xp.astype(valid > 0, columns.dtype), axis=1, keepdims=True)
    rows = xp.clip(present, 1, count)
    number = index_range(0, count, valid)[None, :]
    place = xp.clip((2 * number + 1) * present // (2 * rows), 0, tokens - 1)
    weight = xp.astype(number < xp.clip(present, 0, count), xp.float32)
    return QueryRows(xp.take_along_axis(columns, place, axis=1), None, (0, tokens)), weight


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
        to the logits. Additive entries that :func:`is_fill` tells (−Inf, the minimum of a type, −1e9
        or −1e4 beside 0) count as not allowed; any other entry (ALiBi) as part of the logit.
    keys : (batch, key), non-zero where a key is not padding
    function : (batch, head, query, key indices) → bool, as FlexAttention's ``mask_mod``. It is called
        with index arrays that broadcast against each other.
    partly_causal : (batch,), True for sequences in which some keys are seen by earlier queries and others
        are not (a prefix that all see, blocks of image tokens in causal text). The mass that a key receives
        is then averaged over the queries at or after it and those before that see it. Without ``causal``.
    """

    causal: bool = True
    window: int | None = None
    tensor: Array | None = None
    keys: Array | None = None
    function: Callable[[Array, Array, Array, Array], Array] | None = None
    partly_causal: Bool[Any, " batch"] | None = None

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

    def check(self, batch: int, heads: int, tokens: int, keys: int | None = None) -> None:
        """Refuse what does not broadcast to (batch, heads, tokens, keys); None: as many keys as tokens."""
        keys = tokens if keys is None else keys
        if self.tensor is not None:
            xp = namespace_of(self.tensor)
            if self.additive and xp.isdtype(self.tensor.dtype, "integral"):
                raise EstimatorError(
                    f"the mask tensor has dtype {self.tensor.dtype}: pass bool (True = allowed) or a "
                    "floating dtype (added to the logits)"
                )
            shape = tuple(self.tensor.shape)
            padded = (1,) * (4 - len(shape)) + shape
            full = (batch, heads, tokens, keys)
            if len(padded) != 4 or any(a not in (1, b) for a, b in zip(padded, full, strict=True)):
                raise EstimatorError(
                    f"the mask tensor has shape {shape}, which does not broadcast to (batch, head, query, "
                    f"key) = {full}; slice it to the keys that are present"
                )
        if self.keys is not None and tuple(self.keys.shape) != (batch, keys):
            raise EstimatorError(
                f"the padding mask has shape {tuple(self.keys.shape)}, expected (batch, key) = "
                f"{(batch, keys)}"
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
        filled = is_fill(part, allowed)
        bias = xp.astype(part, xp.float32)
        return xp.where(filled, xp.zeros_like(bias), bias), allowed & ~filled


def _tensor_rows(tensor: Array, rows: QueryRows) -> Array:
    """``tensor`` in four dimensions, cut to the rows and keys."""
    tensor = in_four_axes(tensor)
    if tensor.shape[2] != 1:
        tensor = take_rows(tensor, rows, axis=2)
    return tensor if tensor.shape[3] == 1 else tensor[..., rows.keys[0] : rows.keys[1]]
