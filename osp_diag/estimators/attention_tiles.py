"""Attention logits and their softmax, one tile of queries at a time: never a T×T array.

Where logits come from is a *source* (:class:`ProductLogits`, :class:`ModelLogits`); what is taken
from them are the functions in an :class:`AttentionReductions` table. The generic functions are the
definition; a faster kernel (FlexAttention, Triton) is another table with the same functions, which
may look at the fields of a :class:`ProductLogits` and return the same numbers its own way.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int

from osp_diag.estimators._arrays import (
    Array,
    accumulator_dtype,
    counts_by_bin,
    float32_matmul,
    index_range,
    is_jax_namespace,
    is_torch_namespace,
    namespace_of,
)
from osp_diag.estimators.attention_mask import (
    AttentionMask,
    QueryRows,
    is_fill,
    take_rows,
)

__all__ = [
    "GENERIC_ATTENTION",
    "AttentionReductions",
    "LogitGrid",
    "LogitSource",
    "LogitTile",
    "ModelLogits",
    "ProductLogits",
    "SampledTile",
    "SoftmaxStatistics",
    "column_sums",
    "pick_sink",
]


class LogitTile(NamedTuple):
    """Logits of some queries as they enter the softmax: scaled, soft-capped, biased."""

    logits: Array
    """(batch, head, row, key) float32; anything where not allowed"""
    allowed: Array
    """bool, broadcastable to ``logits``"""
    extra: Array | None
    """log-sum-exp of the learned sink logits, broadcastable to (batch, head, row); None without them"""


class LogitSource(Protocol):
    """Where the logits of some queries come from."""

    @property
    def key_count(self) -> int: ...

    def span(self, start: int, stop: int) -> QueryRows: ...

    def tile(self, rows: QueryRows) -> LogitTile: ...


@dataclass(frozen=True, eq=False)
class ProductLogits:
    """Logits from queries and keys.

    ``query`` (batch, head, token, channel) and ``key`` (batch, key_value_head, key, channel) are
    float32 and finite; ``usable`` (batch, key) is False for keys that had a NaN or Inf.
    """

    query: Array
    key: Array
    usable: Array
    scale: float
    mask: AttentionMask
    softcap: float | None
    sink_logits: Array | None

    @property
    def key_count(self) -> int:
        return self.key.shape[2]

    def span(self, start: int, stop: int) -> QueryRows:
        return self.mask.span(start, stop, self.key_count, self.key)

    def tile(self, rows: QueryRows) -> LogitTile:
        xp = namespace_of(self.query)
        batch, heads, _, channels = self.query.shape
        groups, (first, last) = self.key.shape[1], rows.keys
        query = take_rows(self.query, rows, axis=2) * self.scale
        count = query.shape[2]
        # Heads that share a key are rows of one matrix product: keys are never repeated.
        query = xp.reshape(query, (batch, groups, heads // groups * count, channels))
        key = xp.matrix_transpose(self.key[:, :, first:last, :])
        logits = xp.reshape(float32_matmul(query, key), (batch, heads, count, last - first))
        if self.softcap is not None:
            logits = self.softcap * xp.tanh(logits / self.softcap)
        bias, allowed = self.mask.rows(rows, batch=batch, heads=heads, like=self.query)
        if bias is not None:
            logits = logits + bias
        allowed = allowed & self.usable[:, None, None, first:last]
        extra = None
        if self.sink_logits is not None:
            extra = xp.astype(self.sink_logits, xp.float32)[None, :, None]
        return LogitTile(logits, allowed, extra)


@dataclass(frozen=True, eq=False)
class ModelLogits:
    """Logits that the model made itself: (batch, head, token, key + extra_columns), after the mask."""

    logits: Array
    extra_columns: int
    mask: AttentionMask

    @property
    def key_count(self) -> int:
        return self.logits.shape[3] - self.extra_columns

    def span(self, start: int, stop: int) -> QueryRows:
        return self.mask.span(start, stop, self.key_count, self.logits)

    def tile(self, rows: QueryRows) -> LogitTile:
        xp = namespace_of(self.logits)
        batch, heads = self.logits.shape[:2]
        part = take_rows(self.logits, rows, axis=2)
        _, allowed = self.mask.rows(rows, batch=batch, heads=heads, like=self.logits)
        logits = part[..., rows.keys[0] : rows.keys[1]]
        extra = None
        if self.extra_columns:
            extra = _log_sum_exp(part[..., self.key_count :])
        return LogitTile(xp.astype(logits, xp.float32), allowed & ~is_fill(logits, allowed), extra)


def _log_sum_exp(values: Array) -> Array:
    """log Σ exp over the last axis in float32; −Inf where every entry is a fill."""
    xp = namespace_of(values)
    wide = xp.astype(values, xp.float32)
    wide = xp.where(is_fill(values), xp.full_like(wide, -xp.inf), wide)
    top = xp.max(wide, axis=-1)
    empty = top == -xp.inf
    safe = xp.where(empty, xp.zeros_like(top), top)
    total = xp.sum(xp.exp(wide - safe[..., None]), axis=-1)
    log = xp.log(xp.where(empty, xp.ones_like(total), total)) + safe
    return xp.where(empty, xp.full_like(log, -xp.inf), log)


class SoftmaxStatistics(NamedTuple):
    """What the softmax of each query gives: (batch, head, token) over the queries, all but ``key_mass``."""

    log_sum_exp: Array
    """over the allowed keys and the learned sinks; 0 where not ``usable``"""
    other_maximum: Array
    """largest logit of the allowed keys other than the sink key; −Inf without any"""
    sink_logit: Array
    """logit of the sink key; −Inf where the query cannot see it"""
    sink_probability: Array
    extra_probability: Array
    """probability given to the learned sinks"""
    usable: Array
    """bool: the query sees something, and its logits have neither NaN nor +Inf"""
    nonfinite: Array
    """bool: a logit of the query is NaN or +Inf"""
    key_mass: Array
    """(batch, head, key): Σ over queries of weight · probability"""


def pick_sink(
    tile: LogitTile, sink: Int[Any, " batch"], rows: QueryRows
) -> tuple[Float[Any, "batch head row"], Array]:
    """(logit of the sink key, −Inf where not allowed; where a key is the sink, (batch, 1, 1, key))."""
    xp = namespace_of(tile.logits)
    first, last = rows.keys
    batch, heads, count = tile.logits.shape[:3]
    is_sink = index_range(first, last, tile.logits)[None, None, None, :] == sink[:, None, None, None]
    visible = xp.any(tile.allowed & is_sink, axis=-1)
    index = xp.clip(sink - first, 0, last - first - 1)[:, None, None, None]
    index = xp.broadcast_to(index, (batch, heads, count, 1))
    logit = xp.take_along_axis(tile.logits, index, axis=-1)[..., 0]
    return xp.where(visible, logit, xp.full_like(logit, -xp.inf)), is_sink


class SampledTile:
    """Logits of some sampled queries, split into the sink key and the other keys.

    ``weight`` is (batch, head, row); ``tile.allowed`` is cut to finite logits, so that one overflow
    does not spoil a mean.
    """

    def __init__(self, tile: LogitTile, is_sink: Array, sink_logit: Array, weight: Array) -> None:
        xp = namespace_of(tile.logits)
        self.logits = tile.logits
        self.extra = tile.extra
        self.allowed = tile.allowed & (xp.abs(tile.logits) < xp.inf)
        self.other = self.allowed & ~is_sink
        visible = xp.isfinite(sink_logit)
        self.sink_logit = xp.where(visible, sink_logit, xp.zeros_like(sink_logit))
        self.weight = weight
        self.sink_weight = weight * xp.astype(visible, weight.dtype)


def column_sums(weight: Array, values: Array) -> Array:
    """Σ_row weight[b, h, row] · values[b, h, row, key]: products and sums where they fuse, else a matmul."""
    xp = namespace_of(values)
    if is_torch_namespace(xp) and (
        values.device.type != "cpu" or sys.modules["torch"].compiler.is_compiling()
    ):
        return xp.sum(weight[..., None] * values, axis=2)
    return float32_matmul(weight[..., None, :], values)[..., 0, :]


def _softmax_tile(source: LogitSource, rows: QueryRows, sink: Array, weight: Array) -> SoftmaxStatistics:
    """Statistics of one tile; ``key_mass`` covers ``rows.keys`` and leaves out the sink key."""
    tile = source.tile(rows)
    xp = namespace_of(tile.logits)
    sink_logit, is_sink = pick_sink(tile, sink, rows)
    nothing = xp.full_like(sink_logit, -xp.inf)
    # The softmax is over three parts: the other keys, the sink key and the learned sinks. ``top``, the
    # largest logit of all, is taken off before any exponential.
    masked = xp.where(tile.allowed & ~is_sink, tile.logits, nothing[..., None])
    other = xp.max(masked, axis=-1)
    top = xp.maximum(other, sink_logit)
    extra = nothing if tile.extra is None else xp.broadcast_to(tile.extra, top.shape)
    top = xp.maximum(top, extra)
    finite = (top < xp.inf) & ~xp.isnan(sink_logit) & ~xp.isnan(extra)  # NaN < Inf is False, too
    if is_jax_namespace(xp):  # XLA's maximum over an axis can lose a NaN on a CPU
        finite = finite & ~xp.any(xp.isnan(masked), axis=-1)
    usable = finite & (top > -xp.inf)
    top = xp.where(usable, top, xp.zeros_like(top))
    # An unusable row is emptied before the exponential: 0 · NaN would poison the column sums.
    weights = xp.exp(xp.where(usable[..., None], masked, nothing[..., None]) - top[..., None])
    sink_logit = xp.where(usable, sink_logit, nothing)
    sink_weight = xp.exp(sink_logit - top)
    extra_weight = xp.exp(xp.where(usable, extra, nothing) - top)
    # Z = Σ_k exp(logit_k − top) over the three parts; A[i, k] = exp(logit_k − top) / Z.
    total = xp.sum(weights, axis=-1) + sink_weight + extra_weight
    total = xp.where(usable, total, xp.ones_like(total))
    return SoftmaxStatistics(
        log_sum_exp=top + xp.log(total),
        other_maximum=xp.where(usable, other, nothing),
        sink_logit=sink_logit,
        sink_probability=sink_weight / total,
        extra_probability=extra_weight / total,
        usable=usable,
        nonfinite=~finite,
        key_mass=column_sums(take_rows(weight, rows, axis=1)[:, None, :] / total, weights),
    )


def softmax_statistics(
    source: LogitSource, sink: Int[Any, " batch"], weight: Float[Any, "batch token"], tile: int
) -> SoftmaxStatistics:
    """Softmax statistics of every query in tiles of ``tile`` queries: O(T · tile) memory.

    ``sink`` is the position of each sequence's sink key, ``weight`` the weight of each query in
    ``key_mass``.
    """
    xp = namespace_of(weight)
    tokens = weight.shape[1]
    parts = []
    mass: Any = 0.0
    for start in range(0, tokens, tile):
        rows = source.span(start, min(start + tile, tokens))
        part = _softmax_tile(source, rows, sink, weight)
        parts.append(part)
        # A tile sees a range of keys; zeros stand for the others.
        before, after = rows.keys[0], source.key_count - rows.keys[1]
        zero = xp.zeros_like(part.key_mass[..., :1])
        lead = part.key_mass.shape[:2]
        padding = [xp.broadcast_to(zero, (*lead, size)) for size in (before, after)]
        mass = mass + xp.concat([padding[0], part.key_mass, padding[1]], axis=-1)
    joined = {
        name: xp.concat([getattr(part, name) for part in parts], axis=-1)
        for name in SoftmaxStatistics._fields
        if name != "key_mass"
    }
    # Tiles leave the sink key's column out: its mass is Σ_i w_i A[i, sink].
    to_sink = xp.sum(weight[:, None, :] * joined["sink_probability"], axis=-1)
    is_sink = index_range(0, source.key_count, weight)[None, None, :] == sink[:, None, None]
    mass = xp.where(is_sink, to_sink[..., None], mass)
    return SoftmaxStatistics(key_mass=mass, **joined)


@dataclass(frozen=True)
class LogitGrid:
    """Fixed bins, equally wide in asinh(logit), over ±limit; logits beyond it fall into the outer bins."""

    bins: int = 256
    limit: float = 1e4

    @property
    def edges(self) -> np.ndarray:
        """The ``bins + 1`` edges, in logit units."""
        top = math.asinh(self.limit)
        return np.sinh(np.linspace(-top, top, self.bins + 1))

    @property
    def centres(self) -> np.ndarray:
        """The middle of each bin in asinh, in logit units."""
        top = math.asinh(self.limit)
        edges = np.linspace(-top, top, self.bins + 1)
        return np.sinh((edges[1:] + edges[:-1]) / 2)

    def place(self, logits: Array) -> Array:
        """The bin of each finite logit."""
        xp = namespace_of(logits)
        # asinh(logit) from −asinh(limit) … asinh(limit) to 0 … bins.
        position = (xp.asinh(logits) / math.asinh(self.limit) + 1.0) * (self.bins / 2)
        return xp.astype(xp.clip(xp.floor(position), 0, self.bins - 1), xp.int32)


def logit_counts(
    values: Float[Any, "batch head element"], weight: Float[Any, "batch head element"], grid: LogitGrid
) -> Float[Any, "head logit_bin"]:
    """Weighted histogram of logits; elements of weight 0 may hold anything."""
    xp = namespace_of(values)
    heads = values.shape[1]
    values, weight = (xp.reshape(xp.permute_dims(a, (1, 0, 2)), (heads, -1)) for a in (values, weight))
    safe = xp.where(weight > 0, values, xp.zeros_like(values))
    counts = counts_by_bin(grid.place(safe), weight, grid.bins)
    return xp.astype(counts, accumulator_dtype(xp, counts))


# Why kernels plug in here and not in estimators: docs/decisions.md, Estimators.
class AttentionReductions(NamedTuple):
    """Where faster kernels plug in: replace any function by one that returns the same numbers."""

    softmax_statistics: Callable[[LogitSource, Array, Array, int], SoftmaxStatistics] = softmax_statistics
    logit_counts: Callable[[Array, Array, LogitGrid], Array] = logit_counts


GENERIC_ATTENTION = AttentionReductions()
