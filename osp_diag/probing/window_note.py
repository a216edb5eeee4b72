"""What a reader of sink rates should know of layers whose mask hides the first token from later queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from osp_diag.estimators.base import State
from osp_diag.schema import ATTENTION

__all__ = ["window_note"]

BEGINNING = "the sink rate of layers "


def window_note(states: Mapping[tuple[Any, ...], State]) -> str | None:
    """The note on the layers in which some query that was measured does not see the first token; or None.

    Parameters
    ----------
    states : by (site, layer, what is observed), with the sums of ``visible_sink_rate``, which count what the
        mask of each call lets the queries see, whoever made it
    """
    shares = {}
    for (site, layer, *_), state in states.items():
        if site == ATTENTION and "visible_sink.share" in state:
            count = float(state["visible_sink.count"].sum())
            share = float(state["visible_sink.share"].sum()) / count if count else 1.0
            if share < 1 - 1e-6:
                shares[layer] = share
    if not shares:
        return None
    low, high = (f"{bound:.2g}" for bound in (min(shares.values()), max(shares.values())))
    span = low if low == high else f"{low} to {high}"
    layers = ", ".join(map(str, sorted(shares)))
    return (
        f"{BEGINNING}{layers}, where a sliding window (or a mask like one) hides "
        "the first token from later queries, is 0 by construction once ε exceeds about w/T, the share of "
        f"queries that see it ({span}); visible_sink_rate is over those queries"
    )
