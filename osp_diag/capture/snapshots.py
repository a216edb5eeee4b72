"""Raw activations of one sequence, kept for pictures: figures never touch a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["SNAPSHOT_SITES", "Snapshots"]

SNAPSHOT_SITES = (
    "residual_post",
    "attention_input",
    "mlp_input",
    "mlp_hidden",
    "query_post_rope",
    "key_post_rope",
)


class Snapshots:
    """Copies of the first ``tokens`` positions of the first sequence, at chosen sites and layers.

    Parameters
    ----------
    tokens : how many positions to keep
    sites : where
    layers : which layers, or None for all
    megabytes : what all copies together may take; further ones are dropped, and said to be
    """

    def __init__(
        self,
        tokens: int,
        *,
        sites: Sequence[str] = SNAPSHOT_SITES,
        layers: Sequence[int] | None = None,
        megabytes: float = 64.0,
    ) -> None:
        self.tokens = tokens
        self.sites = tuple(sites)
        self.layers = None if layers is None else frozenset(layers)
        self.kept: dict[tuple[str, int], torch.Tensor] = {}
        self.dropped: set[tuple[str, int]] = set()
        self._megabytes = megabytes
        self.clear()

    def clear(self) -> None:
        """Forget what was kept: its forward pass raised."""
        self.kept.clear()
        self.dropped.clear()
        self._room = self._megabytes * 2**20

    def offer(self, site: str, layer: int, x: torch.Tensor) -> None:
        """Keep a copy of the first sequence: (token, channel), or (head, token, width)."""
        if site not in self.sites or (self.layers is not None and layer not in self.layers):
            return
        if (site, layer) in self.kept or (site, layer) in self.dropped:
            return
        part = x[0, ..., : self.tokens, :]
        needed = part.numel() * 4
        if needed > self._room:
            self.dropped.add((site, layer))
            return
        self._room -= needed
        self.kept[site, layer] = part.float().clone()
