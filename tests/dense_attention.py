"""Attention statistics in float64 NumPy from the whole T×T array, written apart from the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import entr

EPSILONS = (0.1, 0.2, 0.3, 0.5, 0.8)
SINK_POSITIONS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Case:
    """Inputs of one attention, as NumPy arrays; ``additive`` and ``allowed`` are mask tensors."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    strata: np.ndarray
    scale: float
    causal: bool = True
    window: int | None = None
    additive: np.ndarray | None = None
    allowed: np.ndarray | None = None
    keys: np.ndarray | None = None
    function: Callable | None = None
    softcap: float | None = None
    sink_logits: np.ndarray | None = None


def make_case(
    seed: int = 0,
    *,
    batch: int = 3,
    heads: int = 4,
    groups: int = 2,
    tokens: int = 23,
    channels: int = 8,
    size: float = 1.5,
    left: tuple[int, ...] = (),
    right: tuple[int, ...] = (),
    **options: object,
) -> Case:
    """Random queries, keys and values with a sink; padding of given length at either side of a sequence."""
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(batch, heads, tokens, channels)) * size
    key = rng.normal(size=(batch, groups, tokens, channels))
    value = rng.normal(size=(batch, groups, tokens, channels + 3))
    valid = np.ones((batch, tokens))
    for b, count in enumerate(left):
        valid[b, :count] = 0
    for b, count in enumerate(right):
        valid[b, tokens - count :] = 0
    first = np.zeros_like(valid)
    first[np.arange(batch), valid.argmax(axis=1)] = valid.max(axis=1)
    for b, t in enumerate(valid.argmax(axis=1)):
        key[b, :, t] += query[b, :groups].mean(axis=1) * 2 / size
        value[b, :, t] *= 0.2
    delimiter = (rng.random((batch, tokens)) < 0.2) * valid * (1 - first)
    strata = np.stack([valid, first, delimiter, valid - first - delimiter])
    if any(left) or any(right):
        options.setdefault("keys", valid > 0)
    arrays = [a.astype(np.float32) for a in (query, key, value, strata)]
    return Case(*arrays, scale=channels**-0.5, **options)


def sub_batch(case: Case, index: slice) -> Case:
    """Some sequences of a case."""
    cut = {name: getattr(case, name)[index] for name in ("query", "key", "value")}
    for name in ("additive", "allowed", "keys"):
        part = getattr(case, name)
        if part is not None and part.shape[0] == case.query.shape[0]:
            cut[name] = part[index]
    return replace(case, strata=case.strata[:, index], **cut)


def dense_logits(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """(logits, allowed), both (batch, head, query, key)."""
    q, k = case.query.astype(np.float64), case.key.astype(np.float64)
    heads, tokens = q.shape[1:3]
    k = np.repeat(k, heads // k.shape[1], axis=1)
    logits = case.scale * np.einsum("bhic,bhjc->bhij", q, k)
    if case.softcap is not None:
        logits = case.softcap * np.tanh(logits / case.softcap)
    i, j = np.arange(tokens)[:, None], np.arange(tokens)[None, :]
    allowed = np.ones(logits.shape, dtype=bool)
    if case.causal:
        allowed &= j <= i
    if case.window is not None:
        allowed &= i - j < case.window
    if case.keys is not None:
        allowed &= case.keys[:, None, None, :] != 0
    if case.allowed is not None:
        allowed &= case.allowed
    if case.function is not None:
        for b, h, row, column in np.ndindex(*logits.shape):
            allowed[b, h, row, column] &= bool(case.function(*map(np.asarray, (b, h, row, column))))
    if case.additive is not None:
        filled = case.additive <= np.finfo(case.additive.dtype).min / 2
        allowed &= ~filled
        logits = logits + np.where(filled, 0.0, case.additive.astype(np.float64))
    return logits, allowed


def dense_outputs(case: Case, logits: np.ndarray | None = None, allowed: np.ndarray | None = None) -> dict:
    """Every output of the ``attention`` site but the histogram, over every query."""
    if logits is None or allowed is None:
        logits, allowed = dense_logits(case)
    batch, heads, tokens, _ = logits.shape
    masked = np.where(allowed, logits, -np.inf)
    extra = np.full(heads, -np.inf) if case.sink_logits is None else case.sink_logits.astype(np.float64)
    extra = np.broadcast_to(extra[None, :, None, None], (batch, heads, tokens, 1))
    both = np.concatenate([masked, extra], axis=-1)
    top = both.max(axis=-1, keepdims=True)
    weights = np.exp(both - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    probability = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    p, p_extra = probability[..., :-1], probability[..., -1]
    return {
        **_received(case, p, total[..., 0] > 0),
        **_per_query(case, p, p_extra, masked, total[..., 0] > 0),
        **_values(case),
        **_channels(case, masked),
    }


def _sinks(case: Case) -> np.ndarray:
    return case.strata[0].argmax(axis=1)


def _received(case: Case, p: np.ndarray, usable: np.ndarray) -> dict:
    batch, heads, tokens, _ = p.shape
    alphas = np.full((batch, heads, tokens), np.nan)
    for b, h in np.ndindex(batch, heads):
        valid = (case.strata[0, b] > 0) & usable[b, h]
        sink = _sinks(case)[b]
        for k in range(sink, tokens):
            queries = valid & (np.arange(tokens) >= k) if case.causal else valid
            if queries.any() and case.strata[0, b, k] > 0:
                alphas[b, h, k - sink] = p[b, h, queries, k].mean()
    rate = np.full((heads, len(EPSILONS), len(SINK_POSITIONS)), np.nan)
    for h, (e, epsilon), (s, k) in (
        (h, e, s) for h in range(heads) for e in enumerate(EPSILONS) for s in enumerate(SINK_POSITIONS)
    ):
        known = ~np.isnan(alphas[:, h, k]) if k < tokens else np.zeros(batch, dtype=bool)
        if known.any():
            rate[h, e, s] = (alphas[known, h, k] > epsilon).mean()
    seen = ~np.isnan(alphas)
    count = seen.sum(axis=0)
    mean = np.divide(
        np.where(seen, alphas, 0).sum(axis=0), count, out=np.full(count.shape, np.nan), where=count > 0
    )
    return {"sink_rate": rate, "key_mass": mean}


def _mean(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weighted mean over batch and token of (batch, head, token) → (head,)."""
    total, count = (values * weight).sum(axis=(0, 2)), weight.sum(axis=(0, 2))
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def _per_query(
    case: Case, p: np.ndarray, p_extra: np.ndarray, masked: np.ndarray, usable: np.ndarray
) -> dict:
    at = np.arange(len(p))
    sink = _sinks(case)
    to_sink = p[at, :, :, sink]
    sink_logit = masked[at, :, :, sink]
    dominant = (masked.argmax(axis=-1) == sink[:, None, None]) & np.isfinite(sink_logit)
    weight = case.strata[0][:, None, :] * usable
    strata = [s[:, None, :] * usable for s in case.strata]
    allowed = masked > -np.inf
    mean_logit = np.where(allowed, masked, 0).sum(axis=-1) / np.maximum(allowed.sum(axis=-1), 1)
    sees_sink = weight * np.isfinite(sink_logit)
    difference = np.where(np.isfinite(sink_logit), sink_logit, 0) - mean_logit
    columns = np.einsum("bhi,bhij->bhj", weight, p)
    share = np.stack([(columns * s[:, None, :]).sum(axis=(0, 2)) for s in case.strata], axis=-1)
    largest = np.where(weight > 0, masked.max(axis=-1), -np.inf)
    return {
        "first_token_attention": np.stack([_mean(to_sink, s) for s in strata], axis=-1),
        "first_token_dominance": np.stack([_mean(dominant, s) for s in strata], axis=-1),
        "key_mass_share": share / weight.sum(axis=(0, 2))[:, None],
        "extra_sink_mass": _mean(p_extra, weight),
        "max_logit": largest.max(axis=(0, 2)),
        "delta_logit": _mean(difference, sees_sink),
        "attention_entropy": _mean(entr(p).sum(axis=-1) + entr(p_extra), weight),
    }


def _values(case: Case) -> dict:
    norm = np.linalg.norm(case.value.astype(np.float64), axis=-1)
    by_stratum = np.stack(
        [_mean(norm, np.broadcast_to(s[:, None], norm.shape)) for s in case.strata], axis=-1
    )
    present = case.strata[0].any(axis=1)
    sink = norm[np.arange(len(norm)), :, _sinks(case)][present].mean(axis=0)
    return {"value_norm": by_stratum, "value_drain": sink / by_stratum[:, 0]}


def _channels(case: Case, masked: np.ndarray) -> dict:
    q, k = case.query.astype(np.float64), case.key.astype(np.float64)
    batch, heads, tokens, width = q.shape
    at, sink = np.arange(batch), _sinks(case)
    sink_key = k[at, :, sink]
    keys = np.repeat(sink_key, heads // k.shape[1], axis=1)
    after = np.arange(tokens)[None, :] > sink[:, None]
    weight = (case.strata[0] * after)[:, None, :] * np.isfinite(masked[at, :, :, sink])
    count = weight.sum(axis=(0, 2))
    part = case.scale * q * keys[:, :, None, :]
    contribution = (part * weight[..., None]).sum(axis=(0, 2)) / count[:, None]
    rms_query = np.sqrt((q**2 * weight[..., None]).sum(axis=(0, 2)) / count[:, None])
    present = case.strata[0].any(axis=1)
    rms_key = np.repeat(np.sqrt((sink_key[present] ** 2).mean(axis=0)), heads // k.shape[1], axis=0)
    top = min(8, max(1, width // 4))
    channels, overlap = np.full(heads, np.nan), np.full(heads, np.nan)
    for h in np.flatnonzero(count):
        order = np.sort(np.abs(contribution[h]))[::-1]
        channels[h] = next(n for n in range(1, width + 1) if order[:n].sum() >= 0.9 * order.sum())
        a, b = set(np.argsort(-rms_query[h])[:top]), set(np.argsort(-rms_key[h])[:top])
        overlap[h] = len(a & b) / len(a | b)
    norm_q, norm_k = np.linalg.norm(q, axis=-1), np.linalg.norm(k, axis=-1)
    cosine = np.einsum("bhic,bhc->bhi", q, keys) / (norm_q * np.linalg.norm(keys, axis=-1)[..., None])
    others = case.strata[0] * (np.arange(tokens)[None, :] != sink[:, None])
    other_norm = _mean(norm_k, np.broadcast_to(others[:, None], norm_k.shape))
    return {
        "sink_logit_contribution": contribution,
        "sink_logit_channels_90": channels,
        "query_key_channel_overlap": overlap,
        "sink_cosine": _mean(cosine, weight),
        "query_norm": _mean(norm_q, weight),
        "sink_key_norm": np.repeat(norm_k[at, :, sink][present].mean(axis=0), heads // k.shape[1]),
        "other_key_norm": np.repeat(other_norm, heads // k.shape[1]),
    }
