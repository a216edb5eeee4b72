"""Raw activations of one sequence, kept for pictures: figures never touch a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from osp_diag.estimators._arrays import index_range
from osp_diag.estimators.attention_mask import AttentionMask, QueryRows

if TYPE_CHECKING:
    from osp_diag.seams.attention import AttentionCall

__all__ = ["SNAPSHOT_SITES", "LogitRule", "Snapshots"]

SNAPSHOT_SITES = (
    "residual_post",
    "attention_input",
    "mlp_input",
    "mlp_hidden",
    "query_post_rope",
    "key_post_rope",
)


@dataclass(frozen=True)
class LogitRule:
    """How one layer makes logits of the kept queries and keys: softcap·tanh(scale·q·kᵀ / softcap) + bias.

    ``bias`` is (1 or head, query, key), −∞ where a key is not allowed: causality, windows and masks are in
    it. ``sink_logits`` (head) are −∞ where there are none, ``softcap`` NaN. ``sees_beyond`` says that some
    kept query also attends to keys that were not kept.
    """

    scale: float
    softcap: float
    sink_logits: torch.Tensor
    bias: torch.Tensor
    sees_beyond: bool


# Why queries and keys and no T×T maps: docs/decisions.md, Figures.
class Snapshots:
    """Copies of the first ``tokens`` positions of the first sequence, at chosen sites and layers.

    Parameters
    ----------
    tokens : how many positions to keep
    sites : where
    layers : which layers, or None for all
    megabytes : what all copies together may take, enough for all sites of a 7B model at 64 tokens; further
        ones are left out, and named in ``dropped``
    """

    def __init__(
        self,
        tokens: int,
        *,
        sites: Sequence[str] = SNAPSHOT_SITES,
        layers: Sequence[int] | None = None,
        megabytes: float = 256.0,
    ) -> None:
        self.tokens = tokens
        self.sites = tuple(sites)
        self.layers = None if layers is None else frozenset(layers)
        self.copies: dict[tuple[str, int], torch.Tensor] = {}
        self.rules: dict[int, LogitRule] = {}
        """by layer, where queries and keys after rotation were both kept"""
        self.dropped: set[tuple[str, int]] = set()
        self._megabytes = megabytes
        self.clear()

    def clear(self) -> None:
        """Forget what was kept: its forward pass raised."""
        self.copies.clear()
        self.rules.clear()
        self.dropped.clear()
        self._room = self._megabytes * 2**20

    def offer(self, site: str, layer: int, x: torch.Tensor) -> None:
        """Keep a copy of the first sequence: (token, channel), or (head, token, width)."""
        if site not in self.sites or (self.layers is not None and layer not in self.layers):
            return
        if (site, layer) in self.copies or (site, layer) in self.dropped:
            return
        part = x[0, ..., : self.tokens, :]
        size = part.numel() * 4
        if size > self._room:
            self.dropped.add((site, layer))
            return
        self._room -= size
        self.copies[site, layer] = part.float().clone()

    def offer_call(self, layer: int, call: AttentionCall, mask: AttentionMask) -> None:
        """Keep what makes logits of the first sequence's queries and keys, where both were kept."""
        has_both = all((f"{site}_post_rope", layer) in self.copies for site in ("query", "key"))
        if not has_both or layer in self.rules or call.query is None:
            return
        batch, heads, tokens, _ = call.query.shape
        count = min(tokens, self.tokens)
        rows = QueryRows(index_range(0, count, call.query), (0, count), (0, tokens))
        additive, allowed = mask.rows(rows, batch=batch, heads=heads, like=call.query)
        # The mask's two parts as one bias of the logits; one head stands for all where they are alike.
        if additive is None:
            bias = torch.zeros((allowed.shape[1], count, tokens), device=allowed.device)
        else:
            bias = additive[0].expand(max(additive.shape[1], allowed.shape[1]), count, tokens).clone()
        bias.masked_fill_(~allowed[0], float("-inf"))
        size = 4 * bias.shape[0] * count * count
        if size > self._room:
            return
        self._room -= size
        no_sinks = torch.full((heads,), float("-inf"))
        self.rules[layer] = LogitRule(
            call.scale,
            float("nan") if call.softcap is None else call.softcap,
            no_sinks if call.sink_logits is None else call.sink_logits.float().cpu().reshape(-1),
            bias[..., :count].clone(),
            bool((bias[..., count:] > float("-inf")).any()),
        )
