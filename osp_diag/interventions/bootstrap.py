"""From what each sequence gave to numbers with intervals: a bootstrap over sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from jaxtyping import Int

from osp_diag.capture.states import Key
from osp_diag.estimators.base import Layout, State, Suite
from osp_diag.probing.labelling import label_states

__all__ = ["resampled"]

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
