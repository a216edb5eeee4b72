"""Runs whose heads make their sinks in planted ways, measured by the estimators themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.estimators import logits, query_key, sink_implementation, sinks, value_drain
from osp_diag.estimators.attention import AttentionObservation
from osp_diag.estimators.base import Suite
from osp_diag.probing.labelling import label_states
from osp_diag.runs.run import Run

WIDTH, TOKENS, SEQUENCES = 32, 64, 3
HOT = 14
"""The channel that concentrated sinks use; with 14 + 16 = 30 it is the slowest frequency but one."""
PLANTED = ("no sink", "negative infinity", "balanced", "mixed", "norm", "learned sink", "unclear")
"""What can be planted in a head; a sink by ``norm`` is balanced, all others align with their queries."""
SPIKE = 500.0

ATTENTION = Suite(
    [
        sinks.SinkRate(),
        sinks.FirstTokenAttention(),
        sinks.ExtraSinkMass(),
        logits.LogitDistribution(),
        logits.DeltaLogit(),
        sink_implementation.SinkLogitContribution(),
        sink_implementation.QueryKeyChannelOverlap(),
        sink_implementation.SinkGeometry(),
        value_drain.ValueDrain(),
    ]
)


def rotated(x: np.ndarray, layout: str = "half", width: int = WIDTH, back: bool = False) -> np.ndarray:
    """Rotary embedding (θ = 10,000) of the first ``width`` channels of (…, token, channel)."""
    pairs = np.arange(width // 2)
    first, second = (pairs, pairs + width // 2) if layout == "half" else (2 * pairs, 2 * pairs + 1)
    angle = np.arange(x.shape[-2])[:, None] * 10_000.0 ** (-pairs / len(pairs)) * (-1 if back else 1)
    turned = x.copy()
    turned[..., first] = x[..., first] * np.cos(angle) - x[..., second] * np.sin(angle)
    turned[..., second] = x[..., first] * np.sin(angle) + x[..., second] * np.cos(angle)
    return turned


def strata(sequences: int = SEQUENCES, tokens: int = TOKENS) -> np.ndarray:
    """Every token but the first is an ordinary one."""
    first = np.zeros((sequences, tokens))
    first[:, 0] = 1
    return np.stack([np.ones_like(first), first, np.zeros_like(first), 1 - first]).astype(np.float32)


def head(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys (sequence, token, channel); logits are q·k."""
    query, key = (rng.standard_normal((SEQUENCES, TOKENS, WIDTH)) * size for size in (0.1, 0.5))
    direction = np.sign(rng.standard_normal(WIDTH)) / np.sqrt(WIDTH)
    if kind in ("negative infinity", "mixed"):
        sink, other = (1.0, -9.0) if kind == "negative infinity" else (5.0, -5.0)
        query[..., HOT] += 3
        key[..., HOT] += other / 3
        key[:, 0] *= 0.05
        key[:, 0, HOT] = sink / 3
    elif kind == "balanced":
        query += 5 * direction
        key -= (key @ direction)[..., None] * direction
        key[:, 0] = 1.6 * direction
    elif kind == "norm":
        query += rng.standard_normal(query.shape)
        query += 1.5 * direction
        key *= 0.2
        key[:, 0] = 8 * direction
    elif kind == "unclear":
        key[:, 0] = 0
        key[:, 0, HOT] = 1
        query[..., HOT] = np.where(np.arange(TOKENS) % 20 < 9, 15.0, -15.0)
        key[:, 1:, HOT] = 0
    return query, key


def attention(kinds: Sequence[str], seed: int = 0) -> tuple[Any, Any, np.ndarray]:
    """State, layout and queries of a layer. Two query heads share a key head; every other one is quiet."""
    rng = np.random.default_rng(seed)
    drawn = [head(kind, rng) for kind in kinds]
    quiet = [0.1 * rng.standard_normal((SEQUENCES, TOKENS, WIDTH)) for _ in kinds]
    # Orthogonal to its sink key, a quiet head has nothing of its neighbour's sink.
    keys = [key[:, :1] for _, key in drawn]
    quiet = [
        q - (q * k).sum(-1, keepdims=True) / (k * k).sum(-1, keepdims=True) * k
        for q, k in zip(quiet, keys, strict=True)
    ]
    query = np.stack(
        [part for (q, _), other in zip(drawn, quiet, strict=True) for part in (q, other)], axis=1
    )
    key = np.stack([k for _, k in drawn], axis=1)
    value = rng.standard_normal(key.shape)
    for group, kind in enumerate(kinds):
        value[:, group, 0] *= 0.1 if kind != "no sink" else 1.0
    learned = [4.0 + np.log(TOKENS) if kind == "learned sink" else -40.0 for kind in kinds]
    observation = AttentionObservation(
        *(array.astype(np.float32) for array in (query, key, value)),
        strata(),
        scale=1.0,
        sink_logits=np.array([logit for own in learned for logit in (own, -40.0)], np.float32),
        query_sample=None,
    )
    return ATTENTION.measure(observation), observation.layout, query


def channel_norms(x: np.ndarray) -> tuple[Any, Any]:
    """State and layout of ``head_channel_norm`` of (sequence, head, token, channel)."""
    observation = query_key.HeadsObservation(x.astype(np.float32), strata())
    return Suite([query_key.HeadChannelNorm()]).measure(observation), observation.layout


def label_norms(layers: Mapping[int, tuple[Any, Any]]) -> xr.Dataset:
    """Labelled ``head_channel_norm`` of layers."""
    return label_states(Suite([query_key.HeadChannelNorm()]), layers)


def residual(layers: int, spike: float) -> xr.Dataset:
    """States of which the first token is ``spike`` times as large as all others."""
    rms = np.ones((layers, 4, 8))
    rms[:, 1] = spike
    massive = np.zeros((layers, 4))
    massive[:, :2] = 1.0 if spike >= 100 else 0.0
    return xr.Dataset(
        {
            "channel_rms": (("layer", "stratum", "channel"), rms),
            "massive_activation_count": (("layer", "stratum"), massive),
        },
        coords={"layer": np.arange(layers), "stratum": ["all", "first", "delimiter", "rest"]},
    )


def sink_groups(kinds: Sequence[str], layers: int = 2, seed: int = 0) -> dict[str, xr.Dataset]:
    """The sites of one step; the embedding is calm, block outputs have the spike if any head is planted."""
    states = {layer: attention(kinds, seed + layer) for layer in range(layers)}
    groups = {
        "attention": label_states(ATTENTION, {layer: found[:2] for layer, found in states.items()}),
        "query_post_rope": label_norms({n: channel_norms(found[2]) for n, found in states.items()}),
        "query_pre_rope": label_norms(
            {n: channel_norms(rotated(found[2], back=True)) for n, found in states.items()}
        ),
        "embedding": residual(1, 1.0),
        "residual_post": residual(layers, SPIKE if any(kind != "no sink" for kind in kinds) else 1.0),
    }
    return groups


def sink_run(steps: Mapping[int, Sequence[str]], name: str = "planted", **attrs: Any) -> Run:
    """A run: step → what is planted in its key heads (query heads 0, 2, 4 …), in each of two layers."""
    told = {
        "model_name": name,
        "protocol": "sequence",
        "bos": "no",
        "sequence_length": TOKENS,
        "tokens": SEQUENCES * TOKENS,
        "token_source": "made-up text",
        "dtype": "float32",
        "config": {"model.rope_theta": 10_000.0},
    }
    return Run.in_memory([(step, sink_groups(kinds)) for step, kinds in steps.items()], {}, told | attrs)
