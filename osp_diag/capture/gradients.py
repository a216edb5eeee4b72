"""Gradients of the loss at the sites: read in the backward pass of the very tensors that the sites read.

A hook on a tensor sees its gradient once it is whole, summed over every path from it. Activation
checkpointing that is not reentrant keeps those tensors, and what it computes again makes others, which bear
no hooks: so nothing counts twice. Reentrant checkpointing runs its blocks without gradients first, and there
is nothing to hook; such sites are absent, with this reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch

from osp_diag.capture.hooks import batch_first
from osp_diag.schema import GRADIENT, ROUTER
from osp_diag.sites.names import Tap

__all__ = ["NO_GRADIENT", "SiteGradients", "TokensOfPass", "has_gradient"]

NO_GRADIENT = (
    "the forward pass reached it without gradients: under torch.no_grad(), or in a block under reentrant "
    "activation checkpointing (use_reentrant=False keeps the tensors that gradients are of)"
)
FROZEN = "its tensor needs no gradient: nothing that is trained comes before it"
CACHED = "its tokens are made with a cache"

Rows = Callable[[torch.device], list[tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]]]
"""device → of each part of a pass that is folded by itself, how its rows are taken, and their strata."""


def has_gradient(tap: Tap) -> bool:
    """Whether gradients are measured where a tap reads: one vector a token, of no single projection."""
    return tap.side in ("input", "output") and not tap.heads and tap.site != ROUTER and ":" not in tap.site


class TokensOfPass:
    """Which tokens a forward pass is of; known when the stream has entered, before any gradient comes."""

    def __init__(self) -> None:
        self.shape: tuple[int, int] | None = None
        """(sequences, tokens of each)"""
        self.parts: Rows | None = None
        self.is_cached = False


class SiteGradients:
    """Gradients of the tensors that sites read, as they come in a step's backward passes.

    Parameters
    ----------
    fold : called with (site, layer, gradient as (batch, token, channel), strata)
    loss_scale : what the loop multiplies its loss by before ``backward``; gradients are divided by it
    """

    def __init__(
        self,
        fold: Callable[[str, int, torch.Tensor, torch.Tensor], None],
        loss_scale: float = 1.0,
    ) -> None:
        self._fold, self._loss_scale = fold, loss_scale
        self._tokens = TokensOfPass()
        self._is_open = True
        self._reasons: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))

    def start(self) -> TokensOfPass:
        """A forward pass begins; what is returned is told about its tokens."""
        self._tokens = TokensOfPass()
        return self._tokens

    def close(self) -> None:
        """The step is over: gradients that come later belong to none."""
        self._is_open = False

    @property
    def absent(self) -> dict[str, str]:
        """Site → why no gradient of it was read, and in which layers."""
        return {
            site: "; ".join(f"{reason} (layers {_listed(layers)})" for reason, layers in reasons.items())
            for site, reasons in self._reasons.items()
        }

    def receiver(self, tap: Tap, layer: int, value: torch.Tensor) -> Callable[[torch.Tensor], None] | None:
        """What to call with the gradient of ``value``, as the tap reads it; None where there is none."""
        site, tokens = f"{GRADIENT}{tap.site}", self._tokens
        if not value.requires_grad:
            reason = FROZEN if torch.is_grad_enabled() else NO_GRADIENT
            self._reasons[site][reason].add(layer)
            return None

        def receive(gradient: torch.Tensor) -> None:
            if not self._is_open or tokens.shape is None or tokens.parts is None:
                return
            if tokens.is_cached:
                self._reasons[site][CACHED].add(layer)
                return
            rows = batch_first(tap, gradient, *tokens.shape)
            if rows is None:  # of which the activation itself says why
                return
            rows = rows.reshape(*tokens.shape, -1)
            if self._loss_scale != 1.0:
                rows = rows / self._loss_scale
            for take, strata in tokens.parts(gradient.device):
                self._fold(site, layer, take(rows), strata)

        return receive


def _listed(layers: set[int]) -> str:
    ordered = sorted(layers)
    if len(ordered) > 2 and ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"{ordered[0]}–{ordered[-1]}"
    return ", ".join(map(str, ordered))
