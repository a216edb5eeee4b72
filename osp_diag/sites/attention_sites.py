"""The sites of a block around its attention call."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch

from osp_diag.schema import SITES
from osp_diag.seams.call import SkipReason
from osp_diag.sites.blocks import Block, is_inside, output_tap
from osp_diag.sites.projections import distinct_heads, pre_rope_tap
from osp_diag.sites.trace import Event

__all__ = ["attention_event", "attention_sites", "event_around", "is_causal"]

_PROJECTION_NAMES = {
    "query_pre_rope": re.compile(r"^(q|query|wq|q_lin|to_q)(_?proj)?$", re.IGNORECASE),
    "key_pre_rope": re.compile(r"^(k|key|wk|k_lin|to_k)(_?proj)?$", re.IGNORECASE),
    "value": re.compile(r"^(v|value|wv|v_lin|to_v)(_?proj)?$", re.IGNORECASE),
}

_FILL = -1e3
NO_ATTENTION = (
    "no attention here that a seam can see (state-space or recurrent layers have none; a kernel of your own "
    "is seen if the function that calls it is declared with osp_diag.attention_function)"
)
CROSS_ONLY = "the block attends to another sequence only (cross-attention)"


def attention_event(block: Block) -> Event | None:
    """The outermost module around the attention call with at most one projection after the call.

    A module with more (an inner block, as in ALBERT) holds the MLP too, and is looked into.
    """
    return None if block.call is None else event_around(block, block.call_time, block.calls[-1][0])


def event_around(block: Block, first: int, last: int) -> Event | None:
    """The outermost module around the times of calls with at most one projection after the last of them."""
    for event in block.inner:
        if not event.start < first < event.stop:
            continue
        later_linears = [e for e in block.inner if e.projection and last < e.start < event.stop]
        if len(later_linears) <= 1:
            return event
    return None


def attention_sites(block: Block, attention: Event | None) -> None:
    """Find attention's input, output, queries, keys and values; without a call, say that there are none."""
    if block.call is None:
        for site in SITES:
            if site.startswith(("attention", "query", "key", "value")):
                block.absent[site] = _why_none(block)
        return
    inner = [event for event in block.inner if attention is None or is_inside(event, attention)]
    earlier = [event for event in inner if event.stop < block.call_time]
    earlier_linears = [event for event in earlier if event.projection]
    later_linears = [e for e in inner if e.projection and e.start > block.calls[-1][0]]
    if attention is not None and block.is_state(attention.input):
        block.add("attention_input", block.past_norm(attention), "input")
    elif earlier_linears:
        block.add("attention_input", earlier_linears[0], "input")
    else:
        block.absent["attention_input"] = "no module around or before the attention call reads the stream"
    if later_linears:
        block.add("attention_output", later_linears[0], "input")
    else:
        block.absent["attention_output"] = "no projection runs after attention in its module"
    _pre_rope_sites(block, earlier)


def _why_none(block: Block) -> str:
    reasons = [reason for _, reason in block.skipped if reason not in (SkipReason.CROSS, SkipReason.CACHED)]
    if reasons:
        return f"the attention call cannot be read: {reasons[0]}"
    return NO_ATTENTION if block.cross_time is None else CROSS_ONLY


def _pre_rope_sites(block: Block, earlier: list[Event]) -> None:
    call = block.call
    if call.query is None or call.key is None:
        _projections_by_name(block, earlier)
        return
    key = distinct_heads(call.key)
    heads = {"query_heads": call.query.shape[1], "key_heads": key.shape[1]}
    for site, operand in (("query_pre_rope", call.query), ("key_pre_rope", key)):
        tap = pre_rope_tap(site, block.layer, operand, earlier, **heads)
        if tap is None:
            block.absent[site] = (
                "no module output equals what enters the product at position 0 "
                "(assembled from parts, as in latent attention, or fused in an unknown layout)"
            )
        else:
            block.taps.append(tap)


def _projections_by_name(block: Block, earlier: list[Event]) -> None:
    """Where only attention logits are seen, the projections are told by their names."""
    heads = block.call.logits.shape[1]
    for site in ("query_post_rope", "key_post_rope"):
        block.absent[site] = f"the model hands only attention logits to its {block.call.seam}"
    for site, name in _PROJECTION_NAMES.items():
        event = next((e for e in earlier if e.projection and name.search(e.name.rpartition(".")[2])), None)
        if event is not None and event.output is not None and event.output.shape[-1] % heads == 0:
            block.taps.append(replace(output_tap(site, block.layer, event), heads=heads))
        else:
            block.absent[site] = (
                f"the model hands only attention logits to its {block.call.seam}, no projection is named so"
            )


def is_causal(call: Any) -> bool:
    """Whether no query sees a later key: by flag, by mask, or by the logits that were filled.

    Some models fill with −1e4 or −1e9; no bias of so few tokens takes every later key of every head that far.
    """
    if call.causal:
        return True
    values = call.mask if call.logits is None else call.logits
    if values is None or values.ndim < 2 or values.shape[-2] != values.shape[-1]:
        return False
    later = torch.ones(values.shape[-2:], dtype=torch.bool, device=values.device).triu(1)
    # Every entry above the diagonal is disallowed, or filled.
    hidden = ~values if values.dtype == torch.bool else values <= _FILL
    return bool(hidden[..., later].all())
