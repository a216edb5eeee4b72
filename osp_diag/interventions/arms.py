"""What one arm of an experiment gave, sequence by sequence: the untouched model, or one intervention."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from osp_diag.capture.collector import Collector
from osp_diag.capture.states import Key, is_weight
from osp_diag.estimators.base import Layout, State, Suite
from osp_diag.probing.host import to_host

__all__ = ["UNTOUCHED", "Arm"]

UNTOUCHED = ""
"""The name of the arm without an intervention."""


@dataclass
class Arm:
    """The sums of each sequence, from which any draw of sequences gives its numbers."""

    surprises: list[tuple[float, int]] = field(default_factory=list)
    """(Σ −log p in nats, predicted tokens)"""
    divergences: list[tuple[float, int]] = field(default_factory=list)
    """(Σ KL in nats, tokens)"""
    states: list[dict[Key, State]] = field(default_factory=list)
    layouts: dict[Key, Layout] = field(default_factory=dict)
    suites: dict[tuple[str, str], Suite] = field(default_factory=dict)
    """(site, kind) → its estimators"""

    def add(
        self,
        collector: Collector,
        surprise: tuple[float, int],
        divergence: tuple[float, int],
        *,
        without: AbstractSet[tuple[str, int]] = frozenset(),
    ) -> None:
        """Add a sequence; statistics of weights, and of the (site, layer) ``without``, are left out."""
        self.surprises.append(surprise)
        self.divergences.append(divergence)
        states = {
            key: state
            for key, state in collector.states.items()
            if not is_weight(key[0]) and key[:2] not in without
        }
        self.states.append(to_host(states))
        self.layouts |= {key: collector.layouts[key] for key in states}
        for site, _, kind in states:
            self.suites[site, kind] = collector.suites_at(site)[kind]
