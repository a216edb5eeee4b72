"""The projections of a block as matrices: whose each is (query, key, gate …), by what it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn import functional

from osp_diag.schema import DOWN_WEIGHT, GATE_WEIGHT, PROJECTION_WEIGHT
from osp_diag.sites.blocks import Block, input_tap, same
from osp_diag.sites.names import Tap
from osp_diag.sites.projections import distinct_heads, pre_rope_tap
from osp_diag.sites.trace import Event

__all__ = ["projection_weights"]

_ACTIVATIONS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    functional.silu,
    functional.gelu,
    lambda x: functional.gelu(x, approximate="tanh"),
    lambda x: x * torch.sigmoid(1.702 * x),
    functional.relu,
    lambda x: functional.relu(x).square(),
    torch.sigmoid,
)

_Part = tuple[int, int, int, int]


def projection_weights(block: Block, taps: list[Tap]) -> list[Tap]:
    """The matrices of the block's projections, by their roles; by their path within it where one has none.

    A fused projection is one tap for each part that is told; the down projection is ``mlp_down_weight``. Of a
    gated MLP the gate is once more a tap of ``mlp_gate_weight``, which is read beside the up projection.

    Parameters
    ----------
    taps : those of the block so far
    """
    experts = () if block.expert_list is None else (f"{block.expert_list[0]}.",)
    projections = [
        event
        for event in block.inner
        if event.projection and block.has_one_row_a_token(event.input) and not event.name.startswith(experts)
    ]
    of_block = [tap for tap in taps if tap.layer == block.layer]
    down = {tap.module for tap in of_block if tap.site == DOWN_WEIGHT}
    roles: list[tuple[Event, str, _Part | None]] = []
    for tap in of_block:
        if tap.site == "attention_output" and tap.side == "input":
            roles += [(e, "attention_output", None) for e in projections if e.name == tap.module][:1]
    gate_and_up = _gate_and_up(block, of_block, projections)
    roles += _attention_roles(block, of_block, projections) + gate_and_up
    told = {event.name for event, _, _ in roles}
    roles += [
        (event, block.name_of(event.name), None) for event in projections if event.name not in told | down
    ]
    weights: dict[tuple[str, str], Tap] = {}
    for event, role, part in roles:
        tap = input_tap(f"{PROJECTION_WEIGHT}{role}", block.layer, event)
        # One matrix however often its module runs.
        weights.setdefault((event.name, role), replace(tap, side="weight", fused=part, call=None))
    if block.experts:
        block.absent[GATE_WEIGHT] = "the gate and up projections of experts are not read"
    gates = [weights[event.name, role] for event, role, _ in gate_and_up if role == "gate"]
    return [*weights.values(), *(replace(tap, site=GATE_WEIGHT, side="gate") for tap in gates)]


def _attention_roles(
    block: Block, taps: list[Tap], projections: list[Event]
) -> list[tuple[Event, str, _Part | None]]:
    """The projections, or parts of a fused one, that give queries, keys and values."""
    call = block.call
    if call is None or call.query is None or call.key is None:
        # Of a model that hands over logits alone, those that were told by their names.
        sites = {"query_pre_rope": "query", "key_pre_rope": "key", "value": "value"}
        by_name = {event.name: event for event in projections}
        return [
            (by_name[tap.module], sites[tap.site], tap.fused)
            for tap in taps
            if tap.site in sites and tap.side == "output" and tap.module in by_name
        ]
    earlier = [event for event in projections if event.stop < block.call_time]
    key = distinct_heads(call.key)
    operands = {"query": call.query, "key": key, "value": call.value}
    heads = {"query_heads": call.query.shape[1], "key_heads": key.shape[1]}
    by_name = {event.name: event for event in earlier}
    roles = []
    for role, operand in operands.items():
        if operand is None:
            continue
        operand = distinct_heads(operand) if role == "value" else operand
        site = role if role == "value" else f"{role}_pre_rope"
        tap = pre_rope_tap(site, block.layer, operand, earlier, **heads)
        if tap is None:
            # Behind a norm of queries and keys: what the norm reads.
            norm = next((tap for tap in taps if tap.site == site), None)
            inward = None if norm is None else _by_head(block, norm, operand)
            tap = None if inward is None else pre_rope_tap(site, block.layer, inward, earlier, **heads)
        if tap is not None:
            roles.append((by_name[tap.module], role, tap.fused))
    return roles


def _by_head(block: Block, norm: Tap, operand: torch.Tensor) -> torch.Tensor | None:
    """What a norm of queries or keys reads, as (batch, head, token, width)."""
    event = next((e for e in block.inner if (e.name, e.call) == (norm.module, norm.call)), None)
    state = None if event is None else event.input
    if state is None or state.numel() != operand.numel():
        return None
    if state.shape == operand.shape:
        return state
    batch, heads, tokens, width = operand.shape
    return state.reshape(batch, tokens, heads, width).transpose(1, 2)


def _gate_and_up(
    block: Block, taps: list[Tap], projections: list[Event]
) -> list[tuple[Event, str, _Part | None]]:
    """The projections that give the MLP's hidden state, gated or not, by what multiplies what."""
    tap = next((t for t in taps if t.site == "mlp_hidden" and t.side == "input"), None)
    down = next((e for e in projections if tap is not None and e.name == tap.module), None)
    if down is None or down.input is None:
        return []
    hidden, width = down.input.double(), down.input.shape[-1]
    before = [event for event in projections if event.stop < down.start and event.output is not None]
    inward = [e for e in before if e.start > block.call_time and e.output.shape[-1] in (width, 2 * width)]  # type: ignore[union-attr]
    if not inward:
        return []
    last = inward[-1]
    assert last.output is not None, "only such are looked at"
    if last.output.shape[-1] == 2 * width:
        for groups, slots in ((1, 2 * width), (width, 2)):
            half = slots // 2
            parts = last.output.double().unflatten(-1, (groups, slots)).split(half, dim=-1)
            first, second = (part.reshape(hidden.shape) for part in parts)
            for gate, up, order in ((first, second, (0, half)), (second, first, (half, 0))):
                if _gates(gate, up, hidden):
                    return [
                        (last, role, (groups, slots, at, half))
                        for role, at in zip(("gate", "up"), order, strict=True)
                    ]
        return []
    beside = [e for e in inward[:-1] if same(e.input, last.input) and e.output.shape[-1] == width]  # type: ignore[union-attr]
    for other in beside:
        for gate, up in ((other, last), (last, other)):
            assert gate.output is not None, "only such are looked at"
            assert up.output is not None, "only such are looked at"
            if _gates(
                gate.output.double().reshape(hidden.shape), up.output.double().reshape(hidden.shape), hidden
            ):
                return [(gate, "gate", None), (up, "up", None)]
    return [] if beside else [(last, "up", None)]


def _gates(gate: torch.Tensor, up: torch.Tensor, hidden: torch.Tensor) -> bool:
    """Whether hidden = f(gate) · up with one of the activations that models use."""
    tolerance = 1e-2 * float(hidden.abs().max())
    return bool(hidden.any()) and any(
        torch.allclose(activation(gate) * up, hidden, rtol=1e-2, atol=tolerance)
        for activation in _ACTIVATIONS
    )
