"""Some sums kept apart by group of forward passes: what a bootstrap over batches of tokens resamples."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from osp_diag.estimators.base import Layout, State, Suite, merge_states

__all__ = ["GROUPED_FIELDS", "GROUPED_SITES", "TokenGroups"]

GROUPED_SITES = ("embedding", "attention_input", "mlp_input", "residual_post", "final_norm")
"""The residual stream and what the norms make of it: where outliers are looked for."""
GROUPED_FIELDS = ("token.count", "channel.square", "osp_token_kurtosis.total")
"""Enough for the RMS of every channel, the concentration of energy, and the OSP kurtosis."""


# Why groups of batches and not tokens: docs/decisions.md, Analyses.
class TokenGroups:
    """One small state for every (site, layer) and group; the groups together are the whole.

    Forward passes are dealt out to the groups in turn, over the ranks too, so that groups are equally large
    and each draws from the whole text.

    Parameters
    ----------
    count : how many groups
    rank, ranks : which process of how many this is
    sites : where
    """

    def __init__(
        self, count: int, *, rank: int = 0, ranks: int = 1, sites: Collection[str] = GROUPED_SITES
    ) -> None:
        self.count = count
        self.sites = frozenset(sites)
        self.states: dict[tuple[Any, ...], State] = {}
        """By (site, layer, what is observed, group)."""
        self._rank, self._ranks = rank, ranks
        self._current = 0
        self._backup: dict[tuple[Any, ...], State] = {}

    def start(self, passes: int) -> None:
        """A forward pass begins, so many are over."""
        self._current = (passes * self._ranks + self._rank) % self.count
        self._backup = dict(self.states)

    def forget(self) -> None:
        """Take back what the pass gave: it raised."""
        self.states = self._backup

    def add(self, key: tuple[str, int, str], suite: Suite, layout: Layout, increment: State) -> None:
        """Fold what one pass gave at one place."""
        if key[0] not in self.sites or key[2] != "activation":
            return
        group_key = (*key, self._current)
        state = self.states.get(group_key, {})
        grouped = suite.opening({name: increment[name] for name in GROUPED_FIELDS if name in increment})
        fields = suite.fields(layout)
        shared = {name: fields[name] for name in grouped if name in state}
        merged = merge_states(shared, state, grouped) if shared else {}
        self.states[group_key] = state | grouped | merged
