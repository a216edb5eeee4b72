"""Which channels of a head rotary embedding turns together, found from what it keeps: their energy.

A rotation mixes the two channels of a pair and leaves the sum of their squares as it was. So the norms of
channels before and after it tell how the channels are paired, whatever the model's code calls it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from osp_diag.errors import OspDiagError
from osp_diag.runs.run import Run

__all__ = ["RotaryPairs", "rotary_pairs"]

TOLERANCE = 0.02
"""Energy that pairs may seem to gain or lose: norms are means over sequences, so their squares differ a bit.
Wrong pairings miss by 10% and more in real models."""
UNCHANGED = 1e-4
"""Relative change of a channel's norm below which it counts as not rotated."""


class RotaryPairs(NamedTuple):
    """The pairs of a head, from the fastest frequency to the slowest."""

    first: np.ndarray
    second: np.ndarray
    layout: str
    """``half`` (j with j + r/2, Llama), ``interleaved`` (2j with 2j + 1, GPT-J), or why there are no pairs"""

    def summed(self, channels: np.ndarray) -> np.ndarray:
        """(…, head_channel) → (…, pair): the sum over the two channels of each pair."""
        return np.asarray(channels[..., self.first] + channels[..., self.second])


def rotary_pairs(run: Run, step: int) -> RotaryPairs:
    """The pairs of channels that the model of a run rotates, from the channel norms of its queries.

    Where only the first r channels are rotated (partial rotary embedding), pairs are made of these. There are
    no pairs, and ``layout`` says why, where the run lacks the norms or no pairing keeps the energy.
    """
    try:
        before, after = (
            run.at(f"query_{when}_rope")["head_channel_norm"].sel(step=step).values.astype(np.float64)
            for when in ("pre", "post")
        )
    except (OspDiagError, KeyError):
        return _none("the run lacks head_channel_norm before and after rotary embedding")
    width = before.shape[-1]
    before, after = before.reshape(-1, width) ** 2, after.reshape(-1, width) ** 2
    measured = np.isfinite(before).all(-1) & np.isfinite(after).all(-1) & (before.sum(-1) > 0)
    before, after = before[measured], after[measured]
    # Norms are squared above, and a relative change δ of a norm is 2δ of its square.
    changed = np.abs(after - before) > 2 * UNCHANGED * before
    if not changed.any():
        return _none("no channel is rotated")
    rotated = int(np.flatnonzero(changed.any(axis=0))[-1]) + 1
    rotated += rotated % 2
    layouts = [_half(rotated), _interleaved(rotated)]
    # Σ over heads and pairs of |energy after − energy before|, over the energy of the rotated channels.
    errors = [
        np.abs(pairs.summed(after) - pairs.summed(before)).sum() / before[:, :rotated].sum()
        for pairs in layouts
    ]
    best = int(np.argmin(errors))
    if errors[best] > TOLERANCE:
        return _none(f"no pairing of the channels keeps their energy (it changes by {errors[best]:.0%})")
    return layouts[best]


def _half(rotated: int) -> RotaryPairs:
    first = np.arange(rotated // 2)
    return RotaryPairs(first, first + rotated // 2, "half")


def _interleaved(rotated: int) -> RotaryPairs:
    first = np.arange(0, rotated, 2)
    return RotaryPairs(first, first + 1, "interleaved")


def _none(reason: str) -> RotaryPairs:
    nothing = np.empty(0, np.int64)
    return RotaryPairs(nothing, nothing, reason)
