"""From what each sequence gave to numbers with intervals: a bootstrap over sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from osp_diag.capture.states import Key
from osp_diag.estimators.base import Layout, State, Suite
from osp_diag.probing.labelling import label_states

__all__ = ["BOUNDS", "draws", "interval", "ratio", "resampled"]

BOUNDS = {"low": 0.025, "high": 0.975}
"""Quantiles of the resampled numbers between which the interval lies: 95%."""
_LONG = frozenset(
    {
        "channel",
        "head_channel",
        "key_position",
        "key_rank",
        "logit_bin",
        "output_channel",
        "rank",
        "token_id",
        "token_position",
    }
)
"""Dimensions along which a statistic is a list and not a number."""


def draws(sequences: int, resamples: int, seed: int) -> Int[np.ndarray, "draw sequence"]:
    """How often each sequence is taken: once each in the first row, at random in the others."""
    generator = np.random.default_rng(seed)
    chosen = generator.integers(0, sequences, (resamples, sequences))
    counts = [np.bincount(row, minlength=sequences) for row in chosen]
    return np.stack([np.ones(sequences, dtype=np.int64), *counts])


def ratio(
    totals: Float[np.ndarray, " sequence"],
    numbers: Float[np.ndarray, " sequence"],
    taken: Int[np.ndarray, "draw sequence"],
) -> Float[np.ndarray, " draw"]:
    """Σ totals / Σ numbers over the sequences of each draw: a mean over tokens."""
    return (taken @ totals) / (taken @ numbers)


def interval(values: np.ndarray) -> np.ndarray:
    """(bound, …) of the numbers (draw, …) of all draws but the first; NaN where any of them is."""
    if len(values) < 2:
        return np.full((len(BOUNDS), *values.shape[1:]), np.nan)
    return np.quantile(values[1:], list(BOUNDS.values()), axis=0)


def resampled(
    suite: Suite,
    key: Key,
    states: Sequence[State],
    layout: Layout,
    taken: Int[np.ndarray, "draw sequence"],
) -> xr.Dataset:
    """The statistics of one site and layer in each draw, of the merged sums of its sequences.

    Returns
    -------
    Dataset with the leading dimension ``draw``; what is listed by channel, position or token id is left out
    """
    fields = suite.fields(layout)
    merged: State = {}
    for name, spec in fields.items():
        values = np.stack([np.asarray(state[name], dtype=np.float64) for state in states])
        if spec.combine == "sum":
            merged[name] = _weighted(taken, values)
            continue
        pick = np.maximum if spec.combine == "maximum" else np.minimum
        out = np.full((len(taken), *values.shape[1:]), spec.identity)
        for sequence, value in enumerate(values):
            rows = taken[:, sequence] > 0
            out[rows] = pick(out[rows], value)
        merged[name] = out
    of_draw = {draw: ({n: v[draw] for n, v in merged.items()}, layout) for draw in range(len(taken))}
    dataset = label_states(suite, of_draw).rename(layer="draw")
    return dataset.drop_dims(_LONG.intersection(map(str, dataset.dims)))


def _weighted(taken: np.ndarray, values: np.ndarray) -> np.ndarray:
    if np.isfinite(values).all():
        return np.tensordot(taken.astype(np.float64), values, axes=1)
    # 0 · ∞ would make a NaN of a sequence that is not taken.
    return np.stack(
        [
            (row[row > 0, None] * values[row > 0].reshape((row > 0).sum(), -1))
            .sum(0)
            .reshape(values.shape[1:])
            for row in taken
        ]
    )
