"""The router of a mixture of experts: which module's output scores every expert for every token."""

from __future__ import annotations

from dataclasses import replace

import torch

from osp_diag.schema import ROUTER
from osp_diag.sites.blocks import Block, is_inside, output_tap
from osp_diag.sites.names import Tap
from osp_diag.sites.trace import Event

__all__ = ["router_taps"]


def router_taps(block: Block, experts: int) -> list[Tap]:
    """The router's logits (or, where it gives none, its probabilities), and its choice if it gives it so.

    Told by its output: a number for each expert and token, made before the experts run. Logits are not all
    of one sign or do not sum to 1; probabilities do; a choice is 0 for all but the same number of experts a
    token.

    Parameters
    ----------
    experts : how many the block's mixture has
    """
    holder = next((e for e in block.inner if e.name == block.experts), None)
    if holder is None:
        return []
    inside = block.expert_list is not None
    first = holder.start
    if block.expert_list is not None:
        members = [e for e in block.inner if e.name.startswith(f"{block.expert_list[0]}.")]
        first = min((e.start for e in members), default=holder.stop)
    scores: dict[str, tuple[Event, int | None]] = {}
    for event in block.inner:
        if event.stop >= first or (inside and not is_inside(event, holder)):
            continue
        if event.input is None or not block.is_state(event.input):
            continue
        for place, output in event.outputs.items():
            if output.shape[-1] == experts and block.has_one_row_a_token(output):
                # The last is the nearest to the experts: routers may hold modules of their own.
                scores[_kind(output.double().reshape(-1, experts))] = (event, place)
    kinds = ["logits" if "logits" in scores else "probabilities", "choice"]
    if "choice" in scores and scores.get("logits", scores["choice"])[0] is not scores["choice"][0]:
        kinds.remove("choice")
    return [
        replace(output_tap(ROUTER, block.layer, scores[kind][0]), argument=scores[kind][1], scores=kind)
        for kind in kinds
        if kind in scores
    ]


def _kind(rows: torch.Tensor) -> str:
    """What numbers (token, expert) are."""
    chosen = (rows != 0).sum(-1)
    if bool((rows >= 0).all()):
        if bool((chosen == chosen[0]).all()) and 0 < int(chosen[0]) < rows.shape[-1]:
            return "choice"
        if torch.allclose(rows.sum(-1), torch.ones(len(rows), dtype=rows.dtype), atol=1e-2):
            return "probabilities"
    return "logits"
